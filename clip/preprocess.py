"""What CLIP's image tower wants to see."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
STRIP = 64  # times as long as it is wide: no ordinary picture


# How a picture becomes a square. Adapters were trained on centre crops; the others show all of it.
FRAMINGS = ("crop", "pad", "squash")
ACROSS, DOWN = {"left": 0, "right": 1}, {"top": 0, "bottom": 1}
POSITIONS = ("centre", *DOWN, *ACROSS, *(f"{down}-{across}" for down in DOWN for across in ACROSS))


def preprocess(image: Image.Image, size: int = 224, framing: str = "crop", position: str = "centre") -> Tensor:
    """RGB picture to (1, 3, size, size), normalised; resized by bicubic interpolation.

    Args:
        framing: "crop": shortest edge to `size`, of it a square; "pad": longest edge to `size`, and around it zeros,
            which is how "no image" looks behind the normalisation; "squash": both edges to `size`.
        position: one of POSITIONS: which square is cropped, or where in the padding the picture lies.

    Raises:
        ValueError: a framing or a position of another name.
    """
    if framing not in FRAMINGS or position not in POSITIONS:
        raise ValueError(f"{framing!r} and {position!r}: one of {FRAMINGS} and one of {POSITIONS} are wanted")
    if framing == "crop":
        return normalised(crop(image, size, position))
    if framing == "squash":
        return normalised(image.resize((size, size), Image.Resampling.BICUBIC))
    return padded(image, size, position)


def padded(image: Image.Image, size: int, position: str) -> Tensor:
    width, height = image.size
    width, height = (max(1, int(size * side / max(width, height))) for side in (width, height))
    (left, right), (top, bottom) = (
        (before, size - side - before)
        for side, before in zip((width, height), corner((size, size), (width, height), position), strict=True)
    )
    return pad(normalised(image.resize((width, height), Image.Resampling.BICUBIC)), (left, right, top, bottom))


def normalised(image: Image.Image) -> Tensor:
    """(1, 3, height, width)"""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]


def corner(outer: tuple[int, int], inner: tuple[int, int], position: str) -> tuple[int, int]:
    """Left and top of one rectangle (width, height) within another; in the middle rounded down, as transformers does."""
    words = position.split("-")
    shares = (next((side[word] for word in words if word in side), 0.5) for side in (ACROSS, DOWN))
    return tuple(int((long - short) * share) for long, short, share in zip(outer, inner, shares, strict=True))


def crop(image: Image.Image, size: int, position: str = "centre") -> Image.Image:
    width, height = image.size
    short = min(width, height)
    whole = int(size * width / short), int(size * height / short)
    left, top = corner(whole, (size, size), position)
    if max(image.size) > STRIP * short:
        return resize_middle(image, size, whole, (left, top))
    return image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def resize_middle(image: Image.Image, size: int, whole: tuple[int, int], corner: tuple[int, int]) -> Image.Image:
    """The square at `corner` of the picture resized to `whole`, without making the rest: that of a strip is huge."""
    (left, right, *x), (top, bottom, *y) = (
        seen(length, length / resized, first, size)
        for length, resized, first in zip(image.size, whole, corner, strict=True)
    )
    box = (x[0], y[0], x[1], y[1])
    return image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BICUBIC, box)


def seen(length: int, pixel: float, first: int, count: int) -> tuple[int, int, float, float]:
    """Along one side: what bicubic looks at for `count` pixels of the result, and where in that they lie."""
    start, end = first * pixel, (first + count) * pixel
    margin = 2 * max(1, pixel) + 1
    low, high = max(0, math.floor(start - margin)), min(length, math.ceil(end + margin))
    return low, high, start - low, min(end, high) - low
