"""Pictures that prompt together, and how they are heard: by which adapter, how loudly, where, when, in which layers."""

import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from files.errors import Notice, UserError
from files.features import Features, is_features
from files.masks import open_mask, values
from files.pictures import Picture
from generate.framing import check_framing
from generate.layers import Factors
from ipadapter import ImagePrompt, Prompt, Scale


@dataclass(frozen=True)
class ImageGroup:
    """One image prompt of one or more pictures, which share one softmax; several groups are added, each with its own."""

    # Files or pictures, and their embeddings: what `features` gives, .safetensors, .ipadpt.
    images: Sequence[Picture | Features] = ()
    # Which of the adapters that were opened reads them, 0 and on.
    adapter: int = 0
    # Its weight: a number, or one for each cross-attention layer; None: 1, beside a text 0.6.
    scale: float | Sequence[float] | None = None
    # In which layers: `all`, `style`, `layout`, `style+layout`, `down`, `middle`, `up`, `down.block_2=0.3,up.block_0.1=1`,
    # or one of the courses over the layers in `generate.layers`.
    layers: str = "all"
    # In which steps: the shares of the run between which it acts.
    start: float = 0.0
    until: float = 1.0
    # How its weight goes over the steps: "constant", "fade-in", "fade-out", or numbers, each for an equal share of them.
    curve: str | Sequence[float] = "constant"
    # Of each picture; 0 leaves one out.
    weights: Sequence[float] = ()
    # Where: a grey picture, white is here, or (1, 1, H, W) in [0, 1].
    mask: Picture | Tensor | None = None
    # How a picture becomes a square: "crop", "pad", "squash", or "tile": the squares of a long one, each of which acts where
    # it lies.
    framing: str = "crop"
    # Which part is cropped, or where in the padding the picture lies: "centre", "top", "bottom-left", ...
    crop_position: str = "centre"
    # What stands on the unconditional side instead of "no image": one for all pictures, or one for each. With "tile" its
    # centre.
    negative_image: Sequence[Picture | Features] = ()
    # How much of a picture of noise (`generate.embeddings.noise_picture`) is blended in there, 0 to 1: the more, the less
    # noisy what is made.
    negative_noise: float = 0.0
    # A text that is taken off the picture's embedding, or that and how much of it (1): what of the picture not to follow.
    less: str | tuple[str, float] | None = None
    # Face embeddings for a FaceID adapter, files or tensors (faces, 512); without any, the faces are read off the images.
    faces: Sequence[str | Path | Tensor] = ()
    # How far FaceID-plus version 2 follows the picture of the face, beside the embedding; None: 1.
    structure_scale: float | None = None

    def __post_init__(self):
        """Raises UserError: a window or a curve that there is not; not as many weights as pictures."""
        if not self.plain:
            check_told(self)

    @property
    def plain(self) -> bool:
        """Whether it is pictures for the first adapter, and nothing is said of them but how loudly they are heard."""
        said = (one for one in fields(self) if one.name not in ("images", "scale"))
        return not any(map(embedded, self.images)) and all(getattr(self, one.name) == one.default for one in said)

    @property
    def encodes(self) -> bool:
        """Whether an image encoder is needed; embeddings that hold all that is read of them do without."""
        return self.plain or wants_encoder(self)

    def heard(self, scale: float | Sequence[float] | Scale, found: Factors | None) -> tuple[Scale, Scale]:
        """The scales of the image prompt and of its absence, in its layers and steps.

        Args:
            scale: in all of them.
            found: what `layers` comes to.
        """
        if found is None and (self.start, self.until, self.curve) == (0.0, 1.0, "constant"):
            return scale, scale
        if isinstance(scale, Scale):
            raise UserError("`scale`: a Scale has layers and steps of its own; here they are the group's")
        each, scale = (scale, 1.0) if isinstance(scale, Sequence) else (None, scale)
        sides = (found.heard, found.factors) if found else (None, None)
        if each is not None:
            sides = [[a * b for a, b in zip(each, side or [1.0] * len(each), strict=True)] for side in sides]
        return tuple(Scale(scale, side, self.start, self.until, self.curve) for side in sides)


def embedded(image: object) -> bool:
    """Whether it is no picture but an embedding."""
    return isinstance(image, Features) or is_features(image)


