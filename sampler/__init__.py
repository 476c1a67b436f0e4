"""From noise to latents: the noise schedule, guidance, and six samplers that are called alike."""

import ipadapter  # noqa: F401, isort: skip, first: it sees to it that what follows are our rooms

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sampler.ddim import ddim, ddim_levels
from sampler.dpm_solver import dpmpp_2m, karras_levels
from sampler.euler import euler, euler_ancestral, euler_levels, euler_start
from sampler.guidance import Predict, Steps, guided
from sampler.inpaint import inpainted, widened
from sampler.lcm import lcm, lcm_levels
from sampler.noise import noise, noise_and_generators
from sampler.schedule import SD, Level, Schedule, add_noise, loss_weight, numbered, v_weight, velocity
from sampler.unipc import unipc, unipc_levels


class Run(Protocol):
    """Denoise x step by step, yielding the latents after each step (the last ones are the result).

    Who sends others in their place (`Generator.send`) has it go on from those, as `inpainted` does.

    Args:
        predict: what the model believes, predict(x, level) -> (eps, x_0), as `guided` makes it.
        x: the latents at levels[0], (batch, 4, H/8, W/8) fp32 of unit variance, as is all that is yielded on the way.
        levels: the noise levels to visit, and last the one to end at; any part of what `Sampler.levels` gives.
        generators: one per picture, the source of new noise, so that a picture does not depend on the batch it is in;
            None: PyTorch's own generator. Deterministic samplers leave them alone.
    """

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        levels: Sequence[Level],
        generators: Sequence[torch.Generator] | None = None,
    ) -> Steps: ...


@dataclass(frozen=True)
class Sampler:
    """How to denoise, on which noise levels, and how much of it is usual.

    All equal diffusers' schedulers of that name, step by step, given the same schedule. Where that names no spacing they
    visit what Stable Diffusion's users are used to: "leading" from 1, and "linspace" for "unipc". (SDXL's scheduler file
    names "leading"; 1.5's names none, and there diffusers takes "linspace" for Euler too.)
    """

    run: Run
    visit: Callable[[Schedule, int], list[Level]]  # as `levels`, for steps that there can be
    steps: int = 50  # as many as usual
    max_steps: int = 1000
    guidance_scale: float = 7.5  # as large as usual
    begin: Callable[[Tensor, Schedule, Level], Tensor] | None = None  # as `start`; None: with the noise itself

    def levels(self, schedule: Schedule, steps: int) -> list[Level]:
        """steps + 1 noise levels, from noise to picture; ValueError unless steps is 1 to `max_steps`."""
        if not 1 <= steps <= self.max_steps:
            raise ValueError(f"`steps`: {steps} given, 1 to {self.max_steps} allowed")
        return self.visit(schedule, steps)

    def start(self, noise: Tensor, schedule: Schedule, level: Level) -> Tensor:
        """The x that a picture begins with, at the first of its levels: the noise, or a little less of it."""
        return self.begin(noise, schedule, level) if self.begin else noise


SAMPLERS = {
    "ddim": Sampler(ddim, ddim_levels),
    "euler": Sampler(euler, euler_levels, begin=euler_start),
    "euler-a": Sampler(euler_ancestral, euler_levels, begin=euler_start),
    "dpm++": Sampler(dpmpp_2m, karras_levels, steps=20),
    "unipc": Sampler(unipc, unipc_levels, steps=20, max_steps=998),
    "lcm": Sampler(lcm, lcm_levels, steps=4, max_steps=50, guidance_scale=1.0),
}

__all__ = [
    "SAMPLERS",
    "SD",
    "Level",
    "Predict",
    "Run",
    "Sampler",
    "Schedule",
    "Steps",
    "add_noise",
    "ddim",
    "ddim_levels",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "guided",
    "inpainted",
    "lcm",
    "loss_weight",
    "noise",
    "noise_and_generators",
    "numbered",
    "unipc",
    "v_weight",
    "velocity",
    "widened",
]
