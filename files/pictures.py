"""Picture files: opening any kind as RGB, and writing PNG, JPEG and WebP with the settings that made them."""

import io
import json
import os
import re
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from files.decoding import (
    PictureError,
    PictureWarning,
    TooLarge,
    check_profile,
    decoded,
    opened,
    orientation,
    small_rgb,
    unknown,
)
from files.errors import UserError, untrusted
from files.whole import whole

MOST = 1 << 30  # bytes taken from a pipe
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WRITTEN = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    ".webp": {"format": "WEBP", "lossless": True},
}
SIDES = {"PNG": 1 << 31, "JPEG": 65500, "WEBP": 16383}  # pixels that a format holds at most
Picture = str | Path | Image.Image  # a file, or opened
KEY = "ipadapter"  # under which a picture holds its settings
LONGEST = 65_000  # bytes; a JPEG's EXIF has no room for more


def open_picture(source: str | Path | BinaryIO) -> Image.Image:
    """Open a picture as RGB in sRGB: first frame, upright by EXIF, transparency on white, deep greys brought to 8 bits.

    JPEG, PNG and TIFF of more than 67 million pixels are brought down to fewer; other kinds may have no more. A JPEG
    that lacks its end, and a picture whose colour profile cannot be used, are read with a PictureWarning.

    Args:
        source: a file, or a binary stream (standard input, a pipe), which is read to its end.

    Raises:
        PictureError: missing, empty, cut short, or no picture.
    """
    if not isinstance(source, (str, os.PathLike)):
        name = str(getattr(source, "name", "the picture")).replace("<stdin>", "standard input")
        return read_picture(io.BytesIO(source.read(MOST)), name, mend=True)
    try:
        with open(source, "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)  # else a pipe: it cannot be sought in
            return read_picture(file if regular else io.BytesIO(file.read(MOST)), source, mend=True)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise PictureError(f"{source}: {unopened(source, error)}") from None


def unopened(source: str | Path, error: Exception) -> str:
    """What to tell of a file that cannot be opened."""
    if re.match(r"file:/", str(source)):
        return "the address of a file; its path alone is wanted"
    if re.match(r"\w\w+:/", str(source)):
        return "a URL, not a file; download the picture first"
    if isinstance(error, ValueError):  # a name that no file can have
        return f"cannot be read ({error})"
    if os.path.isdir(source):
        return "a folder, not a picture"
    return "no such picture" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def picture_size(source: BinaryIO) -> tuple[int, int]:
    """Width and height of the picture that `read_picture` would give, by what it says of itself; (0, 0) if it says nothing."""
    try:
        image = opened(source)
        turned = orientation(image) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size
    except Exception:  # noqa: BLE001, as in `read_picture`, which will tell
        return 0, 0


def read_picture(source: BinaryIO, name: str | Path, mend: bool = False) -> Image.Image:
    """Read a picture as RGB, as `open_picture` does, from a file or from bytes that errors call `name`.

    Args:
        mend: take a JPEG that lacks at most a fifth of its rows, with a PictureWarning; else it is cut short.

    Raises:
        PictureError: the bytes are cut short, or no picture.
    """
    try:
        with decoded(source, name, mend) as image:
            turn = UPRIGHT.get(orientation(image))
            if image.info.get("icc_profile"):
                check_profile(image, name)
            image = small_rgb(image)
        return image.transpose(turn) if turn is not None else image
    except (PictureError, PictureWarning):
        raise
    except Exception as error:  # noqa: BLE001, on damaged bytes Pillow's many readers raise nearly anything
        raise PictureError(f"{name}: {unread(source, error)}") from None


def unread(source: BinaryIO, error: Exception) -> str:
    """What to tell of bytes that cannot be read."""
    if isinstance(error, TooLarge):
        return f"too large, over {error} pixels"
    if isinstance(error, MemoryError):
        return "too large for the memory here"
    if isinstance(error, Image.UnidentifiedImageError):
        return unknown(source)
    return f"the picture is damaged or cut short ({' '.join(str(error).split()) or type(error).__name__})"


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """pixels (batch, 3, H, W), nominally in [-1, 1], clamped -> RGB pictures."""
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pixels]


def from_pil(image: Image.Image) -> Tensor:
    """A picture -> pixels (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def save_picture(image: Image.Image, path: Path, settings: dict | None = None) -> None:
    """Write a .png, .jpg, .jpeg or .webp, whole or not at all; the settings go into it as JSON.

    Where they stand: in a PNG as text (iTXt) under the key `ipadapter`; in JPEG and WebP in EXIF's UserComment, as
    {"ipadapter": settings} in ASCII. `read_settings` reads both.

    Raises:
        PictureError: a name that ends otherwise, or a picture larger than its format holds.
    """
    how = WRITTEN.get(path.suffix.lower())
    if how is None:
        raise PictureError(f"{path}: a name that ends in {', '.join(WRITTEN)} is wanted")
    if max(image.size) > (most := SIDES[how["format"]]):
        told = f"{image.width}x{image.height} pixels; {how['format']} holds {most} a side, .png more"
        raise PictureError(f"{path}: {told}")
    if settings is not None:
        how = how | (as_text(settings) if how["format"] == "PNG" else as_exif(settings, how["format"], path))
    with whole(path) as part:
        image.save(part, **how)


def as_text(settings: dict) -> dict[str, PngInfo]:
    """Settings for a PNG, as an argument of Pillow's `save`."""
    text = PngInfo()
    text.add_itxt(KEY, json.dumps(settings))
    return {"pnginfo": text}


def as_exif(settings: dict, kind: str, path: Path) -> dict[str, Image.Exif]:
    """Likewise for JPEG and WebP; of a JPEG none, with a PictureWarning, if they are too long."""
    comment = b"ASCII\0\0\0" + json.dumps({KEY: settings}).encode()
    if kind == "JPEG" and len(comment) > LONGEST:
        told = "the settings are too long for a JPEG, and left out; a .png holds them"
        warnings.warn(f"{path}: {told}", PictureWarning, stacklevel=3)
        return {}
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    return {"exif": exif}


def read_settings(path: str | Path) -> dict | None:
    """The settings that `save_picture` wrote into a picture; None if it has none that can be read.

    Raises:
        PictureError: missing, not readable, or no picture.
    """
    try:
        with open(path, "rb") as file:
            return settings_in(file)
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({error.strerror or 'not a PNG, JPEG or WebP picture'})") from None


def text_in(path: Path, key: str) -> str | None:
    """A text that a PNG holds before its pixels, by its key; None if it has none.

    Raises:
        PictureError: missing, damaged, or no PNG.
    """
    with (
        untrusted(PictureError, f"{path}: not a PNG picture that can be read"),
        Image.open(path, formats=["PNG"]) as image,
    ):
        return image.info.get(key)


def settings_in(file: BinaryIO) -> dict | None:
    """As `read_settings`. Raises UnidentifiedImageError."""
    try:
        with Image.open(file, formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.format == "PNG":
                found = json.loads(image.text[KEY])
            else:
                comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
                found = json.loads(comment.removeprefix(b"ASCII\0\0\0"))[KEY]
    except Image.UnidentifiedImageError:
        raise
    except Exception:  # noqa: BLE001, none at all, damaged, or another program's
        return None
    return found if isinstance(found, dict) else None
