"""Tells what a file is from the names and shapes of its tensors, never from its name."""

import re

from files.tensors import State
from weights.diffusers_names import from_diffusers
from weights.families import of_width

UNKNOWN = "something unknown"
INVERSION = "a textual-inversion embedding"
UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."  # where a whole checkpoint has them


def what_is(state: State) -> str:
    """One phrase that says what a file seems to be, for messages, and the key that told so."""
    for phrase, parts in SIGNS:
        for key in state:
            if re.search(parts, key):
                return f"{phrase(state) if callable(phrase) else phrase} (it has {key})"
    return f"{UNKNOWN} (its first keys: {', '.join(list(state)[:3])})"


def clip_is(state: State) -> str:
    text = any(re.match(r"(text_model|transformer\.resblocks)\.", key) for key in state)
    width = f" of width {clip_width(state)}" if clip_width(state) else ", without its class embedding"
    return f"a CLIP {'model' if text else 'image encoder'}{width}"


def checkpoint_is(state: State) -> str:
    """Whole, or what it lacks: many files hold a UNet alone."""
    name = family(state)
    parts = {"autoencoder": AUTOENCODER, "text tower": ("cond_stage_model.", "conditioner.")}
    lacks = [part for part, prefix in parts.items() if not any(key.startswith(prefix) for key in state)]
    if name in OTHERS:
        return named(name)
    return f"a checkpoint of {name} without {' and '.join(lacks)}" if lacks else f"a whole {name} checkpoint"


def named(name: str) -> str:
    return f"{'an' if name.startswith(('A', 'SD')) else 'a'} {name} checkpoint"


OTHERS = {  # no UNets, or UNets that read something else than CLIP's texts
    "FLUX": r"double_blocks\.|^single_transformer_blocks\.",
    "SD 3": r"joint_blocks\.|^transformer_blocks\.\d+\.ff_context\.",
    "AuraFlow": r"double_layers\.",
    "PixArt": r"y_embedder\.y_proj\.|^caption_projection\.",
    "Stable Cascade": r"clip_txt(_pooled)?_mapper\.",
    "Kolors": r"encoder_hid_proj\.",
    "AltDiffusion": r"^cond_stage_model\.roberta\.",
    "Stable Video Diffusion": r"time_stack\.|temporal_transformer_blocks\.",
}
SMALL = (  # what is trained beside a base model, and is no adapter of ours
    (
        f"{INVERSION}, which `embedding` opens",
        r"^(\d+\.)?(emb_params$|string_to_param\.|clip_[lg]$|text_encoders_[01]$|<[^>]*>$)",
    ),
    ("a hypernetwork, which is not supported", r"^\d+\.\d+\.linear"),
    ("a LoRA of 2022, whose names do not tell its layers", r"^unet:\d+:(up|down)$"),
    (
        "a checkpoint whose UNet is there as an average alone (model_ema), which is not read",
        r"^model_ema\.diffusion_model",
    ),
    ("the state of an optimizer, not a model", r"^(optimizer\.)?(state\.\d+\.(exp_avg|step)|exp_avg)"),
    ("a PuLID adapter", r"^(pulid_|id_adapter)"),
    ("an IP-Adapter for a transformer, which is not supported", r"^blocks\.\d+\..*_ip\."),
    ("a T2I-Adapter", r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)"),
    ("an AnimateDiff motion module", r"motion_modules\."),
    ("an upscaler (ESRGAN)", r"^(params(_ema)?\.)?(conv_first\.|RRDB_trunk\.|model\.\d+\.(sub\.|weight))"),
)
TOWERS = (  # image encoders that are not CLIP's vision transformer
    (
        "a SigLIP",
        r"^(vision_model\.)?(head\.(probe|attention)|embeddings\.patch_embedding\.bias$)|^visual\.trunk\.attn_pool\.",
    ),
    ("an EVA-CLIP", r"^visual\.(trunk\.)?(rope\.|blocks\.\d+\.attn\.[qkv]_proj)|^visual\.cls_token$"),
    ("a CLIP whose image tower is a ConvNeXt", r"^visual\.trunk\.(stem|stages)\."),
    ("a CLIP whose image tower is one of timm's", r"^visual\.trunk\."),
    ("a CLIP whose image tower is a ResNet", r"^visual\.(layer\d\.|attnpool\.|bn1\.)"),
    ("a CoCa", r"^(visual\.attn_pool|text_decoder)\."),
    (
        "a DINO image encoder",
        r"^(\w+\.)?(embeddings\.(cls|mask|register)_tokens?$|(mask|storage|register)_tokens?$|rope_embed|blocks\.\d+\.ls1)",
    ),
    ("a vision transformer in timm's layout", r"^(vit\.|cls_token$|pos_embed$|patch_embed\.proj\.)"),
    (
        "the image encoder of a BLIP or another language model",
        r"^(visual_encoder|q_?former)\.|^(vision_model\.)?encoder\.layers\.\d+\.(self_)?attn\.qkv\.",
    ),
)


