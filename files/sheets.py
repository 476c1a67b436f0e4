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


COLOURS = ("black", "#c0392b", "#2471a3", "#1e8449")
MOST = 2000  # points of a curve; of more, means stand for those side by side


def curve(values: Sequence[float], x_title: str, y_title: str) -> Image.Image:
    """Values against their number, 1, 2, ...: each in grey, and in black the mean of those around it."""
    numbers = np.array([v for v in values if math.isfinite(v)] or [0.0])
    last = len(numbers)
    numbers = np.array([part.mean() for part in np.array_split(numbers, min(last, MOST))])
    window = max(1, len(numbers) // 20)
    kernel = np.ones(min(len(numbers), 2 * window + 1))
    smooth = np.convolve(numbers, kernel, "same") / np.convolve(np.ones(len(numbers)), kernel, "same")
    axes = Axes((1, last), tuple(np.percentile(numbers, [0, 99]).tolist()), x_title, y_title)
    x = np.linspace(1, last, len(numbers))
    axes.line(x, numbers, "#bbbbbb", 1)
    axes.line(x, smooth, "black", 3)
    return axes.page


def plot(lines: dict[str, Sequence[tuple[float, float]]], x_title: str, y_title: str) -> Image.Image:
    """Lines of points (x, y), each with its name in its colour."""
    points = np.array(
        [point for line in lines.values() for point in line if all(map(math.isfinite, point))] or [(0, 0)]
    )
    axes = Axes(*((float(column.min()), float(column.max())) for column in points.T), x_title, y_title)
    for i, (name, line) in enumerate(lines.items()):
        axes.line(*np.array(line).T, COLOURS[i % len(COLOURS)], 2)
        axes.draw.text(
            (RIGHT - 8, TOP + 18 + 18 * i), name, fill=COLOURS[i % len(COLOURS)], font=axes.font, anchor="rs"
        )
    return axes.page


def stacked(pages: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width below each other."""
    whole = Image.new("RGB", (pages[0].width, sum(page.height for page in pages)), "white")
    for i, page in enumerate(pages):
        whole.paste(page, (0, sum(above.height for above in pages[:i])))
    return whole


LEFT, TOP, RIGHT, BOTTOM = 80, 24, 936, 432


class Axes:
    """A page with two axes; x and y: their ends."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_title: str, y_title: str):
        self.x, self.y = x, (y if y[1] > y[0] else (y[0] - 1, y[0] + 1))
        self.page = Image.new("RGB", (960, 480), "white")
        self.draw, self.font = ImageDraw.Draw(self.page), ImageFont.load_default(14)
        for i in range(5):
            y, x = BOTTOM - i / 4 * (BOTTOM - TOP), LEFT + i / 4 * (RIGHT - LEFT)
            self.draw.line([(LEFT, y), (RIGHT, y)], fill="#dddddd")
            self.text((LEFT - 8, y), f"{self.y[0] + i / 4 * (self.y[1] - self.y[0]):.4g}", "rm")
            self.text((x, BOTTOM + 8), f"{self.x[0] + i / 4 * (self.x[1] - self.x[0]):,.0f}", "mt")
        self.text(((LEFT + RIGHT) / 2, BOTTOM + 28), x_title, "mt")
        self.text((LEFT, TOP - 8), y_title, "ls")

    def text(self, at: tuple[float, float], text: str, anchor: str) -> None:
        self.draw.text(at, text, fill="black", font=self.font, anchor=anchor)

    def line(self, x: np.ndarray, y: np.ndarray, colour: str, width: int) -> None:
        """A single point is a dot."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = LEFT + ((x - x0) / (x1 - x0) if x1 > x0 else np.full(len(x), 0.5)) * (RIGHT - LEFT)
        up = BOTTOM - (y.clip(y0, y1) - y0) / (y1 - y0) * (BOTTOM - TOP)
        if len(x) > 1:
            self.draw.line(list(zip(across.tolist(), up.tolist(), strict=True)), fill=colour, width=width)
        else:
            self.draw.ellipse([across[0] - 3, up[0] - 3, across[0] + 3, up[0] + 3], fill=colour)
