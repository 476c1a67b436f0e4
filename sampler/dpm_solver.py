"""DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) on the noise levels of Karras et al. (arXiv 2206.00364)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sampler.guidance import Predict, Steps
from sampler.schedule import INFINITY, STEPS, Level, Schedule, unit

RHO = 7  # how much shorter the steps get where there is little noise


def step_size(level: Level, after: Level) -> float:
    """h = lambda_next - lambda, lambda = -log sigma being half the log signal-to-noise ratio; endless to sigma 0."""
    return math.log(level.sigma / after.sigma) if after.sigma else math.inf


def toward(x: Tensor, x_0: Tensor, h: float) -> Tensor:
    """The exact solution over a step h if x_0 stays the same (proposition 4.1, divided by alpha)."""
    return math.exp(-h) * x - math.expm1(-h) * x_0


@torch.no_grad()
def dpmpp_2m(
    predict: Predict, x: Tensor, levels: Sequence[Level], generators: Sequence[torch.Generator] | None = None
) -> Steps:
    """Steps of second order out of the last two predictions of x_0; the first step is of first order, as is one to sigma 0.

    Args as for any sampler; deterministic.
    """
    x = x / levels[0].alpha ** 0.5
    x_0 = h = None
    for level, after in pairwise(levels):
        x_0_before, (_, x_0) = x_0, predict(unit(x, level.sigma), level)
        h_before, h = h, step_size(level, after)
        second_order = x_0_before is not None and after.sigma
        x = toward(x, x_0 + h / (2 * h_before) * (x_0 - x_0_before) if second_order else x_0, h)
        taken = yield unit(x, after.sigma)
        x = x if taken is None else taken / after.alpha**0.5


def karras_levels(schedule: Schedule, steps: int) -> list[Level]:
    """From the highest noise level to the lowest, evenly spaced in sigma^(1/7) (equation 5), and then 0.

    They fall between timesteps, of which the UNet is told the nearest. `schedule.spacing` is of no effect: no timesteps
    are chosen here, and the highest level is always visited.
    """
    high, low = (schedule.level(t, INFINITY).sigma ** (1 / RHO) for t in (STEPS - 1, 0))
    sigmas = [(high + i / max(steps - 1, 1) * (low - high)) ** RHO for i in range(steps)]
    return [*(Level(round(schedule.timestep(sigma)), sigma) for sigma in sigmas), Level(0, 0.0)]
