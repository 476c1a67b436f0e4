"""Pictures: opening any kind of file as RGB, and what CLIP's image tower wants to see."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class PictureError(ValueError):
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


def preprocess(image: Image.Image, size: int = 224) -> Tensor:
    """RGB picture to (1, 3, size, size), normalised: shortest edge to `size` (bicubic), centre crop."""
    width, height = image.size
    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2  # rounded down, as transformers does
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
