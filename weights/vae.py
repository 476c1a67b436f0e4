"""Autoencoders that come as files of their own."""

from pathlib import Path

import torch

from files.tensors import State, WeightsError
from vae import SD_VAE, VAE
from weights.configs import vae_config
from weights.diffusers import CONFIG, read_part
from weights.diffusers_names import from_diffusers
from weights.fill import IGNORED, fill, peeled, under
from weights.kinds import AUTOENCODER, what_is
from weights.settings import vae_says


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
    return fill(lambda state: VAE(vae_config(state, latent_scale)), vae_state(path), path, dtype, device)


def vae_state(path: str | Path) -> State:
    """The tensors of an autoencoder of 4 latent channels, in the original names."""
    state = peeled(read_part(path), AUTOENCODER, "encoder.conv_in.", "decoder.conv_in.")
    inner = from_diffusers(under(AUTOENCODER, state) or {key: w for key, w in state.items() if not IGNORED.match(key)})
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
