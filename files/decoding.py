"""Pillow, made to read whatever is brought: cut short, huge, in odd colours or formats; `files/pictures.py` asks for it."""

import io
import math
import re
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.JpegImagePlugin import JpegImageFile

from files.colours import deep, inks, levels_of, srgb, to_rgb
from files.errors import Notice, UserError

# Those that are read: not EPS, for which Pillow runs a program, nor what it knows by name alone (HDF5, MPEG, ...).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "ICO")
FORMATS += ("ICNS", "PSD", "QOI", "DDS", "PCX", "SGI", "SUN", "XBM", "XPM")
HEIF = re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1|avif|avis)", re.DOTALL)
LARGE = 1 << 26  # pixels; JPEG, PNG and TIFF that have more are brought down while they are read
SHRUNK = ("JPEG", "MPO", "PNG", "TIFF")  # those kinds; others may have no more
LARGEST_JPEG = 1 << 28  # pixels; it is made smaller while it is decoded, where PNG and TIFF first take their memory
END = b"\xff\xd9"  # of a JPEG
MISSING = 0.2  # share of a picture that may be missing below

warnings.filterwarnings("ignore", module=r"PIL\.")  # odd tags and large sizes, which are dealt with here

OTHERS = {  # what is taken for a picture, by its first bytes
    rb"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL picture, which Pillow does not read; convert it to JPEG or PNG",
    rb"\s*(<\?xml[^>]*>\s*)?<svg": "an SVG drawing, which is no picture of pixels; convert it to PNG",
    rb"\s*<(!DOCTYPE |!doctype )?(html|HTML)|\s*<\?xml": "a web page, not a picture; the download went wrong",
    rb"%PDF": "a PDF, not a picture; save its page as PNG",
    rb"version https://git-lfs": "a Git LFS pointer, not the picture; run 'git lfs pull' where it came from",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": "a video; save a frame of it as PNG",
    rb"v/1\x01|#\?RADIANCE": "a picture of light (OpenEXR, Radiance), which Pillow does not read; save it as TIFF or PNG",
    rb"II\*\0....CR|FUJIFILM|IIRO|IIU\0": "a camera's raw picture; develop it, and save it as TIFF, JPEG or PNG",
    rb"\x93NUMPY": "an array of NumPy's; save it as PNG",
    rb"\0{64}": "begins with zeros; the download is not finished, or the disk lost it",
}


class PictureError(UserError):
    """A picture that cannot be used; the message is one line that names the file."""


class TooLarge(Exception):
    """More pixels than this many."""


class PictureWarning(Notice):
    """A picture that is used though something is wrong with it; the message is one line that names the file."""


def decoded(source: BinaryIO, name: str | Path, mend: bool) -> Image.Image:
    """The picture as it is stored, in any mode; a JPEG that lacks its end is mended if that is wanted."""
    image = opened(source)
    try:
        image.load()
    except OSError:
        if not mend or image.format not in ("JPEG", "MPO"):
            raise
        image = mended(source, name)
    return image


def mended(source: BinaryIO, name: str | Path) -> Image.Image:
    """A JPEG that lacks its end, with a PictureWarning. Raises PictureError where it lacks more than that."""
    image = with_end(source)
    missing = grey_rows(image) / image.height
    if missing > MISSING:
        raise PictureError(f"{name}: damaged or cut short (the lower {missing:.0%} of it is missing)") from None
    lost = f"the lower {missing:.1%} of it is missing" if missing else "its end is missing"
    blurred = ", and with that detail" if image.info.get("progressive") else ""
    warnings.warn(f"{name}: cut short, {lost}{blurred}", PictureWarning, stacklevel=3)
    return image


def with_end(source: BinaryIO) -> Image.Image:
    """A JPEG with a mark where its end should be: what was behind that is mid-grey."""
    source.seek(0)
    content = source.read()
    try:
        image = opened(io.BytesIO(content + END))
        image.load()
    except OSError:  # cut in the midst of a table, which would take the mark for more of its own
        image = opened(io.BytesIO(content[: content.rfind(b"\xff")] + END))
        image.load()
    return image


