"""Files of ControlNets and T2I-Adapters: which kind one is, told from its tensors, and whether it fits the base."""

from pathlib import Path

import torch
from torch import Tensor, nn

from control import ControlNet, ControlNetUnion, StyleAdapter, T2IAdapter
from files.tensors import State, WeightsError
from ipadapter.low_rank import LowRank, total
from unet import UNetConfig
from weights.base import Base
from weights.configs import count, encoder_config, hint_widths, t2i_config
from weights.diffusers import read_part
from weights.diffusers_names import control_from_diffusers, t2i_from_diffusers
from weights.families import drawn_by, of_width
from weights.fill import IGNORED, fill, peeled, under
from weights.kinds import what_is
from weights.names import names

Net = ControlNet | T2IAdapter | StyleAdapter
LORA, DIFFERENCE = "lora_controlnet", "difference"  # keys without a meaning but that they are there
FIRST = "input_blocks.0.0.weight"
STYLE_LAYERS = "transformer_layes."  # of a style adapter, spelled as in its file
ENCODER = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
TASKS = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint")  # of a Union, in its order
SAME = {  # other names of the hints that these are for
    **dict.fromkeys(("hed", "pidi", "softedge", "ted"), "scribble"),
    **dict.fromkeys(("lineart", "lineart-anime", "mlsd", "edges"), "canny"),
    "pose": "openpose",
    "normalbae": "normal",
    "seg": "segment",
    "inpaint": "repaint",
}
SHUFFLE, INPAINT = "shuffle", "inpaint"  # ControlNets whose outputs are pooled, whose hints say what is made anew


def load_control(
    path: str | Path, base: Base, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Net:
    """A ControlNet or T2I-Adapter for this base.

    ControlNets in the original layout, with `control_model.` or without, or in diffusers' (for SDXL also the smaller
    ones and Unions), Control-LoRAs; T2I-Adapters full, light, for SDXL and for style, in either layout.

    Raises:
        WeightsError: unreadable, another kind of file, keys missing or left over, or made for another base.
    """
    state = read_part(path)
    state = expanded(path, state, base, device) if LORA in state else control_state(path, state)
    net = fill(build_control, state, path, dtype, device)
    check_control(net, path, base)
    return net


def control_state(path: str | Path, state: State) -> State:
    """The tensors of a net in the original names."""
    for key in state:
        if "lllite" in key:
            raise WeightsError(f"{path}: a ControlNet-LLLite ({key}) is not supported; a ControlNet is")
    if DIFFERENCE in state:
        raise WeightsError(
            f"{path}: a ControlNet that holds differences to its base (it has the key {DIFFERENCE}) is not supported; the "
            "whole one is"
        )
    if "style_embedding" in (style := under("adapter.", state) or state):
        return style
    state = under("control_model.", state) or control_from_diffusers(peeled(state, "zero_convs.", "controlnet_"))
    if "zero_convs.0.0.weight" in state:
        return {key: w for key, w in state.items() if not IGNORED.match(key)}
    state = t2i_from_diffusers(under("adapter.", state) or state)
    if "body.0.block1.weight" in state or "body.0.in_conv.weight" in state:
        return state
    raise WeightsError(f"{path}: a ControlNet or T2I-Adapter is wanted here; this is {what_is(state)}")


def build_control(state: State) -> Net:
    if "style_embedding" in state:
        return StyleAdapter(*state["proj"].shape, state["style_embedding"].shape[1], count(state, STYLE_LAYERS))
    if "zero_convs.0.0.weight" not in state:
        return T2IAdapter(t2i_config(state))
    config, hint = encoder_config(state), hint_widths(state)
    if "task_embedding" not in state:
        return ControlNet(config, hint)
    tasks = len(state["task_embedding"])
    return ControlNetUnion(config, tasks, hint, state["control_add_embedding.linear_1.weight"].shape[1] // tasks)


def expanded(path: str | Path, state: State, base: Base, device: torch.device | str) -> State:
    """A Control-LoRA (Stability AI): what it changes is a product of two thin matrices, what it lacks is the base's own."""
    unet = base.parts()["UNet"].state
    whole = {key: w for key, w in unet.items() if key.startswith(ENCODER)}
    whole[FIRST] = whole[FIRST][:, :4]  # a base for inpainting reads more
    if str(device) == "meta":
        state, whole = ({key: w.to("meta") for key, w in one.items()} for one in (state, whole))
    for key, w in state.items():
        name, _, last = key.rpartition(".")
        if last == "up" and f"{name}.down" in state:
            whole[f"{name}.weight"] = changed(path, f"{name}.weight", whole, w, state[f"{name}.down"])
        elif last != "down" and key != LORA:
            whole[key] = w
    return whole


def changed(path: str | Path, key: str, whole: State, up: Tensor, down: Tensor) -> Tensor:
    """A weight of the base with what a Control-LoRA adds to it, in the weight's dtype."""
    weight = whole.get(key)
    product = (up.shape[0], down[0].numel()) if up.ndim > 1 and down.ndim > 1 and up.shape[1] == len(down) else None
    if weight is None or product != (len(weight), weight[0].numel()):
        found = "no such layer" if weight is None else f"one of {tuple(weight.shape)}"
        raise WeightsError(f"{path}: this Control-LoRA is for another base: it changes {key}, the base has {found}")
    return total(weight, [(1.0, LowRank(down, up))]).to(weight.dtype)


def check_control(net: Net, path: str | Path, base: Base) -> None:
    """Refuse a net that is made for another UNet; the message says what would fit."""
    ours = base.config
    if isinstance(net, StyleAdapter):
        what, theirs = "a style adapter", family_named(net.proj.shape[1])
        fits = net.proj.shape[1] == ours.context_dim
    elif isinstance(net, T2IAdapter):
        xl = net.config.shrink == 16
        what, fits = "a T2I-Adapter", net.config.channels == ours.channels + ours.channels[-1:] * xl
        fits, theirs = fits and xl == bool(ours.vector_dim), "SDXL" if xl else "SD 1.x"
    else:
        what, theirs = "a ControlNet", family_of(net.config)
        same = [(c.channels, tuple(map(len, c.down)), c.vector_dim, c.linear_proj) for c in (net.config, ours)]
        fits = same[0] == same[1] and net.config.context_dim in (0, ours.context_dim)
    if not fits:
        family = drawn_by(base.family, ours.channels).name
        known = ", ".join(names("control", family)) or "none is published"
        raise WeightsError(f"{path}: {what} for {theirs}; the base {base.path} is {family}; for that: {known}")


def family_of(config: UNetConfig) -> str:
    return "SDXL" if config.vector_dim else family_named(config.context_dim)


def family_named(context_dim: int) -> str:
    row = of_width(context_dim)
    return row.name if row else f"a base with {context_dim} wide tokens"


def task_of(net: nn.Module, kind: str | None, name: str) -> int | None:
    """Which type of hint a Union is told: what was asked for, or what the hint's file is called; None for other nets.

    Raises:
        WeightsError: a type that this net does not have, or none told.
    """
    if not isinstance(net, ControlNetUnion):
        return None
    known = TASKS[: len(net.task_embedding)]
    words = sorted((*TASKS, *SAME), key=len, reverse=True)
    told = kind or next((word for word in words if word in Path(name).stem.lower().replace("_", "-")), None)
    told = SAME.get(told, told)
    if told not in known:
        raise WeightsError(
            f"`control_type`: {'none given and none in the name of the hint' if told is None else f'{kind or told} given'}; "
            f"this Union takes {', '.join(known)}"
        )
    return known.index(told)
