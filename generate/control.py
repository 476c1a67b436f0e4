"""Hints for ControlNets and T2I-Adapters: what a picture is, for the net that is to follow it."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from control import Control, T2IAdapter
from control.canny import canny
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
    # `init`, for a net that inpaints.
    picture: Picture | None = None
    # Which of the nets that were opened, in their order.
    net: int = 0
    # What its outputs are multiplied by; 0 is off.
    scale: float = 1.0
    # It acts in step i of N where start <= i / N and (i + 1) / N <= until.
    start: float = 0.0
    until: float = 1.0
    # Where it acts: white, and not where black.
    mask: Picture | None = None
    # On the prompt alone and not on its absence, and the finer the more weakly; for empty prompts (ControlNets).
    guess: bool = False
    # Take the edges of the picture (Canny), not the picture.
    edges: bool = False
    # Which type of hint, for a Union; None: as the picture's name says. Others: "shuffle" pools the outputs, "inpaint" marks
    # what is made anew; None: where the net's file is called so.
    control_type: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.until <= 1:
            raise UserError(
                f"`from` {self.start:g} and `until` {self.until:g}: two numbers from 0 to 1 that rise are wanted"
            )


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
    file = models.controls[hint.net]
    kind, picture = hint.control_type, picture_of(hint, canvas)
    task = task_of(net, kind, named(hint))
    picture = canny(picture) if hint.edges else picture
    box = canvas.part(height, width) if canvas else None
    picture = brought(picture, height, width, canvas and canvas.picture.size, box)
    pixels = from_pil(picture) / 2 + 0.5
    if isinstance(net, T2IAdapter) and net.config.hint_channels == 1:
        pixels = values(picture.convert("L"))
    if task is None and called(INPAINT, kind, file) and not isinstance(net, T2IAdapter):
        pixels = torch.where(anew(canvas, file, height, width, box), -1.0, pixels)
    pixels = pixels.to(models.device, models.dtype)
    mask = None if hint.mask is None else mask_of(hint.mask, canvas and canvas.picture.size, box).to(models.device)
    return Control(
        net,
        net.encode(pixels) if task is None else net.encode(pixels, task),
        hint.scale,
        hint.start,
        hint.until,
        mask,
        hint.guess,
        pool=task is None and called(SHUFFLE, kind, file),
    )


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
        task_of(net, hint.control_type, named(hint))
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


def named(hint: Hint) -> str:
    """What the hint is called, which may tell its type."""
    return "canny" if hint.edges else str(getattr(hint.picture, "filename", hint.picture))


def picture_of(hint: Hint, canvas: Canvas | None) -> Image.Image:
    if hint.picture is None:
        if canvas is None:
            raise UserError("`hint`: a picture is wanted for each `control`")
        return canvas.picture
    return hint.picture if isinstance(hint.picture, Image.Image) else open_picture(hint.picture)


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
