"""What the models of a run are called, and what these names stand for; nothing is fetched yet."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from files.errors import UserError
from weights import Base, load_adapter
from weights.families import drawn_by
from weights.inversion import Embedding, read_embeddings
from weights.lora import LoRA, read_lora
from weights.names import Found, check_together, find, resolve
from weights.presets import Preset

ROLES = ("base", "adapter", "image_encoder", "vae")
Named = str | Path  # a file, or the name of a published one


class Asked(NamedTuple):
    """What is asked for of one adapter."""

    adapter: Named | None
    image_encoder: Named | None
    faceid_v2: bool  # whether it is FaceID-plus version 2
    encode: bool  # whether pictures are encoded for it


def together(
    adapter: Named | Sequence[Named | None] | None,
    image_encoder: Named | Sequence[Named | None] | None,
    faceid_v2: bool | Sequence[bool],
    encode: bool | Sequence[bool],
) -> list[Asked]:
    """What is asked for of each adapter. Raises UserError: not as many of the others as adapters."""
    adapters = list(adapter) if isinstance(adapter, Sequence) and not isinstance(adapter, str) else [adapter]
    several = isinstance(image_encoder, Sequence) and not isinstance(image_encoder, str)
    encoders = list(image_encoder) if several else [image_encoder] * len(adapters)
    versions, encodes = ([one] * len(adapters) if isinstance(one, bool) else list(one) for one in (faceid_v2, encode))
    for name, found in (("image_encoder", encoders), ("faceid_v2", versions), ("encode", encodes)):
        if len(found) != len(adapters):
            raise UserError(f"`{name}`: {len(found)} given, for {len(adapters)} adapters: one for all, or one for each")
    return list(map(Asked, adapters, encoders, versions, encodes))


def base_named(each: Sequence[Asked]) -> str | None:
    """The base that the first of several adapters brings by its name."""
    found = [find("adapter", str(one.adapter)) for one in each if one.adapter]
    return next((preset.base for preset in found if isinstance(preset, Preset)), None)


def row_of(asked: Asked, base: Named | None, vae: Named | None, image: bool, new_adapter: bool) -> dict[str, Found]:
    """What an adapter stands for, by role, and what follows from it; no image encoder where no picture is encoded."""
    names = zip(ROLES, (base, asked.adapter, asked.image_encoder, vae), strict=True)
    given = {role: name and str(name) for role, name in names}
    found = resolve(given, image, new_adapter, faces_alone if asked.encode else lambda adapter: True)
    return found if asked.encode else found | {"image_encoder": None}


def lora_of(given: Named | tuple[Named, float], base: Found) -> tuple[LoRA | Preset, float]:
    """A LoRA for a base, and its weight; a file is read before anything is fetched."""
    name, weight = given if isinstance(given, tuple) else (given, 1.0)
    found = find("lora", str(name))
    check_together({"base": base, "lora": found})
    return (read_lora(found) if isinstance(found, Path) else found), weight


def net_of(name: Named, base: Found) -> Path | Preset:
    """A ControlNet or T2I-Adapter for a base."""
    found = find("control", str(name))
    check_together({"base": base, "control": found})
    return found


def check_opened(base: Base, found: Sequence[Found | None]) -> None:
    """Refuse names of another family than a file turned out to be, before they are fetched. Raises WeightsError."""
    family = drawn_by(base.family, base.config.channels)
    told = Preset("base", str(base.path), file="", megabytes=0, families=(family,))
    for one in found:
        check_together({"base": told, "other": one})


def inversions_of(given: str | Path | tuple[str | Path, str | None]) -> list[Embedding]:
    """The textual inversions of a file, which may be given with the name that is to call it."""
    return read_embeddings(*given) if isinstance(given, tuple) else read_embeddings(given)


def faces_alone(adapter: Path) -> bool:
    return not load_adapter(adapter, device="meta").reads_clip
