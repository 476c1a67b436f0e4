"""A map laid over a picture as colours, from cold to hot."""

import numpy as np
from PIL import Image

COLOURS = ((20, 11, 52), (88, 20, 110), (165, 44, 96), (225, 83, 50), (252, 165, 10), (246, 250, 150))
SHOWN = 0.7  # how much of the result is the map; the rest is the picture, in grey


def heated(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey under the map's colours, of the picture's size.

    heat: (rows, columns), 0 the coldest colour, 1 the hottest; on any grid that lies over the whole picture.
    """
    grid = Image.fromarray(np.asarray(heat, dtype=np.float32))
    smooth = np.asarray(grid.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(smooth, stops, channel) for channel in zip(*COLOURS, strict=True)], axis=-1)
    coloured = Image.fromarray(colours.round().astype(np.uint8))
    return Image.blend(picture.convert("L").convert("RGB"), coloured, SHOWN)