def family(state: State) -> str:
    """'SD 1.x', 'SD 2.x', 'SDXL' or another name for the base model that a checkpoint, a folder or a UNet belongs to."""
    names = "\n".join(key.removeprefix(UNET) for key in state)  # searched as one: key by key takes longer than opening
    for name, sign in OTHERS.items():
        if re.search(sign, names, re.MULTILINE):
            return name
    unet = unet_state(state)
    if "label_emb.0.0.weight" in unet:
        return told_more(state, unet)
    linear = any(w.ndim == 2 for key, w in unet.items() if key.endswith(".1.proj_in.weight"))
    return "SD 2.x" if linear or starts(state, "cond_stage_model.model.") else "SD 1.x"


def told_more(state: State, unet: State) -> str:
    """As `family`, of those whose UNet is told more than the text (`label_emb`)."""
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    if starts(state, first) and not starts(state, second, first + "transformer.") or context_width(unet) == 1280:
        return "SDXL refiner"
    return "SD 2.x unCLIP" if "input_blocks.1.1.proj_in.weight" in unet else "SDXL"  # SDXL has no attention there


def starts(state: State, *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in state)


def unet_state(state: State) -> State:
    """Of a checkpoint, or of a file that is a UNet alone, in the original names."""
    return {key.removeprefix(UNET): w for key, w in state.items() if key.startswith(UNET)} or from_diffusers(state)


def context_width(unet: State) -> int:
    return next((w.shape[-1] for key, w in unet.items() if key.endswith("attn2.to_k.weight") and w.ndim), 0)


SIGNS = (  # the first that a key matches decides
    (lambda state: f"an IP-Adapter ({adapter_is(state)})", r"^(ip_adapter|image_proj|adapter_modules)|_double_stream_"),
    *SMALL,
    ("a LoRA", r"lora_down|lora_up|lora_A|lora_B|\.lora\."),
    (checkpoint_is, r"^model\.diffusion_model\."),
    ("part of an SDXL checkpoint", r"^conditioner\.embedders\."),
    ("a ControlNet", r"^(control_model\.|controlnet_|input_hint_block\.)"),
    *((named(name), sign) for name, sign in OTHERS.items()),
    (lambda state: f"a UNet alone, without autoencoder and text tower, of {family(state)}", r"^input_blocks\."),
    (lambda state: f"a UNet of a diffusers folder, of {family(state)}", r"^down_blocks\."),
    *TOWERS,
    (clip_is, r"^(vision_model|visual)\.|^(embeddings\.)?class_embedding$"),
    ("a CLIP text tower", r"^(text_model|transformer\.resblocks)\."),
    ("a T5 encoder", r"^(encoder\.)?block\.\d+\.layer\.\d+\."),
    ("a TAESD, an approximation of an autoencoder", r"^((taesd_)?(en|de)coder\.(layers\.)?)?\d+\.conv\.\d+\.weight$"),
    (
        lambda state: "an autoencoder" if any("encoder." in key for key in state) else "a decoder alone",
        r"^(first_stage_model\.|decoder\.)",
    ),
)


def no_clip(state: State) -> bool:
    """Whether a file has an image encoder that is none of CLIP's vision transformers."""
    return any(re.search(sign, key) for _, sign in TOWERS for key in state)


def other_base(state: State) -> str:
    """The base that an IP-Adapter is made for and that is not read here, as "FLUX (XLabs)"; empty for all other adapters.

    Those of transformers do not have odd numbers for their layers, and two matrices for each, without biases. That of
    Kolors is as SDXL's, but its Resampler wider (so ComfyUI_IPAdapter_plus tells it too).
    """

    def has(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in state)

    if has("_double_stream_|^ip_adapter_proj_model"):
        return "FLUX (XLabs)"
    if has(r"^ip_adapter\.\d+\.(\w+\.)*norm|^image_proj\.time_embedding"):
        return "SD 3"
    if has(r"^ip_adapter\.\d+\.to_[kv]_ip\.bias"):
        return "FLUX (InstantX)"
    if columns(state, "image_proj.latents") == 2048 and columns(state, "image_proj.proj_in.weight") == 1024:
        return "Kolors"
    return "a transformer" if has(r"^ip_adapter\.\d*[02468]\.to_k_ip\.") else ""


def adapter_is(state: State) -> str:
    """What kind of adapter, for which base."""
    if other := other_base(state):
        return f"for {other}, which is not supported"
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
    layer = next((key for key in state if key.endswith("to_k_ip.weight")), "")
    return f"{kind}, {adapter_base(columns(state, layer))}" if layer else kind


def adapter_base(width: int) -> str:
    """Which base model an adapter was made for, by the width of its tokens."""
    return f"for {row.name}" if (row := of_width(width)) else f"for a base with {width} wide tokens"


def columns(state: State, key: str) -> int:
    """Width of a matrix that a damaged file may lack: then 0."""
    return state[key].shape[-1] if key in state and state[key].ndim else 0


def clip_width(state: State) -> int:
    return next((w.shape[-1] for key, w in state.items() if key.endswith("class_embedding") and w.ndim), 0)
