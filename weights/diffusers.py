"""Diffusers folders: one model in each sub-folder, read as one checkpoint."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

from files.errors import untrusted
from files.hashes import sha256, sha256_of_several
from files.tensors import State, WeightsError, read, shards
from weights.diffusers_names import from_diffusers

PLACES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
TWO_TOWERS = {
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.transformer.",
}
CONFIG = "config.json"
SCHEDULER, VAE_CONFIG = Path("scheduler/scheduler_config.json"), Path("vae/config.json")
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model|open_clip_model|open_clip_pytorch_model)\.(fp16\.)?(safetensors|bin)"
    r"(\.(fp16\.)?index(\.fp16)?\.json)?"
)


def read_folder(path: str | Path, elsewhere: Collection[str] = ()) -> State:
    """All models of a diffusers folder (SD 1.x, SD 2.x, SDXL and what is distilled from them), as one checkpoint.

    Of a sub-folder alone its one model, as its file has it but for the names.

    Args:
        elsewhere: the sub-folders that are not looked at, as what they hold comes from elsewhere.

    Returns:
        `model.diffusion_model.*` and `first_stage_model.*` in the original names, and the text towers in the
        transformers names: `cond_stage_model.transformer.*`, or where there are two of them (SDXL)
        `conditioner.embedders.0.transformer.*` and `conditioner.embedders.1.transformer.*`.

    Raises:
        WeightsError: a part or a shard is missing, or a file cannot be read.
    """
    path = Path(path)
    if not (path / "unet").is_dir() and (any(map(WEIGHTS.fullmatch, listed(path))) or only_weights(path)):
        return from_diffusers(read_part(path))
    places = PLACES | (TWO_TOWERS if (path / "text_encoder_2").is_dir() else {})
    places = {part: place for part, place in places.items() if part not in elsewhere}
    if missing := [f"{part}/" for part in places if not (path / part).is_dir()]:
        wanted = ", ".join(f"{part}/" for part in places)
        made = (
            read_json(path / "model_index.json").get("_class_name") if (path / "model_index.json").is_file() else None
        )
        raise WeightsError(
            f"{path}: not a whole diffusers folder ({wanted}): no {', '.join(missing)}; {listing(path)}"
            + f"; it is made for {made}" * bool(made)
            + "".join(f"; {inner.parent} is one" for inner in [*path.glob("*/unet"), *path.glob("*/*/unet")][:1])
        )
    parts = {place: from_diffusers(read_part(path / part)) for part, place in places.items()}
    return {place + key: w for place, part in parts.items() for key, w in part.items()}


def read_part(path: str | Path) -> State:
    """The tensors of one model under the names that its file has: a file, an index of shards, or a folder with either.

    Raises:
        WeightsError: no weights here, a shard is missing, or a file cannot be read.
    """
    files = part_files(path) if os.path.isdir(path) else [path]
    return {key: w for file in files for key, w in read(file).items()}


def part_files(folder: str | Path) -> list[Path]:
    """The weight files of a folder of one model: of variants the plain one, then `.fp16`; of formats safetensors.

    Where it has none by the usual names, its only file of weights, whatever that is called; or those of `image_encoder/` in
    it: so they lie in h94/IP-Adapter.

    Raises:
        WeightsError: no weights here, or a shard is missing.
    """
    folder = Path(folder)
    names = [name for name in listed(folder) if WEIGHTS.fullmatch(name)] or only_weights(folder)
    names = sorted(names, key=lambda n: ("open_clip" in n, "fp16" in n, ".bin" in n, "index" in n))
    if not names and (folder / "image_encoder").is_dir():
        return part_files(folder / "image_encoder")
    if not names:
        wanted = "diffusion_pytorch_model or model, .safetensors or .bin; or one file of weights alone"
        raise WeightsError(f"{folder}: a folder without weights ({wanted}); {listing(folder)}")
    return shards(folder / names[0]) if names[0].endswith(".json") else [folder / names[0]]


def only_weights(folder: Path) -> list[str]:
    """The one file of weights in a folder, by any name."""
    names = [name for name in listed(folder) if name.lower().endswith((".safetensors", ".bin", ".ckpt", ".pt", ".pth"))]
    return names if len(names) == 1 else []


def folder_files(path: str | Path) -> list[Path]:
    """All files that are read of a diffusers folder, or of a folder of one model."""
    path = Path(path)
    parts = [path / part for part in PLACES | TWO_TOWERS if (path / part).is_dir()]
    found = [file for part in parts or [path] for file in part_files(part)]
    settings = (path / SCHEDULER, path / VAE_CONFIG) if parts else (found[0].with_name(CONFIG),)
    return found + [file for file in settings if file.exists()]


def model_sha256(path: str | Path) -> str:
    """The hash of a model's file, or of a folder or an index of shards: of the files that are read there."""
    path = Path(path)
    if path.name.endswith(".index.json"):
        return sha256_of_several(path.parent, shards(path))
    return sha256_of_several(path, folder_files(path)) if path.is_dir() else sha256(path)


def read_json(path: Path) -> dict:
    with untrusted(WeightsError, f"{path}: not readable as JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def listed(folder: Path) -> list[str]:
    return sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else []


def listing(folder: Path) -> str:
    return f"found: {', '.join(listed(folder)[:12]) or 'nothing'}"