def wants_encoder(group: ImageGroup) -> bool:
    if not all(isinstance(one, Features) for one in (*group.images, *group.negative_image)):
        return True
    # Of embeddings "no image" is zeros, of patches it is those of a grey picture.
    grey = any(one.image is not None and one.image.ndim == 3 and one.negative is None for one in group.images)
    return bool(group.negative_noise or group.less or (grey and not group.negative_image))


def check_told(group: ImageGroup) -> None:
    """Refuse what is said of pictures and cannot be. Raises UserError."""
    try:
        Scale(1.0, None, group.start, group.until, group.curve)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_framing(group.framing, group.crop_position)
    if not 0 <= group.negative_noise <= 1:
        raise UserError(f"`negative_noise`: {group.negative_noise:g} given, 0 to 1 is wanted")
    if group.weights and not group.faces and not any(map(embedded, group.images)):
        check_weights(group.weights, len(group.images))
    if group.framing == "tile" and len(group.images) != 1:
        raise UserError("`framing` tile: one picture to a group; others want an `image` of their own")


def swap(image: ImagePrompt, absent: ImagePrompt, layers: Container[int]) -> ImagePrompt:
    """The absence of an image prompt, which in these layers hears its pictures."""
    pairs = enumerate(zip(absent.key_values, image.key_values, strict=True))
    return replace(absent, key_values=[there if i in layers else away for i, (away, there) in pairs])


def weighed(image: ImagePrompt, weights: Sequence[float]) -> ImagePrompt:
    """An image prompt whose pictures have a weight each: their values V' are multiplied by it, in their one softmax.

    At weight 1 nothing changes, at 0 a picture's tokens are left out.

    Raises:
        UserError: not as many weights as there are pictures.
    """
    if not weights or set(weights) == {1}:
        return image
    tokens = image.key_values[0][0].shape[1]
    each = torch.tensor(weights).repeat_interleave(tokens // len(weights))
    key_values = [(k[:, each != 0], (v * each.to(v)[:, None])[:, each != 0]) for k, v in image.key_values]
    return ImagePrompt(key_values, image.scale, image.mask, image.group)


def check_weights(weights: Sequence[float], pictures: int) -> None:
    """Raises UserError: not as many weights as there are pictures, or all are 0."""
    if weights and len(weights) != pictures:
        raise UserError(f"`weights`: {len(weights)} given, {pictures} wanted, one for each picture of the group")
    if weights and not any(weights):
        raise UserError("`weights`: all are 0: nothing of the group is left")


def mask_tensor(mask: Picture | Tensor) -> Tensor:
    """Grey values (1, 1, H, W) in [0, 1], not cut at the half.

    Raises:
        UserError: no mask, or one without any white.
    """
    if not isinstance(mask, Tensor):
        mask = values(open_mask(mask, "`mask`"))
    if not mask.any():
        raise UserError("`mask`: it is all black: the image prompt would act nowhere; white is where it acts")
    return mask


def timed(scale: object) -> bool:
    return isinstance(scale, Scale) and (scale.start, scale.until) != (0.0, 1.0)


def tell_effects(prompts: Sequence[Prompt], steps: int, height: int, width: int) -> None:
    """Say which window holds none of the steps, and which mask has another aspect than the picture, to which it is brought."""
    for scale in dict.fromkeys(image.scale for prompt in prompts for image in prompt.images if timed(image.scale)):
        if not any(scale.over(i, steps) for i in range(steps)):
            told = f"`start` {scale.start:g}, `until` {scale.until:g}: no whole one of {steps} steps lies between"
            warnings.warn(Notice(f"{told}, so that the image prompt has no effect"), stacklevel=3)
    for mask in {id(image.mask): image.mask for prompt in prompts for image in prompt.images}.values():
        down, across = (height, width) if mask is None else mask.shape[2:]
        off = min(abs(down * width / height - across), abs(across * height / width - down))
        if off >= 2 and min(down, across) > 1:  # else the mask of a tile, a strip of its picture
            told = f"`mask`: {across}x{down} pixels, of another aspect than {width}x{height}, to which it is brought"
            warnings.warn(Notice(told), stacklevel=3)
