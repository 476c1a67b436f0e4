"""OpenCLIP's names for an image tower, translated to the transformers names that our own tower has."""

import re

from weights.files import State

TEXT_SIDE = re.compile(
    r"(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$|token_embedding\.|transformer\.|ln_final\."
)

NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
INSIDE_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_openclip(state: State) -> State:
    """`visual.*` of an OpenCLIP file -> `vision_model.*`, `visual_projection.weight`; the text side is left aside."""
    out: State = {}
    for key, value in state.items():
        if TEXT_SIDE.match(key):
            continue
        if key == "visual.proj":
            out["visual_projection.weight"] = value.mT if value.ndim > 1 else value
            continue
        name = key
        for old, new in NAMES.items():
            name = name.replace(old, new)
        for old, new in INSIDE_LAYER.items():
            name = name.replace(f".{old}.", f".{new}.")
        if ".attn.in_proj_" in name:  # q, k and v in one matrix
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        else:
            out[name] = value
    return out
