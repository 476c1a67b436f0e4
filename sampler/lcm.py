"""Sampling a latent consistency model (arXiv 2310.04378), or a base with an LCM-LoRA (arXiv 2311.05556)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sampler.guidance import Eps
from sampler.schedule import STEPS, alphas_cumprod, check_steps, noise_like

TEACHER_STEPS = 50  # of DDIM, whose timesteps 19, 39, ..., 999 the distillation knew
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10


@torch.no_grad()
def lcm(eps: Eps, x: Tensor, steps: int, generators: Sequence[torch.Generator] | None = None) -> Iterator[Tensor]:
    """Leap to x_0, noise it again to the next timestep, leap again (arXiv 2303.01469, algorithm 1).

    `steps` of the distillation's 50 timesteps are visited, evenly spaced from 999 downwards. Two to eight are usual,
    at a guidance scale of 1 to 2. Args as for any `Sampler`; new noise after each step but the last, 1 to 50 steps.
    """
    check_steps(steps, TEACHER_STEPS)
    alphas = alphas_cumprod().tolist()
    stride = STEPS // TEACHER_STEPS
    visit = [STEPS - 1 - stride * (i * TEACHER_STEPS // steps) for i in range(steps)]
    for t, t_next in zip(visit, [*visit[1:], None], strict=True):
        e = eps(x, torch.tensor(t, device=x.device))
        x_0 = (x - (1 - alphas[t]) ** 0.5 * e) / alphas[t] ** 0.5
        # The boundary condition: at t = 0 the model would return its input (arXiv 2310.04378, section 4.1).
        variance = (TIMESTEP_SCALING * t) ** 2 + SIGMA_DATA**2
        x = SIGMA_DATA**2 / variance * x + TIMESTEP_SCALING * t / variance**0.5 * x_0
        if t_next is not None:
            x = alphas[t_next] ** 0.5 * x + (1 - alphas[t_next]) ** 0.5 * noise_like(x, generators)
        yield x
