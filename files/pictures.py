"""Picture files: opening any kind as RGB, and writing PNGs that are whole or absent."""

import json
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from files.errors import UserError
from files.whole import whole


class PictureError(UserError):
    """A picture that cannot be used; the message is one line that names the file."""


def open_picture(path: str | Path) -> Image.Image:
    """Open a picture file as RGB: first frame, upright by EXIF, transparency on white, 16 bits brought to 8.

    Raises:
        PictureError: the file is missing, empty, cut short, or no picture.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, no error for names that no file can have
        raise PictureError(f"{path}: {'a folder, not a picture' if os.path.isdir(path) else 'no such picture'}")
    if path.stat().st_size == 0:
        raise PictureError(f"{path}: the file is empty")
    return read_picture(path, path)


def read_picture(source: Path | BinaryIO, name: str | Path) -> Image.Image:
    """Read a picture as RGB, as `open_picture` does, from a file or from bytes that errors call `name`.

    Raises:
        PictureError: the bytes are cut short, or no picture.
    """
    try:
        with Image.open(source) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise PictureError(f"{name}: too large, over {2 * Image.MAX_IMAGE_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise PictureError(
            f"{name}: not a picture that Pillow can read (PNG, JPEG, WebP, GIF, BMP, TIFF, ...)"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error) as error:
        raise PictureError(f"{name}: the picture is damaged or cut short ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to 8-bit RGB, with transparency laid on white."""
    if image.mode.startswith(("I", "F")):  # 16-bit and wider grey: Pillow would clip, not scale
        values = np.asarray(image, dtype=np.float32)
        top = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """pixels (batch, 3, H, W), nominally in [-1, 1], clamped -> RGB pictures."""
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pixels]


def save_png(image: Image.Image, path: Path, settings: dict | None = None) -> None:
    """Write a PNG, whole or not at all.

    The settings go into the PNG's text as JSON, under the key `ipadapter`.
    """
    info = PngInfo()
    if settings is not None:
        info.add_itxt("ipadapter", json.dumps(settings))
    with whole(path) as part:
        image.save(part, format="PNG", pnginfo=info)
