"""Picture files: pictures of every kind are opened as they are meant, and written with what made them."""

import io
import json
import os
import struct
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from processes import started

from files.decoding import LARGE
from files.fonts import font_files, font_for, lettering, shows, wrapped
from files.pictures import PictureError, PictureWarning, open_picture, read_picture, read_settings, save_picture
from files.sheets import sheet

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def opened(path) -> list[list[tuple[int, int, int]]]:
    image = open_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rows(*rows: list[tuple[int, int, int]]) -> list[list[list[int]]]:
    return [[list(colour) for colour in row] for row in rows]


def two_colours(width: int = 16, height: int = 8) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "ppm", "webp", "tga"])
def test_lossless_formats_give_exact_values(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    two_colours(2, 1).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert opened(path) == rows([RED, BLUE])


def test_the_name_may_lie_about_the_format(tmp_path):
    two_colours(2, 1).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert opened(tmp_path / "x.jpg") == rows([RED, BLUE])


@pytest.mark.parametrize("mode, red", [("RGB", RED), ("CMYK", (0, 255, 255, 0)), ("L", 76)])
def test_jpeg(tmp_path, mode, red):
    Image.new(mode, (16, 16), red).save(tmp_path / "x.jpg", quality=100)
    wanted = (76, 76, 76) if mode == "L" else RED
    assert np.abs(np.array(opened(tmp_path / "x.jpg")) - wanted).max() <= 2


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (4, 1))
    for i, ink in enumerate([(0, 255, 255, 0), (255, 255, 0, 0), (0, 0, 0, 0), (0, 0, 0, 255)]):
        image.putpixel((i, 0), ink)
    image.save(tmp_path / "x.tiff")
    assert opened(tmp_path / "x.tiff") == rows([RED, BLUE, WHITE, BLACK])


def test_an_animation_gives_its_first_frame(tmp_path):
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"x.{suffix}"
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
        extra = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **extra)
        assert Image.open(path).n_frames == 3
        assert opened(path) == rows(*[[RED] * 8] * 8)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257, 254 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    assert Image.open(tmp_path / f"x.{suffix}").mode in ("I;16", "I")
    assert opened(tmp_path / f"x.{suffix}") == rows([(v, v, v) for v in (0, 1, 128, 254, 255)])


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert opened(tmp_path / "x.png") == rows([(0, 0, 0), (0, 0, 0), (1, 1, 1)])


def test_grey_and_bilevel(tmp_path):
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert opened(tmp_path / "grey.png") == rows([(0, 0, 0), (7, 7, 7), (255, 255, 255)])
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert opened(tmp_path / "bits.png") == rows([WHITE, BLACK])


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *RED])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "x.png")
    assert opened(tmp_path / "x.png") == rows([RED, BLUE])
    image.save(tmp_path / "clear.png", transparency=0)  # entry 0 is see-through
    assert opened(tmp_path / "clear.png") == rows([RED, WHITE])


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for i, alpha in enumerate((255, 0, 51)):  # 51 is a fifth: 255 - 51 of white shines through
        image.putpixel((i, 0), (*RED, alpha))
    image.save(tmp_path / "rgba.png")
    assert opened(tmp_path / "rgba.png") == rows([RED, WHITE, (255, 204, 204)])
    grey = Image.new("LA", (3, 1))
    for i, alpha in enumerate((255, 0, 51)):
        grey.putpixel((i, 0), (0, alpha))
    grey.save(tmp_path / "la.png")
    assert opened(tmp_path / "la.png") == rows([BLACK, WHITE, (204, 204, 204)])
    two_colours(2, 1).save(tmp_path / "key.png", transparency=BLUE)
    assert opened(tmp_path / "key.png") == rows([RED, WHITE])


