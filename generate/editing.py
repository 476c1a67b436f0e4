"""A picture to begin with: noised and drawn on, made anew in a part, or changed as a text says."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from files.colours import to_rgb
from files.errors import Notice, UserError
from files.masks import grey, open_mask
from files.pictures import from_pil, open_picture, to_pil
from generate.models import Models
from ipadapter import Prompt
from sampler import Level, Sampler, Schedule, inpainted
from sampler.noise import noise_like, seeded
from weights.base import INPAINTS, INSTRUCTED, Base

Picture = str | Path | Image.Image
Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels
STRENGTH = 0.8  # of image to image, where none is asked for; to make a part anew it is 1
IMAGE_GUIDANCE = 1.5  # how far an instruction-editing base follows the picture, where nothing is asked for
ROWS = 64  # of a picture that are encoded at once in little memory
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
    init: Picture | None = None,
    inpaint: Picture | None = None,
    strength: float | None = None,
    outpaint: Sequence[int] | None = None,
    only_masked: int | None = None,
) -> Canvas | None:
    """What to begin with, of the arguments that `pictures` explains; None where there is no picture.

    Raises:
        UserError: what does not go together or is out of its range; a picture that cannot be used, a mask that is none.
    """
    if init is None:
        given = {"inpaint": inpaint, "strength": strength, "outpaint": outpaint, "only_masked": only_masked}
        if lone := next((name for name, value in given.items() if value is not None), None):
            raise UserError(f"`{lone}`: goes with `init`, the picture to begin with")
        return None
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"`strength`: {strength:g} given, a number from 0 to 1 is wanted")
    if only_masked is not None and only_masked < 0:
        raise UserError(f"`only_masked`: {only_masked} given, 0 pixels or more are wanted")
    if only_masked is not None and inpaint is None and outpaint is None:
        raise UserError("`only_masked`: goes with `inpaint`, the mask around which to work")
    picture = to_rgb(init) if isinstance(init, Image.Image) else open_picture(init)
    mask = None
    if inpaint is not None:
        mask = grey(inpaint, "`inpaint`") if isinstance(inpaint, Image.Image) else open_mask(inpaint)
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
    if canvas is None:
        return height or side, width or side
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


def steps_that_run(base: Base, canvas: Canvas | None, steps: int) -> int:
    """As `Canvas.count`; an instruction-editing base always begins with noise. Raises UserError."""
    return steps if canvas is None or base.channels == INSTRUCTED else canvas.count(steps)


def check_reads(base: Base, canvas: Canvas | None) -> None:
    """Refuse a base that reads more than is brought.

    Raises:
        UserError: see above.
    """
    if base.channels == INPAINTS and (canvas is None or canvas.mask is None):
        raise UserError(f"{base.path}: an inpainting base; it wants `init`, a picture, and `inpaint`, a mask")
    if base.channels == INSTRUCTED:
        if canvas is None:
            raise UserError(f"{base.path}: an instruction-editing base; it wants `init`, the picture to change")
        for name, value in {"inpaint": canvas.mask, "strength": canvas.strength}.items():
            if value is not None:
                raise UserError(
                    f"`{name}`: not with an instruction-editing base ({base.path}), which reads the picture"
                )


# As the models see it

Posterior = tuple[Tensor, Tensor]  # mean and standard deviation of latents, (1, 4, h, w) fp32


@dataclass(frozen=True)
class Beginning:
    """What the models see of a canvas in the size in which it is worked on; with none, it is pure noise to begin with."""

    like: Tensor  # an empty latent, (1, 4, h, w) fp32
    picture: Posterior | None = None
    masked: Posterior | None = None  # of the picture without what is made anew, for a base that reads it
    mask: Tensor | None = None  # (1, 1, h, w): 1 is made anew
    pure: bool = True  # begin with pure noise
    changed: Tensor | None = None  # the picture for an instruction-editing base, (1, 4, h, w)

    def drawn(
        self, sampler: Sampler, schedule: Schedule, levels: Sequence[Level], seeds: Sequence[int]
    ) -> tuple[Tensor, list[torch.Generator], Sampler, Tensor | None]:
        """What pictures of these seeds begin with, at the first of the levels.

        All is drawn from one generator per picture, in this order: the picture's latent, the noise, the masked picture's
        latent; the sampler draws on. So did diffusers' pipelines, for a single picture.

        Returns:
            x (seeds, 4, h, w), the generators, the sampler, and what the base reads beside x, (seeds, channels, h, w).
        """
        generators, like = seeded(seeds), self.like.expand(len(seeds), -1, -1, -1)

        def latents(mean: Tensor, std: Tensor) -> Tensor:
            return mean + std * noise_like(like, generators)

        x_0 = latents(*self.picture) if self.picture else None
        noise = noise_like(like, generators)
        x = sampler.start(noise, schedule, levels[0]) if self.pure else levels[0].noised(x_0, noise)
        beside = self.changed if self.changed is None else self.changed.expand_as(like)
        if self.masked:
            beside = torch.cat([self.mask.expand_as(like[:, :1]), latents(*self.masked)], dim=1)
        elif self.mask is not None:
            sampler = replace(sampler, run=inpainted(sampler.run, x_0, noise, self.mask))
        return x, generators, sampler, beside


def beginning(models: Models, canvas: Canvas | None, height: int, width: int) -> Beginning:
    """Encode a canvas in this size. An autoencoder that is not kept is freed on return.

    Raises:
        UserError: a mask whose white falls between the latent's positions; an autoencoder whose latents are not finite.
    """
    like, reads = torch.empty(1, 4, height // 8, width // 8, device=models.device), models.base.channels
    if canvas is None:
        return Beginning(like)
    size = width, height
    pixels = from_pil(canvas.cut(canvas.picture, height, width).resize(size, Image.Resampling.LANCZOS))
    if reads == INSTRUCTED:  # the mean, and unscaled, as it was trained
        return Beginning(like, changed=posterior(models, pixels)[0] / models.base.family.latent_scale)
    if canvas.mask is None:
        return Beginning(like, posterior(models, pixels), pure=False)
    area = from_pil(canvas.cut(canvas.mask, height, width).resize(size, Image.Resampling.LANCZOS))[:, :1] / 2 + 0.5
    if reads == INPAINTS or not sum(canvas.mask.histogram()[1:-1]):  # a soft mask stays soft, where that can be
        area = (area >= 0.5).float()
    mask = interpolate(area, size=like.shape[2:]).to(like)
    if not mask.any():
        raise UserError("`inpaint`: the mask's white is too thin: a latent position stands for 8x8 pixels")
    pure = canvas.strength in (None, 1)
    masked = posterior(models, pixels * (area < 0.5)) if reads == INPAINTS else None
    return Beginning(like, None if masked and pure else posterior(models, pixels), masked, mask, pure)


def posterior(models: Models, pixels: Tensor) -> Posterior:
    """Of a picture (1, 3, H, W) in [-1, 1]; an autoencoder that overflows in half precision is taken again in fp32."""
    vae, rows = models.vae(), ROWS if models.low_memory else None
    for dtype in dict.fromkeys((next(vae.parameters()).dtype, torch.float32)):
        vae = vae if next(vae.parameters()).dtype == dtype else models.vae(dtype)
        mean, std = vae.posterior(pixels.to(models.device, dtype), rows)
        if mean.isfinite().all() and std.isfinite().all():
            return mean.float(), std.float()
    raise UserError("the autoencoder's latents are not finite: a damaged base")
