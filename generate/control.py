"""Hints for ControlNets and T2I-Adapters: what a picture is, for the net that is to follow it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip import preprocess
from control import Control, ControlNetUnion, StyleAdapter, T2IAdapter
from control.canny import canny
from files.colours import to_rgb
from files.errors import Notice, UserError
from files.masks import open_mask, values
from files.pictures import Picture, from_pil, open_picture
from generate.canvas import Canvas
from generate.models import Models
from weights.control import INPAINT, SHUFFLE, Net, task_of


@dataclass(frozen=True)
class Hint:
    """What a net is to follow, how far, when and where. Pictures as files or opened."""

    # Lines, depth, a skeleton, ...: what the net was trained on, RGB; it is brought to the size of the picture made. None:
    # `init`, for a net that inpaints. Several: of as many types, for a Union, which reads them together.
    picture: Picture | Sequence[Picture] | None = None
    # Which of the nets that were opened, in their order.
    net: int = 0
    # What its outputs are multiplied by; 0 is off. Of several pictures one for all, or one for each.
    scale: float | Sequence[float] = 1.0
    # It acts in step i of N where start <= i / N and (i + 1) / N <= until.
    start: float = 0.0
    until: float = 1.0
    # Where it acts: white, and not where black.
    mask: Picture | None = None
    # On the prompt alone and not on its absence, and the finer the more weakly; for empty prompts (ControlNets).
    guess: bool = False
    # Take the edges of the picture (Canny), not the picture.
    edges: bool = False
    # Which type of hint, for a Union, of several one for each; None: as the picture's name says. Others: "shuffle" pools
    # the outputs, "inpaint" marks what is made anew; None: where the net's file is called so.
    control_type: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.until <= 1:
            raise UserError(
                f"`from` {self.start:g} and `until` {self.until:g}: two numbers from 0 to 1 that rise are wanted"
            )
        for name in ("control_type", "scale"):
            given = getattr(self, name)
            if isinstance(given, list | tuple) and len(given) != len(self.pictures):
                raise UserError(f"`{name}`: {len(given)} given, for {len(self.pictures)} hints: one for each is wanted")

    @property
    def pictures(self) -> list[Picture | None]:
        return list(self.picture) if isinstance(self.picture, list | tuple) else [self.picture]


def follow(
    models: Models, hints: Sequence[Hint], height: int, width: int, canvas: Canvas | None = None
) -> list[Control]:
    """Hints read by their nets, which happens once a run.

    Args:
        height, width: of the pictures made.
        canvas: what they begin with; where a part of it is worked on, so it is of the hints.

    Raises:
        UserError: a net that was not opened, sides or settings that it cannot have, a picture that cannot be used.
    """
    check_hints(models, hints, height, width)
    nets: dict[Path, Net] = {}
    for file in dict.fromkeys(models.controls[hint.net] for hint in hints):
        nets[file] = models.control(file)
    return [read(nets[models.controls[hint.net]], models, hint, height, width, canvas) for hint in hints]


def read(net: Net, models: Models, hint: Hint, height: int, width: int, canvas: Canvas | None) -> Control:
    file, kind = models.controls[hint.net], hint.control_type
    scale, how = hint.scale, {}
    if isinstance(net, StyleAdapter):
        return Control(net, net.encode(look(models, picture_of(hint.picture, canvas))), scale, hint.start, hint.until)
    box = canvas.part(height, width) if canvas else None
    whole = canvas and canvas.picture.size
    tasks = tasks_of(net, hint)
    pixels = torch.cat([pixels_of(net, one, hint.edges, height, width, canvas, box) for one in hint.pictures])
    if not tasks and called(INPAINT, kind, file) and not isinstance(net, T2IAdapter):
        pixels = torch.where(anew(canvas, file, height, width, box), -1.0, pixels)
    pixels = pixels.to(models.device, models.dtype)
    if len(tasks) > 1:  # each scale goes into the net
        scales = [hint.scale] * len(tasks) if isinstance(hint.scale, float | int) else hint.scale
        scale, how = float(any(scales)), {"scales": scales}
    mask = None if hint.mask is None else mask_of(hint.mask, whole, box).to(models.device)
    pool = not tasks and called(SHUFFLE, kind, file)
    return Control(net, net.encode(pixels, *tasks, **how), scale, hint.start, hint.until, mask, hint.guess, pool)


def pixels_of(
    net: Net,
    picture: Picture | None,
    edges: bool,
    height: int,
    width: int,
    canvas: Canvas | None,
    box: tuple[int, ...] | None,
) -> Tensor:
    """A hint as a net reads it, (1, 1 or 3, height, width) in [0, 1]."""
    picture = picture_of(picture, canvas)
    picture = canny(picture) if edges else picture
    picture = brought(picture, height, width, canvas and canvas.picture.size, box)
    if isinstance(net, T2IAdapter) and net.config.hint_channels == 1:
        return values(picture.convert("L"))
    return from_pil(picture) / 2 + 0.5


def look(models: Models, picture: Image.Image) -> Tensor:
    """What a style adapter reads of a picture: the image tower's last layer, (1, 1 + patches, width)."""
    tower = models.style_encoder()
    pixels = preprocess(to_rgb(picture), tower.config.image_size).to(models.device, models.dtype)
    return tower.ultimate(tower.penultimate(pixels))


