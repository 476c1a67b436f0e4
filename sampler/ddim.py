"""DDIM (arXiv 2010.02502, equation 12)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sampler.guidance import Eps
from sampler.schedule import alphas_cumprod, noise_like, timesteps


@torch.no_grad()
def ddim(
    eps: Eps, x: Tensor, steps: int, generators: Sequence[torch.Generator] | None = None, eta: float = 0.0
) -> Iterator[Tensor]:
    """Denoise x step by step, yielding the latents after each step (the last ones are the result).

    Args:
        eps: the noise prediction, eps(x, t).
        x: pure noise, (batch, 4, H/8, W/8) fp32.
        steps: how many, 1 to 1000.
        generators: one per picture, source of the noise that eta adds.
        eta: 0 is deterministic; 1 adds as much new noise at each step as DDPM does.
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
            x = x + sigma * noise_like(x, generators)
        yield x
