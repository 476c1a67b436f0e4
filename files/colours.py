"""Any picture that Pillow has decoded as 8-bit sRGB: deep greys by their range, colour profiles, transparency on white."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms

TOPS = (1, 255, 65535)  # values that stand for white, as pictures in numbers are usually scaled
SAMPLE = 1 << 10  # pixels a side: enough to tell the range of a picture


def to_rgb(image: Image.Image, levels: tuple[float, float] | None = None) -> Image.Image:
    """Any PIL mode to 8-bit RGB in sRGB.

    Args:
        image: its colour profile, if it has one, is in `info`; so is a transparent colour.
        levels: which values of a deep grey picture (modes I, I;16 and F) are black and white; by default `levels_of`.

    Raises:
        PyCMSError: a colour profile that cannot be used; see `srgb`.
    """
    profile = image.info.get("icc_profile")
    if deep(image):
        image = to_grey(image, levels or levels_of(image))
    return on_white(image, profile) if image.has_transparency_data else opaque(image, profile)


def opaque(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and (transform := srgb(profile, inks(image))):
        image = ImageCms.applyTransform(image.convert(inks(image)), transform)
    return image.convert("RGB")


def on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    clear = image.convert("RGBA")
    image = opaque(image.convert("L") if inks(image) == "L" else clear.convert("RGB"), profile)
    image.putalpha(clear.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def inks(image: Image.Image) -> str:
    """The mode in which the colour profile of a picture speaks of its pixels."""
    return "CMYK" if image.mode == "CMYK" else "L" if deep(image) or image.mode in ("1", "L", "LA", "La") else "RGB"


@lru_cache(maxsize=16)  # a folder of pictures has few profiles
def srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings pixels of a mode (L, RGB, CMYK) from an ICC profile to sRGB; None where that would change nothing.

    Raises:
        PyCMSError: the profile is damaged, or of another kind than the pixels.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        cube = np.moveaxis(np.indices((16, 16, 16), np.uint8) * 17, 0, -1).reshape(64, 64, 3)
        plain = Image.linear_gradient("L") if mode == "L" else Image.fromarray(cube)
        change = ImageChops.difference(transform.apply(plain), plain.convert("RGB"))
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ImageCms.PyCMSError(error) from None
    # sRGB itself, as its many makers round it, is left as it is.
    return transform if max(high for _, high in change.getextrema()) > 2 else None


def deep(image: Image.Image) -> bool:
    """Whether it has values that Pillow would clip, not scale, to 8 bits."""
    return image.mode.startswith(("I", "F"))


def levels_of(image: Image.Image) -> tuple[float, float]:
    """Which values of a deep grey picture are black and white.

    0 and the least of 1, 255 and 65535 that holds them (whole numbers to 1 are as dark as they say: 255 is white), or
    else their own least and greatest. Of floating-point numbers a twentieth at either end may lie outside, and is
    clipped: filters overshoot, and lights are brighter than white.
    """
    if image.mode.startswith("I;16") or image.format == "PNG":  # older Pillows call the 16 bits of a PNG I
        return 0, 65535
    values = numbers(image.resize([min(side, SAMPLE) for side in image.size], Image.Resampling.NEAREST))
    values = values[np.isfinite(values)]
    if not values.size:
        return 0, 1
    whole = image.mode != "F"
    low, high = image.getextrema() if whole else np.percentile(values, [5, 95])
    for top in TOPS[whole:]:
        if 0 <= low and high <= top:
            return 0, top
    return (low, high) if whole else (values.min(), values.max())


def to_grey(image: Image.Image, levels: tuple[float, float]) -> Image.Image:
    """A deep grey picture in 8 bits; what is no number becomes black."""
    low, high = levels
    values = np.nan_to_num(numbers(image), nan=low, posinf=high, neginf=low).clip(low, high)
    return Image.fromarray(((values - low) * (255 / (high - low or 1))).round().astype(np.uint8))


def numbers(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)
