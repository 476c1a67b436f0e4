"""From noise to latents: the noise schedule, guidance, and six samplers that are called alike."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sampler.ddim import ddim
from sampler.dpm_solver import dpmpp_2m
from sampler.euler import euler, euler_ancestral
from sampler.guidance import Eps, guided
from sampler.lcm import lcm
from sampler.schedule import add_noise, alphas_cumprod, noise, noise_and_generators, v_weight
from sampler.unipc import unipc


class Sampler(Protocol):
    """Denoise x step by step, yielding the latents after each step (the last ones are the result).

    All equal diffusers' schedulers of that name, step by step, given Stable Diffusion's settings: scaled-linear betas,
    steps_offset 1, timestep_spacing "leading", and "linspace" for "unipc". (SDXL's scheduler file names "leading"; 1.5's
    names none, and there diffusers takes "linspace" for Euler too. "dpm++" and "lcm" are the same either way.)

    Args:
        eps: the noise prediction, eps(x, t), as `guided` makes it.
        x: pure noise, (batch, 4, H/8, W/8) fp32, of unit variance, as is all that is yielded on the way.
        steps: how many, 1 to `MAX_STEPS`; ValueError outside.
        generators: one per picture, the source of new noise, so that a picture does not depend on the batch it is in;
            None: PyTorch's own generator. Deterministic samplers leave them alone.
    """

    def __call__(
        self, eps: Eps, x: Tensor, steps: int, generators: Sequence[torch.Generator] | None = None
    ) -> Iterator[Tensor]: ...


SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "euler": euler,
    "euler-a": euler_ancestral,
    "dpm++": dpmpp_2m,
    "unipc": unipc,
    "lcm": lcm,
}
MAX_STEPS = {"ddim": 1000, "euler": 1000, "euler-a": 1000, "dpm++": 1000, "unipc": 998, "lcm": 50}

__all__ = [
    "MAX_STEPS",
    "SAMPLERS",
    "Eps",
    "Sampler",
    "add_noise",
    "alphas_cumprod",
    "ddim",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "guided",
    "lcm",
    "noise",
    "noise_and_generators",
    "unipc",
    "v_weight",
]
