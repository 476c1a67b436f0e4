"""Sampling a latent consistency model (arXiv 2310.04378), or a base with an LCM-LoRA (arXiv 2311.05556)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sampler.guidance import Predict, Steps
from sampler.noise import noise_like
from sampler.schedule import STEPS, Level, Schedule

TEACHER_STEPS = 50  # of DDIM, whose timesteps 19, 39, ..., 999 the distillation knew
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10


@torch.no_grad()
def lcm(
    predict: Predict, x: Tensor, levels: Sequence[Level], generators: Sequence[torch.Generator] | None = None
) -> Steps:
    """Leap to x_0, noise it again to the next timestep, leap again (arXiv 2303.01469, algorithm 1).

    Two to eight steps are usual, at a guidance scale of 1 to 2. Args as for any sampler; new noise after each step that
    does not end at sigma 0.
    """
    for level, after in pairwise(levels):
        _, x_0 = predict(x, level)
        # The boundary condition: at t = 0 the model would return its input (arXiv 2310.04378, section 4.1).
        variance = (TIMESTEP_SCALING * level.t) ** 2 + SIGMA_DATA**2
        x = SIGMA_DATA**2 / variance * x + TIMESTEP_SCALING * level.t / variance**0.5 * x_0
        if after.sigma:
            x = after.noised(x, noise_like(x, generators))
        taken = yield x
        x = x if taken is None else taken


def lcm_levels(schedule: Schedule, steps: int) -> list[Level]:
    """`steps` of the distillation's 50 timesteps, evenly spaced from 999 downwards, whatever `schedule.spacing` says."""
    stride = STEPS // TEACHER_STEPS
    visit = [STEPS - 1 - stride * (i * TEACHER_STEPS // steps) for i in range(steps)]
    return [*(schedule.level(t) for t in visit), Level(0, 0.0)]
