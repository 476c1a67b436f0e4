"""DDIM (arXiv 2010.02502, equation 12)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from sampler.guidance import Predict, Steps
from sampler.noise import noise_like
from sampler.schedule import STEPS, Level, Schedule, timesteps


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    levels: Sequence[Level],
    generators: Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
) -> Steps:
    """Denoise x (batch, 4, H/8, W/8) step by step, yielding the latents after each step (the last ones are the result).

    Args as for any sampler (`Run`); eta: 0 is deterministic; 1 adds as much new noise at each step as DDPM does.
    """
    for level, after in pairwise(levels):
        eps, x_0 = predict(x, level)
        alpha, alpha_prev = level.alpha, (level.end or after).alpha
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
        x = alpha_prev**0.5 * x_0 + (1 - alpha_prev - sigma**2) ** 0.5 * eps
        if sigma:
            x = x + sigma * noise_like(x, generators)
        taken = yield x
        x = x if taken is None else taken


def ddim_levels(schedule: Schedule, steps: int) -> list[Level]:
    """The last step ends at alphas_cumprod[0], not at 1 (unless `schedule.set_alpha_to_one`).

    Each step goes down by 1000 // steps in diffusers, whatever comes next. Where "trailing" or "linspace" is asked for,
    its pictures are wanted, so that is done here too; it matters where the steps do not divide 1000, and with "linspace".
    """
    last = Level(0, 0.0) if schedule.set_alpha_to_one else schedule.level(0)
    levels = [schedule.level(round(t)) for t in timesteps(schedule, steps)]
    if schedule.spacing in ("trailing", "linspace"):
        down = STEPS // steps
        levels = [replace(a, end=schedule.level(a.t - down) if a.t >= down else last) for a in levels]
    return [*levels, last]
