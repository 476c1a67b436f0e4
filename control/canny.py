"""Canny's edge detector (IEEE PAMI 8(6), 1986), as ControlNets for edges are used to it: OpenCV's variant of it.

Sobel gradients without a blur before them, |dx| + |dy| for their length, of three colours the strongest.
"""

import numpy as np
from PIL import Image

LOW, HIGH = 100, 200  # the thresholds that ControlNets for edges are used with


def canny(picture: Image.Image, low: int = LOW, high: int = HIGH) -> Image.Image:
    """White lines on black, RGB, as large as the picture.

    Args:
        low, high: lengths of a gradient, of 8-bit colours: above `high` is an edge, and above `low` what is connected
            to one.
    """
    dx, dy, length = gradient(np.asarray(picture.convert("RGB"), dtype=np.int32))
    ridge = thin(dx, dy, length) & (length > low)
    edges = connected(ridge & (length > high), ridge)
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def gradient(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the colour whose gradient is the longest, x (H, W, 3) -> dx, dy and |dx| + |dy|, (H, W) each."""
    wide = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down, across = (wide[:-2] + 2 * wide[1:-1] + wide[2:]), (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:])
    dx, dy = down[:, 2:] - down[:, :-2], across[2:] - across[:-2]
    length = abs(dx) + abs(dy)
    strongest = length.argmax(-1)[..., None]
    return tuple(np.take_along_axis(one, strongest, -1)[..., 0] for one in (dx, dy, length))


def thin(dx: np.ndarray, dy: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Where the gradient is longer than on both sides of it: across, down, or along one of the diagonals."""
    height, width = length.shape
    wide = np.pad(length, 1)

    def beside(down: int, right: int) -> np.ndarray:
        return wide[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    tangent = np.sqrt(2) - 1  # of 22.5 degrees
    across = abs(dy) < tangent * abs(dx)
    upright = abs(dy) > (tangent + 2) * abs(dx)
    falling = (dx < 0) == (dy < 0)
    # Of two neighbours that are equal the first counts; on a diagonal neither does.
    along_x = (length > beside(0, -1)) & (length >= beside(0, 1))
    along_y = (length > beside(-1, 0)) & (length >= beside(1, 0))
    diagonal = np.where(
        falling,
        (length > beside(-1, -1)) & (length > beside(1, 1)),
        (length > beside(-1, 1)) & (length > beside(1, -1)),
    )
    return np.where(across, along_x, np.where(upright, along_y, diagonal))


def connected(strong: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """All of the ridge that touches a strong point, over any number of others."""
    found, front = strong.copy(), list(zip(*strong.nonzero(), strict=True))
    height, width = ridge.shape
    while front:
        i, j = front.pop()
        rows, columns = slice(max(i - 1, 0), min(i + 2, height)), slice(max(j - 1, 0), min(j + 2, width))
        new = ridge[rows, columns] & ~found[rows, columns]
        if new.any():
            found[rows, columns] |= new
            front += [(rows.start + di, columns.start + dj) for di, dj in zip(*new.nonzero(), strict=True)]
    return found