UPRIGHT = {  # what stands where when the stored rows are "12", "34" (EXIF 2.3, tag 274)
    1: ["12", "34"],
    2: ["21", "43"],
    3: ["43", "21"],
    4: ["34", "12"],
    5: ["13", "24"],
    6: ["31", "42"],
    7: ["42", "31"],
    8: ["24", "13"],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_turns_the_picture_upright(tmp_path, orientation):
    image = Image.fromarray(np.array([[1, 2], [3, 4]], dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    found = np.asarray(open_picture(tmp_path / "x.png"))[..., 0]
    assert ["".join(map(str, row)) for row in found] == UPRIGHT[orientation]


def test_exif_rotated_jpeg(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    two_colours(32, 16).save(tmp_path / "x.jpg", exif=exif, quality=100)
    image = open_picture(tmp_path / "x.jpg")
    assert image.size == (16, 32)
    assert np.abs(np.array(image.getpixel((8, 4))) - RED).max() <= 2  # what was left is on top
    assert np.abs(np.array(image.getpixel((8, 28))) - BLUE).max() <= 2


def broken(folder, kind: str):
    """A file of this kind, whose name is the kind."""
    path = folder / f"{kind}.png"
    whole = folder / "whole"
    noise(64, 64).save(whole, format=kind.split()[-1] if kind.startswith("cut") else "PNG")
    content = whole.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is no picture\n" * 100)
    elif kind == "only a signature":
        path.write_bytes(content[:8])
    elif kind == "zeros":
        path.write_bytes(bytes(5000))
    elif kind == "damaged":
        path.write_bytes(content[: len(content) // 2] + bytes(200) + content[len(content) // 2 + 200 :])
    elif kind.startswith("cut"):
        path.write_bytes(content[: len(content) * 2 // 3])
    return path


FAULTS = {
    "missing": "no such picture",
    "folder": "a folder, not a picture",
    "empty": "the file is empty",
    "text": "not a picture",
    "zeros": "begins with zeros; the download is not finished",
    "only a signature": "not a picture",
    "damaged": "damaged or cut short",
    "cut PNG": "damaged or cut short",
    "cut JPEG": "damaged or cut short",
    "cut GIF": "damaged or cut short",
    "cut BMP": "damaged or cut short",
    "cut TIFF": "damaged or cut short",
    "cut WEBP": "damaged or cut short",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_file_that_is_no_whole_picture_is_named_in_one_line(tmp_path, kind):
    path = broken(tmp_path, kind)
    with pytest.raises(PictureError) as error:
        open_picture(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and FAULTS[kind] in message and "\n" not in message


def test_a_picture_beyond_all_measure_is_refused(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match=r"x\.png: too large, over 2000 pixels$"):
        open_picture(tmp_path / "x.png")


def test_a_name_that_no_file_can_have_is_a_picture_error():
    with pytest.raises(PictureError):
        open_picture("a" * 300 + ".png")


@pytest.mark.parametrize("address", ["https://example.com/cat.png", "http:/example.com/cat.png", "s3://bucket/cat.png"])
def test_a_url_is_called_one(address):
    with pytest.raises(PictureError, match="a URL, not a file"):
        open_picture(Path(address))


def test_what_makes_pillow_run_a_program_is_no_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(PictureError, match="not a picture that Pillow can read"):
        open_picture(tmp_path / "x.png")


# From pipes


def test_a_binary_stream_is_a_picture(tmp_path):
    two_colours(2, 1).save(tmp_path / "x.png")
    with open(tmp_path / "x.png", "rb") as file:
        assert opened(file) == rows([RED, BLUE])
    reading, writing = os.pipe()
    os.write(writing, (tmp_path / "x.png").read_bytes())
    os.close(writing)
    assert opened(f"/dev/fd/{reading}") == rows([RED, BLUE])
    os.close(reading)


NO_PICTURES = {
    b"\xff\x0a" + bytes(20): "a JPEG XL picture",
    b"<?xml version='1.0'?>\n<svg xmlns='x'/>": "an SVG drawing",
    b"<!DOCTYPE html><html>404</html>": "a web page",
    b"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer",
    b"\0\0\0\x18ftypmp42" + bytes(20): "a video",
    b"II*\0\x10\0\0\0CR\2\0" + bytes(90): "a camera's raw picture",
    b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(40): "damaged or cut short",
}


@pytest.mark.parametrize("content", NO_PICTURES, ids=NO_PICTURES.get)
def test_what_is_taken_for_a_picture_is_called_what_it_is(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(PictureError, match=rf"x\.jpg: .*{NO_PICTURES[content]}"):
        open_picture(tmp_path / "x.jpg")


@pytest.mark.parametrize("given, told", [(b"text", "not a picture"), (b"", "the file is empty")])
def test_errors_call_standard_input_by_its_name(given, told):
    stream = io.BytesIO(given)
    stream.name = "<stdin>"  # as Python calls it
    with pytest.raises(PictureError, match=f"^standard input: {told}"):
        open_picture(stream)


# Cut short


def jpeg(**options: object) -> bytes:
    """320x240, smooth: where it is cut, it is cut in the picture."""
    y, x = np.mgrid[:240, :320]
    file = io.BytesIO()
    image = Image.fromarray(np.stack([x * 255 // 320, y, 128 + 90 * np.sin(x / 9 + y / 7)], -1).astype(np.uint8))
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_jpeg_without_its_last_bytes_is_the_picture_with_a_warning(tmp_path, progressive, lost):
    content = jpeg(progressive=progressive)
    (tmp_path / "x.jpg").write_bytes(content[:-lost])
    with pytest.warns(PictureWarning, match=r"x\.jpg: cut short, its end is missing"):
        found = open_picture(tmp_path / "x.jpg")
    whole = np.asarray(Image.open(io.BytesIO(content)), dtype=int)
    assert np.abs(np.asarray(found)[:224] - whole[:224]).max() <= 2


def test_of_a_jpeg_a_strip_below_may_be_missing_and_no_more(tmp_path):
    content = jpeg()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) * 9 // 10])
    with pytest.warns(PictureWarning, match=r"x\.jpg: cut short, the lower \d+\.\d% of it is missing$"):
        found = np.asarray(open_picture(tmp_path / "x.jpg"), dtype=int)
    whole = np.asarray(Image.open(io.BytesIO(content)), dtype=int)
    assert np.array_equal(found[:192], whole[:192]) and (found[-8:] == 128).all()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match=r"damaged or cut short \(the lower \d+% of it is missing\)$"):
        open_picture(tmp_path / "x.jpg")


def test_data_are_read_whole_or_not_at_all():
    with pytest.raises(PictureError, match="damaged or cut short"):
        read_picture(io.BytesIO(jpeg()[:-20]), "x")


@pytest.mark.parametrize("length", [2, 30, 600])
def test_damaged_exif_costs_the_orientation_alone(tmp_path, length):
    exif = Image.Exif()
    exif[274] = 6
    exif[270] = "x" * 700
    two_colours(32, 16).save(tmp_path / "x.jpg", exif=exif)
    content = (tmp_path / "x.jpg").read_bytes()
    start = content.index(b"Exif") + 6
    (tmp_path / "x.jpg").write_bytes(content[:start] + b"\xff" * length + content[start + length :])
    assert open_picture(tmp_path / "x.jpg").size == (32, 16)


# Colour profiles. The values wanted are worked out here, from the published colours of the lights.

# Columns: red, green, blue in XYZ under D50, as the profiles hold them.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
COLOURS = [(200, 120, 60), (10, 90, 30), (128, 128, 128), (255, 255, 255), (0, 0, 0), (90, 60, 200), (240, 30, 30)]


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, pcs: bytes, kind: bytes, **tags: bytes) -> bytes:
    """An ICC profile of these tags (ICC.1:2022, 7.2 and 7.3)."""
    text = "test".encode("utf-16-be")
    named = b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    tags = {"desc": named, "cprt": named, "wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)} | tags
    table, body = b"", b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name.encode() + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    head = struct.pack(">I4xI4s4s4s", 132 + len(table) + len(body), 0x04000000, kind, space, pcs)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def of_lights(lights: np.ndarray, curve: bytes) -> bytes:
    columns = {f"{name}XYZ": b"XYZ \0\0\0\0" + fixed(*column) for name, column in zip("rgb", lights.T, strict=True)}
    return profile(b"RGB ", b"XYZ ", b"mntr", **columns, **{f"{name}TRC": curve for name in "rgb"})


SRGB_CURVE = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
P3 = of_lights(DISPLAY_P3, SRGB_CURVE)
ADOBE = of_lights(ADOBE_RGB, b"curv\0\0\0\0" + struct.pack(">IH", 1, 563))  # 2.2 and a bit, in 1/256
LINEAR_GREY = profile(b"GRAY", b"XYZ ", b"mntr", kTRC=b"curv\0\0\0\0" + struct.pack(">I", 0))


def encoded(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def decoded(values: np.ndarray) -> np.ndarray:
    values = values / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def in_srgb(lights: np.ndarray, light: np.ndarray) -> np.ndarray:
    return encoded(light @ (np.linalg.inv(SRGB) @ lights).T)


COLOUR_ROW = np.array([COLOURS], dtype=np.uint8)
WANTED = {
    "Display P3": (P3, in_srgb(DISPLAY_P3, decoded(COLOUR_ROW))),
    "Adobe RGB": (ADOBE, in_srgb(ADOBE_RGB, (COLOUR_ROW / 255) ** (563 / 256))),
}


@pytest.mark.parametrize("name", WANTED)
def test_a_colour_profile_is_brought_to_srgb(tmp_path, name):
    content, wanted = WANTED[name]
    assert np.abs(wanted - COLOUR_ROW).max() > 20
    image = Image.fromarray(COLOUR_ROW)
    image.save(tmp_path / "x.png", icc_profile=content)
    image.save(tmp_path / "x.webp", icc_profile=content, lossless=True)
    image.save(tmp_path / "x.tiff", icc_profile=content)
    image.resize((7 * 16, 16), Image.Resampling.NEAREST).save(
        tmp_path / "x.jpg", icc_profile=content, quality=100, subsampling=0
    )
    for suffix in ("png", "webp", "tiff"):
        assert np.abs(np.asarray(open_picture(tmp_path / f"x.{suffix}")) - wanted).max() <= 1.5
    assert np.abs(np.asarray(open_picture(tmp_path / "x.jpg"))[8:9, 8::16] - wanted).max() <= 4


def test_transparency_and_palettes_keep_their_profile(tmp_path):
    wanted = WANTED["Display P3"][1]
    clear = Image.fromarray(COLOUR_ROW).convert("RGBA")
    clear.putalpha(Image.fromarray(np.array([[255, 255, 255, 255, 255, 255, 0]], dtype=np.uint8)))
    clear.save(tmp_path / "x.png", icc_profile=P3)
    found = np.asarray(open_picture(tmp_path / "x.png"))
    assert np.abs(found[:, :6] - wanted[:, :6]).max() <= 1.5 and found[0, 6].tolist() == [255, 255, 255]
    Image.fromarray(COLOUR_ROW).quantize(7).save(tmp_path / "palette.png", icc_profile=P3)
    assert np.abs(np.asarray(open_picture(tmp_path / "palette.png")) - wanted).max() <= 1.5


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(tmp_path, mode):
    grey = np.array([[0, 20, 128, 200, 255]], dtype=np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "x.png", icc_profile=LINEAR_GREY)
    assert np.abs(np.asarray(open_picture(tmp_path / "x.png"))[..., 1] - encoded(grey / 255)).max() <= 1


def test_a_cmyk_profile(tmp_path):
    """Inks on a paper whose cyan is a mid-grey (L* = 50), as no rule of thumb would have it."""
    corners = np.full((2, 2, 2, 2, 3), (0, 128, 128), dtype=np.uint8)  # Lab; in order of cyan, magenta, yellow, black
    corners[0, 0, 0, 0], corners[1, 0, 0, 0] = (255, 128, 128), (128, 128, 128)
    ramp = bytes(range(256))
    lut = (
        b"mft1\0\0\0\0"
        + bytes([4, 3, 2, 0])
        + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
        + 4 * ramp
        + corners.tobytes()
        + 3 * ramp
    )
    image = Image.new("CMYK", (32, 16))
    image.paste((255, 0, 0, 0), (16, 0, 32, 16))
    for suffix in ("tiff", "jpg"):
        image.save(tmp_path / f"x.{suffix}", icc_profile=profile(b"CMYK", b"Lab ", b"prtr", A2B0=lut))
        found = open_picture(tmp_path / f"x.{suffix}")
        assert np.abs(np.array(found.getpixel((24, 8))) - 119).max() <= 2  # L* = 50 in sRGB
        assert np.abs(np.array(found.getpixel((4, 8))) - 255).max() <= 2


def test_srgb_in_any_makers_rounding_changes_no_value(tmp_path):
    image = noise(64, 64)
    for content in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), of_lights(SRGB, SRGB_CURVE)):
        image.save(tmp_path / "x.png", icc_profile=content)
        assert np.array_equal(open_picture(tmp_path / "x.png"), image)


@pytest.mark.parametrize("fault", ["cut", "garbage", "of a grey picture"])
def test_a_profile_that_cannot_be_used_leaves_the_pixels_and_a_warning(tmp_path, fault):
    content = {"cut": P3[:200], "garbage": b"garbage" * 99, "of a grey picture": LINEAR_GREY}[fault]
    image = noise(8, 8)
    image.save(tmp_path / "x.png", icc_profile=content)
    with pytest.warns(PictureWarning, match=r"x\.png: its colour profile cannot be used, taken for sRGB$"):
        assert np.array_equal(open_picture(tmp_path / "x.png"), image)


def test_a_profile_and_an_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(COLOUR_ROW).save(tmp_path / "x.png", exif=exif, icc_profile=P3)
    found = np.asarray(open_picture(tmp_path / "x.png"))
    assert found.shape == (7, 1, 3) and np.abs(found[:, 0] - WANTED["Display P3"][1][0]).max() <= 1.5


# Deep greys


def grey_of(path: Path, values: np.ndarray) -> list[int]:
    Image.fromarray(values[None]).save(path)
    found = np.asarray(open_picture(path))
    assert (found == found[..., :1]).all()
    return found[0, :, 0].tolist()


DEEP = {
    "floats to 1": (np.float32([0, 0.25, 0.5, 1]), [0, 64, 128, 255]),
    "dim floats": (np.float32([0, 0.1, 0.2]), [0, 26, 51]),
    "floats to 255": (np.float32([0, 7, 128, 255]), [0, 7, 128, 255]),
    "floats to 65535": (np.float32([0, 257, 65535]), [0, 1, 255]),
    "floats around 0": (np.float32([-1, 0, 1]), [0, 128, 255]),
    "floats of any size": (np.float32([1e6, 2e6, 5e6]), [0, 64, 255]),
    "a few brighter than white": (np.float32([0, 0.5] * 50 + [900]), [0, 128] * 50 + [255]),
    "no number": (np.float32([0, np.nan, 1, np.inf, -np.inf]), [0, 0, 255, 255, 0]),
    "no number at all": (np.float32([np.nan, np.nan]), [0, 0]),
    "one value": (np.float32([-3, -3]), [0, 0]),
    "whole numbers to 255": (np.int32([0, 1, 255]), [0, 1, 255]),
    "whole numbers to 65535": (np.int32([0, 257, 65535]), [0, 1, 255]),
    "whole numbers of 32 bits": (np.int32([0, 2**30, 2**31 - 1]), [0, 128, 255]),
    "whole numbers around 0": (np.int32([-100, 0, 100]), [0, 128, 255]),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_are_scaled_by_their_range(tmp_path, name):
    values, wanted = DEEP[name]
    assert grey_of(tmp_path / "x.tiff", values) == wanted


def test_unsigned_32_bits(tmp_path):
    """Written by hand, for Pillow writes none; values over 2**31 are no negative ones."""
    values = np.array([0, 2**31, 2**32 - 1], dtype="<u4").tobytes()
    tags = [
        (256, 3),
        (257, 1),
        (258, 32),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(values)),
        (339, 1),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(values)) + values + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert np.asarray(read_picture(io.BytesIO(content), "x"))[0, :, 0].tolist() == [0, 128, 255]


def test_floats_in_colour_are_told(tmp_path):
    values = np.zeros((1, 1, 3), dtype="<f4").tobytes() + struct.pack("<3H", 32, 32, 32)
    tags = [(256, 1), (257, 1), (258, 20), (259, 1), (262, 2), (273, 8), (277, 3), (278, 1), (279, 12), (339, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(values)) + values + struct.pack("<H", len(tags)) + entries + bytes(4)
    with pytest.raises(PictureError, match="x: a TIFF of a kind that Pillow cannot read"):
        read_picture(io.BytesIO(content), "x")


# HEIC


def test_heic_is_told_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("files.decoding.find_spec", lambda name: None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400))
    with pytest.raises(PictureError, match="HEIC: a HEIC picture: pip install pillow-heif, or convert it to JPEG$"):
        open_picture(tmp_path / "IMG_0001.HEIC")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    """A stand-in that registers itself as pillow-heif does."""
    two_colours(2, 1).save(file := io.BytesIO(), "PNG")

    def register_heif_opener() -> None:
        Image.register_open("HEIF", lambda source, name: Image.open(io.BytesIO(file.getvalue())), lambda start: True)

    module = types.ModuleType("pillow_heif")
    module.register_heif_opener = register_heif_opener
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr("files.decoding.find_spec", lambda name: module)
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setitem(Image.OPEN, "HEIF", None)  # for it to be taken away again
    monkeypatch.delitem(Image.OPEN, "HEIF")
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert opened(tmp_path / "x.heic") == rows([RED, BLUE])


# Large pictures


@pytest.mark.parametrize(
    "mode, suffix", [("RGB", "png"), ("RGB", "jpg"), ("CMYK", "jpg"), ("LA", "png"), ("F", "tiff")]
)
def test_a_large_picture_is_brought_down(tmp_path, monkeypatch, mode, suffix):
    image = two_colours(300, 200).convert(mode.replace("F", "L")).convert(mode)
    image.save(tmp_path / f"x.{suffix}", **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    whole = np.asarray(open_picture(tmp_path / f"x.{suffix}"), dtype=int)
    monkeypatch.setattr("files.decoding.LARGE", 20_000)
    found = np.asarray(open_picture(tmp_path / f"x.{suffix}"), dtype=int)
    assert found.shape == (100, 150, 3)
    assert np.abs(found[50, ::149] - whole[100, ::299]).max() <= 2


@pytest.mark.slow
def test_a_large_picture_is_no_word_on_the_screen(tmp_path):
    two_colours(30, 20).save(tmp_path / "x.png")
    code = "from PIL import Image; from files.pictures import open_picture; import sys; Image.MAX_IMAGE_PIXELS = 400; "
    code += "open_picture(sys.argv[1])"
    run = started(code, tmp_path / "x.png").ended()
    assert (run.returncode, run.stderr) == (0, "")


def test_a_jpeg_may_be_larger_than_pillow_takes(tmp_path, monkeypatch):
    """Telephones make them of 200 million pixels."""
    two_colours(320, 160).save(tmp_path / "x.jpg")
    two_colours(320, 160).save(tmp_path / "x.png")
    monkeypatch.setattr("files.decoding.LARGE", 20_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert open_picture(tmp_path / "x.jpg").size == (160, 80)
    with pytest.raises(PictureError, match="too large"):
        open_picture(tmp_path / "x.png")
    monkeypatch.setattr("files.decoding.LARGEST_JPEG", 51_000)
    with pytest.raises(PictureError, match="too large"):
        open_picture(tmp_path / "x.jpg")


def test_of_other_kinds_large_ones_are_refused(tmp_path, monkeypatch):
    """Their decoders take several times the memory of the picture."""
    two_colours(320, 160).save(tmp_path / "x.webp")
    monkeypatch.setattr("files.decoding.LARGE", 20_000)
    with pytest.raises(PictureError, match=r"x\.webp: too large, over 20000 pixels$"):
        open_picture(tmp_path / "x.webp")


def test_eight_thousand_pixels_a_side_are_not_large():
    assert LARGE == 8192**2


# Writing


SETTINGS = {
    "prompt": "a cat, 猫, \N{GRINNING FACE}",
    "scale": 0.6,
    "image": ["cat.png"],
    "sha256": {"cat.png": "ab" * 32},
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG"])
def test_a_picture_keeps_the_settings_that_made_it(tmp_path, suffix):
    image = two_colours(64, 48)
    save_picture(image, tmp_path / f"x{suffix}", SETTINGS)
    assert read_settings(tmp_path / f"x{suffix}") == SETTINGS
    assert np.abs(np.asarray(open_picture(tmp_path / f"x{suffix}"), dtype=int) - np.asarray(image)).max() <= 3
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]
    save_picture(image, tmp_path / f"y{suffix}")
    assert read_settings(tmp_path / f"y{suffix}") is None


def test_other_programs_can_read_the_settings(tmp_path):
    for suffix in ("png", "jpg", "webp"):
        save_picture(two_colours(), tmp_path / f"x.{suffix}", SETTINGS)
    assert json.loads(Image.open(tmp_path / "x.png").text["ipadapter"]) == SETTINGS
    for suffix in ("jpg", "webp"):
        comment = Image.open(tmp_path / f"x.{suffix}").getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"ASCII\0\0\0" and json.loads(comment[8:]) == {"ipadapter": SETTINGS}


def test_settings_beyond_measure_cost_no_picture(tmp_path):
    for suffix in ("png", "webp", "jpg"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            save_picture(two_colours(), tmp_path / f"x.{suffix}", {"prompt": "x" * 100_000})
        assert len(told) == (suffix == "jpg") and open_picture(tmp_path / f"x.{suffix}").size == (16, 8)
        assert (read_settings(tmp_path / f"x.{suffix}") is None) == (suffix == "jpg")


@pytest.mark.parametrize("text", ["", "[", "[1]", "3", "[" * 60_000, "1" * 5000, '{"ipadapter": [1]}'])
def test_garbage_in_the_place_of_settings_is_none(tmp_path, text):
    info, exif = PngInfo(), Image.Exif()
    info.add_text("ipadapter", text[14:-1] if text.startswith("{") else text)
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + text.encode()
    two_colours().save(tmp_path / "x.png", pnginfo=info)
    two_colours().save(tmp_path / "x.jpg", exif=exif)
    assert read_settings(tmp_path / "x.png") is read_settings(tmp_path / "x.jpg") is None


def test_reading_settings_of_what_is_no_picture_is_one_line(tmp_path):
    (tmp_path / "text.png").write_text("text")
    for name, told in (
        ("missing.png", "No such file"),
        ("text.png", "not a PNG, JPEG or WebP"),
        ("", "Is a directory"),
    ):
        with pytest.raises(PictureError, match=f"{name}: cannot be read \\(.*{told}") as error:
            read_settings(tmp_path / name)
        assert "\n" not in str(error.value)


def test_what_a_format_cannot_hold_is_told(tmp_path):
    with pytest.raises(PictureError, match="WEBP holds 16383"):
        save_picture(Image.new("RGB", (16384, 1)), tmp_path / "x.webp")
    with pytest.raises(PictureError, match=r"x\.gif: a name that ends in \.png, \.jpg, \.jpeg, \.webp is wanted"):
        save_picture(two_colours(), tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())


# Titles of sheets


def font_file(chars: str) -> bytes:
    """A TrueType font: a box for what it lacks, and another shape for each of these characters."""
    shapes = [[(0, 0), (0, 700), (500, 700), (500, 0)]]
    shapes += [[(0, 0), (100 + 60 * i, 700), (600, 0)] for i in range(len(chars))]
    glyphs, places = b"", [0]
    for shape in shapes:
        moves = np.diff([(0, 0), *shape], axis=0)
        outline = struct.pack(">hhhhhHH", 1, 0, 0, 600, 700, len(shape) - 1, 0) + bytes([1] * len(shape))
        outline += moves[:, 0].astype(">i2").tobytes() + moves[:, 1].astype(">i2").tobytes()
        glyphs += outline + b"\0" * (-len(outline) % 4)
        places.append(len(glyphs))
    count, codes = len(shapes), [*sorted(map(ord, chars)), 0xFFFF]
    deltas = [(i + 1 - code) % 65536 for i, code in enumerate(codes[:-1])] + [1]
    segments = b"".join(np.array(row, ">u2").tobytes() for row in (codes, [0], codes, deltas, [0] * len(codes)))
    cmap = struct.pack(">HHHHIHHHHHHH", 0, 1, 3, 1, 12, 4, 14 + len(segments), 0, 2 * len(codes), 0, 0, 0) + segments
    tables = {
        "cmap": cmap,
        "glyf": glyphs,
        "head": struct.pack(">IIIIHH16xhhhhHHhhh", 0x10000, 0, 0, 0x5F0F3CF5, 0, 1000, 0, 0, 600, 700, 0, 8, 2, 1, 0),
        "hhea": struct.pack(">IhhhH11hH", 0x10000, 800, -200, 0, 650, *[0] * 11, count),
        "hmtx": struct.pack(">Hh", 650, 0) * count,
        "loca": struct.pack(f">{count + 1}I", *places),
        "maxp": struct.pack(">IH13H", 0x10000, count, 8, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0),
    }
    head, body = struct.pack(">IHHHH", 0x10000, len(tables), 64, 2, 48), b""
    for name, content in tables.items():
        head += name.encode() + struct.pack(">III", 0, 12 + 16 * len(tables) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    return head + body


@pytest.fixture
def fonts(tmp_path, monkeypatch) -> Path:
    """A system whose fonts are those in this folder."""
    monkeypatch.setattr("files.fonts.PLACES", (str(tmp_path),))
    for function in (font_files, font_for):
        function.cache_clear()
    yield tmp_path
    for function in (font_files, font_for):
        function.cache_clear()


def test_a_font_of_the_system_shows_what_ours_lacks(fonts):
    (fonts / "a.ttf").write_bytes(b"damaged")
    (fonts / "b.ttf").write_bytes(font_file("к"))
    (fonts / "deep/folder").mkdir(parents=True)
    (fonts / "deep/folder/c.ttf").write_bytes(font_file("окт猫"))
    text, font = lettering("кот 猫", 20)
    assert text == "кот 猫" and Path(font.path).name == "c.ttf" and all(shows(font, char) for char in text)
    assert not shows(font, "я")
    assert lettering("plain words", 20)[1].getname()[0] == "Aileron"  # Pillow's own


def test_without_a_font_letters_are_written_in_others(fonts):
    assert lettering("a café,\n ÅNGSTRÖM", 20)[0] == "a cafe, ANGSTROM"
    assert lettering("cafe\N{COMBINING ACUTE ACCENT}", 20)[0] == "cafe"
    assert lettering("猫 a\N{GRINNING FACE}", 20)[0] == "\\u732b a\\U0001f600"
    (fonts / "b.ttf").write_bytes(font_file("猫"))
    font_files.cache_clear(), font_for.cache_clear()
    assert lettering("猫犬", 20)[0] == "猫\\u72ac"


def test_what_fits_no_line_is_broken_and_cut(fonts):
    text, font = lettering("a photograph of a cat in the snow, at night, with stars above it, oil on canvas", 20)
    for width in (60, 100, 300, 5000):
        lines = wrapped(text, font, width)
        assert len(lines) <= 3 and all(font.getlength(line) <= width for line in lines)
        shown = " ".join(lines)
        assert shown == text if width == 5000 else shown.endswith("...") or width == 300
    assert wrapped("x" * 40, font, 60)[0] == "x" * 6 or font.getlength("x" * 7) > 60
    assert wrapped("", font, 60) == []


def test_titles_stay_above_their_column(fonts):
    image = Image.new("RGB", (128, 128), "blue")
    page = np.asarray(sheet([[image, image]], ["short", "a title far longer than its column is wide, and more " * 5]))
    top = page[: len(page) - 128 - 4]
    assert (top[:, 132:136] == 255).all() and (top[:, -4:] == 255).all() and (page[:4] == 255).all()
    assert (page[-132:-4, 4:132] == (0, 0, 255)).all()
    assert (top[:, 136:-4] < 255).any(axis=(1, 2)).sum() > 2 * (top[:, 4:132] < 255).any(axis=(1, 2)).sum()
