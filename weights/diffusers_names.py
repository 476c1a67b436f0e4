"""diffusers' names for Stable Diffusion's UNet and autoencoder, translated to the original names that our own have.

The names follow from rules, for any number of levels, ResBlocks and depths; they are the way back from diffusers' own
`convert_ldm_unet_checkpoint` and `convert_ldm_vae_checkpoint` (loaders/single_file_utils.py).
"""

import re
from collections.abc import Collection, Iterable

from files.tensors import State

BLOCK = re.compile(r"(down_blocks|mid_block|up_blocks)(?:[._](\d+))?[._]([a-z]+)[._](\d+)[._]")
RESBLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding[._]linear_1": "time_embed.0",
    "time_embedding[._]linear_2": "time_embed.2",
    "time_embedding[._]cond_proj": "cond_proj",
    "add_embedding[._]linear_1": "label_emb.0.0",
    "add_embedding[._]linear_2": "label_emb.0.2",
}
CONTROL = {
    r"controlnet_cond_embedding\.conv_in": "input_hint_block.0",
    "controlnet_mid_block": "middle_block_out.0",
}
VAE_ATTENTION = {
    r"\.(?:to_)?([qkv])(?:uery|ey|alue)?\.": r".\1.",  # query, key, value: files older than 2023
    r"\.(proj_attn|to_out\.0)\.": ".proj_out.",
    r"(group|conv)_norm": "norm",
}
VAE = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    **VAE_ATTENTION,
    r"down_blocks": "down",
    r"resnets": "block",
    r"(down|up)samplers\.0": r"\1sample",
    r"conv_shortcut": "nin_shortcut",
}


def from_diffusers(state: State) -> State:
    """A UNet, autoencoder or text tower as a diffusers folder has it -> our names; any other state as it is."""
    if {"conv_in.weight", "conv_out.weight", "down_blocks.0.resnets.0.conv1.weight"} <= state.keys():
        res_blocks, attentive = unet_shape(state)
        return {unet_key(key, res_blocks, attentive): w for key, w in state.items()}
    levels = len(numbers(state, r"decoder\.up_blocks\.(\d+)\."))
    if levels or any(".mid.attn_1." in key and (w.ndim == 2 or ".to_" in key) for key, w in state.items()):
        renamed = {vae_key(key, levels): w for key, w in state.items()}
        return {key: w[:, :, None, None] if ".attn_1." in key and w.ndim == 2 else w for key, w in renamed.items()}
    if "embeddings.token_embedding.weight" in state:  # as transformers 5 saves a tower without projection
        return {f"text_model.{key}": w for key, w in state.items()}
    return state


def control_from_diffusers(state: State) -> State:
    """A ControlNet as diffusers has it, the Union among them -> the original names; any other state as it is."""
    if "controlnet_cond_embedding.conv_in.weight" not in state:
        return state
    res_blocks, hint = unet_shape(state)[0], numbers(state, r"controlnet_cond_embedding\.blocks\.(\d+)\.")

    def rename(key: str) -> str:
        key = re.sub(r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", key)
        key = re.sub(r"^controlnet_cond_embedding\.conv_out", f"input_hint_block.{2 * len(hint) + 2}", key)
        place = re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.", key)
        if place:
            return f"input_hint_block.{2 * int(place[1]) + 2}.{key[place.end() :]}"
        return unet_key(rename_start(key, CONTROL), res_blocks, set())

    return {rename(key): w for key, w in state.items()}


def t2i_from_diffusers(state: State) -> State:
    """A T2I-Adapter as diffusers has it -> the original names; one that has them as it is."""
    light = "body.0.in_conv.weight" in state and "conv_in.weight" not in state
    per_level = len(numbers(state, r"body\.0\.resnets\.(\d+)\."))
    if not per_level:
        return state

    def rename(key: str) -> str:
        if light:
            return key.replace(".resnets.", ".body.")
        key = re.sub(r"^body\.(\d+)\.resnets\.(\d+)", lambda m: f"body.{per_level * int(m[1]) + int(m[2])}", key)
        return re.sub(r"^body\.(\d+)\.in_conv", lambda m: f"body.{per_level * int(m[1])}.in_conv", key)

    return {rename(key): w for key, w in state.items()}


def unet_shape(keys: Collection[str]) -> tuple[int, set[int]]:
    """What `unet_key` needs to know, told from all keys of a UNet, in diffusers' names or in the original ones."""
    if down := numbers(keys, r"down_blocks\.0\.resnets\.(\d+)\."):
        return len(down), numbers(keys, r"up_blocks\.(\d+)\.attentions\.")
    ends = numbers(keys, r"input_blocks\.(\d+)\.0\.op\.")  # of the levels
    per_level = min(ends, default=len(numbers(keys, r"input_blocks\.(\d+)\.")))
    return per_level - 1, {i // per_level for i in numbers(keys, r"output_blocks\.(\d+)\.1\.proj_in\.")}


def unet_key(key: str, res_blocks: int, attentive: set[int]) -> str:
    """One name of diffusers' UNet -> the original name; what no rule knows stays. Names of LoRAs may have "_" for ".".

    `res_blocks` are those of a level on the way down, `attentive` the levels of the way up that have attention.
    """
    if not (match := BLOCK.match(key)):
        return rename_start(key, OUTSIDE)
    part, level, kind, i = match[1], int(match[2] or 0), match[3], int(match[4])
    per_level, attention = res_blocks + 1, int(kind == "attentions")
    rest = rename_start(key[match.end() :], RESBLOCK if kind == "resnets" else {})
    if part == "mid_block":
        return f"middle_block.{2 * i + attention}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * per_level}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":  # last in the last block of its level
        return f"output_blocks.{level * per_level + res_blocks}.{1 + (level in attentive)}.{rest}"
    way, first = ("input", 1) if part == "down_blocks" else ("output", 0)
    return f"{way}_blocks.{first + level * per_level + i}.{attention}.{rest}"


def vae_key(key: str, levels: int) -> str:
    """One name of diffusers' AutoencoderKL -> the original name.

    Without `levels` all are that already, but perhaps for the attention, which converters of 2023 passed over.
    """
    for old, new in (VAE if levels else VAE_ATTENTION).items():
        key = re.sub(old, new, key) if levels or ".mid.attn_1." in key else key
    return re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)  # the finest is up.0


def rename_start(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = re.sub(rf"^{old}(?=[._]|$)", new, key)
    return key


def numbers(keys: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for key in keys if (match := re.match(pattern, key))}
