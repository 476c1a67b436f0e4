"""Euler's method on the noise level sigma (arXiv 2206.00364), without and with new noise.

Both visit the timesteps that DDIM visits, and end at sigma = 0.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sampler.guidance import Eps
from sampler.schedule import noise_like, sigmas, timesteps, unit


@torch.no_grad()
def euler(eps: Eps, x: Tensor, steps: int, generators: Sequence[torch.Generator] | None = None) -> Iterator[Tensor]:
    """The probability flow dx = eps dsigma, followed in straight lines (algorithm 1, lines 4 and 5).

    Args as for any `Sampler`; deterministic, 1 to 1000 steps.
    """
    visit = timesteps(steps)
    levels = [*(sigmas()[t] for t in visit), 0.0]
    x = x * (1 + levels[0] ** 2) ** 0.5
    for t, (sigma, sigma_next) in zip(visit, pairwise(levels), strict=True):
        x = x + (sigma_next - sigma) * eps(unit(x, sigma), torch.tensor(t, device=x.device))
        yield unit(x, sigma_next)


@torch.no_grad()
def euler_ancestral(
    eps: Eps, x: Tensor, steps: int, generators: Sequence[torch.Generator] | None = None
) -> Iterator[Tensor]:
    """Each step goes down below the next level and adds noise up to it: the variance of DDPM's posterior.

    arXiv 2006.11239, equation 7, in terms of sigma, as k-diffusion's `sample_euler_ancestral` has it.
    Args as for any `Sampler`; new noise at each step, 1 to 1000 steps.
    """
    visit = timesteps(steps)
    levels = [*(sigmas()[t] for t in visit), 0.0]
    x = x * (1 + levels[0] ** 2) ** 0.5
    for t, (sigma, sigma_next) in zip(visit, pairwise(levels), strict=True):
        down = sigma_next**2 / sigma
        up = sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5  # down and up together are sigma_next
        x = x + (down - sigma) * eps(unit(x, sigma), torch.tensor(t, device=x.device))
        x = x + up * noise_like(x, generators)
        yield unit(x, sigma_next)
