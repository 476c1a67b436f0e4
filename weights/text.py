"""Text towers of base models: out of files of their own, under transformers' names, and whether the UNet reads them."""

from pathlib import Path

from clip import CLIPText
from clip.tokenizer import CONTEXT, END
from files.tensors import State, WeightsError
from unet import UNet
from weights.configs import count
from weights.diffusers import read_part
from weights.diffusers_names import from_diffusers
from weights.families import Tower
from weights.kinds import what_is
from weights.openclip import text_from_openclip


def read_text(path: Path) -> State:
    """A text tower in a file or a folder of its own, in the transformers layout or in OpenCLIP's; of a whole CLIP its half."""
    state = read_part(path)
    if not any(key.endswith("token_embedding.weight") for key in state):
        raise WeightsError(f"{path}: a CLIP text tower is wanted here; this is {what_is(state)}")
    return {key: w for key, w in state.items() if not key.startswith(("visual", "vision_model.", "logit_"))}


def text_width(state: State) -> int:
    return max(
        (w.shape[-1] for key, w in state.items() if key.endswith("token_embedding.weight") and w.ndim), default=0
    )


def check_texts(path: str | Path, unet: UNet, texts: list[CLIPText]) -> None:
    """Refuse text towers that the UNet cannot read, and those of another tokenizer."""
    if (width := sum(text.config.width for text in texts)) != unet.config.context_dim:
        raise WeightsError(f"{path}: its UNet reads tokens of {unet.config.context_dim}, its text towers give {width}")
    for text in texts:
        if text.config.vocabulary <= END or text.config.context < CONTEXT:
            wanted = f"a text tower for CLIP's tokenizer is wanted, {END + 1} words and {CONTEXT} tokens"
            has = f"{text.config.vocabulary} words and {text.config.context} tokens"
            raise WeightsError(f"{path}: {wanted}; this one has {has}")
    if unet.config.vector_dim and not texts[-1].config.projection:
        raise WeightsError(f"{path}: the second text tower has no text_projection, which this UNet reads")


def text_state(state: State, tower: Tower) -> State:
    """A text tower's tensors in transformers' names."""
    if "positional_embedding" in state:
        state = openclip_text(state)
    if "embeddings.token_embedding.weight" in state:  # many early fine-tuned models have no `text_model.`
        state = from_diffusers(state)
    return without_last(state) if tower.penultimate else state


def openclip_text(state: State) -> State:
    """A text tower's tensors in OpenCLIP's names -> in transformers'."""
    transposed = state.get("text_projection.weight")  # as diffusers' converter writes it
    if transposed is not None and transposed.ndim == 2:
        state = state | {"text_projection": transposed.mT}
    return text_from_openclip(state)


def without_last(state: State) -> State:
    """A whole tower of SD 2.x has 24 layers and a projection; folders, and files made of them, come without the last."""
    layers = count(state, "text_model.encoder.layers.")
    if layers == 24 or "text_projection.weight" in state:
        unused = (f"text_model.encoder.layers.{layers - 1}.", "text_projection")
        state = {key: w for key, w in state.items() if not key.startswith(unused)}
    return state