def tasks_of(net: Net, hint: Hint) -> list[int]:
    """The type of each picture, for a Union; of other nets none. Raises WeightsError."""
    kinds = hint.control_type
    kinds = [kinds] * len(hint.pictures) if kinds is None or isinstance(kinds, str) else kinds
    found = [task_of(net, kind, named(picture, hint.edges)) for kind, picture in zip(kinds, hint.pictures, strict=True)]
    return [task for task in found if task is not None]


def check_hints(models: Models, hints: Sequence[Hint], height: int, width: int) -> None:
    """Refuse what a net cannot do, before any is read: sides that it cannot halve often enough, types that it lacks.

    Raises:
        UserError: see above.
    """
    for hint in hints:
        if not 0 <= hint.net < len(models.controls):
            raise UserError(f"`control`: net {hint.net} is wanted, {len(models.controls)} were opened")
        file = models.controls[hint.net]
        net = models.control_kinds[file]
        several = len(hint.pictures) > 1
        if several and not isinstance(net, ControlNetUnion):
            raise UserError(f"`hint`: {len(hint.pictures)} given, {file} follows one; several are for a Union")
        if len(set(tasks := tasks_of(net, hint))) < len(tasks):
            raise UserError("`control_type`: two hints of one type; of each type there is one")
        if isinstance(net, StyleAdapter) and (hint.mask is not None or hint.guess or hint.edges):
            raise UserError(f"`mask`, `guess` and `edges`: not for a style adapter ({file}), which joins the text")
        if isinstance(net, T2IAdapter):
            multiple = net.config.multiple
            if height % multiple or width % multiple:
                near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
                raise UserError(
                    f"`height` and `width`: {height} and {width} given, {file} wants multiples of {multiple}; near them: "
                    f"{near[0]} and {near[1]}"
                )
            if hint.guess:
                raise UserError(f"`guess`: for ControlNets; {file} is a T2I-Adapter")


def named(picture: Picture | None, edges: bool) -> str:
    """What a hint is called, which may tell its type."""
    return "canny" if edges else str(getattr(picture, "filename", picture))


def picture_of(picture: Picture | None, canvas: Canvas | None) -> Image.Image:
    if picture is None:
        if canvas is None:
            raise UserError("`hint`: a picture is wanted for each `control`")
        return canvas.picture
    return picture if isinstance(picture, Image.Image) else open_picture(picture)


def brought(
    picture: Image.Image, height: int, width: int, whole: tuple[int, int] | None, box: tuple[int, ...] | None
) -> Image.Image:
    """A hint in the size of the pictures made, or the part of it that is worked on, RGB."""
    picture = picture.convert("RGB")
    if box:
        picture = picture if picture.size == whole else picture.resize(whole, Image.Resampling.LANCZOS)
        picture = picture.crop(box)
    elif abs(picture.width * height / picture.height - width) >= 8:
        told = f"`hint` is {picture.width}x{picture.height} pixels, of another aspect than {width}x{height}, to which it is brought"
        warnings.warn(Notice(told), stacklevel=5)
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def called(what: str, kind: str | None, file: Path) -> bool:
    """Whether a net is one of those of which no tensor tells: as was said, or else by the name of its file."""
    return kind == what if kind else what in file.stem.lower()


def anew(canvas: Canvas | None, file: Path, height: int, width: int, box: tuple[int, ...] | None) -> Tensor:
    """Where the picture is made anew, (1, 1, height, width) of bool."""
    if canvas is None or canvas.mask is None:
        raise UserError(f"{file}: a ControlNet for inpainting; it wants `init`, a picture, and `inpaint`, a mask")
    area = canvas.mask.crop(box) if box else canvas.mask
    return from_pil(area.resize((width, height), Image.Resampling.LANCZOS))[:, :1] > 0


def mask_of(mask: Picture, whole: tuple[int, int] | None, box: tuple[int, ...] | None) -> Tensor:
    """(1, 1, H, W) in [0, 1]; it speaks of the whole picture."""
    found = open_mask(mask, "`mask`")
    if found.getextrema() == (0, 0):
        raise UserError("`mask`: all black, so that the hint would act nowhere")
    found = found.resize(whole, Image.Resampling.LANCZOS).crop(box) if box else found
    return values(found)
