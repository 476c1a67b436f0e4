"""What CLIP's image tower wants to see."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
STRIP = 64  # times as long as it is wide: no ordinary picture


def preprocess(image: Image.Image, size: int = 224) -> Tensor:
    """RGB picture to (1, 3, size, size), normalised: shortest edge to `size` (bicubic), centre crop."""
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    left, top = (width - size) // 2, (height - size) // 2  # rounded down, as transformers does
    if max(image.size) > STRIP * short:
        image = resize_middle(image, size, (width, height), (left, top))
    else:
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]


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
