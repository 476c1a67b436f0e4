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
from generate.fit import check_group, encoders
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
    for one in seen:
        if isinstance(one, Features) and None in encoders(one, reader):
            told = "is of another adapter; its widths fit, whether its image encoder is the same cannot be told"
            warnings.warn(Notice(f"{one.name}: {told}"), stacklevel=4)
    if reader.projection.faces:
        faces, seen = faces_of(group, seen)
        faces = faces.to(models.device, models.dtype)
    elif group.framing == "tile":
        seen, masks = tiled(seen)
    elif seen and isinstance(seen[0], Features):
        masks = seen[0].masks
    image, negative = clip_features(models, group, seen) if reader.clip else (None, None)
    return Features(image, negative, faces, masks)


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
    patches = models.adapters[group.adapter].kind.image_proj.patches
    image, absent = encoded(models, group, seen, patches, group.framing)
    if group.less:
        text, strength = group.less if isinstance(group.less, tuple) else (group.less, 1.0)
        image = image - strength * text_features(models, group.adapter, text)
    if group.negative_image:
        against = [opened_as(one) for one in group.negative_image]
        absent, _ = encoded(models, group, against, patches, "crop" if group.framing == "tile" else group.framing)
        absent = absent.expand_as(image)
    elif absent is None:
        absent = nothing(models, group.adapter, image)
    if group.negative_noise:
        encoder = encoder_of(models, group.adapter)
        noise = noise_picture(encoder.config.image_size).to(models.device, models.dtype)
        absent = torch.lerp(absent, image_features(encoder, noise, patches).expand_as(absent), group.negative_noise)
    return image, absent


def encoded(
    models: Models, group: ImageGroup, seen: Sequence[Image.Image | Features], patches: bool, framing: str
) -> tuple[Tensor, Tensor | None]:
    """Features of pictures and embeddings, and of their absence where those that are embeddings have it."""
    drawn, rows, absent = [one for one in seen if isinstance(one, Image.Image)], iter(()), iter(())
    if drawn:
        encoder = encoder_of(models, group.adapter)
        how = encoder.config.image_size, "crop" if framing == "tile" else framing, group.crop_position
        pixels = torch.cat([preprocess(one, *how) for one in drawn]).to(models.device, models.dtype)
        rows = iter(image_features(encoder, pixels, patches).split(1))
        absent = iter(null_features(encoder, pixels, patches).split(1)) if not group.negative_image else iter(())
    read = [one for one in seen if isinstance(one, Features)]
    image = [one.image.to(models.device, models.dtype) if isinstance(one, Features) else next(rows) for one in seen]
    if group.negative_image or (read and any(one.negative is None for one in read)):
        return torch.cat(image), None
    away = [one.negative.to(image[0]) if isinstance(one, Features) else next(absent) for one in seen]
    return torch.cat(image), torch.cat(away)


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
