"""Noise that means the same elsewhere: a seed, and one generator per picture."""

from collections.abc import Sequence

import torch
from torch import Tensor


def noise(seed: int, count: int, height: int, width: int) -> Tensor:
    """(count, 4, height/8, width/8) fp32 on the CPU; picture j's noise depends on seed + j alone."""
    return noise_and_generators(range(seed, seed + count), height, width)[0]


def noise_and_generators(seeds: Sequence[int], height: int, width: int) -> tuple[Tensor, list[torch.Generator]]:
    """Noise of each seed, (seeds, 4, height/8, width/8), and its generator: a sampler draws on where this stopped."""
    generators = seeded(seeds)
    return torch.cat([torch.randn((1, 4, height // 8, width // 8), generator=g) for g in generators]), generators


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each, on the CPU, whose numbers are the same everywhere."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def noise_like(x: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal noise like x (batch, ...), row j out of generators[j]; None: PyTorch's own generator."""
    if generators is None:
        return torch.randn_like(x)
    rows = [torch.randn(row.shape, generator=g, device=g.device) for row, g in zip(x.split(1), generators, strict=True)]
    return torch.cat(rows).to(x)
