"""Autoencoders and image encoders that come as files of their own."""

import re
from pathlib import Path

import torch

from clip import CLIPImage
from files.tensors import State, WeightsError
from vae import SD_VAE, VAE
from weights import configs
from weights.clip_config import read_config
from weights.diffusers import CONFIG, read_part
from weights.diffusers_names import from_diffusers
from weights.fill import IGNORED, fill, under
from weights.kinds import AUTOENCODER, no_clip, what_is
from weights.openclip import OPENAI_NUMBERS, clip_names
from weights.settings import vae_says

# Parts of a whole CLIP model that an image encoder does without.
TEXT_SIDE = re.compile(rf"text(_model)?\.|text_projection|(logit_scale|logit_bias|{'|'.join(OPENAI_NUMBERS)})$")
OPENAI_WIDTHS = (768, 1024)  # ViT-B and ViT-L; those of ViT-H and bigG are OpenCLIP's


def load_vae(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    latent_scale: float = SD_VAE.latent_scale,
) -> VAE:
    """A stand-alone autoencoder, in the original layout (with or without the prefix `first_stage_model.`) or diffusers'.

    Args:
        path: a file, or diffusers' folder.
        latent_scale: what the base's UNet expects (`Base.family.latent_scale`); no tensor tells.

    Raises:
        WeightsError: unreadable, another kind of file, keys missing or left over, or of latents of another scale.
    """
    check_scale(path, latent_scale)
    return fill(lambda state: VAE(configs.vae_config(state, latent_scale)), vae_state(path), path, dtype, device)


def vae_state(path: str | Path) -> State:
    """The tensors of an autoencoder of 4 latent channels, in the original names."""
    state = read_part(path)
    inner = under(AUTOENCODER, state) or {key: w for key, w in from_diffusers(state).items() if not IGNORED.match(key)}
    whole = {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= inner.keys()
    if not whole and not (kind := what_is(state)).startswith("an autoencoder"):  # else `fill` says what it lacks
        raise WeightsError(f"{path}: an autoencoder is wanted here; this is {kind}")
    found = inner.get("post_quant_conv.weight")
    if found is not None and found.shape[:1] != (4,):
        channels = found.shape[0] if found.ndim else 0
        raise WeightsError(f"{path}: an autoencoder of 4 latent channels is wanted here; this one has {channels}")
    return inner


def check_scale(path: str | Path, latent_scale: float) -> None:
    """Refuse an autoencoder in whose folder it says that its latents are scaled otherwise than the base's."""
    config = Path(path) / CONFIG
    said = vae_says(config).get("scaling_factor") or latent_scale
    if said != latent_scale:
        raise WeightsError(
            f"{config}: its latents are scaled by {said}, the base's by {latent_scale}: another family's"
        )


def load_image_encoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CLIPImage:
    """A CLIP image tower (ViT) in the layout of transformers, OpenCLIP or OpenAI; what else the file holds is left aside.

    Args:
        path: a file (OpenAI's TorchScript archives too), an index of shards, or transformers' folder, or one that has
            it as `image_encoder/`. What a `config.json` there says of heads and GELU counts; else the width tells, and
            for the GELU the layout: OpenCLIP's has the exact one, OpenAI's own files the approximation.

    Raises:
        WeightsError: unreadable, another kind of file, keys missing or left over, or a config that contradicts them.
    """
    state = read_part(path)
    names, openclip = clip_names(state)
    if "vision_model.embeddings.class_embedding" not in names or no_clip(state):
        raise WeightsError(f"{path}: a CLIP image encoder (ViT) is wanted here; this is {what_is(state)}")
    inner = {key: w for key, w in names.items() if not TEXT_SIDE.match(key) and not IGNORED.match(key)}
    said = read_config(path, "image")
    if said:
        quick_gelu, heads = said.quick_gelu, said.heads
    else:
        width = names["vision_model.embeddings.class_embedding"].numel()
        quick_gelu, heads = OPENAI_NUMBERS <= names.keys() or (not openclip and width in OPENAI_WIDTHS), None
    tower = fill(lambda state: CLIPImage(configs.image_config(state, quick_gelu, heads)), inner, path, dtype, device)
    if said:
        said.check(tower)
    return tower
