"""Masks: grey pictures that say where, from black, nowhere, to white."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageChops
from torch import Tensor

from files.decoding import PictureError, decoded
from files.errors import untrusted
from files.pictures import from_pil, open_picture

COLOURED = 16  # of 255, by which channels differ at most in a grey picture: JPEG rounds them apart


def open_mask(source: str | Path | BinaryIO | Image.Image, name: str | None = None) -> Image.Image:
    """Open a mask in 8-bit grey, of any kind that `open_picture` reads.

    Args:
        source: a file, bytes that can be read twice (`io.BytesIO`), or a picture.
        name: what errors call a picture; a file is called by its name.

    Raises:
        PictureError: as in `open_picture`; a picture that has colours, or says by its transparency where it holds.
    """
    if isinstance(source, Image.Image):
        return grey(source, name or "the mask")
    seen, name = open_picture(source), str(getattr(source, "name", source))
    with open(source, "rb") if isinstance(source, (str, os.PathLike)) else nullcontext(source) as file:
        with untrusted(PictureError, f"{name}: the picture is damaged"):
            stored = decoded(file, name, mend=True)  # before its transparency becomes white
        return grey(seen, name, see_through(stored))


def values(mask: Image.Image) -> Tensor:
    """A grey picture -> (1, 1, H, W) in [0, 1], not cut at the half."""
    return from_pil(mask)[:, :1] / 2 + 0.5


def grey(image: Image.Image, name: str = "the mask", clear: bool | None = None) -> Image.Image:
    """A picture that is grey, as such: mode L.

    Args:
        name: what errors call it.
        clear: whether it has an alpha channel that says something; None: as `image` has it.

    Raises:
        PictureError: it is no mask, see `open_mask`.
    """
    wanted = "a mask is grey, white where it holds and black elsewhere"
    if see_through(image) if clear is None else clear:
        raise PictureError(f"{name}: has a transparent part (an alpha channel); {wanted}")
    red, *others = image.convert("RGB").split()
    if any(ImageChops.difference(red, other).getextrema()[1] > COLOURED for other in others):
        raise PictureError(f"{name}: has colours; {wanted}")
    return image.convert("L")


def see_through(image: Image.Image) -> bool:
    image.load()  # else it may not know its palette
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
