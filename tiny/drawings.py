"""The bundled drawings as tensors, and the augmentations that the tiny model is trained with."""

import io
import json
import math
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from clip.preprocess import MEAN, STD

DATA = Path(__file__).parent / "data"
SPLITS = ("train", "unseen-drawings", "unseen-things")


@dataclass
class Drawings:
    """One split, in memory."""

    pixels: Tensor  # (n, 3, 128, 128) uint8
    captions: list[str]  # the name of the thing: "red apple"
    styles: list[str]  # the drawing style: "noto"
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def styled(self, i: int) -> str:
        return f"{self.captions[i]}, {self.styles[i]} style"


def load(split: str, limit: int | None = None, data: Path = DATA) -> Drawings:
    """Read a split ('train', 'unseen-drawings' or 'unseen-things'), in the shards' own shuffled order."""
    keys, files, notes = [], [], []
    for shard in sorted(data.glob(f"{split}-*.tar*")):
        with tarfile.open(shard) as tar:
            for member in islice(tar, limit and 2 * limit):  # a drawing and its notes
                key, _, kind = member.name.rpartition(".")
                content = tar.extractfile(member).read()
                if kind == "json":
                    notes.append(json.loads(content))
                else:
                    keys.append(key)
                    files.append(content)
    if not keys:
        raise FileNotFoundError(f"{data}: no shards of the split '{split}'")
    keys, files, notes = keys[:limit], files[:limit], notes[:limit]
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(lambda f: np.asarray(Image.open(io.BytesIO(f)).convert("RGB")), files))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Drawings(pixels, [note["caption"] for note in notes], [note["style"] for note in notes], keys)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def clip_pixels(x: Tensor) -> Tensor:
    """[-1, 1] pixels -> CLIP's normalisation (already at the tower's size)."""
    mean, std = clip_statistics(x.device)
    return ((x + 1) / 2 - mean) / std


@cache
def clip_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))


def jitter(x: Tensor, shift: float, zoom: float, flip: bool, turn: float = 0.0) -> Tensor:
    """Move, scale, mirror and turn each drawing a little; what comes in from outside is white.

    Args:
        x: (n, 3, H, W) in [-1, 1].
        shift: largest move, as a share of the picture; zoom: largest change of size, as a share; turn: the largest, radians.
    """
    n = len(x)
    size = 1 + zoom * (2 * torch.rand(n, device=x.device) - 1)
    mirror = torch.where(torch.rand(n, device=x.device) < 0.5, -1.0, 1.0) if flip else torch.ones(n, device=x.device)
    move = 2 * shift * (2 * torch.rand(n, 2, device=x.device) - 1)
    angle = turn * (2 * torch.rand(n, device=x.device) - 1) if turn else torch.zeros_like(size)
    along, across = size * angle.cos(), size * angle.sin()
    theta = torch.stack([along * mirror, -across, move[:, 0], across * mirror, along, move[:, 1]], 1).view(n, 2, 3)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x - 1, grid, mode="bilinear", align_corners=False) + 1  # zero padding is white


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Mean over pictures of the peak signal-to-noise ratio, dB; a, b in [-1, 1], clamped."""
    mse = ((a.clamp(-1, 1) - b.clamp(-1, 1)) ** 2).flatten(1).mean(1)
    return (10 * (math.log10(4) - mse.clamp_min(1e-10).log10())).mean()
