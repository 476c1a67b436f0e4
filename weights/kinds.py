"""Tells what a file is from the names and shapes of its tensors, never from its name."""

import re

from files.tensors import State
from weights.families import of_width

UNET = "model.diffusion_model."  # where a whole checkpoint has its UNet


def what_is(state: State) -> str:
    """One phrase that says what a file seems to be, for messages, and the key that told so."""
    for phrase, parts in SIGNS:
        for key in state:
            if re.search(parts, key):
                return f"{phrase(state) if callable(phrase) else phrase} (it has {key})"
    return f"something unknown (its first keys: {', '.join(list(state)[:3])})"


def clip_is(state: State) -> str:
    text = any(re.match(r"(text_model|transformer\.resblocks)\.", key) for key in state)
    return f"a CLIP {'model' if text else 'image encoder'} of width {clip_width(state)}"


SIGNS = (  # the first that a key matches decides
    (lambda state: f"an IP-Adapter ({adapter_is(state)})", r"^(module\.)?(ip_adapter|image_proj|adapter_modules)"),
    ("a LoRA", r"lora_down|lora_up|lora_A|lora_B|\.lora\."),
    (lambda state: f"a whole {family(state)} checkpoint", r"^model\.diffusion_model\."),
    ("part of an SDXL checkpoint", r"^conditioner\.embedders\."),
    ("a ControlNet", r"^(control_model\.|controlnet_|input_hint_block\.)"),
    ("a FLUX checkpoint", r"^double_blocks\."),
    ("a UNet alone, without autoencoder and text tower", r"^input_blocks\."),
    ("a UNet of a diffusers folder", r"^down_blocks\."),
    (clip_is, r"^(vision_model|visual)\."),
    ("a CLIP text tower", r"^text_model\."),
    ("an autoencoder", r"^(first_stage_model\.|decoder\.)"),
)


def family(state: State) -> str:
    """'SD 1.x', 'SD 2.x', 'SDXL' or another word for the base model that a whole checkpoint or folder holds."""

    def starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in state)

    if starts(f"{UNET}joint_blocks."):
        return "SD 3"
    if starts(f"{UNET}double_blocks."):
        return "FLUX"
    if f"{UNET}label_emb.0.0.weight" in state:
        if starts("conditioner.embedders.1.", "conditioner.embedders.0.transformer."):
            return "SDXL"
        return "SDXL refiner" if starts("conditioner.embedders.") else "SD 2.x unCLIP"
    linear = any(w.ndim == 2 for key, w in state.items() if key.startswith(UNET) and key.endswith(".1.proj_in.weight"))
    return "SD 2.x" if linear or starts("cond_stage_model.model.") else "SD 1.x"


def adapter_is(state: State) -> str:
    """What kind of adapter, for which base."""
    if "image_proj.latents" in state:
        kind = f"plus, reads {columns(state, 'image_proj.proj_in.weight')} wide patch features"
    elif "image_proj.perceiver_resampler.proj_in.weight" in state:
        kind = f"FaceID-plus, reads faces and {columns(state, 'image_proj.perceiver_resampler.proj_in.weight')} wide patch features"
    elif "image_proj.proj.3.weight" in state:
        kind = f"full-face, reads {columns(state, 'image_proj.proj.0.weight')} wide patch features"
    elif "image_proj.proj.2.weight" in state:
        kind = "FaceID, reads faces"
    elif "image_proj.proj.weight" in state:
        kind = f"base, reads embeddings of {columns(state, 'image_proj.proj.weight')}"
    else:
        return "of an unknown kind"
    return f"{kind}, {adapter_base(columns(state, 'ip_adapter.1.to_k_ip.weight'))}"


def adapter_base(width: int) -> str:
    """Which base model an adapter was made for, by the width of its tokens."""
    return f"for {row.name}" if (row := of_width(width)) else f"for a base with {width} wide tokens"


def columns(state: State, key: str) -> int:
    """Width of a matrix that a damaged file may lack: then 0."""
    return state[key].shape[-1] if key in state and state[key].ndim else 0


def clip_width(state: State) -> int:
    for key in ("vision_model.embeddings.class_embedding", "visual.class_embedding"):
        if key in state:
            return state[key].shape[-1]
    return 0
