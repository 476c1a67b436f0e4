"""Sheets of pictures with captions, and curves."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files.fonts import lettering, wrapped


def sheet(
    rows: Sequence[Sequence[Image.Image | None]], titles: Sequence[str] = (), side: int | None = None
) -> Image.Image:
    """Pictures in a grid on white, with a title above each column; None leaves a place empty.

    Titles may be in any script. Long ones are broken into lines, and cut after three.

    Args:
        rows: rows of equal length.
        titles: one per column, or none at all.
        side: width of a column in pixels; by default that of the widest picture in the last column.
    """
    side = side or max(row[-1].width for row in rows if row[-1])
    gap = max(4, side // 32)
    lettered = [lettering(title, max(10, side // 10)) for title in titles]
    lines = [wrapped(text, font, side) for text, font in lettered]
    line_height = max((font.getbbox("Ag")[3] for _, font in lettered), default=0)
    fitted = [[image and fit(image, side) for image in row] for row in rows]
    heights = [max((image.height for image in row if image), default=side) for row in fitted]
    top = max(map(len, lines), default=0) * line_height + (2 * gap if titles else gap)
    page = Image.new("RGB", (gap + (side + gap) * len(rows[0]), top + sum(h + gap for h in heights)), "white")
    draw = ImageDraw.Draw(page)
    for column, (text, (_, font)) in enumerate(zip(lines, lettered, strict=True)):
        x, y = gap + column * (side + gap) + side / 2, top / 2 - (len(text) - 1) / 2 * line_height
        for i, line in enumerate(text):
            draw.text((x, y + i * line_height), line, fill="black", font=font, anchor="mm")
    y = top
    for row, height in zip(fitted, heights, strict=True):
        for column, image in enumerate(row):
            if image:
                page.paste(
                    image, (gap + column * (side + gap) + (side - image.width) // 2, y + (height - image.height) // 2)
                )
        y += height + gap
    return page


def fit(image: Image.Image, side: int) -> Image.Image:
    """Scale to a width of `side`, and no higher than that unless the picture is taller than wide."""
    factor = side / max(image.size) if image.height > 2 * image.width else side / image.width
    return image.resize(
        (max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.LANCZOS
    )


def curve(values: Sequence[float], x_title: str, y_title: str) -> Image.Image:
    """Values against their number, 1, 2, ...: each in grey, and in black the mean of those around it."""
    size, left, top, right, bottom = (960, 480), 80, 24, 936, 432
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    values = np.array([v for v in values if math.isfinite(v)] or [0.0])
    window = max(1, len(values) // 20)
    kernel = np.ones(min(len(values), 2 * window + 1))
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
    low, high = np.percentile(values, [0, 99])
    low, high = (low, high) if high > low else (low - 1, high + 1)

    def points(row: np.ndarray) -> list[tuple[float, float]]:
        x = np.linspace(left, right, len(row)) if len(row) > 1 else np.array([(left + right) / 2])
        y = bottom - (row.clip(low, high) - low) / (high - low) * (bottom - top)
        return list(zip(x.tolist(), y.tolist(), strict=True))

    for i in range(5):
        y = bottom - i / 4 * (bottom - top)
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((left - 8, y), f"{low + i / 4 * (high - low):.4g}", fill="black", font=font, anchor="rm")
        x = left + i / 4 * (right - left)
        draw.text((x, bottom + 8), f"{1 + i / 4 * (len(values) - 1):,.0f}", fill="black", font=font, anchor="mt")
    draw.text(((left + right) / 2, bottom + 28), x_title, fill="black", font=font, anchor="mt")
    draw.text((8, 4), y_title, fill="black", font=font)
    for row, colour, width in ((values, "#bbbbbb", 1), (smooth, "black", 3)):
        if len(row) > 1:
            draw.line(points(row), fill=colour, width=width)
        else:
            (x, y) = points(row)[0]
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    return page
