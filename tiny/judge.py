"""The judge: a small network that tells which thing a drawing shows and in which style, used by measures alone.

It shares nothing with what it judges: no weights, no text, no contrast; and its drawings are split in another way
(`known`). What a thing looks like is the mean of its known drawings, so the file holds the network only.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, silu

from tiny import drawings
from tiny.draw import h
from tiny.drawings import Drawings

STYLES = ("emojione", "fluent 3d", "fluent flat", "noto", "noto classic", "openmoji", "twemoji")
SIDE = 64  # pixels that it looks at
WIDTHS = ((48, 2), (80, 3), (104, 4))  # channels and blocks at 16x16, 8x8 and 4x4 positions
HELD_BACK = 0.1  # share of all drawings that it has not learned from


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, stride=2, padding=2)
        layers, before = [], 24
        for width, blocks in WIDTHS:
            layers += [Narrow(before, width), *(Block(width) for _ in range(blocks))]
            before = width
        self.layers = nn.Sequential(*layers)
        self.thing = nn.Linear(2 * before, 96)
        self.style = nn.Linear(2 * before, len(STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, 3, 64, 64) in [-1, 1] -> things (n, 96), unit length, and logits of the styles (n, 7)."""
        x = silu(self.layers(self.stem(x)))
        x = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return normalize(self.thing(x), dim=-1), self.style(x)


class Narrow(nn.Sequential):
    """Half the side, more channels."""

    def __init__(self, before: int, width: int):
        super().__init__(nn.GroupNorm(1, before), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(before, width, 1))


class Block(nn.Module):
    """Each channel looks around for itself, then all of them meet at each position; added to x."""

    def __init__(self, width: int):
        super().__init__()
        self.around = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.meet = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.meet(silu(self.norm(self.around(x))))


def small(x: Tensor) -> Tensor:
    """(n, 3, 128, 128) -> what the judge looks at."""
    return interpolate(x, size=(SIDE, SIDE), mode="area")


def known(thing: str, style: str) -> bool:
    """Whether the judge learns from this drawing: its own split, across the three of the tiny model."""
    return h(f"judge/{style}/{thing}") >= HELD_BACK


def gather(data: Path = drawings.DATA) -> tuple[Drawings, Tensor]:
    """All drawings of all three splits, and which of them the judge learns from (n,)."""
    parts = [drawings.load(split, data=data) for split in drawings.SPLITS]
    whole = Drawings(
        torch.cat([p.pixels for p in parts]),
        *([word for p in parts for word in getattr(p, field)] for field in ("captions", "styles", "keys")),
    )
    return whole, torch.tensor([known(*names) for names in zip(whole.captions, whole.styles, strict=True)])


@dataclass
class Bench:
    """A judge and what it knows."""

    judge: Judge
    things: list[str]
    means: Tensor  # (things, 96), unit length

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, 3, 128, 128) in [-1, 1] -> how much each shows each thing (n, things), and each style (n, 7)."""
        things, styles = zip(*(self.judge(small(part.clamp(-1, 1))) for part in x.split(256)), strict=True)
        return torch.cat(things) @ self.means.T, torch.cat(styles)


@torch.no_grad()
def bench(judge: Judge, data: Drawings, learned: Tensor) -> Bench:
    """Look at all known drawings once."""
    picked = learned.nonzero()[:, 0].tolist()
    things = sorted({data.captions[i] for i in picked})
    place = {thing: i for i, thing in enumerate(things)}
    rows = torch.tensor([place[data.captions[i]] for i in picked])
    seen = torch.cat([judge(small(drawings.to_unit(data.pixels[part])))[0] for part in torch.tensor(picked).split(256)])
    sums = torch.zeros(len(things), seen.shape[1]).index_add_(0, rows, seen)
    return Bench(judge, things, normalize(sums, dim=-1))


def accuracy(found: Bench, data: Drawings, held: list[int]) -> dict[str, float]:
    """Of drawings that the judge has not seen, of things that it knows: right at once, among the first five; styles."""
    place = {thing: i for i, thing in enumerate(found.things)}
    held = [i for i in held if data.captions[i] in place]
    things, styles = found(drawings.to_unit(data.pixels[held]))
    right = torch.tensor([place[data.captions[i]] for i in held])
    rank = (things > things.gather(1, right[:, None])).sum(1)
    style = torch.tensor([STYLES.index(data.styles[i]) for i in held])
    return {
        "thing": (rank < 1).float().mean().item(),
        "thing among five": (rank < 5).float().mean().item(),
        "style": (styles.argmax(1) == style).float().mean().item(),
        "drawings": len(held),
        "things": len(found.things),
    }
