"""The noise schedule of Stable Diffusion (CompVis, ddpm.py), and noise that means the same elsewhere."""

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


def noise(seed: int, count: int, height: int, width: int) -> Tensor:
    """(count, 4, height/8, width/8) fp32 on the CPU; picture j's noise depends on seed + j alone."""
    shape = (1, 4, height // 8, width // 8)
    return torch.cat([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed + j)) for j in range(count)])
