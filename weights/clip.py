"""A whole CLIP, both towers, out of one file: what results are scored with (`evaluate.py`)."""

from dataclasses import replace
from pathlib import Path

import torch

from clip import CLIPImage, CLIPText
from clip.tokenizer import CONTEXT, END
from files.tensors import State, WeightsError, read
from weights import configs
from weights.fill import IGNORED, fill
from weights.kinds import what_is
from weights.openclip import from_openclip, text_from_openclip

IMAGE, TEXT = ("vision_model.", "visual_projection."), ("text_model.", "text_projection.")
# Beside the towers: the temperature of the training, and the three numbers that OpenAI's own files carry.
ASIDE = {"logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size"}
OPENAI = {(768, 512), (1024, 768)}  # widths of the image and the text tower of OpenAI's ViT-B and ViT-L


def load_clip(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quick_gelu: bool | None = None,
) -> tuple[CLIPImage, CLIPText]:
    """Both towers of a CLIP (ViT), each with its projection, in the transformers layout or in OpenCLIP's.

    Args:
        quick_gelu: which GELU the weights were trained with; no tensor tells. None: the approximation for the
            sizes that OpenAI published (ViT-B, ViT-L), the exact one for all others. LAION's ViT-B and ViT-L
            have the exact one too: give False for them.

    Raises:
        WeightsError: unreadable, another kind of file, one tower alone, or keys missing or left over.
    """
    state = {key: value for key, value in read(path).items() if key not in ASIDE and not IGNORED.match(key)}
    if "visual.conv1.weight" in state:
        state = from_openclip(state) | text_from_openclip(state)
    image, text = ({key: w for key, w in state.items() if key.startswith(side)} for side in (IMAGE, TEXT))
    whole = {"visual_projection.weight", "text_projection.weight"} <= state.keys()
    if not whole or "text_model.embeddings.token_embedding.weight" not in text:
        raise WeightsError(f"{path}: a whole CLIP (ViT), both towers, is wanted here; this is {what_is(state)}")
    if left := [key for key in state if key not in image and key not in text]:
        raise WeightsError(f"{path}: {len(left)} keys of no CLIP that is known here: {', '.join(left[:4])}")
    quick = widths(state) in OPENAI if quick_gelu is None else quick_gelu
    towers = (
        fill(lambda state: CLIPImage(configs.image_config(state, quick)), image, path, dtype, device),
        fill(lambda state: CLIPText(replace(configs.text_config(state), quick_gelu=quick)), text, path, dtype, device),
    )
    image, text = (tower.config for tower in towers)
    if image.projection != text.projection or text.context < CONTEXT or text.vocabulary <= END:
        raise WeightsError(
            f"{path}: two towers that share a space, {CONTEXT} tokens and a vocabulary of {END + 1} are wanted; "
            f"found spaces of {image.projection} and {text.projection}, {text.context} tokens, {text.vocabulary} words"
        )
    return towers


def widths(state: State) -> tuple[int, ...]:
    """Of the image and the text tower."""
    keys = ("vision_model.pre_layrnorm.weight", "text_model.final_layer_norm.weight")
    return tuple(state[key].numel() if key in state else 0 for key in keys)
