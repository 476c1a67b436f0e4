"""What the models of a run are called, and what these names stand for; nothing is fetched yet."""

from collections.abc import Sequence
from pathlib import Path

from files.errors import UserError
from weights import load_adapter
from weights.lora import LoRA, read_lora
from weights.names import find, resolve
from weights.presets import Preset

ROLES = ("base", "adapter", "image_encoder", "vae")
Named = str | Path  # a file, or the name of a published one


def together(
    adapter: Named | Sequence[Named | None] | None,
    image_encoder: Named | Sequence[Named | None] | None,
    faceid_v2: bool | Sequence[bool],
    encode: bool | Sequence[bool],
) -> list[tuple[Named | None, Named | None, bool, bool]]:
    """For each adapter itself, its image encoder, whether it is FaceID-plus version 2, whether pictures are encoded."""
    adapters = list(adapter) if isinstance(adapter, Sequence) and not isinstance(adapter, str) else [adapter]
    several = isinstance(image_encoder, Sequence) and not isinstance(image_encoder, str)
    encoders = list(image_encoder) if several else [image_encoder] * len(adapters)
    versions, encodes = ([one] * len(adapters) if isinstance(one, bool) else list(one) for one in (faceid_v2, encode))
    for name, found in (("image_encoder", encoders), ("faceid_v2", versions), ("encode", encodes)):
        if len(found) != len(adapters):
            raise UserError(f"`{name}`: {len(found)} given, for {len(adapters)} adapters: one for all, or one for each")
    return list(zip(adapters, encoders, versions, encodes, strict=True))


def base_named(each: Sequence[tuple[Named | None, Named | None, bool, bool]]) -> str | None:
    """The base that the first of several adapters brings by its name."""
    found = [find("adapter", str(name)) for name, *_ in each if name]
    return next((preset.base for preset in found if isinstance(preset, Preset)), None)


def rows_of(
    adapter: Named | None,
    encoder: Named | None,
    faceid_v2: bool,
    encodes: bool,
    base: Named | None,
    vae: Named | None,
    image: bool,
    new_adapter: bool,
) -> dict[str, Path | Preset | None]:
    """What an adapter stands for, by role, and what follows from it; no image encoder where no picture is encoded."""
    given = {role: name and str(name) for role, name in zip(ROLES, (base, adapter, encoder, vae), strict=True)}
    found = resolve(given, image, new_adapter, faces_alone if encodes else lambda adapter: True)
    return found if encodes else found | {"image_encoder": None}


def lora_of(given: Named | tuple[Named, float]) -> tuple[LoRA | Preset, float]:
    """A LoRA and its weight; a file is read before anything is fetched."""
    name, weight = given if isinstance(given, tuple) else (given, 1.0)
    found = find("lora", str(name))
    return (read_lora(found) if isinstance(found, Path) else found), weight


def faces_alone(adapter: Path) -> bool:
    return not load_adapter(adapter, device="meta").reads_clip
