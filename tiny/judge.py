"""The judge: a small network that tells which thing a drawing shows and in which style, used by measures alone.

It shares nothing with what it judges: no weights, no text, no contrast; and its drawings are split in another way
(`known`). What a thing looks like is the mean of its known drawings, so the file holds the network only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize, relu

from files.pictures import from_pil
from tiny import drawings
from tiny.draw import h
from tiny.drawings import Drawings
from tiny.presets import SIZE
from tiny.trainer import WEIGHTS
from training.measures import centre
from weights import read

STYLES = ("emojione", "fluent 3d", "fluent flat", "noto", "noto classic", "openmoji", "twemoji")
WIDTHS = (32, 96, 176)  # channels at 32x32, 16x16 and 8x8 positions
DIM = 128  # numbers that say which thing it is
FILE = "judge-tiny.safetensors"
HELD_BACK = 0.1  # share of all drawings that it has not learned from
Told = dict[str, float]


class Judge(nn.Module):
    """A residual network (arXiv 1512.03385) of plain convolutions, which a CPU does best."""

    def __init__(self):
        super().__init__()
        fine, middle, coarse = WIDTHS
        self.fine = nn.Sequential(*step(3, fine, 6, 4), Block(fine))
        self.middle = nn.Sequential(*step(fine, middle, 3, 2), Block(middle))
        self.coarse = nn.Sequential(*step(middle, coarse, 3, 2), Block(coarse))
        self.thing = nn.Linear(5 * coarse, DIM)
        self.style = nn.Linear(2 * middle + 2 * coarse, len(STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, 3, 128, 128) in [-1, 1] -> things (n, 128), unit length, and logits of the styles (n, 7)."""
        middle = self.middle(self.fine(x))
        coarse = self.coarse(middle)
        most = coarse.amax((2, 3))
        # Where in the picture: a thing has a shape, a style has none.
        quarters = adaptive_avg_pool2d(coarse, 2).flatten(1)
        outlines = [middle.mean((2, 3)), middle.amax((2, 3)), coarse.mean((2, 3)), most]
        return normalize(self.thing(torch.cat([quarters, most], 1)), dim=-1), self.style(torch.cat(outlines, 1))


def step(before: int, after: int, size: int, stride: int) -> tuple[nn.Module, ...]:
    """A convolution to fewer positions."""
    return nn.Conv2d(before, after, size, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)


class Block(nn.Module):
    """Two convolutions, added to x."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(*step(width, width, 3, 1), *step(width, width, 3, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return relu(x + self.layers(x), inplace=True)


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
    means: Tensor  # (things, 128), unit length

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, 3, 128, 128) in [-1, 1] -> how much each shows each thing (n, things), and each style (n, 7)."""
        things, styles = looked_at(self.judge, x)
        return things @ self.means.T, styles


@torch.no_grad()
def looked_at(judge: Judge, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the judge finds in each picture and in its mirror image together, shapes as of Judge."""
    found = [judge(torch.cat([part, part.flip(3)])) for part in x.clamp(-1, 1).split(64)]
    things, styles = (torch.cat([sum(v.chunk(2)) / 2 for v in values]) for values in zip(*found, strict=True))
    return normalize(things, dim=-1), styles


def open_network(weights: Path = WEIGHTS) -> Judge:
    judge = Judge().requires_grad_(False).eval()
    judge.load_state_dict({key: value.float() for key, value in read(weights / FILE).items()})
    return judge


def classifier(device: torch.device) -> Callable[[list[Image.Image]], tuple[Tensor, Tensor]]:
    """The network alone, for pictures of any size: what `looked_at` makes of them."""
    judge = open_network().to(device)

    def look(pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        return looked_at(judge, torch.cat([from_pil(centre(picture, SIZE)) for picture in pictures]).to(device))

    return look


def bench(judge: Judge, data: Drawings, learned: Tensor) -> Bench:
    """Look at all known drawings once."""
    captions = [data.captions[i] for i in learned.nonzero()[:, 0].tolist()]
    things = sorted(set(captions))
    place = {thing: i for i, thing in enumerate(things)}
    rows = torch.tensor([place[caption] for caption in captions])
    parts = data.pixels[learned].split(500)
    seen = torch.cat([looked_at(judge, drawings.to_unit(part))[0] for part in parts])
    sums = torch.zeros(len(things), seen.shape[1]).index_add_(0, rows, seen)
    return Bench(judge, things, normalize(sums, dim=-1))


def told(judge: Bench, y: Tensor, things: Sequence[str], styles: Sequence[str], among: int | None = None) -> Told:
    """Share of pictures y (n, 3, 128, 128) that show what was asked for: the thing, the style, both.

    The thing is told where of all the things that were asked for it is the likeliest ("of five": among the five likeliest),
    the style where it is the likeliest of the seven. Pictures of things that the judge does not know are left out.

    Args:
        among: as if only so many had been asked for at a time; None: all of them.
    """
    place = {thing: i for i, thing in enumerate(judge.things)}
    some = [i for i, thing in enumerate(things) if thing in place]
    shown, drawn = judge(y[some])
    right = torch.tensor([place[things[i]] for i in some])
    ranks = []
    for part in torch.arange(len(some)).split(among or len(some)):
        at_hand, own = right[part].unique(return_inverse=True)
        scores = shown[part][:, at_hand]
        ranks.append((scores > scores.gather(1, own[:, None])).sum(1))
    rank, style = torch.cat(ranks), drawn.argmax(1) == torch.tensor([STYLES.index(styles[i]) for i in some])
    found = {"thing": rank < 1, "thing of five": rank < 5, "style": style, "both": (rank < 1) & style}
    found["both, of five"] = (rank < 5) & style
    return {name: right.float().mean().item() for name, right in found.items()} | {"pictures": len(some)}


def ceiling(judge: Bench, data: Drawings, learned: Tensor, among: int | None = None) -> Told:
    """What the judge makes of real drawings that it has not seen: nothing that is judged by it can be told oftener."""
    held = (~learned).nonzero()[:, 0].tolist()
    x = drawings.to_unit(data.pixels[held])
    return told(judge, x, [data.captions[i] for i in held], [data.styles[i] for i in held], among)
