"""What base models say beside their weights: of their noise schedule, and of their autoencoder's scale and precision.

It is used, or refused where it cannot be; nothing is passed over.
"""

import math
import os
import re
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from files.errors import Notice
from files.tensors import State, WeightsError
from sampler import Schedule
from weights.diffusers import SCHEDULER, VAE_CONFIG, read_json
from weights.families import SDXL, Family
from weights.kinds import UNET

MARKS = ("v_pred", "ztsnr")  # keys of files: v is predicted; the schedule ends in pure noise
PREDICTIONS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"}  # as metadata and schedulers call them
# What is read of a scheduler's config, by its names and those of `Schedule`; and what else it may say.
NAMED = {
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "beta_schedule": "beta_schedule",
    "prediction_type": "prediction",
    "timestep_spacing": "spacing",
    "rescale_betas_zero_snr": "zero_snr",
    "steps_offset": "steps_offset",
    "set_alpha_to_one": "set_alpha_to_one",
}
ONLY = {
    "prediction_type": ("epsilon", "v_prediction"),
    "num_train_timesteps": (1000,),
    "trained_betas": (),
    "rescale_betas_zero_snr": (False, True),
    "steps_offset": (0, 1),
    "set_alpha_to_one": (False, True),
}


def schedule_of(path: str | Path, state: State, kind: Family, **asked: str | None) -> Schedule:
    """The family's noise schedule, changed by what a folder's scheduler or a file says, and that by what is asked for.

    Raises:
        WeightsError: it cannot be used.
    """
    if mark := next((key for key in state if key.startswith("edm_")), None):
        raise WeightsError(f"{path}: made for the noise levels of EDM (its key {mark}), which are not supported")
    said = scheduler_says(path) if os.path.isdir(path) else {}
    if kind is not SDXL:  # diffusers' pipelines of the others correct it too
        said.pop("steps_offset", None)
    if told := metadata(path).get("modelspec.prediction_type"):
        said |= prediction_told(path, told)
    if "v_pred" in state:
        said["prediction"] = "v"
    if "ztsnr" in state:
        said |= {"zero_snr": True, "spacing": "trailing"}
    try:
        return replace(kind.schedule, **said | {name: value for name, value in asked.items() if value})
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None


def prediction_told(path: str | Path, told: str) -> dict[str, str]:
    """What the metadata of a file say that it predicts; what is not known is told, and nothing follows of it."""
    if found := PREDICTIONS.get(told.lower().replace("-", "_")):
        return {"prediction": found}
    warnings.warn(Notice(f"{path}: its metadata says that it predicts {told!r}, which is not known"), stacklevel=3)
    return {}


def scheduler_says(path: str | Path) -> dict[str, object]:
    """What a folder's scheduler says, as arguments of `Schedule`."""
    file = Path(path) / SCHEDULER
    config = read_json(file) if file.exists() else {}
    made_by = str(config.get("_class_name"))
    if "EDM" in made_by or config.get("timestep_type") == "continuous":
        raise WeightsError(f"{file}: made for the noise levels of EDM (arXiv 2206.00364), which are not supported")
    if "Flow" in made_by:
        raise WeightsError(f"{file}: made for a flow, not for a diffusion; that is not supported")
    for name, allowed in ONLY.items():
        if (found := config.get(name)) not in (None, *allowed):
            raise WeightsError(
                f"{file}: the {name} is {found!r}; {' and '.join(map(str, allowed)) or 'none'} supported"
            )
    for name in ("beta_start", "beta_end"):
        number(file, config, name, 1)
    said = {ours: config[theirs] for theirs, ours in NAMED.items() if config.get(theirs) is not None}
    return said | ({"prediction": PREDICTIONS[said["prediction"]]} if "prediction" in said else {})


def number(file: Path, config: dict, name: str, below: float = math.inf) -> float | None:
    """What a config says under a name, a number above 0; None for nothing."""
    found = config.get(name)
    if found is not None and not (isinstance(found, int | float) and 0 < found < below):
        raise WeightsError(f"{file}: the {name} is {found!r}; a number above 0 and below {below:g} is wanted")
    return found


def metadata(path: str | Path) -> dict[str, str]:
    """What stands in a .safetensors file beside its tensors; of any other file nothing."""
    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        return file.metadata() or {}
    return {}


def sd2_predicts_noise(state: State) -> bool:
    """The versions of SD 2.x (512 pixels and eps, 768 and v) have the same tensors; how widely one bias varies tells.

    It is what ComfyUI goes by (supported_models.py), and has since 2023.
    """
    name = re.escape(UNET) + r"output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias"
    biases = {int(match[1]): w for key, w in state.items() if (match := re.fullmatch(name, key))}
    return bool(biases) and biases[max(biases)].float().std(correction=0).item() <= 0.09


def heed_vae(path: str | Path, kind: Family) -> Family:
    """The family's row, changed by what a folder's autoencoder says of its scale and its precision."""
    said = vae_says(Path(path) / VAE_CONFIG)
    # Heeded only where a family overflows in fp16: all folders say so, as it is diffusers' default.
    half = kind.half_vae or not said.get("force_upcast", True)
    return replace(kind, latent_scale=said.get("scaling_factor") or kind.latent_scale, half_vae=half)


def vae_says(file: Path) -> dict[str, object]:
    """The config of an autoencoder in diffusers' layout; where there is none, nothing.

    Raises:
        WeightsError: it cannot be read, or its latents are not scaled alone.
    """
    config = read_json(file) if os.path.isfile(file) else {}  # unlike Path, no error for names that no file can have
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(name):
            raise WeightsError(f"{file}: has {name}; an autoencoder whose latents are scaled alone is wanted")
    number(file, config, "scaling_factor")
    return config
