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

from files.errors import Notice, brief
from files.tensors import State, WeightsError
from sampler import Schedule
from weights.clip_config import read_config
from weights.diffusers import CONFIG, SCHEDULER, TWO_TOWERS, VAE_CONFIG, read_json
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
# What configs of UNets and autoencoders say and no tensor tells, in diffusers' words.
UNTOLD = {
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "resnet_time_scale_shift": "default",
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
                f"{file}: the {name} is {brief(repr(found), 60)}; {' and '.join(map(str, allowed)) or 'none'} supported"
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


def heed(path: str | Path, kind: Family, vae: bool, texts: bool) -> Family:
    """The family's row, changed by what a folder says of its autoencoder's scale and precision and of its text towers.

    Args:
        vae, texts: whether these are the folder's own.

    Raises:
        WeightsError: something is said that cannot be used.
    """
    check_unet(next((file for part in ("unet", "") if (file := Path(path, part, CONFIG)).is_file()), None), kind)
    if vae:
        said = vae_says(Path(path) / VAE_CONFIG)
        # Heeded only where a family overflows in fp16: all folders say so, as it is diffusers' default.
        half = kind.half_vae or not said.get("force_upcast", True)
        kind = replace(kind, latent_scale=said.get("scaling_factor") or kind.latent_scale, half_vae=half)
    for i, (name, tower) in enumerate(zip(TWO_TOWERS, kind.text, strict=False) if texts else ()):
        if (Path(path) / name).is_dir() and (told := read_config(Path(path) / name, "text")):
            told.check_eps()
            tower = replace(tower, quick_gelu=told.quick_gelu, heads=told.heads)
            kind = replace(kind, text=(*kind.text[:i], tower, *kind.text[i + 1 :]))
    return kind


def check_unet(file: Path | None, kind: Family) -> None:
    """Refuse a UNet of which its config says what is not so here, and no tensor tells."""
    config = read_json(file) if file else {}
    check_untold(file, config)
    heads = next((name for name in ("num_attention_heads", "attention_head_dim") if config.get(name)), None)
    widths = config.get("block_out_channels")
    if heads and isinstance(widths, list):
        # diffusers' attention_head_dim is how many heads there are.
        found = config[heads] if isinstance(config[heads], list) else [config[heads]] * len(widths)
        ours = [8 if kind.context_dim == 768 else width // 64 for width in widths if isinstance(width, int)]
        if found != ours:
            raise WeightsError(f"{file}: the {heads} is {config[heads]!r}; for widths of {widths} {ours} is supported")


def check_untold(file: Path | None, config: dict) -> None:
    for name, allowed in UNTOLD.items():
        if (found := config.get(name, allowed)) not in (allowed, None):
            raise WeightsError(f"{file}: the {name} is {brief(repr(found), 60)}; {allowed!r} is supported")


def vae_says(file: Path) -> dict[str, object]:
    """The config of an autoencoder in diffusers' layout; where there is none, nothing.

    Raises:
        WeightsError: it cannot be read, or its latents are not scaled alone.
    """
    config = read_json(file) if os.path.isfile(file) else {}  # unlike Path, no error for names that no file can have
    check_untold(file, config)
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(name):
            raise WeightsError(f"{file}: has {name}; an autoencoder whose latents are scaled alone is wanted")
    number(file, config, "scaling_factor")
    return config
