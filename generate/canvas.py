"""A picture to begin with, and what is to be done with it, before any model has seen it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from files.colours import to_rgb
from files.decoding import LARGE as MOST
from files.errors import Notice, UserError
from files.masks import open_mask
from files.pictures import Picture, from_pil, open_picture, to_pil
from ipadapter import Prompt

Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels
STRENGTH = 0.8  # of image to image, where none is asked for; to make a part anew it is 1
LARGE = 4  # times the area that a base was made for: a picture that has more is brought down


@dataclass(frozen=True)
class Canvas:
    """A picture to begin with, and what is to be done with it; `canvas_of` makes it of what was brought."""

    picture: Image.Image  # RGB
    mask: Image.Image | None = None  # mode L: white is made anew, black stays; None: all of it is drawn on
    strength: float | None = None  # share of the steps that run; None: what is usual
    padding: int | None = None  # work on the part around the mask alone, so many pixels more, and paste it back

    def part(self, height: int, width: int) -> Box | None:
        """The part that is worked on alone, in a size of this aspect; None: the whole."""
        return None if self.padding is None else around(self.mask, self.padding, height, width)

    def cut(self, picture: Image.Image, height: int, width: int) -> Image.Image:
        """Of a picture as large as this one, what is worked on."""
        box = self.part(height, width)
        return picture.crop(box) if box else picture

    def count(self, steps: int) -> int:
        """How many of so many steps run, the last ones: the less, the nearer the result is to the picture.

        Raises:
            UserError: none.
        """
        strength = self.strength if self.strength is not None else STRENGTH if self.mask is None else 1.0
        if not (count := min(int(steps * strength), steps)):
            raise UserError(f"`strength` {strength:g}: leaves none of {steps} `steps`; more of either is wanted")
        return count

    def framed(self, prompt: Prompt, height: int, width: int) -> Prompt:
        """A prompt whose masks speak of the whole picture, for the part that is worked on."""
        if not (box := self.part(height, width)):
            return prompt
        left, top, right, bottom = box

        def cut(mask: Tensor) -> Tensor:
            whole = interpolate(mask.float(), size=(self.picture.height, self.picture.width), mode="bilinear")
            return whole[:, :, top:bottom, left:right]

        images = (image if image.mask is None else replace(image, mask=cut(image.mask)) for image in prompt.images)
        return replace(prompt, images=tuple(images))

    def finished(self, made: Image.Image) -> Image.Image:
        """What was made; if that is a part alone, the whole picture, of which no bit changes outside of the mask."""
        if not (box := self.part(made.height, made.width)):
            return made
        left, top, right, bottom = box
        whole = self.picture.copy()
        whole.paste(made.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return Image.composite(whole, self.picture, self.mask)


def canvas_of(
    init: Picture | Canvas | None = None,
    inpaint: Picture | None = None,
    strength: float | None = None,
    outpaint: Sequence[int] | None = None,
    only_masked: int | None = None,
) -> Canvas | None:
    """What to begin with, of the arguments that `pictures` explains; None where there is no picture.

    Raises:
        UserError: what does not go together or is out of its range; a picture that cannot be used, a mask that is none.
    """
    if init is not None and not isinstance(init, Canvas):
        return begun(init, inpaint, strength, outpaint, only_masked)
    given = {"inpaint": inpaint, "strength": strength, "outpaint": outpaint, "only_masked": only_masked}
    if init is None and (lone := next((name for name, value in given.items() if value is not None), None)):
        raise UserError(f"`{lone}`: goes with `init`, the picture to begin with")
    return init


def begun(
    init: Picture,
    inpaint: Picture | None,
    strength: float | None,
    outpaint: Sequence[int] | None,
    only_masked: int | None,
) -> Canvas:
    """As `canvas_of`, where there is a picture."""
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"`strength`: {strength:g} given, a number from 0 to 1 is wanted")
    if only_masked is not None and only_masked < 0:
        raise UserError(f"`only_masked`: {only_masked} given, 0 pixels or more are wanted")
    if only_masked is not None and inpaint is None and outpaint is None:
        raise UserError("`only_masked`: goes with `inpaint`, the mask around which to work")
    picture = to_rgb(init) if isinstance(init, Image.Image) else open_picture(init)
    mask = None
    if inpaint is not None:
        mask = open_mask(inpaint, "`inpaint`")
        across, down = picture.size
        if min(abs(mask.height * across / down - mask.width), abs(mask.width * down / across - mask.height)) >= 2:
            tell(f"`inpaint`: {mask.width}x{mask.height} pixels, of another aspect than `init`, to which it is brought")
        if mask.size != picture.size and (outpaint is not None or only_masked is not None):
            mask = mask.resize(picture.size, Image.Resampling.LANCZOS)
    if outpaint is not None:
        picture, mask = enlarged(picture, mask, outpaint)
    if mask is not None and (shade := {(0, 0): "black", (255, 255): "white"}.get(mask.getextrema())):
        lost = "nothing would be made anew" if shade == "black" else "nothing would stay"
        raise UserError(f"`inpaint`: the mask is all {shade}, {lost}; white is made anew, black stays")
    return Canvas(picture, mask, strength, only_masked)


def size_of(canvas: Canvas | None, side: int, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Height and width in which to work, multiples of 8 but for what is asked for.

    Args:
        side: of a picture that the base was made for.
        height, width: as asked for. One alone brings the other by the picture's aspect. None: the picture's own, or,
            where that is too large or only a part is worked on, its aspect in the area that the base was made for.
    """
    return size_with(canvas, side, height, width) if canvas else (height or side, width or side)


