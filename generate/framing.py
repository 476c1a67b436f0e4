"""Squares of a long picture: each prompts by itself, and acts in the result where it lies in the picture."""

import itertools
import math

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from clip import FRAMINGS as SQUARES
from clip import POSITIONS
from files.errors import UserError

FRAMINGS = (*SQUARES, "tile")
MOST = 8  # tiles; a picture that is longer is a strip
FINE = 840  # positions along a mask; a multiple of all numbers of tiles


def check_framing(framing: str, position: str) -> None:
    """Raises UserError for names that are none, and for a position that nothing asks for."""
    for name, given, known in (("framing", framing, FRAMINGS), ("crop_position", position, POSITIONS)):
        if given not in known:
            raise UserError(f"`{name}`: {given!r} given, one of {', '.join(known)} is wanted")
    if position != "centre" and framing not in ("crop", "pad"):
        raise UserError(f"`crop_position` {position}: `framing` {framing} takes the whole picture")


def tiles(image: Image.Image) -> list[tuple[Image.Image, Tensor]]:
    """As few squares as cover a picture, evenly along its longer side, each with its mask in the result.

    Returns:
        Squares of the picture's own pixels, and masks (1, 1, 1, n) or (1, 1, n, 1), stretched over whatever is made.
        They sum to 1 everywhere: where two squares overlap, one fades into the other.

    Raises:
        UserError: a picture more than 8 times as long as it is wide.
    """
    long, short = max(image.size), min(image.size)
    count, wide = math.ceil(long / short), image.width == long
    if count > MOST:
        raise UserError(
            f"`framing` tile: a picture of {image.width}x{image.height} has {count} squares, at most {MOST}"
        )
    starts = [(long - short) * i / max(1, count - 1) for i in range(count)]
    boxes = [(round(start), 0, round(start) + short, short) for start in starts]
    boxes = boxes if wide else [(top, left, bottom, right) for left, top, right, bottom in boxes]
    along = (torch.arange(FINE, dtype=torch.float64) + 0.5) / FINE * long
    overlap = count * short - long
    # How far, from 0 to 1, each square has taken over from the one before it.
    fade = max(overlap / max(1, count - 1), 1e-6)
    taken = [((along - start) / fade).clamp(0, 1) for start in starts[1:]]
    taken = [torch.ones_like(along), *taken, torch.zeros_like(along)]
    masks = [(this - following).float() for this, following in itertools.pairwise(taken)]
    return [
        (image.crop(box), mask.view(1, 1, 1, -1) if wide else mask.view(1, 1, -1, 1))
        for box, mask in zip(boxes, masks, strict=True)
    ]


def within(square: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of a tile, and where there is a mask of its group, too, what both leave."""
    square = square if mask is None else square.to(mask)
    return square if mask is None else mask * interpolate(square, size=mask.shape[2:], mode="bilinear")
