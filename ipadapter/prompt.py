"""What conditions a denoising step: a text and any number of image prompts, as plain values.

An image prompt brings its adapter: the keys and values that the adapter makes of its tokens, for every layer. So nothing
of an adapter lives in the model, and what does not change from step to step is computed once.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipadapter.scale import Rows, Scale, Weight, of_rows

# Keys and values of each cross-attention layer, in the order of their numbers; (batch, tokens, heads * head_dim).
KeyValues = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ImagePrompt:
    """One image prompt: what it says, how loudly, and where. `IPAdapter.prompt` makes it of tokens.

    Args:
        key_values: K' and V'.
        scale: the weight of the image prompt, one for all layers, a sequence with one for each, or a `Scale`. Where it
            comes to the number 0 the prompt is silent, and the model is the base model, bit for bit.
        mask: (1 or batch, 1, H, W) in [0, 1] at any resolution, where the prompt acts; None: everywhere.
        group: which of several it is, where one of what is asked for makes several image prompts.

    Raises:
        ValueError: not as many scales as layers.
    """

    key_values: KeyValues
    scale: Weight | Sequence[Weight] | Scale | Rows = 1.0
    mask: Tensor | None = None
    group: int = 0

    def __post_init__(self):
        given = self.scale.layers if isinstance(self.scale, Scale) else self.scale
        if isinstance(given, Sequence) and len(given) != len(self.key_values):
            raise ValueError(f"`scale`: {len(given)} given, one for each of {len(self.key_values)} layers wanted")

    @property
    def rows(self) -> int:
        """How many rows of a batch it is for."""
        return len(self.key_values[0][0])


@dataclass(frozen=True)
class Prompt:
    """All that conditions a denoising step. It passes through the model untouched; cross-attention reads it."""

    text: Tensor | KeyValues  # (batch, 77, context_dim), out of the text tower; or what `prepared` made of it
    images: tuple[ImagePrompt, ...] = ()
    vector: Tensor | None = None  # (batch, vector_dim), for bases with a `label_emb` (SDXL); None for SD 1.x
    beside: Tensor | None = None  # (batch, channels, h, w), for who puts it beside x: UNets that read more channels
    step: tuple[int, int] = (0, 1)  # which step of the run this is, 0, 1, ..., and of how many
    absent: tuple[bool, ...] = ()  # which rows are a prompt's absence, that guidance steers away from; (): none

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return (self.text if isinstance(self.text, Tensor) else self.text[0][0]).dtype

    @property
    def rows(self) -> int:
        """How many rows of a batch it is for."""
        return len(self.text if isinstance(self.text, Tensor) else self.text[0][0])

    @staticmethod
    def cat(prompts: Sequence["Prompt"]) -> "Prompt":
        """Stack prompts along the batch: the unconditional one and the conditional one, or those of several pictures.

        Their image prompts may differ in scale and in mask; each row keeps its own.

        Raises:
            ValueError: they differ in what a batch has in common, such as the number of image prompts or of tokens.
        """
        same("the number of image prompts", (len(prompt.images) for prompt in prompts))
        images = tuple(cat_images(row) for row in zip(*(prompt.images for prompt in prompts), strict=True))
        vector = stack("the vector", [prompt.vector for prompt in prompts])
        texts = [prompt.text for prompt in prompts]
        plain = same("how their texts are given", ("plain" if isinstance(x, Tensor) else "prepared" for x in texts))
        text = (stack if plain == "plain" else cat_key_values)("the text (tokens, width)", texts)
        beside = stack("what stands beside x", [prompt.beside for prompt in prompts])
        absent = [row for prompt in prompts for row in prompt.absent or (False,) * prompt.rows]
        step = same("the step", (prompt.step for prompt in prompts))
        return Prompt(text, images, vector, beside, step, tuple(absent) if any(absent) else ())


def cat_images(row: Sequence[ImagePrompt]) -> ImagePrompt:
    """One image prompt of several, stacked along the batch."""
    key_values = cat_key_values("an image prompt (tokens, width)", [image.key_values for image in row])
    group = same("the group of an image prompt", (image.group for image in row))
    one, mask = row[0].scale, None
    shared = isinstance(one, float) and all(image.scale is one for image in row)
    if any(image.mask is not None for image in row):
        mask = cat_masks(row)
    return ImagePrompt(key_values, one if shared else cat_scales(row), mask, group)


def cat_key_values(what: str, rows: Sequence[KeyValues]) -> KeyValues:
    same("the number of layers", map(len, rows))
    return [tuple(stack(what, x) for x in zip(*pairs, strict=True)) for pairs in zip(*rows, strict=True)]


def cat_scales(row: Sequence[ImagePrompt]) -> Weight | list[Weight] | Scale | Rows:
    """Those that agree stay as they are; what differs by the step is told apart in it."""
    scales, counts = [image.scale for image in row], tuple(image.rows for image in row)
    if any(isinstance(scale, Scale | Rows) for scale in scales):
        first = scales[0]
        shared = isinstance(first, Scale) and not isinstance(first.weight, Tensor)
        return first if shared and all(scale == first for scale in scales) else Rows(tuple(scales), counts)
    if not any(isinstance(scale, Sequence) for scale in scales):
        return of_rows(scales, counts)
    layers = len(row[0].key_values)
    scales = [scale if isinstance(scale, Sequence) else [scale] * layers for scale in scales]
    return [of_rows(layer, counts) for layer in zip(*scales, strict=True)]


def cat_masks(row: Sequence[ImagePrompt]) -> Tensor:
    """A mask that all rows share serves them as it is; a row without one is heard everywhere."""
    masks = [image.mask for image in row]
    first = next(mask for mask in masks if mask is not None)
    if all(mask is first and len(mask) == 1 for mask in masks):
        return first
    masks = [torch.ones_like(first[:1]) if mask is None else mask for mask in masks]
    return stack(
        "a mask (1, height, width)",
        [mask.expand(image.rows, -1, -1, -1) for mask, image in zip(masks, row, strict=True)],
    )


def stack(what: str, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Along the batch; None where nobody has any."""
    shape = same(what, (None if x is None else tuple(x.shape[1:]) for x in tensors))
    return None if shape is None else torch.cat(tensors)


def same(what: str, values: Iterable[Hashable]) -> Hashable:
    """What the rows of a batch have in common."""
    first, *others = dict.fromkeys(values)
    if others:
        raise ValueError(f"prompts that differ in {what} do not stack: {' and '.join(map(str, (first, *others)))}")
    return first
