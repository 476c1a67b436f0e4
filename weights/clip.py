"""CLIP out of files: the image tower, which adapters read, and both towers, which results are scored with (`evaluate.py`)."""

import re
from pathlib import Path

import torch

from clip import CLIPImage, CLIPText
from clip.tokenizer import CONTEXT, END
from files.tensors import State, WeightsError
from weights.clip_config import read_config
from weights.configs import image_config, text_config
from weights.diffusers import read_part
from weights.fill import IGNORED, blank, fill
from weights.kinds import no_clip, what_is
from weights.openclip import CLASS, OPENAI_NUMBERS, clip_names

IMAGE, TEXT = ("vision_model.", "visual_projection."), ("text_model.", "text_projection.")
# What stands beside the towers, first of all the temperature of the training.
ASIDE = {"logit_scale", "logit_bias"} | OPENAI_NUMBERS
ESSENTIAL = (
    "vision_model.embeddings.class_embedding",
    "text_model.embeddings.token_embedding.weight",
    "visual_projection.weight",
    "text_projection.weight",
)
# Widths of the image and the text tower of OpenAI's ViT-B and ViT-L; the exact GELU is OpenCLIP's, of ViT-H and bigG.
OPENAI = {768: 512, 1024: 768}
# What an image encoder does without of a whole CLIP.
TEXT_SIDE = re.compile(rf"text(_model)?\.|text_projection|(logit_scale|logit_bias|{'|'.join(OPENAI_NUMBERS)})$")


def load_image_encoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CLIPImage:
    """A CLIP image tower (ViT) in the layout of transformers, OpenCLIP or OpenAI; what else the file holds is left aside.

    Args:
        path: a file (OpenAI's TorchScript archives too), an index of shards, or transformers' folder, or one that has
            it as `image_encoder/`. What a `config.json` there says of heads and GELU counts; else the width tells, and
            for the GELU the layout: OpenCLIP's has the exact one, OpenAI's own files the approximation.

    Raises:
        WeightsError: unreadable, another kind of file, keys missing or left over, or a config that contradicts them.
    """
    state = read_part(path)
    names, openclip = (state, False) if CLASS[0] in state else clip_names(state)
    if "vision_model.embeddings.class_embedding" not in names or no_clip(state):
        raise WeightsError(f"{path}: a CLIP image encoder (ViT) is wanted here; this is {what_is(state)}")
    inner = {key: w for key, w in names.items() if not TEXT_SIDE.match(key) and not IGNORED.match(key)}
    said = read_config(path, "image")
    if said:
        quick_gelu, heads = said.quick_gelu, said.heads
    else:
        width = names["vision_model.embeddings.class_embedding"].numel()
        quick_gelu, heads = OPENAI_NUMBERS <= names.keys() or (not openclip and width in OPENAI), None
    tower = fill(lambda state: blank(CLIPImage, image_config(state, quick_gelu, heads)), inner, path, dtype, device)
    if said:
        said.check(tower)
    return tower


def load_clip(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quick_gelu: bool | None = None,
) -> tuple[CLIPImage, CLIPText]:
    """Both towers of a CLIP (ViT), each with its projection, in the layout of transformers, OpenCLIP or OpenAI.

    Args:
        path: a file (OpenAI's TorchScript archives too), an index of shards, or transformers' folder.
        quick_gelu: which GELU the weights were trained with; no tensor tells. None: what a `config.json` beside them
            says; without one the approximation for OpenAI's own files and for the sizes that OpenAI published (ViT-B,
            ViT-L), the exact one for all others. LAION's ViT-B and ViT-L have the exact one too: give False for them.

    Raises:
        WeightsError: unreadable, another kind of file, one tower alone, keys missing or left over, or a config that
            contradicts them.
    """
    read = read_part(path)
    names, _ = clip_names(read)
    state = {key: value for key, value in names.items() if key not in ASIDE and not IGNORED.match(key)}
    image, text = ({key: w for key, w in state.items() if key.startswith(side)} for side in (IMAGE, TEXT))
    lacks = [key for key in ESSENTIAL if key not in state]
    if lacks or no_clip(read):
        without = f", without {lacks[0]}" if len(lacks) == 1 else ""
        raise WeightsError(f"{path}: a whole CLIP (ViT), both towers, is wanted here; this is {what_is(read)}{without}")
    if left := [key for key in state if key not in image and key not in text]:
        raise WeightsError(f"{path}: {len(left)} keys of no CLIP that is known here: {', '.join(left[:4])}")
    said = {side: read_config(path, side) for side in ("image", "text")}
    by_size = widths(state) in OPENAI.items() or OPENAI_NUMBERS <= names.keys()

    def settings(side: str) -> tuple[bool, int | None]:
        config = said[side]
        told = by_size if config is None else config.quick_gelu
        return told if quick_gelu is None else quick_gelu, config and config.heads

    towers = (
        fill(lambda state: blank(CLIPImage, image_config(state, *settings("image"))), image, path, dtype, device),
        fill(lambda state: blank(CLIPText, text_config(state, *settings("text"))), text, path, dtype, device),
    )
    for config, tower in zip(said.values(), towers, strict=True):
        if config:
            config.check(tower)
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
