"""What an adapter reads of pictures and of their absence: framed, encoded, and what is taken off or put against them."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from clip import CLIPImage, TwoTowerEncoder, preprocess, tokenize
from files.errors import Notice, UserError
from files.faces import find_faces, read_embedding
from files.features import Features, is_features, read_features, write_features
from files.pictures import Picture, open_picture
from generate.fit import Adapter, check_group, encoders
from generate.framing import tiles
from generate.group import ImageGroup
from generate.models import Models
from ipadapter import IPAdapter
from ipadapter.adapter import image_features, null_features
from weights.clip import load_clip
from weights.diffusers import model_sha256, read_part


@torch.no_grad()
def features(models: Models, group: ImageGroup) -> Features:
    """What the adapter of a group reads of it. In the place of the pictures it gives what they give, bit for bit.

    Raises:
        UserError: a picture or embedding that cannot be used, or that the adapter does not read.
    """
    check_group(group, models.adapters, models.base)
    return read_of(models, group)


def read_of(models: Models, group: ImageGroup) -> Features:
    """As `features`, of a group that was checked."""
    reader = models.adapters[group.adapter]
    seen, faces, masks = [opened_as(image) for image in group.images], None, None
    if any(isinstance(one, Features) for one in seen):
        tell_strangers(seen, reader)
        masks = getattr(seen[0], "masks", None)
    if reader.kind.image_proj.faces:
        faces, seen = faces_of(group, seen)
        faces, masks = faces.to(models.device, models.dtype), None
    elif group.framing == "tile":
        seen, masks = tiled(seen)
    image, negative = clip_features(models, group, seen) if reader.kind.reads_clip else (None, None)
    return Features(image, negative, faces, masks)


def tell_strangers(seen: Sequence[Image.Image | Features], reader: Adapter) -> None:
    for one in seen:
        if isinstance(one, Features) and None in encoders(one, reader):
            told = "is of another adapter; its widths fit, whether its image encoder is the same cannot be told"
            warnings.warn(Notice(f"{one.name}: {told}"), stacklevel=5)


def opened_as(image: Picture | Features) -> Image.Image | Features:
    if isinstance(image, (Image.Image, Features)):
        return image
    return read_features(image) if is_features(image) else open_picture(image)


def signed(found: Features, models: Models, number: int) -> Features:
    """With the hashes of the adapter and of the image encoder that it is of."""
    opened = models.adapters[number]
    files = {"adapter": opened.file, "image_encoder": opened.image_encoder}
    return replace(found, sha256={role: model_sha256(file) for role, file in files.items() if file})


def save_features(models: Models, group: ImageGroup, path: Path) -> ImageGroup:
    """Write what the adapter of a group reads, and by what it was made; the group with that in the place of its pictures."""
    once = replace(models, keep=True, held=models.held if models.keep else {})
    found = signed(features(once, group), models, group.adapter)
    write_features(path, found)
    plain = {"faces": (), "framing": "crop", "crop_position": "centre"}
    return replace(group, images=(found,), negative_image=(), negative_noise=0.0, less=None, **plain)


def tokens(models: Models, adapter: IPAdapter, group: ImageGroup) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens of a group's image prompt and those of its absence, both (1, pictures * num_tokens, context_dim).

    And the masks of tiles (n, 1, height, width), each of an image prompt of its own; None where there are none.
    """
    found = read_of(models, group)
    scale = 1.0 if group.structure_scale is None else group.structure_scale
    version_2 = scale if models.adapters[group.adapter].faceid_v2 else None
    nobody = None if found.faces is None else torch.zeros_like(found.faces)
    read = (found.faces, found.image), (nobody, found.negative)
    here, away = (adapter.project(*features, version_2).flatten(0, 1)[None] for features in read)
    return here, away, found.masks


def faces_of(group: ImageGroup, seen: list[Image.Image | Features]) -> tuple[Tensor, list[Image.Image | Features]]:
    """The faces of a group, and the pictures of them that CLIP sees."""
    if group.faces:
        return torch.cat([x if isinstance(x, Tensor) else read_embedding(x) for x in group.faces]), seen
    if isinstance(seen[0], Features):
        return torch.cat([one.faces for one in seen]), seen
    return find_faces(seen, [str(image) for image in group.images])


def clip_features(models: Models, group: ImageGroup, seen: Sequence[Image.Image | Features]) -> tuple[Tensor, Tensor]:
    """CLIP's features of what is seen and of its absence, both (n, width) or (n, 1 + patches, width)."""
    image, absent = encoded(models, group, seen)
    if group.less:
        text, strength = group.less if isinstance(group.less, tuple) else (group.less, 1.0)
        image = image - strength * text_features(models, group.adapter, text)
    if group.negative_image:
        absent = opposed(models, group, image)
    elif absent is None:
        absent = nothing(models, group.adapter, image)
    return image, noisy(models, group, absent) if group.negative_noise else absent


def encoded(models: Models, group: ImageGroup, seen: Sequence[Image.Image | Features]) -> tuple[Tensor, Tensor | None]:
    """Features of pictures and embeddings, and of their absence where there is no other and all embeddings have it."""
    drawn = [one for one in seen if isinstance(one, Image.Image)]
    found = of_pictures(models, group, drawn) if drawn else (None, None)
    return found if len(drawn) == len(seen) else beside_embeddings(models, seen, *found)


