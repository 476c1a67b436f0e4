"""DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) on the noise levels of Karras et al. (arXiv 2206.00364)."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sampler.guidance import Eps
from sampler.schedule import STEPS, check_steps, sigmas, timestep, unit

RHO = 7  # how much shorter the steps get where there is little noise


def karras(steps: int) -> list[float]:
    """Noise levels from 14.6 to 0.029, evenly spaced in sigma^(1/7) (arXiv 2206.00364, equation 5)."""
    check_steps(steps, STEPS)
    low, high = sigmas()[0] ** (1 / RHO), sigmas()[-1] ** (1 / RHO)
    return [(high + i / max(steps - 1, 1) * (low - high)) ** RHO for i in range(steps)]


def step_size(sigma: float, sigma_next: float) -> float:
    """h = lambda_next - lambda, lambda = -log sigma being half the log signal-to-noise ratio; endless to sigma 0."""
    return math.log(sigma / sigma_next) if sigma_next else math.inf


def toward(x: Tensor, x_0: Tensor, h: float) -> Tensor:
    """The exact solution over a step h if x_0 stays the same (proposition 4.1, divided by alpha)."""
    return math.exp(-h) * x - math.expm1(-h) * x_0


@torch.no_grad()
def dpmpp_2m(eps: Eps, x: Tensor, steps: int, generators: Sequence[torch.Generator] | None = None) -> Iterator[Tensor]:
    """Steps of second order out of the last two predictions of x_0; the first step and the last are of first order.

    The noise levels fall between timesteps: eps gets such a t, and `guided` tells the UNet the nearest whole one.
    The last step ends at sigma = 0. Args as for any `Sampler`; deterministic, 1 to 1000 steps.
    """
    levels = [*karras(steps), 0.0]
    x = x * (1 + levels[0] ** 2) ** 0.5
    x_0 = h = None
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x_0_before, x_0 = x_0, x - sigma * eps(unit(x, sigma), torch.tensor(timestep(sigma), device=x.device))
        h_before, h = h, step_size(sigma, sigma_next)
        x = toward(x, x_0 + h / (2 * h_before) * (x_0 - x_0_before) if 0 < i < steps - 1 else x_0, h)
        yield unit(x, sigma_next)
