"""LoRAs for the base model as files: what their names mean, and whether they fit.

Read are the names of kohya-ss (`lora_unet_*`, `lora_te*_*`) and those of diffusers and peft (`unet.*`, `text_encoder*.*`),
for linear layers and convolutions (LoCon).
"""

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from files.errors import untrusted
from files.tensors import State, WeightsError, read
from ipadapter import low_rank
from ipadapter.low_rank import LowRank
from weights.diffusers_names import unet_key, unet_shape
from weights.families import of_width
from weights.kinds import what_is

PREFIX = re.compile(
    r"(?:(lora_unet_|unet\.|(?:model\.)?diffusion_model\.)|(lora_te2_|text_encoder_2\.)|(lora_te1?_|text_encoder\.))?"
    r"(?:base_model\.model\.)?"
)
PARTS = {1: "unet", 2: "text_2", 3: "text"}  # by the group of PREFIX that matched
MATRIX = re.compile(
    r"(?:\.lora_(down|up|mid|A|B)(?:\.\w+)?|(?:\.lora|\.lora_linear_layer|_lora)\.(down|up))\.weight$"
    r"|(?:[._]lora(?:_linear_layer)?)?(?:\.down\.weight)?\.(alpha)$"
)
WHAT = {"unet": "the UNet", "text": "the text tower", "text_2": "a second text tower"}
SAME = {"A": "down", "B": "up"}
OTHERS = {
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.(diff|diff_b)$": "whole differences of weights",
}
ONE = torch.ones(1)
# Of the regular expressions that peft allows for names: letters, alternatives and a wildcard. One that repeats what
# repeats could take years.
PATTERN = re.compile(r"\^?[\w.-]*(\.\*[\w.-]*)?(\|[\w.-]*)*\$?")


@dataclass(frozen=True)
class LoRA:
    """A file, read; the names of its layers are still the file's, with `_` for every `.`."""

    path: Path
    parts: dict[str, dict[str, LowRank]]  # "unet", "text" (the first text tower), "text_2" -> name -> what is added


def read_lora(path: str | Path) -> LoRA:
    """A LoRA or LoCon in kohya's names or in those of diffusers and peft (.safetensors or .bin).

    Raises:
        WeightsError: unreadable, no LoRA, one of another kind (DoRA, LoHa, LoKr, ...), or keys left over.
    """
    state = read(path)
    for mark, kind in OTHERS.items():
        if key := next((key for key in state if re.search(mark, key)), None):
            raise WeightsError(f"{path}: {kind} is not supported ({key}); LoRA and LoCon are")
    found: dict[tuple[str, str], State] = {}
    left = []
    for key, w in state.items():
        if match := MATRIX.search(key):
            kind = match[1] or match[2] or match[3]
            found.setdefault(split(key[: match.start()]), {})[SAME.get(kind, kind)] = w
        else:
            left.append(key)
    if not found or any(key.startswith(("image_proj.", "ip_adapter.")) for key in left):
        raise WeightsError(f"{path}: a LoRA is wanted here; this is {what_is(state)}")
    left += [name for (_, name), layer in found.items() if not whole(layer)]
    if left:
        raise WeightsError(f"{path}: {len(left)} keys that belong to no pair of LoRA matrices: {some(left)}")
    config = peft_config(Path(path))
    parts: dict[str, dict[str, LowRank]] = {}
    for (part, name), layer in found.items():
        rank = layer["down"].shape[0]
        scale = layer["alpha"].item() / rank if "alpha" in layer else peft_scale(config, part, name, rank)
        change = LowRank(layer["down"], layer["up"], layer.get("mid"), scale)
        parts.setdefault(part, {})[name.replace(".", "_")] = change
    return LoRA(Path(path), parts)


def merge(model: nn.Module, loras: list[tuple[LoRA, float]], part: str, keep: bool = True) -> Callable[[], None]:
    """Add LoRAs, each times its weight, to a model.

    Args:
        model: a UNet or a text tower, filled.
        part: what it is of the base: "unet", "text" (the first text tower) or "text_2".
        keep: as in `low_rank.merge`: False merges for good.

    Returns:
        A function that takes the LoRAs out again.

    Raises:
        WeightsError: a layer of a LoRA fits none of the model; then nothing was changed.
    """
    changes: dict[str, list[tuple[float, LowRank]]] = {}
    for lora, weight in loras:
        for name, change in targets(lora, part, model).items():
            changes.setdefault(name, []).append((weight, change))
    return low_rank.merge(model, changes, keep)


def check(lora: LoRA, models: dict[str, nn.Module]) -> None:
    """Refuse a LoRA that does not fit a base, before anything is loaded: the models may be on `meta`.

    Args:
        models: all that the base has of "unet", "text" and "text_2".
    """
    for part, layers in lora.parts.items():
        if part not in models:
            raise WeightsError(
                f"{lora.path}: {len(layers)} of its layers are for {WHAT[part]}, which this base has not; "
                f"the LoRA seems made for {made_for(lora)}"
            )
        targets(lora, part, models[part])


