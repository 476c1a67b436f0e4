"""Diffusers folders: one model in each sub-folder, read as one checkpoint."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from files.hashes import sha256, sha256_of_several
from files.tensors import State, WeightsError, read
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
SCHEDULER, VAE_CONFIG = Path("scheduler/scheduler_config.json"), Path("vae/config.json")
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)\.(fp16\.)?(safetensors|bin)(\.(fp16\.)?index(\.fp16)?\.json)?"
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
    if not (path / "unet").is_dir() and any(map(WEIGHTS.fullmatch, listed(path))):
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
        )
    parts = {place: from_diffusers(read_part(path / part)) for part, place in places.items()}
    return {place + key: w for place, part in parts.items() for key, w in part.items()}


def read_part(folder: str | Path) -> State:
    """The tensors of one sub-folder under the names that its file has, whole or in shards.

    Raises:
        WeightsError: no weights here, a shard is missing, or a file cannot be read.
    """
    return {key: w for file in part_files(folder) for key, w in read(file).items()}


def part_files(folder: str | Path) -> list[Path]:
    """The weight files of one sub-folder: of several variants the plain one, then `.fp16`; of formats safetensors.

    Raises:
        WeightsError: no weights here, or a shard is missing.
    """
    folder = Path(folder)
    names = sorted(filter(WEIGHTS.fullmatch, listed(folder)), key=lambda n: ("fp16" in n, ".bin" in n, "index" in n))
    if not names:
        wanted = "diffusion_pytorch_model or model, .safetensors or .bin"
        raise WeightsError(f"{folder}: no weights here ({wanted}); {listing(folder)}")
    if not names[0].endswith(".json"):
        return [folder / names[0]]
    shards = sorted(set(read_json(folder / names[0]).get("weight_map", {}).values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise WeightsError(
            f"{folder / names[0]}: of its {len(shards)} files {len(missing)} are missing: {', '.join(missing)}"
        )
    return [folder / shard for shard in shards]


def folder_files(path: str | Path) -> list[Path]:
    """All files that are read of a diffusers folder, or of one of its sub-folders."""
    path = Path(path)
    parts = [path / part for part in PLACES | TWO_TOWERS if (path / part).is_dir()] or [path]
    settings = [file for file in (path / SCHEDULER, path / VAE_CONFIG) if file.exists()]
    return [*(file for part in parts for file in part_files(part)), *settings]


def model_sha256(path: str | Path) -> str:
    """The hash of a model's file, or of a diffusers folder: of the files that are read there."""
    path = Path(path)
    return sha256_of_several(path, folder_files(path)) if path.is_dir() else sha256(path)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from None
    return content if isinstance(content, dict) else {}


def listed(folder: Path) -> list[str]:
    return sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else []


def listing(folder: Path) -> str:
    return f"found: {', '.join(listed(folder)[:12]) or 'nothing'}"