def opened(source: BinaryIO) -> Image.Image:
    """The picture before it is decoded; a large JPEG will be decoded at a fraction of its size."""
    source.seek(0)
    if HEIF.match(source.read(12)):
        learn_heif()
    Image.init()
    try:
        image = Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError:
        image = huge_jpeg(source)
    if image.format not in SHRUNK and image.width * image.height > LARGE:
        raise TooLarge(LARGE)
    image.draft(None, [max(1, side // factor(image)) for side in image.size])
    return image


def learn_heif() -> None:
    """Let Pillow open HEIC pictures, if what it wants for that is installed."""
    if "HEIF" not in Image.OPEN and find_spec("pillow_heif"):
        with suppress(ImportError):  # installed, and not for this machine
            from pillow_heif import register_heif_opener

            register_heif_opener()


def huge_jpeg(source: BinaryIO) -> Image.Image:
    """A picture that has more pixels than Pillow opens. Raises TooLarge, unless it is a JPEG of not too many."""
    source.seek(0)
    if source.read(3) != b"\xff\xd8\xff":
        raise TooLarge(2 * Image.MAX_IMAGE_PIXELS) from None
    source.seek(0)
    image = JpegImageFile(source)
    if image.width * image.height > LARGEST_JPEG:
        raise TooLarge(LARGEST_JPEG)
    return image


def factor(image: Image.Image) -> int:
    """By which both sides of a large picture are divided."""
    return math.ceil(math.sqrt(image.width * image.height / LARGE))


def grey_rows(image: Image.Image) -> int:
    """How many rows at the bottom of a JPEG were not in the file: those are mid-grey in every channel."""
    rows = np.asarray(image).reshape(image.height, -1)
    told = (rows.min(1) < 127) | (rows.max(1) > 128)
    return int(told[::-1].argmax()) if told.any() else image.height


def orientation(image: Image.Image) -> int | None:
    """As EXIF tells; None where it tells nothing that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001, Pillow wraps no error here
        return None


def check_profile(image: Image.Image, name: str | Path) -> None:
    """Drop a colour profile that cannot be used: the picture is then taken for sRGB."""
    try:
        srgb(image.info["icc_profile"], inks(image))
    except ImageCms.PyCMSError:
        del image.info["icc_profile"]
        warnings.warn(f"{name}: its colour profile cannot be used, taken for sRGB", PictureWarning, stacklevel=2)


def small_rgb(image: Image.Image) -> Image.Image:
    """As RGB; a large picture in bands of rows, each brought down at once, for the memory's sake."""
    if image.mode == "I" and image.format == "TIFF":
        image = unsigned(image)
    by = factor(image)
    return to_rgb(image) if by == 1 else reduced(image, by)


def reduced(image: Image.Image, by: int) -> Image.Image:
    """As RGB, both sides divided by a whole number."""
    levels = levels_of(image) if deep(image) else None
    small = Image.new("RGB", [math.ceil(side / by) for side in image.size])
    rows = by * max(1, (1 << 22) // (by * image.width))
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows)))
        small.paste(to_rgb(band, levels).reduce(by), (0, top // by))
    return small


def unsigned(image: Image.Image) -> Image.Image:
    """A TIFF's grey values; Pillow takes 32 bits for signed, in which great values are below zero."""
    if image.tag_v2.get(ExifTags.Base.SampleFormat) not in (None, 1, (1,)):
        return image
    values = np.asarray(image)
    return Image.fromarray(values.view(np.uint32).astype(np.float32)) if values.min() < 0 else image


def unknown(source: BinaryIO) -> str:
    """What to tell of bytes that Pillow does not take for a picture."""
    source.seek(0)
    start = source.read(64)
    if not start:
        return "the file is empty"
    if found := HEIF.match(start):
        if b"avi" in found[1] and "AVIF" not in Image.OPEN:
            return "an AVIF picture, which Pillow reads from 11.3 on: pip install -U pillow, or convert it to JPEG"
        if b"avi" not in found[1] and "HEIF" not in Image.OPEN:
            return "a HEIC picture: pip install pillow-heif, or convert it to JPEG"
        return "the picture is damaged or cut short"
    if kind := next((kind for sign, kind in OTHERS.items() if re.match(sign, start, re.DOTALL)), None):
        return kind
    if start[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF of a kind that Pillow cannot read (floating-point colours?); save it with 8 or 16 bits a channel"
    return "not a picture that Pillow can read (PNG, JPEG, WebP, GIF, BMP, TIFF, ...)"
