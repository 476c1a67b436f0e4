"""What a picture should show: texts and image prompts, as all that the UNet reads of them."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from files.errors import UserError
from files.features import Features
from files.pictures import Picture
from generate.embeddings import tokens
from generate.fit import check_group
from generate.framing import within
from generate.group import ImageGroup, mask_tensor, swap, weighed
from generate.layers import Factors, factors
from generate.models import Models
from generate.text import encoded
from ipadapter import ImagePrompt, Prompt, Scale
from unet import layer_names, size_vector
from weights.base import Base
from weights.families import drawn_by

Weight = float | Sequence[float] | Scale  # of an image prompt: one number, one for each cross-attention layer, or more


@torch.no_grad()
def prompts(
    models: Models,
    text: str = "",  # the text prompt
    negative: str = "",  # the negative prompt: what the picture should not be
    # Pictures, files, or embeddings (`Features`), which prompt together; or groups of them, each heard in its own way.
    images: Sequence[Picture | Features | ImageGroup] = (),
    # The weight of the image prompt: one number, one for each cross-attention layer, or a `Scale`; None: 1, beside a text
    # 0.6. Of groups it is that of those that have none.
    scale: float | Sequence[float] | Scale | None = None,
    # Face embeddings for FaceID adapters, files or tensors (faces, 512); without any insightface reads them off the images.
    faces: Sequence[str | Path | Tensor] = (),
    structure_scale: float | None = None,  # how far FaceID-plus version 2 follows the picture of the face; None: 1
    prompt_syntax: str = "plain",  # how weights are written in the texts: "plain" (not at all), "a1111" or "comfy"
    long_prompt: bool = False,  # texts beyond 75 tokens in chunks, not cut; in the other syntaxes they always are
    clip_skip: int = 0,  # how many of the last layers of the text towers are left out, as diffusers counts
) -> tuple[Prompt, Prompt]:
    """The prompt and its absence, for `pictures`.

    Raises:
        UserError: a picture or embedding that cannot be used, or that the adapter does not read.
    """
    groups = [image for image in images if isinstance(image, ImageGroup)]
    alone = [image for image in images if not isinstance(image, ImageGroup)]
    if alone or faces:
        groups.insert(0, ImageGroup(alone, faces=faces, structure_scale=structure_scale))
    for group in groups:  # before anything is read
        check_group(group, models.adapters, models.base)
    texts = encoded(models, text, negative, prompt_syntax, long_prompt, clip_skip)
    sides = [(), ()]
    if groups:
        pairs = image_prompts(models, groups, default_scale(text) if scale is None else scale)
        sides = zip(*pairs, strict=True)
    elif scale is not None:
        raise UserError("`scale` is the weight of an image prompt: it goes with `image`")
    pair = [Prompt(x, images, pooled) for (x, pooled), images in zip(texts, sides, strict=True)]
    return tuple(p if p.vector is None else sized(p, models, models.side, models.side, p.vector) for p in pair)


def default_scale(text: str) -> float:
    return 0.6 if text else 1.0


def scaled(prompt: Prompt, scale: float | Sequence[float], group: int | None = None) -> Prompt:
    """The same prompt with another weight of its image prompts, or of those of one group; what else a `Scale` says stays."""

    def one(image: ImagePrompt) -> ImagePrompt:
        if group not in (None, image.group):
            return image
        return replace(image, scale=replace(image.scale, weight=scale) if isinstance(image.scale, Scale) else scale)

    return replace(prompt, images=tuple(map(one, prompt.images)))


def sized(prompt: Prompt, models: Models, height: int, width: int, pooled: Tensor | None = None) -> Prompt:
    """The same prompt of an SDXL, which is told of it beside the text, for a picture of another size, in pixels."""
    sinusoids = models.base.sinusoids
    pooled = prompt.vector[:, : -6 * sinusoids] if pooled is None else pooled
    return replace(prompt, vector=size_vector(pooled, height, width, sinusoids))


def image_prompts(models: Models, groups: Sequence[ImageGroup], scale: Weight) -> list[tuple[ImagePrompt, ImagePrompt]]:
    """Each group's image prompt and its absence; of tiles each is one.

    An adapter and an image encoder are held as long as the next group reads them too.

    Args:
        scale: of groups that have none.

    Raises:
        UserError: as `prompts` does.
    """
    how = [heard_as(models, group, scale) for group in groups]
    several, found = replace(models, keep=True, held=models.held if models.keep else {}), {}
    for i in in_turn(several, groups, models.keep) if len(groups) > 1 else [0]:
        found[i] = group_prompts(several, groups[i], i, how[i])
    return [pair for i in range(len(groups)) for pair in found[i]]


class Heard(NamedTuple):
    """How a group is heard: its image prompts and their absence."""

    scale: Weight
    null_scale: Weight
    swapped: Container[int] = ()  # layers in which the absence hears the pictures
    mask: Tensor | None = None


def heard_as(models: Models, group: ImageGroup, scale: Weight) -> Heard:
    """`scale`: where the group has none."""
    scale = scale if group.scale is None else group.scale
    return Heard(scale, scale) if group.plain else heard_where(models, group, scale)


def heard_where(models: Models, group: ImageGroup, scale: Weight) -> Heard:
    """As `heard_as`, where its layers, steps or a mask may be given."""
    layers = None if group.layers == "all" else layers_of(models.base, group)
    mask = None if group.mask is None else mask_tensor(group.mask).to(models.device)
    return Heard(*group.heard(scale, layers), layers.swapped if layers else (), mask)


def layers_of(base: Base, group: ImageGroup) -> Factors | None:
    return factors(group.layers, layer_names(base.config), drawn_by(base.family, base.config.channels))


def in_turn(models: Models, groups: Sequence[ImageGroup], keep: bool) -> Iterator[int]:
    """The numbers of groups, those of one image encoder and of one adapter side by side.

    Unless they are to be kept, what was read for the group before goes first, if this one does not read it too.
    """
    encoders, last = [str(models.adapters[group.adapter].image_encoder) for group in groups], None
    for i in sorted(range(len(groups)), key=lambda i: (encoders[i], groups[i].adapter)):
        if not keep and groups[i].adapter != last:
            for name in models.held.keys() - {f"image encoder {encoders[i]}"}:
                del models.held[name]
        last = groups[i].adapter
        yield i


def group_prompts(models: Models, group: ImageGroup, number: int, how: Heard) -> list[tuple[ImagePrompt, ImagePrompt]]:
    """The image prompts of the group of this number, and their absence, each with its scale."""
    adapter, masks, found = models.adapter(group.adapter), [how.mask], []
    *sides, squares = tokens(models, adapter, group)
    if squares is not None:
        masks = [within(one, how.mask) for one in squares.to(models.device).split(1)]
    for where, *pair in zip(masks, *(side.chunk(len(masks), dim=1) for side in sides), strict=True):
        image, absent = (adapter.prompt(one, mask=where) for one in pair)
        if group.weights:
            image, absent = (weighed(one, group.weights) for one in (image, absent))
        if how.swapped:
            absent = swap(image, absent, how.swapped)
        absent = replace(absent, scale=how.null_scale, group=number)
        found.append((replace(image, scale=how.scale, group=number), absent))
    return found
