"""LoRAs for the base model as files: what their names mean, and whether they fit.

Read are the names of kohya-ss (`lora_unet_*`, `lora_te*_*`), those of diffusers and peft (`unet.*`, `text_encoder*.*`) and
SimpleTuner's (`lycoris_*`), for linear layers, convolutions and norms; and all forms that are shared: LoRA and LoCon, LoHa,
LoKr, DoRA, whole differences (`weights/lora_forms.py`).
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from files.errors import Notice
from files.tensors import State, WeightsError
from ipadapter import low_rank
from ipadapter.low_rank import Change, LowRank
from weights.diffusers import part_files, read_part
from weights.diffusers_names import unet_key, unet_shape
from weights.families import of_width
from weights.kinds import what_is
from weights.lora_forms import MISFITS, change_of, peft_config, peft_scale

PREFIX = re.compile(
    r"(?:(lora_unet_|unet\.|(?:model\.)?diffusion_model\.)|(lora_te2_|text_encoder_2\.)|(lora_te1?_|text_encoder\.)|lycoris_)?"
    r"(?:base_model\.model\.)?"
)
PARTS = {1: "unet", 2: "text_2", 3: "text"}  # by the group of PREFIX that matched
# What stands behind a layer's name. The first pattern that matches tells which tensor of the layer it is.
TENSORS = (
    (r"\.lora_(down|up|mid|A|B)(?:\.\w+)?\.weight$", {"A": "down", "B": "up"}),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.(down|up)\.weight$", {}),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))$", {}),
    (r"\.(dora_scale|lora_magnitude_vector)(?:\.\w+)?(?:\.weight)?$", {"lora_magnitude_vector": "rows"}),
    (r"\.(diff|diff_b|w_norm|b_norm)$", {"w_norm": "diff", "b_norm": "diff_b"}),
    (r"(?:[._]lora(?:_linear_layer)?)?(?:\.down\.weight)?\.(alpha)$", {}),
)
WHAT = {"unet": "the UNet", "text": "the text tower", "text_2": "a second text tower"}
OTHERS = {r"\.on_input$": "IA3", r"\.(oft_|boft_)": "OFT", r"\.(glora_|a1\.|b1\.)": "GLoRA"}
BUNDLED = re.compile(r"^bundle_emb\.([^.]+)\.")  # textual inversions that some trainers put into the same file
OPENCLIP = re.compile(r"^(?:transformer_)?resblocks_(\d+)_(\w+)$")
INSIDE = {"attn_out_proj": "self_attn_out_proj", "mlp_c_fc": "mlp_fc1", "mlp_c_proj": "mlp_fc2"}
INSIDE |= {"ln_1": "layer_norm1", "ln_2": "layer_norm2"}


@dataclass(frozen=True)
class LoRA:
    """A file, read; the names of its layers are still the file's, with `_` for every `.`."""

    path: Path
    # "unet", "text" (the first text tower), "text_2" -> name -> what is added to its weight (and bias)
    parts: dict[str, dict[str, dict[str, Change]]]


def read_lora(path: str | Path) -> LoRA:
    """A LoRA of any form that is read, in any of the names (.safetensors or .bin), or a folder of it.

    Textual inversions in the same file are left aside, with a Notice.

    Raises:
        WeightsError: unreadable, no LoRA, one of another form (OFT, ...), or keys left over.
    """
    state, path = read_part(path), part_files(path)[0] if os.path.isdir(path) else path
    for mark, kind in OTHERS.items():
        if key := next((key for key in state if re.search(mark, key)), None):
            raise WeightsError(f"{path}: {kind} is not supported ({key}); LoRA, LoCon, LoHa, LoKr and DoRA are")
    if bundled := sorted({match[1] for key in state if (match := BUNDLED.match(key))}):
        told = f"{path}: its textual inversions ({', '.join(bundled)}) are left aside, `embedding` opens them; the LoRA is used"
        warnings.warn(Notice(told), stacklevel=2)
        state = {key: w for key, w in state.items() if not BUNDLED.match(key)}
    found: dict[tuple[str, str], State] = {}
    left = []
    for key, w in state.items():
        for pattern, same in TENSORS:
            if match := re.search(pattern, key):
                found.setdefault(split(key[: match.start()]), {})[same.get(match[1], match[1])] = w
                break
        else:
            left.append(key)
    if not found or any(key.startswith(("image_proj.", "ip_adapter.")) for key in left):
        raise WeightsError(f"{path}: a LoRA is wanted here; this is {what_is(state)}")
    config = peft_config(Path(path))
    parts: dict[str, dict[str, dict[str, Change]]] = {}
    for (part, name), layer in found.items():
        try:
            changes = change_of(layer, lambda rank, at=(part, name): peft_scale(config, *at, rank))
        except MISFITS:
            left.append(name)
            continue
        parts.setdefault(part, {})[name.replace(".", "_")] = changes
    if left:
        raise WeightsError(f"{path}: {len(left)} keys that belong to no pair of LoRA matrices: {some(left)}")
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
        RuntimeError: as `low_rank.merge`, of a model that is stored in fewer bits.
    """
    changes: dict[str, list[tuple[float, Change]]] = {}
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


def targets(lora: LoRA, part: str, model: nn.Module) -> dict[str, Change]:
    """Of one part of a LoRA: the model's name of each parameter -> what is added to it.

    Raises:
        WeightsError: layers that the model does not have, or has in another shape.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    flat = {flat_text(name.rpartition(".")[0].replace(".", "_")): name.rpartition(".")[0] for name in shapes}
    shape = unet_shape(shapes) if part == "unet" else None
    found, strangers = {}, []
    for name, changes in lora.parts.get(part, {}).items():
        for inner, key, change in layers_of(name, changes):
            ours = flat.get(flat_unet(inner, shape) if shape else flat_text(inner))
            wanted = shapes.get(f"{ours}.{key}", ())
            if fits(change, wanted):
                found[f"{ours}.{key}"] = change
            else:
                strangers.append(f"{name} {change.shape}" + f" for {wanted}" * bool(wanted))
    if strangers:
        raise WeightsError(
            f"{lora.path}: {len(strangers)} of its {len(lora.parts[part])} layers for {WHAT[part]} fit none of this base: "
            f"{some(strangers)}; the LoRA seems made for {made_for(lora)}"
        )
    return found