def size_with(canvas: Canvas, side: int, height: int | None, width: int | None) -> tuple[int, int]:
    """As `size_of`, where there is a picture."""
    across, down = canvas.picture.size
    if height and width:
        off = min(abs(height * across / down - width), abs(width * down / across - height))
        if off >= 8 and canvas.padding is None:
            tell(f"`init` is {across}x{down} pixels, of another aspect than {width}x{height}, to which it is brought")
    elif height or width:
        height, width = height or eights(width * down / across), width or eights(height * across / down)
    elif canvas.padding is None and across * down <= LARGE * side**2:
        height, width = max(8, down // 8 * 8), max(8, across // 8 * 8)
    else:
        by = side / math.sqrt(across * down)
        height, width = eights(by * down), eights(by * across)
        if canvas.padding is None:
            tell(f"`init` is {across}x{down} pixels, brought to {width}x{height}: `height` and `width` can say more")
    return height, width


def enlarged(picture: Image.Image, mask: Image.Image | None, by: Sequence[int]) -> tuple[Image.Image, Image.Image]:
    """A picture with so many pixels more on the left, at the top, on the right and at the bottom, and where these are.

    They continue its edges. A latent position stands for eight pixels a side: one that is new in part is made anew.
    """
    if len(by) != 4 or min(by) < 0 or not any(by):
        raise UserError(
            f"`outpaint`: {' '.join(map(str, by))} given; pixels LEFT TOP RIGHT BOTTOM are wanted, 0 or more"
        )
    left, top, right, bottom = by
    wide, high = picture.width + left + right, picture.height + top + bottom
    if wide * high > MOST:
        raise UserError(f"`outpaint`: {wide}x{high} pixels in all, {MOST / 1e6:.0f} million are the most")
    (edges,) = to_pil(pad(from_pil(picture), (left, right, top, bottom), mode="replicate"))
    new = Image.new("L", (wide, high), 255)
    new.paste(mask or 0, (left, top, left + picture.width, top + picture.height))
    if right:
        new.paste(255, ((left + picture.width) // 8 * 8, 0, *new.size))
    if bottom:
        new.paste(255, (0, (top + picture.height) // 8 * 8, *new.size))
    return edges, new


def around(mask: Image.Image, padding: int, height: int, width: int) -> Box:
    """The box around all that is not black, with so many pixels more, brought to an aspect where the picture has room."""
    left, top, right, bottom = mask.getbbox()
    left, right = max(left - padding, 0), min(right + padding, mask.width)
    top, bottom = max(top - padding, 0), min(bottom + padding, mask.height)
    across, down = right - left, bottom - top
    if across / down > width / height:
        top, bottom = longer(top, bottom, int(across / (width / height) - down), mask.height)
    else:
        left, right = longer(left, right, int(down * (width / height) - across), mask.width)
    return left, top, right, bottom


def longer(low: int, high: int, by: int, most: int) -> tuple[int, int]:
    """A stretch lengthened at both ends, and shifted to lie between 0 and most, as far as it can."""
    low, high = low - by // 2, high + by - by // 2
    shift = max(high - most, 0)
    low, high = low - shift, high - shift
    return max(low, 0), min(high - min(low, 0), most)


def eights(pixels: float) -> int:
    return max(8, round(pixels / 8) * 8)


def tell(line: str) -> None:
    warnings.warn(Notice(line), stacklevel=2)
