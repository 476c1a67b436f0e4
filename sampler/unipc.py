"""UniPC (arXiv 2302.04867): a predictor, and a corrector that costs no further call of the UNet.

Of second order, predicting x_0, with B(h) = e^h - 1 ("bh2"): the defaults elsewhere.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sampler.dpm_solver import step_size, toward
from sampler.guidance import Predict, Steps
from sampler.schedule import INFINITY, STEPS, Level, Schedule, timesteps, unit


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
def unipc(
    predict: Predict, x: Tensor, levels: Sequence[Level], generators: Sequence[torch.Generator] | None = None
) -> Steps:
    """Predict the next x out of the last two x_0 (UniP-2); when its x_0 is known, take that step again (UniC-2).

    The first step is of first order, as is one to sigma 0; nothing corrects the last. Args as for any sampler; deterministic.
    """
    x = x / levels[0].alpha ** 0.5
    x_0 = start = h = h_before = change = None
    for i, (level, after) in enumerate(pairwise(levels)):
        x_0_before, (_, x_0) = x_0, predict(unit(x, level.sigma), level)
        if i > 0:  # correct x: the step that led here, now that x_0 at its end is known
            change_before, change = change, x_0 - x_0_before
            corrected = x_0_before + change / 2
            if i > 1:
                weight_before, weight = corrector_weights(h_before, h)
                corrected = x_0_before + weight_before * change_before + weight * change
            x = toward(start, corrected, h)
        start, h_before, h = x, h, step_size(level, after)
        x = toward(x, x_0 + h / (2 * h_before) * change if i > 0 and after.sigma else x_0, h)
        taken = yield unit(x, after.sigma)
        x = x if taken is None else taken / after.alpha**0.5


def unipc_levels(schedule: Schedule, steps: int) -> list[Level]:
    """As elsewhere, "linspace" and "leading" count a step more than there is and leave the lowest out; then sigma 0.

    "linspace" where nothing is asked for: with "leading" it would start at t = 941 in 20 steps, at less noise than x has.
    """
    if schedule.spacing == "trailing":
        visit = timesteps(schedule, steps)
    elif schedule.spacing == "leading":
        visit = [i * (STEPS // (steps + 1)) + schedule.steps_offset for i in range(steps, 0, -1)]
    else:
        visit = [round(i * ((STEPS - 1) / steps)) for i in range(steps, 0, -1)]
    return [*(schedule.level(t, INFINITY) for t in visit), Level(0, 0.0)]