def fits(change: Change, wanted: tuple[int, ...]) -> bool:
    """Whether a change can be added to a weight of this shape: (1, 1) or no kernel, or a kernel laid flat.

    That its own tensors go together is tried out, without memory.
    """
    if not wanted or change.shape[:1] != wanted[:1] or math.prod(change.shape) != math.prod(wanted):
        return False
    try:
        change.delta(torch.empty(wanted, device="meta"))
    except Exception:  # noqa: BLE001, there is no end to what shapes can be
        return False
    return True


def layers_of(name: str, changes: dict[str, Change]) -> Iterator[tuple[str, str, Change]]:
    """Layer, "weight" or "bias", and change; OpenCLIP's names are told, where q, k and v lie in one matrix."""
    if not (match := OPENCLIP.search(name)):
        yield from ((name, key, change) for key, change in changes.items())
        return
    layer, inner = f"encoder_layers_{match[1]}_", match[2]
    for key, change in changes.items():
        if not inner.startswith("attn_in_proj"):
            yield layer + INSIDE[inner], key, change
        elif isinstance(change, LowRank) and len(change.up) % 3 == 0:
            for letter, up in zip("qkv", change.up.chunk(3), strict=True):
                yield f"{layer}self_attn_{letter}_proj", key, replace(change, up=up)
        else:
            yield name, key, change  # which fits nothing


def made_for(lora: LoRA) -> str:
    """Which base a LoRA seems to belong to, by its names and shapes."""
    unet = lora.parts.get("unet", {})
    if any(
        re.search("(double|single|joint)_blocks|^(transformer|blocks_\\d)|single_transformer", name) for name in unet
    ):
        return "a transformer (FLUX, SD 3 or another), not a UNet"
    shapes = {c["weight"].shape for name, c in unet.items() if name.endswith("attn2_to_k") and "weight" in c}
    widths = {shape[1] for shape in shapes if len(shape) > 1}
    if len(widths) == 1:
        width = widths.pop()
        row = of_width(width)
        return f"{row.name if row else 'another base'} (its UNet reads tokens of {width})"
    return "SDXL (two text towers)" if "text_2" in lora.parts else "a base that its names do not tell"


def split(name: str) -> tuple[str, str]:
    """Part and layer, without what trainers put around the layer's name."""
    match = PREFIX.match(name)
    inner = name[match.end() :].replace(".processor", "")
    part = PARTS.get(match.lastindex) or (
        "text" if inner.startswith(("text_model", "encoder.layers", "resblocks", "transformer_resblocks")) else "unet"
    )
    return part, inner


def flat_unet(name: str, shape: tuple[int, set[int]]) -> str:
    name = unet_key(name, *shape).replace(".", "_")
    return re.sub(r"_to_out$", "_to_out_0", name)  # files of early 2023 leave the number out


def flat_text(name: str) -> str:
    name = name.removeprefix("text_model_")  # transformers 5 has no such level
    return re.sub(r"_to_(q|k|v|out)$", r"_\1_proj", name) if name.startswith("encoder_layers") else name


def some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
