"""A sheet of where each image prompt acted and where each word attended, out of what `pictures` tells by `on_seen`."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from clip import tokenize
from clip.tokenizer import words
from files.heat import heated
from files.sheets import sheet, stacked
from ipadapter import Seen

SIDE = 176  # pixels of a picture on the sheet
COLUMNS = 6


def attention_sheet(
    # One that was made.
    picture: Image.Image,
    # Where its prompt acted: what `on_seen` was told of it.
    seen: Seen,
    # The text prompt; its words get a map each. One that is not plain: as `words_of` has it.
    text: str | Sequence[tuple[str, Sequence[int]]] = "",
    # The image prompts that were asked for, in order: the names of the pictures of each.
    names: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """The picture; beside it how large the text's term and each image prompt's are at each place; below, the words.

    The terms are on one scale, from 0 to the largest of them all, and each has its mean share in its title. Of an image
    prompt of several pictures there is also how its attention is divided between them, from 0 to 1. A word's map is the
    mean over its tokens, from its own least to its own largest value.
    """
    picture, top = picture.crop(seen.box) if seen.box else picture, seen.shares.max()
    names = named(seen.groups, names)
    share = [f"{share:.0%}" for share in seen.shares.mean(dim=(1, 2)).tolist()]
    cells = [("the picture", picture)]
    if names:
        cells.append((f"{share[0]} text", laid(picture, seen.shares[0] / top)))
    for i, pictures in enumerate(names):
        cells.append((f"{share[1 + i]} {', '.join(pictures)}", laid(picture, seen.shares[1 + i] / top)))
        if len(pictures) > 1:
            parts = seen.images[i].chunk(len(pictures))
            cells += [(f"of it {name}", laid(picture, p.sum(dim=0))) for name, p in zip(pictures, parts, strict=True)]
    spoken = words(tokenize(text)[0].tolist()) if isinstance(text, str) else text
    attention = [(word, seen.text[places].mean(dim=0)) for word, places in spoken]
    told = [(word, laid(picture, (m - m.min()) / (m.max() - m.min()).clamp(min=1e-9))) for word, m in attention]
    rows = [part for row in (cells, told) for part in in_rows(row, min(COLUMNS, max(len(cells), len(told))))]
    return stacked([sheet([[image for _, image in row]], [title for title, _ in row], SIDE) for row in rows])


def named(groups: Sequence[int], names: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """The names of each group's pictures as those of each image prompt; of a group that makes several they are counted."""
    return [
        [f"{', '.join(names[group])} {groups[:i].count(group) + 1}"] if groups.count(group) > 1 else names[group]
        for i, group in enumerate(groups)
        if group < len(names)
    ]


def in_rows(cells: list, columns: int) -> list[list]:
    """Rows of so many cells; what lacks of the last one is left empty."""
    filled = cells + [("", None)] * (-len(cells) % columns)
    return [filled[i : i + columns] for i in range(0, len(filled), columns)]


def laid(picture: Image.Image, heat: Tensor) -> Image.Image:
    return heated(picture, heat.cpu().numpy())
