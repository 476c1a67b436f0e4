"""DDIM (arXiv 2010.02502, equation 12)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sampler.guidance import Eps
from sampler.schedule import STEPS, alphas_cumprod


def timesteps(steps: int) -> list[int]:
    """The timesteps to visit, from noise to picture: evenly spaced from t = 1 upwards ("leading", offset 1)."""
    if not 1 <= steps <= STEPS:
        raise ValueError(f"steps: {steps} given, 1 to {STEPS} allowed")
    return [min(i * (STEPS // steps) + 1, STEPS - 1) for i in reversed(range(steps))]


@torch.no_grad()
def ddim(
    eps: Eps, x: Tensor, steps: int, eta: float = 0.0, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Denoise x step by step, yielding the latents after each step (the last ones are the result).

    Args:
        eps: the noise prediction, eps(x, t).
        x: pure noise, (batch, 4, H/8, W/8) fp32.
        steps: how many, 1 to 1000.
        eta: 0 is deterministic; 1 adds as much new noise at each step as DDPM does.
        generator: source of that noise.
    """
    alphas = alphas_cumprod().tolist()
    visit = timesteps(steps)
    for t, t_prev in zip(visit, [*visit[1:], 0], strict=True):  # the last step ends at alphas_cumprod[0], not at 1
        e = eps(x, torch.tensor(t, device=x.device))
        alpha, alpha_prev = alphas[t], alphas[t_prev]
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
        x_0 = (x - (1 - alpha) ** 0.5 * e) / alpha**0.5
        x = alpha_prev**0.5 * x_0 + (1 - alpha_prev - sigma**2) ** 0.5 * e
        if sigma:
            x = x + sigma * torch.randn(
                x.shape, generator=generator, device=generator.device if generator else x.device
            ).to(x)
        yield x