def targets(lora: LoRA, part: str, model: nn.Module) -> dict[str, LowRank]:
    """Of one part of a LoRA: the model's name of each parameter -> what is added to it.

    Raises:
        WeightsError: layers that the model does not have, or has in another shape.
    """
    shapes = {name: p.shape for name, p in model.named_parameters() if name.endswith(".weight") and p.ndim > 1}
    flat = {flat_text(name.removesuffix(".weight").replace(".", "_")): name for name in shapes}
    shape = unet_shape(shapes) if part == "unet" else None
    found, strangers = {}, []
    for name, change in lora.parts.get(part, {}).items():
        ours = flat.get(flat_unet(name, shape) if shape else flat_text(name))
        wanted = tuple(shapes.get(ours, ()))
        if change.shape[:2] == wanted[:2] and math.prod(change.shape) == math.prod(wanted):  # (1, 1) or no kernel
            found[ours] = change
        else:
            strangers.append(f"{name} {change.shape}" + f" for {wanted}" * bool(wanted))
    if strangers:
        raise WeightsError(
            f"{lora.path}: {len(strangers)} of its {len(lora.parts[part])} layers for {WHAT[part]} fit none of this base: "
            f"{some(strangers)}; the LoRA seems made for {made_for(lora)}"
        )
    return found


def made_for(lora: LoRA) -> str:
    """Which base a LoRA seems to belong to, by its names and shapes."""
    unet = lora.parts.get("unet", {})
    if any(re.search("(double|single|joint)_blocks|^transformer|single_transformer", name) for name in unet):
        return "a transformer (FLUX, SD 3 or another), not a UNet"
    widths = {change.shape[1] for name, change in unet.items() if name.endswith("attn2_to_k")}
    if len(widths) == 1:
        width = widths.pop()
        row = of_width(width)
        return f"{row.name if row else 'another base'} (its UNet reads tokens of {width})"
    return "SDXL (two text towers)" if "text_2" in lora.parts else "a base that its names do not tell"


def split(name: str) -> tuple[str, str]:
    """Part and layer, without what trainers put around the layer's name."""
    match = PREFIX.match(name)
    inner = name[match.end() :].replace(".processor", "")
    part = PARTS.get(match.lastindex) or ("text" if inner.startswith(("text_model", "encoder.layers")) else "unet")
    return part, inner


def whole(layer: State) -> bool:
    down, up = layer.get("down"), layer.get("up")
    if down is None or up is None or layer.get("alpha", ONE).numel() != 1:
        return False
    return down.ndim > 1 < up.ndim and 0 < down.shape[0] == up.shape[1]


def flat_unet(name: str, shape: tuple[int, set[int]]) -> str:
    name = unet_key(name, *shape).replace(".", "_")
    return re.sub(r"_to_out$", "_to_out_0", name)  # files of early 2023 leave the number out


def flat_text(name: str) -> str:
    name = name.removeprefix("text_model_")  # transformers 5 has no such level
    return re.sub(r"_to_(q|k|v|out)$", r"_\1_proj", name) if name.startswith("encoder_layers") else name


def peft_config(path: Path) -> dict:
    """What diffusers writes into the file, and peft beside it: there alpha is no tensor.

    Raises:
        WeightsError: it cannot be read, or says what no file of peft says.
    """
    text, wrong = None, f"{path}: its LoRA settings are not readable as JSON"
    with suppress(SafetensorError), safe_open(path, "pt") as file:  # a pickle has no metadata
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    with untrusted(WeightsError, wrong):
        if text is None and (beside := path.with_name("adapter_config.json")).is_file():
            text = beside.read_text(encoding="utf-8")
        config = json.loads(text or "{}")
    for key, value in config.items() if isinstance(config, dict) else ():
        fits = True
        if key.endswith("lora_alpha"):
            fits = isinstance(value, int | float)
        elif key.endswith("alpha_pattern"):
            fits = isinstance(value, dict) and all(map(PATTERN.fullmatch, value))
            fits = fits and all(isinstance(alpha, int | float) for alpha in value.values())
        if not fits:
            raise WeightsError(f"{path}: its LoRA settings say that {key} is {value!r}"[:300])
    return config if isinstance(config, dict) else {}


def peft_scale(config: dict, part: str, name: str, rank: int) -> float:
    """alpha / rank by peft's settings; 1 where nothing is said."""
    prefix = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}[part]

    def setting(key: str, default: object) -> object:
        return config.get(prefix + key, config.get(key, default))

    alphas = setting("alpha_pattern", {})
    fitting = (alpha for key, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", name))
    alpha = next(fitting, setting("lora_alpha", rank))
    return alpha / (rank**0.5 if setting("use_rslora", False) else rank)


def some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
