"""The noise schedule as a value, and the noise levels that a sampler is handed.

Two names for one latent: x = sqrt(alpha) x_0 + sqrt(1 - alpha) eps has unit variance and is what the UNet takes;
x / sqrt(alpha) = x_0 + sigma eps is where most samplers are simplest, sigma = sqrt((1 - alpha) / alpha) being the
noise level (arXiv 2206.00364, table 1: s and sigma of the column VP).
"""

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from torch import Tensor

STEPS = 1000  # training steps of the diffusion process
# Stands for the infinite noise level of a zero terminal SNR in those samplers that compute with sigma, here and
# elsewhere: alpha is 2^-24, the smallest number that fp16 knows.
INFINITY = 4096.0


@dataclass(frozen=True)
class Level:
    """One noise level: x = sqrt(alpha) x_0 + sqrt(1 - alpha) eps = sqrt(alpha) (x_0 + sigma eps)."""

    t: float  # what the UNet is told, 0 to 999; between two timesteps with Euler's "linspace"
    sigma: float  # 0, a picture, to infinity, pure noise
    end: "Level | None" = None  # where a step of DDIM from here ends, if not at the next level (see `ddim_levels`)
    step: tuple[int, int] = (0, 1)  # which step of the run begins here, and of how many (see `numbered`)
    alpha: float = field(init=False)  # the share of signal, 1 / (1 + sigma^2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", 1 / (1 + self.sigma**2))

    def noised(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """A picture's latents at this noise level."""
        return self.alpha**0.5 * x_0 + (1 - self.alpha) ** 0.5 * noise


def check(name: str, found: str | None, allowed: tuple[str | None, ...]) -> None:
    if found not in allowed:
        *others, last = map(repr, allowed)
        raise ValueError(f"{name}: {found!r} given, {', '.join(others)} or {last} allowed")


@dataclass(frozen=True)
class Schedule:
    """How noise was added in training, what the model predicts of it, and which timesteps sampling visits.

    The defaults are Stable Diffusion's (CompVis, v1-inference.yaml); the names are those of diffusers' scheduler files,
    but `prediction` (prediction_type there), `spacing` (timestep_spacing) and `zero_snr` (rescale_betas_zero_snr).

    ValueError for a name that does not exist, and for zero_snr with "eps": in pure noise there is nothing to tell.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear" (PixArt, from 0.0001 to 0.02): what grows evenly, roots or betas
    prediction: str = "eps"  # or "v" = sqrt(alpha) eps - sqrt(1 - alpha) x_0 (arXiv 2202.00512, appendix D)
    # "leading", "trailing" or "linspace" (arXiv 2305.08891, table 2); None: what a sampler is used to, see `timesteps`.
    spacing: str | None = None
    zero_snr: bool = False  # the last timestep is pure noise (arXiv 2305.08891, algorithm 1)
    steps_offset: int = 1  # where "leading" begins
    set_alpha_to_one: bool = False  # DDIM's last step ends at alpha 1, not at alphas_cumprod[0]

    def __post_init__(self) -> None:
        check("beta_schedule", self.beta_schedule, ("scaled_linear", "linear"))
        check("prediction", self.prediction, ("eps", "v"))
        check("spacing", self.spacing, (None, "leading", "trailing", "linspace"))
        if self.zero_snr and self.prediction == "eps":
            raise ValueError("prediction: 'eps' given, 'v' wanted with zero_snr: where all is noise, eps tells nothing")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(1000,) fp32 on the CPU: the share of signal in x_t; Stable Diffusion's falls from 0.9991 to 0.0047."""
        power = {"linear": 1, "scaled_linear": 2}[self.beta_schedule]
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        betas = torch.linspace(*ends, STEPS, dtype=torch.float64, device="cpu") ** power
        alphas = torch.cumprod(1 - betas, dim=0)
        if self.zero_snr:
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        return alphas.float()

    @cached_property
    def sigmas(self) -> list[float]:
        """The noise level at each of the 1000 timesteps; Stable Diffusion's rises from 0.029 to 14.6."""
        return ((1 - self.alphas_cumprod.double()) / self.alphas_cumprod.double()).sqrt().tolist()

    def level(self, t: float, infinity: float = math.inf) -> Level:
        """The noise level at a timestep, with a number for infinity; between two timesteps sigma is linear."""
        sigma = self.sigmas[int(t)]
        if t % 1:
            sigma += t % 1 * (self.sigmas[int(t) + 1] - sigma)
        return Level(t, infinity if math.isinf(sigma) else sigma)

    def timestep(self, sigma: float) -> float:
        """Where the schedule has this noise level, 0 to 999: between two timesteps log sigma is linear."""
        above = min(max(bisect(self.sigmas, sigma), 1), STEPS - 1)
        low, high = (self.level(t, INFINITY).sigma for t in (above - 1, above))
        return above - 1 + math.log(sigma / low) / math.log(high / low)


SD = Schedule()


def numbered(levels: Sequence[Level]) -> list[Level]:
    """The levels of a run, each told which of its steps begins there: what changes over the run goes by that."""
    return [replace(level, step=(i, len(levels) - 1)) for i, level in enumerate(levels)]


def timesteps(schedule: Schedule, steps: int) -> list[float]:
    """The timesteps to visit, from noise to picture.

    "leading" goes up from the first one in whole strides, as Stable Diffusion always did, and what does not go into 1000 is
    left out at the top, where the noise is: 20 steps start at 951, 600 steps at 600, a single one at 1. So "trailing" is
    taken where a further stride would have found room (60 steps, 150, 600; of what is usual none), or where only 999 is pure
    noise (zero_snr), if nothing is asked for: it goes down from 999. "linspace" visits 999 and 0 and lies between timesteps:
    to be rounded, unless by Euler.
    """
    lost = schedule.zero_snr or steps == 1 or STEPS % steps >= STEPS // steps
    spacing = schedule.spacing or ("trailing" if lost else "leading")
    if spacing == "leading":
        return [min(i * (STEPS // steps) + schedule.steps_offset, STEPS - 1) for i in reversed(range(steps))]
    if spacing == "trailing":
        stride = STEPS - (STEPS - STEPS / steps)  # rounded so, halves fall where numpy's arange has them
        return [round(STEPS - i * stride) - 1 for i in range(steps)]
    return [STEPS - 1, *(i * ((STEPS - 1) / (steps - 1)) for i in reversed(range(steps - 1)))]


def unit(x: Tensor, sigma: float) -> Tensor:
    """x_0 + sigma eps -> x, the same latent at unit variance."""
    return x / (1 + sigma**2) ** 0.5


# Training


@cache
def alphas_on(schedule: Schedule, device: torch.device) -> Tensor:
    return schedule.alphas_cumprod.to(device)


def add_noise(x: Tensor, noise: Tensor, t: Tensor, schedule: Schedule = SD) -> Tensor:
    """The forward process q(x_t | x_0): x, noise (batch, 4, h, w), t (batch,) in 0..999 -> x_t."""
    a = alphas_on(schedule, x.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * x + (1 - a).sqrt() * noise


def velocity(x: Tensor, noise: Tensor, t: Tensor, schedule: Schedule = SD) -> Tensor:
    """v of x_t, what a model that predicts it is to say; arguments as of `add_noise`."""
    a = alphas_on(schedule, x.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * x


def v_weight(t: Tensor, schedule: Schedule = SD) -> Tensor:
    """Weights (batch,), 1 to 16, that make the squared error of the noise at t that of v (arXiv 2202.00512)."""
    return (1 / alphas_on(schedule, t.device)[t]).clamp(max=16)


def loss_weight(t: Tensor, loss: str, schedule: Schedule = SD) -> Tensor | float:
    """Weights (batch,) that make the squared error of what the model predicts, at t, the loss of that name.

    Args:
        loss: "eps" or "v", the error of these, or "min-snr", which bounds the weight that a nearly clean x_t has for the
            picture in it (arXiv 2303.09556, section 3.4, gamma 5).
    """
    if loss == schedule.prediction:
        return 1.0
    if loss == "v":
        return v_weight(t, schedule)
    a = alphas_on(schedule, t.device)[t]
    if loss == "eps":
        return a
    snr = a / (1 - a)
    return snr.clamp(max=5) / (snr if schedule.prediction == "eps" else snr + 1)
