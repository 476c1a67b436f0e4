"""What a picture should show: texts and image prompts, as all that the UNet reads of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clip import preprocess
from files.errors import UserError
from files.faces import find_faces, read_embedding
from files.pictures import open_picture
from generate.models import Models
from generate.text import encoded
from ipadapter import IPAdapter, Prompt
from unet import size_vector

Picture = str | Path | Image.Image


@torch.no_grad()
def prompts(
    models: Models,
    # The text prompt.
    text: str = "",
    # The negative prompt: what the picture should not be.
    negative: str = "",
    # Image prompts, files or pictures; several prompt together.
    images: Sequence[Picture] = (),
    # The weight of the image prompt: one number, or one for each cross-attention layer; None: 1, beside a text 0.6.
    scale: float | Sequence[float] | None = None,
    # Face embeddings for FaceID adapters, files or tensors (faces, 512); without any, the faces are read off the images
    # (insightface).
    faces: Sequence[str | Path | Tensor] = (),
    # How far FaceID-plus version 2 follows the picture of the face, beside the embedding; None: 1.
    structure_scale: float | None = None,
    # How weights are written in the texts: "plain" (not at all), "a1111" or "comfy".
    prompt_syntax: str = "plain",
    # Longer texts than 75 tokens in chunks, instead of cut; in the other syntaxes they always are.
    long_prompt: bool = False,
    # How many of the last layers of the text towers are left out, as diffusers counts.
    clip_skip: int = 0,
) -> tuple[Prompt, Prompt]:
    """The prompt and its absence, for `pictures`.

    Raises:
        UserError: a picture or embedding that cannot be used, or that the adapter does not read.
    """
    texts = encoded(models, text, negative, prompt_syntax, long_prompt, clip_skip)
    pair = [sized(Prompt(x, vector=pooled), models, models.side, models.side, pooled) for x, pooled in texts]
    if images or faces:
        if models.adapter_kind is None:
            raise UserError("`image`: no adapter was opened, which an image prompt wants")
        adapter, scale = models.adapter(), default_scale(text) if scale is None else scale
        tokens = image_tokens(models, adapter, images, faces, structure_scale)
        pair = [replace(p, images=(adapter.prompt(t, scale),)) for p, t in zip(pair, tokens, strict=True)]
    elif scale is not None:
        raise UserError("`scale` is the weight of an image prompt: it goes with `image`")
    return tuple(pair)


def default_scale(text: str) -> float:
    return 0.6 if text else 1.0


def scaled(prompt: Prompt, scale: float | Sequence[float]) -> Prompt:
    """The same prompt with another weight of its image prompts."""
    return replace(prompt, images=tuple(replace(image, scale=scale) for image in prompt.images))


def sized(prompt: Prompt, models: Models, height: int, width: int, pooled: Tensor | None = None) -> Prompt:
    """The same prompt for a picture of another size, in pixels: SDXL is told of it beside the text."""
    if prompt.vector is None:
        return prompt
    sinusoids = models.base.sinusoids
    pooled = prompt.vector[:, : -6 * sinusoids] if pooled is None else pooled
    return replace(prompt, vector=size_vector(pooled, height, width, sinusoids))


def image_tokens(
    models: Models,
    adapter: IPAdapter,
    images: Sequence[Picture],
    faces: Sequence[str | Path | Tensor] = (),
    structure_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens of the image prompt and those of its absence, both (1, pictures * num_tokens, context_dim).

    An image encoder that is not kept is freed on return.
    """
    encoder = models.image_encoder()
    if faces and not adapter.image_proj.faces:
        raise UserError(f"`face_embedding`: for FaceID adapters; {models.files['adapter']} reads pictures (`image`)")
    if structure_scale is not None and not models.faceid_v2:
        raise UserError(f"`structure_scale`: for FaceID-plus version 2; {models.files['adapter']} is another kind")
    seen = [image if isinstance(image, Image.Image) else open_picture(image) for image in images]
    embeddings = pixels = None
    if adapter.image_proj.faces:
        if faces and images and not encoder:
            raise UserError(f"`image`: {models.files['adapter']} reads the face alone, which `face_embedding` gives")
        if faces:
            embeddings = torch.cat([x if isinstance(x, Tensor) else read_embedding(x) for x in faces])
        else:
            embeddings, seen = find_faces(seen, [str(image) for image in images])
        embeddings = embeddings.to(models.device, models.dtype)
    if encoder:
        if embeddings is not None and len(embeddings) != len(seen):
            raise UserError(
                f"`face_embedding`: {len(embeddings)} faces, `image`: {len(seen)} pictures of them; this adapter "
                "reads both"
            )
        pixels = torch.cat([preprocess(image, encoder.config.image_size) for image in seen])
        pixels = pixels.to(models.device, models.dtype)
    weight = (1.0 if structure_scale is None else structure_scale) if models.faceid_v2 else None
    given = encoder, pixels, embeddings, weight
    return adapter.tokens(*given), adapter.null_tokens(*given)