def of_pictures(models: Models, group: ImageGroup, seen: Sequence[Image.Image]) -> tuple[Tensor, Tensor | None]:
    encoder, patches = encoder_of(models, group.adapter), models.adapters[group.adapter].kind.image_proj.patches
    how = encoder.config.image_size, "crop" if group.framing == "tile" else group.framing, group.crop_position
    pixels = torch.cat([preprocess(one, *how) for one in seen]).to(models.device, models.dtype)
    absent = None if group.negative_image else null_features(encoder, pixels, patches)
    return image_features(encoder, pixels, patches), absent


def beside_embeddings(
    models: Models, seen: Sequence[Image.Image | Features], drawn: Tensor | None, absent: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As `encoded`, where some are embeddings; `drawn` are the features of the others."""
    embeddings = [one for one in seen if isinstance(one, Features)]
    rows = iter(() if drawn is None else drawn.split(1))
    image = [one.image.to(models.device, models.dtype) if isinstance(one, Features) else next(rows) for one in seen]
    known = all(one.negative is not None for one in embeddings)
    if not known or (drawn is not None and absent is None):
        return torch.cat(image), None
    rows = iter(() if absent is None else absent.split(1))
    away = [one.negative.to(image[0]) if isinstance(one, Features) else next(rows) for one in seen]
    return torch.cat(image), torch.cat(away)


def opposed(models: Models, group: ImageGroup, image: Tensor) -> Tensor:
    """The features of the negative pictures, in the place of "no image"."""
    found, _ = encoded(models, group, [opened_as(one) for one in group.negative_image])
    return found.expand_as(image)


def noisy(models: Models, group: ImageGroup, absent: Tensor) -> Tensor:
    """The features of absence with those of a picture of noise blended in."""
    encoder, patches = encoder_of(models, group.adapter), models.adapters[group.adapter].kind.image_proj.patches
    noise = noise_picture(encoder.config.image_size).to(models.device, models.dtype)
    return torch.lerp(absent, image_features(encoder, noise, patches).expand_as(absent), group.negative_noise)


def encoder_of(models: Models, number: int) -> CLIPImage:
    encoder = models.image_encoder(number)
    if encoder is None:
        raise UserError("`image`: no image encoder was opened, which a picture wants; an embedding does without")
    return encoder


def nothing(models: Models, number: int, image: Tensor) -> Tensor:
    """The features of "no image" beside features that came without: zeros, or the patches of a grey picture."""
    if image.ndim == 2:
        return torch.zeros_like(image)
    encoder = encoder_of(models, number)
    side = encoder.config.image_size
    return null_features(encoder, image.new_zeros(1, 3, side, side), True).expand_as(image)


def noise_picture(side: int) -> Tensor:
    """(1, 3, side, side) as `preprocess` gives it: normal noise of CLIP's own mean and spread, always the same.

    Its features, blended into those of the absent image prompt, are what guidance leads away from: not from grey alone, but
    from grain and clutter too.
    """
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def text_features(models: Models, number: int, text: str) -> Tensor:
    """What the text tower of the image encoder's own CLIP makes of a text (1, width): the same space as its embeddings.

    InstantStyle (arXiv 2404.02733, section 3.2) takes it off the picture's. The tower is in the encoder's file, or SDXL's
    second text tower is of the same CLIP (ViT-bigG).

    Raises:
        UserError: another tower than the image encoder's.
    """
    file, width = models.adapters[number].image_encoder, models.adapters[number].kind.image_proj.feature_dim
    theirs = models.base.texts[-1] if len(models.base.texts) == 2 else None
    if theirs and theirs.projection == width:
        tower = models.text_encoder()
        return second_embedding(tower, text).to(models.dtype)
    state = read_part(file)
    projection = state.get("text_projection.weight")
    if projection is not None and theirs is None and not any(key.startswith("text_model.") for key in state):
        return projected_base(models, text, projection)
    _, tower = load_clip(file, models.loaded, models.device)
    return tower.to(models.dtype).embed(tokenize(text).to(models.device))


def projected_base(models: Models, text: str, projection: Tensor) -> Tensor:
    """Where a CLIP lies in two files, as the tiny one: the layers of its text tower are the base's."""
    words, tower = tokenize(text).to(models.device), models.text_encoder().tower
    if projection.shape[1:] != (tower.config.width,):
        raise UserError(f"`less`: a text tower of {projection.shape[-1]} is wanted, the base has {tower.config.width}")
    hidden = tower(words)[:, words[0].argmax()]
    return linear(hidden, projection.to(hidden)).to(models.dtype)


def second_embedding(encoder: TwoTowerEncoder, text: str) -> Tensor:
    second = encoder.second
    return second.embed(tokenize(text, 0).to(next(second.parameters()).device))


def tiled(seen: Sequence[Image.Image | Features]) -> tuple[list[Image.Image], Tensor]:
    if len(seen) != 1 or isinstance(seen[0], Features):
        raise UserError("`framing` tile: one picture to a group; others want an `image` of their own")
    squares, masks = zip(*tiles(seen[0]), strict=True)
    return list(squares), torch.cat(masks)
