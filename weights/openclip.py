"""Other names for CLIP's two towers, translated to the transformers names that our own have: OpenCLIP's and more."""

import re

from files.tensors import State

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
    "visual.proj": "visual_projection.weight",
}
TEXT_NAMES = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
NOT_WEIGHTS = re.compile(r"(logit_scale|logit_bias|attn_mask)$")
OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}  # only OpenAI's own files have them
INSIDE_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


# Where each layout has its class embedding: transformers, OpenCLIP, transformers 5, the image tower of OpenCLIP alone.
CLASS = (
    "vision_model.embeddings.class_embedding",
    "visual.class_embedding",
    "embeddings.class_embedding",
    "class_embedding",
)


def clip_names(state: State) -> tuple[State, bool]:
    """A CLIP in any of the layouts that are about, under the names that our towers have; and whether it was OpenCLIP's.

    It may be part of something larger (`image_encoder.`, `conditioner.embedders.0.open_clip.model.`): then only what has
    the same prefix is taken. A state without an image tower of CLIP stays as it is.
    """
    found = [key for key in state if key.rpartition(".")[2] == "class_embedding"]
    if len(found) != 1:
        return state, False
    layout = next(name for name in CLASS if f".{found[0]}".endswith(f".{name}"))
    prefix = found[0].removesuffix(layout)
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if layout == "embeddings.class_embedding":
        state = {key if key.startswith("visual_") else f"vision_model.{key}": value for key, value in state.items()}
    if layout == "class_embedding":
        state = {f"visual.{key}": value for key, value in state.items()}
    if "visual.class_embedding" not in state:
        return state, False
    return from_openclip(state) | text_from_openclip(state), True


def from_openclip(state: State) -> State:
    """`visual.*` of an OpenCLIP file -> `vision_model.*`, `visual_projection.weight`; the text side is left aside."""
    return rename({key: value for key, value in state.items() if not TEXT_SIDE.match(key)}, NAMES)


def text_from_openclip(state: State) -> State:
    """The text side of an OpenCLIP file -> `text_model.*`, `text_projection.weight`; `visual.*` is left aside."""
    text = {key: value for key, value in state.items() if TEXT_SIDE.match(key) and not NOT_WEIGHTS.match(key)}
    return rename(text, TEXT_NAMES)


def rename(state: State, names: dict[str, str]) -> State:
    out: State = {}
    for key, value in state.items():
        name = key
        for old, new in names.items():
            if key.startswith(old):
                name = new + key[len(old) :]
        for old, new in INSIDE_LAYER.items():
            name = name.replace(f".{old}.", f".{new}.")
        if ".attn.in_proj_" in name and value.ndim and len(value) % 3 == 0:  # q, k and v in one matrix
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        elif key in ("visual.proj", "text_projection") and value.ndim > 1:  # x @ W there, W @ x in a Linear
            out[name] = value.mT.contiguous()  # whichever way it lay, a product rounds alike
        else:
            out[name] = value
    return out
