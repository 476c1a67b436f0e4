"""Euler's method on the noise level sigma (arXiv 2206.00364), without and with new noise.

From x_0 + sigma eps along eps to the next level is to x_0 + sigma_next eps: written so, nothing cancels where sigma is huge.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sampler.guidance import Predict, Steps
from sampler.noise import noise_like
from sampler.schedule import INFINITY, Level, Schedule, timesteps, unit


@torch.no_grad()
def euler(
    predict: Predict, x: Tensor, levels: Sequence[Level], generators: Sequence[torch.Generator] | None = None
) -> Steps:
    """The probability flow dx = eps dsigma, followed in straight lines (algorithm 1, lines 4 and 5).

    Args as for any sampler; deterministic.
    """
    for level, after in pairwise(levels):
        eps, x_0 = predict(x, level)
        x = unit(x_0 + after.sigma * eps, after.sigma)
        taken = yield x
        x = x if taken is None else taken


@torch.no_grad()
def euler_ancestral(
    predict: Predict, x: Tensor, levels: Sequence[Level], generators: Sequence[torch.Generator] | None = None
) -> Steps:
    """Each step goes down below the next level and adds noise up to it: the variance of DDPM's posterior.

    arXiv 2006.11239, equation 7, in terms of sigma, as k-diffusion's `sample_euler_ancestral` has it.
    Args as for any sampler; new noise at each step.
    """
    for level, after in pairwise(levels):
        eps, x_0 = predict(x, level)
        down = after.sigma**2 / level.sigma
        up = after.sigma * (1 - (after.sigma / level.sigma) ** 2) ** 0.5  # down and up together are after.sigma
        x = unit(x_0 + down * eps + up * noise_like(x, generators), after.sigma)
        taken = yield x
        x = x if taken is None else taken


def euler_levels(schedule: Schedule, steps: int) -> list[Level]:
    """DDIM's timesteps, with "linspace" unrounded; the last step ends at sigma = 0."""
    return [*(schedule.level(t, INFINITY) for t in timesteps(schedule, steps)), Level(0, 0.0)]


def euler_start(noise: Tensor, schedule: Schedule, level: Level) -> Tensor:
    """sigma eps with x_0 = 0, as elsewhere with "trailing" and "linspace": 0.998 of unit variance at sigma 14.6."""
    return noise if schedule.spacing in (None, "leading") else unit(level.sigma * noise, level.sigma)
