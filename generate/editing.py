"""Beginning with a picture: noised and drawn on, made anew in a part, or changed as a text says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from files.errors import UserError
from files.masks import values
from files.pictures import from_pil
from generate.canvas import Canvas
from generate.models import Models
from sampler import Level, Sampler, Schedule, inpainted
from sampler.noise import noise_like, seeded
from weights.base import INPAINTS, INSTRUCTED, Base

IMAGE_GUIDANCE = 1.5  # how far an instruction-editing base follows the picture, where nothing is asked for
ROWS = 64  # of a picture that go through the autoencoder at once in little memory


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


Posterior = tuple[Tensor, Tensor]  # mean and standard deviation of latents, (1, 4, h, w) fp32


@dataclass(frozen=True)
class Beginning:
    """What the models see of a canvas in the size in which it is worked on."""

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


def beginning(models: Models, canvas: Canvas, height: int, width: int) -> Beginning:
    """Encode a canvas in the size in which it is worked on. An autoencoder that is not kept is freed on return.

    Raises:
        UserError: a mask whose white falls between the latent's positions; an autoencoder whose latents are not finite.
    """
    reads, size = models.base.channels, (width, height)
    like = torch.empty(1, 4, height // 8, width // 8, device=models.device)
    pixels = from_pil(canvas.cut(canvas.picture, height, width).resize(size, Image.Resampling.LANCZOS))
    if reads == INSTRUCTED:  # the mean, and unscaled, as it was trained
        return Beginning(like, changed=posteriors(models, pixels)[0][0] / models.base.family.latent_scale)
    if canvas.mask is None:
        return Beginning(like, *posteriors(models, pixels), pure=False)
    area = values(canvas.cut(canvas.mask, height, width).resize(size, Image.Resampling.LANCZOS))
    if reads == INPAINTS or not sum(canvas.mask.histogram()[1:-1]):  # a soft mask stays soft, where that can be
        area = (area >= 0.5).float()
    mask = interpolate(area, size=like.shape[2:]).to(like)
    if not mask.any():
        raise UserError("`inpaint`: the mask's white is too thin: a latent position stands for 8x8 pixels")
    pure = canvas.strength in (None, 1)
    stays = [pixels * (area < 0.5)] if reads == INPAINTS else []
    whole = [] if stays and pure else [pixels]
    found = posteriors(models, *whole, *stays)
    return Beginning(like, found[0] if whole else None, found[-1] if stays else None, mask, pure)


def posteriors(models: Models, *pictures: Tensor) -> list[Posterior]:
    """Of pixels (1, 3, H, W) in [-1, 1]; an autoencoder that overflows in half precision is taken again in fp32."""
    vae, rows = models.vae(), ROWS if models.low_memory else None
    for dtype in dict.fromkeys((next(vae.parameters()).dtype, torch.float32)):
        vae = vae if next(vae.parameters()).dtype == dtype else models.vae(dtype)
        found = [vae.posterior(pixels.to(models.device, dtype), rows) for pixels in pictures]
        if all(part.isfinite().all() for pair in found for part in pair):
            return [(mean.float(), std.float()) for mean, std in found]
    raise UserError("the autoencoder's latents are not finite: a damaged base")
