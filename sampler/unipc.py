"""UniPC (arXiv 2302.04867): a predictor, and a corrector that costs no further call of the UNet.

Of second order, predicting x_0, with B(h) = e^h - 1 ("bh2"): the defaults elsewhere.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sampler.dpm_solver import step_size, toward
from sampler.guidance import Eps
from sampler.schedule import STEPS, check_steps, sigmas, unit


def corrector_weights(h_before: float, h: float) -> tuple[float, float]:
    """UniC-2's weights of the change of x_0 over the step before (to be taken as h_before long) and over this one.

    The two equations R(h) rho = b(h) of theorem 3.1, solved; -h stands for h because x_0 is predicted (appendix A).
    """
    b = math.expm1(-h)
    b_1 = -1 / h - 1 / b
    b_2 = -2 * b_1 / h - 1 / b
    rho = (b_1 - b_2) / (1 + h_before / h)
    return rho * h / h_before, b_1 - rho


@torch.no_grad()
def unipc(eps: Eps, x: Tensor, steps: int, generators: Sequence[torch.Generator] | None = None) -> Iterator[Tensor]:
    """Predict the next x out of the last two x_0 (UniP-2); when its x_0 is known, take that step again (UniC-2).

    The first step and the last are of first order; nothing corrects the last. The timesteps are evenly spaced from 999
    down ("linspace": with "leading" it would start at t = 941 in 20 steps, at less noise than x has), and the last step
    ends at sigma = 0. Args as for any `Sampler`; deterministic, 1 to 998 steps.
    """
    check_steps(steps, STEPS - 2)
    visit = [round(i * ((STEPS - 1) / steps)) for i in range(steps, 0, -1)]
    levels = [*(sigmas()[t] for t in visit), 0.0]
    x = x * (1 + levels[0] ** 2) ** 0.5
    x_0 = start = h = h_before = change = None
    for i, (t, (sigma, sigma_next)) in enumerate(zip(visit, pairwise(levels), strict=True)):
        x_0_before, x_0 = x_0, x - sigma * eps(unit(x, sigma), torch.tensor(t, device=x.device))
        if i > 0:  # correct x: the step that led here, now that x_0 at its end is known
            change_before, change = change, x_0 - x_0_before
            corrected = x_0_before + change / 2
            if i > 1:
                weight_before, weight = corrector_weights(h_before, h)
                corrected = x_0_before + weight_before * change_before + weight * change
            x = toward(start, corrected, h)
        start, h_before, h = x, h, step_size(sigma, sigma_next)
        x = toward(x, x_0 + h / (2 * h_before) * change if 0 < i < steps - 1 else x_0, h)
        yield unit(x, sigma_next)
