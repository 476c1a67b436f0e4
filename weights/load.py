"""Autoencoders and image encoders that come as files of their own."""

import re
from pathlib import Path

import torch

from clip import CLIPImage
from files.tensors import State, WeightsError, read
from vae import SD_VAE, VAE
from weights import configs
from weights.diffusers_names import from_diffusers
from weights.fill import IGNORED, fill, under
from weights.kinds import what_is
from weights.openclip import from_openclip

# Parts of a whole CLIP model that an image encoder does without.
TEXT_SIDE = re.compile(r"text_model\.|text_projection|logit_scale$|logit_bias$")
VAE_ = "first_stage_model."


def load_vae(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    latent_scale: float = SD_VAE.latent_scale,
) -> VAE:
    """A stand-alone autoencoder, in the original layout (with or without the prefix `first_stage_model.`) or diffusers'.

    Args:
        latent_scale: what the base's UNet expects (`Base.family.latent_scale`); no tensor tells.
    """
    return fill(lambda state: VAE(configs.vae_config(state, latent_scale)), vae_state(path), path, dtype, device)


def vae_state(path: str | Path) -> State:
    """The tensors of an autoencoder of 4 latent channels, in the original names."""
    state = read(path)
    inner = under(VAE_, state) or {key: w for key, w in from_diffusers(state).items() if not IGNORED.match(key)}
    if not {"encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"} <= inner.keys():
        raise WeightsError(f"{path}: an autoencoder is wanted here; this is {what_is(state)}")
    if "post_quant_conv.weight" in inner and (channels := inner["post_quant_conv.weight"].shape[0]) != 4:
        raise WeightsError(f"{path}: an autoencoder of 4 latent channels is wanted here; this one has {channels}")
    return inner


def load_image_encoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CLIPImage:
    """A CLIP image tower, in the transformers layout or in OpenCLIP's; a text tower in the same file is left aside."""
    state = read(path)
    if "visual.conv1.weight" in state:
        inner, quick_gelu = from_openclip(state), False
    elif "vision_model.embeddings.patch_embedding.weight" in state:
        width = state["vision_model.embeddings.patch_embedding.weight"].shape[0]
        inner = {key: value for key, value in state.items() if not TEXT_SIDE.match(key) and not IGNORED.match(key)}
        quick_gelu = width in (768, 1024)  # OpenAI's own ViT-B and ViT-L; ViT-H and bigG are OpenCLIP's
    else:
        raise WeightsError(f"{path}: a CLIP image encoder is wanted here; this is {what_is(state)}")
    return fill(lambda state: CLIPImage(configs.image_config(state, quick_gelu)), inner, path, dtype, device)
