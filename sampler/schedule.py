"""The noise schedule of Stable Diffusion (CompVis, ddpm.py), and noise that means the same elsewhere.

Two names for one latent: x = sqrt(alpha) x_0 + sqrt(1 - alpha) eps has unit variance and is what the UNet takes;
x / sqrt(alpha) = x_0 + sigma eps is where most samplers are simplest, sigma = sqrt((1 - alpha) / alpha) being the
noise level (arXiv 2206.00364, table 1: s and sigma of the column VP).
"""

import math
from bisect import bisect
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

STEPS = 1000  # training steps of the diffusion process


@cache
def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """(1000,) fp32: the share of signal in x_t, from 0.9991 at t = 0 to 0.0047 at t = 999 (scaled-linear betas)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float().to(device)


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The forward process q(x_t | x_0): x, noise (batch, 4, h, w), t (batch,) in 0..999 -> x_t."""
    a = alphas_cumprod(x.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * x + (1 - a).sqrt() * noise


def v_weight(t: Tensor) -> Tensor:
    """Weights (batch,), 1 to 16, that make the squared error of the noise at t that of v (arXiv 2202.00512)."""
    return (1 / alphas_cumprod(t.device)[t]).clamp(max=16)


# Timesteps and noise levels


def check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ValueError(f"steps: {steps} given, 1 to {most} allowed")


def timesteps(steps: int) -> list[int]:
    """The timesteps to visit, from noise to picture: evenly spaced from t = 1 upwards ("leading", offset 1)."""
    check_steps(steps, STEPS)
    return [min(i * (STEPS // steps) + 1, STEPS - 1) for i in reversed(range(steps))]


@cache
def sigmas() -> list[float]:
    """The noise level at each of the 1000 timesteps, from 0.029 to 14.6."""
    return ((1 - alphas_cumprod()) / alphas_cumprod()).double().sqrt().tolist()


def unit(x: Tensor, sigma: float) -> Tensor:
    """x_0 + sigma eps -> x, the same latent at unit variance."""
    return x / (1 + sigma**2) ** 0.5


def timestep(sigma: float) -> float:
    """Where the schedule has this noise level: between two timesteps log sigma is linear."""
    high = min(max(bisect(sigmas(), sigma), 1), STEPS - 1)
    below, above = sigmas()[high - 1 : high + 1]
    return high - 1 + math.log(sigma / below) / math.log(above / below)


def eps_from_v(v: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The noise that a prediction of v = sqrt(alpha) eps - sqrt(1 - alpha) x_0 means (arXiv 2202.00512, appendix D).

    v, x (batch, 4, h, w); t () in 0..999, whole, or as `timestep` gives it: -2 log sigma is the logit of alpha.
    """
    logits = alphas_cumprod(t.device).logit()
    low = t.long().clamp(max=STEPS - 2)
    alpha = torch.sigmoid(logits[low] + (t - low) * (logits[low + 1] - logits[low]))
    return alpha.sqrt() * v + (1 - alpha).sqrt() * x


# Noise


def noise(seed: int, count: int, height: int, width: int) -> Tensor:
    """(count, 4, height/8, width/8) fp32 on the CPU; picture j's noise depends on seed + j alone."""
    return noise_and_generators(seed, count, height, width)[0]


def noise_and_generators(seed: int, count: int, height: int, width: int) -> tuple[Tensor, list[torch.Generator]]:
    """`noise`, and the generators (one per picture) that it was drawn from: a sampler draws on where this stopped."""
    generators = [torch.Generator("cpu").manual_seed(seed + j) for j in range(count)]
    return torch.cat([torch.randn((1, 4, height // 8, width // 8), generator=g) for g in generators]), generators


def noise_like(x: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal noise like x (batch, ...), row j out of generators[j]; None: PyTorch's own generator."""
    if generators is None:
        return torch.randn_like(x)
    rows = [torch.randn(row.shape, generator=g, device=g.device) for row, g in zip(x.split(1), generators, strict=True)]
    return torch.cat(rows).to(x)
