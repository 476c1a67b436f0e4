"""Base models: which family a checkpoint belongs to, and its parts as models."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from clip import CLIPText, TextEncoder, TwoTowerEncoder
from files.tensors import State, WeightsError, read
from sampler import Schedule
from unet import UNet
from vae import VAE
from weights.configs import count, text_config, unet_config, vae_config
from weights.diffusers import prediction_type, read_folder
from weights.diffusers_names import from_diffusers
from weights.families import FAMILIES, SD2, SD2_BASE, Family, Tower
from weights.fill import IGNORED, build, fill, under
from weights.kinds import UNET, family, what_is
from weights.lora import LoRA, check, merge
from weights.openclip import text_from_openclip

AUTOENCODER = "first_stage_model."
LORA_PARTS = {"UNet": "unet", "text tower": "text", "second text tower": "text_2"}  # what LoRAs call them


@dataclass(frozen=True)
class Part:
    """A part of a base model: where its tensors stand, and how the model is made of them."""

    prefix: str
    state: State
    make: Callable[[State], nn.Module]


@dataclass(frozen=True)
class Base:
    """A base model, its keys checked, its parts built when they are asked for."""

    path: Path
    family: Family
    prediction: str  # what the UNet predicts: "eps", the noise, or "v"
    layers: list[tuple[int, int]]  # (dim, context_dim) of each cross-attention, in the order of an adapter's keys
    dtype: torch.dtype
    device: torch.device | str
    sinusoids: int = 0  # that stand for each size of a picture in `Prompt.vector`: 256 in SDXL, none elsewhere
    loras: Sequence[tuple[LoRA, float]] = ()  # merged into each part as it is built, each with its weight

    @property
    def schedule(self) -> Schedule:
        return Schedule(prediction=self.prediction)

    @property
    def side(self) -> int:
        """Of a picture, in pixels, where none is asked for."""
        return self.family.side

    def unet(self) -> UNet:
        return self.part("UNet")

    def vae(self) -> VAE:
        return self.part("autoencoder", self.vae_dtype)

    @property
    def vae_dtype(self) -> torch.dtype:
        """What to decode in: SDXL's autoencoder overflows in fp16."""
        return self.dtype if self.family.half_vae or self.dtype != torch.float16 else torch.float32

    def text(self) -> CLIPText:
        """The text tower; of two, the first."""
        return self.part("text tower")

    def text_encoder(self) -> TextEncoder | TwoTowerEncoder:
        """What turns a text into what the UNet reads of it."""
        if len(self.family.text) == 2:
            return TwoTowerEncoder(self.text(), self.part("second text tower"))
        return TextEncoder(self.text(), self.family.text[0].pad)

    def part(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        # Read anew each time: a mapped file costs nothing to open, and its pages can go when the model is built.
        part = parts(open_state(self.path), self.family)[name]
        model = fill(part.make, part.state, self.path, dtype or self.dtype, self.device)
        if self.loras and name in LORA_PARTS:
            merge(model, self.loras, LORA_PARTS[name], keep=False)
        return model


def open_base(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prediction: str | None = None,
    loras: Sequence[tuple[LoRA, float]] = (),
) -> Base:
    """An SD 1.x, SD 2.x or SDXL base model: a checkpoint in the original layout (.safetensors, .ckpt), or a folder.

    Args:
        prediction: "eps" or "v", where it is not what the file tells.
        loras: with their weights; they are merged into the parts when these are built.

    Raises:
        WeightsError: unreadable, another kind or family of file, keys missing or left over, or a LoRA that does not fit.
    """
    state = open_state(path)
    if not any(key.startswith(UNET) for key in state):
        raise WeightsError(
            f"{path}: a base model is wanted here (SD 1.x, SD 2.x or SDXL, a checkpoint in the original layout or a "
            f"folder of diffusers); this is {what_is(state)}"
        )
    if family(state) not in FAMILIES:
        raise WeightsError(f"{path}: an SD 1.x, SD 2.x or SDXL checkpoint is wanted here; this is {what_is(state)}")
    if "ztsnr" in state:
        raise WeightsError(f"{path}: made for a noise schedule that ends in pure noise (its key ztsnr); not supported")
    kind = SD2_BASE if FAMILIES[family(state)] is SD2 and sd2_predicts_noise(state) else FAMILIES[family(state)]
    found = parts(state, kind)
    for name, part in found.items():
        if not part.state:
            raise WeightsError(
                f"{path}: the {name} ({part.prefix}*) is missing; a whole {kind.name} checkpoint has: {', '.join(found)}"
            )
    used = (*(part.prefix for part in found.values()), *(prefix for tower in kind.text for prefix in tower.prefixes))
    left = [key for key in state if not key.startswith(used) and not IGNORED.match(key)]
    unet, vae, *texts = (
        build(part.make, part.state, path, left if name == "UNet" else None) for name, part in found.items()
    )
    if unet.config.in_channels != vae.config.latent_channels:
        raise WeightsError(
            f"{path}: its UNet takes {unet.config.in_channels} channels (an inpainting or depth model?), "
            f"{vae.config.latent_channels} are wanted"
        )
    if (width := sum(text.config.width for text in texts)) != unet.config.context_dim:
        raise WeightsError(f"{path}: its UNet reads tokens of {unet.config.context_dim}, its text towers give {width}")
    layers = [(layer.to_k.out_features, layer.to_k.in_features) for layer in unet.cross_attentions()]
    for lora, _ in loras:
        check(lora, dict(zip(LORA_PARTS.values(), (unet, *texts), strict=False)))
    prediction = prediction or predicts(path, state, kind)
    vector_dim = unet.config.vector_dim
    sinusoids = (vector_dim - (texts[-1].config.projection or 0)) // 6 if vector_dim else 0
    return Base(Path(path), kind, prediction, layers, dtype, device, sinusoids, loras)


def open_state(path: str | Path) -> State:
    return read_folder(path) if os.path.isdir(path) else read(path)


def parts(state: State, kind: Family) -> dict[str, Part]:
    """The parts of a base model by their names, the UNet and the autoencoder first."""
    scale = kind.latent_scale
    found = {
        "UNet": Part(UNET, under(UNET, state), lambda part: UNet(unet_config(part))),
        "autoencoder": Part(AUTOENCODER, under(AUTOENCODER, state), lambda part: VAE(vae_config(part, scale))),
    }
    for name, tower in zip(("text tower", "second text tower"), kind.text, strict=False):
        prefix = next((p for p in tower.prefixes if any(key.startswith(p) for key in state)), tower.prefixes[0])
        part, quick = text_state(under(prefix, state), tower), tower.quick_gelu
        found[name] = Part(prefix, part, lambda part, quick=quick: CLIPText(text_config(part, quick)))
    return found


def text_state(state: State, tower: Tower) -> State:
    """A text tower's tensors in transformers' names."""
    if "positional_embedding" not in state:
        return from_diffusers(state)  # many early fine-tuned models have no `text_model.`
    state = text_from_openclip(state)
    if not tower.penultimate:
        return state
    # The last layer is not used, and folders come without it.
    last = count(state, r"text_model\.encoder\.layers\.(\d+)\.") - 1
    return {
        k: w for k, w in state.items() if not k.startswith((f"text_model.encoder.layers.{last}.", "text_projection"))
    }


def predicts(path: str | Path, state: State, kind: Family) -> str:
    """What the UNet predicts, as a folder's scheduler says, or the mark of a file, or the family."""
    if os.path.isdir(path) and (said := prediction_type(path)):
        return {"epsilon": "eps", "v_prediction": "v"}[said]
    return "v" if "v_pred" in state else kind.prediction


def sd2_predicts_noise(state: State) -> bool:
    """The versions of SD 2.x (512 pixels and eps, 768 and v) have the same tensors; how widely one bias varies tells.

    It is what ComfyUI goes by (supported_models.py), and has since 2023.
    """
    last = count(state, re.escape(UNET) + r"output_blocks\.(\d+)\.") - 1
    bias = state.get(f"{UNET}output_blocks.{last}.1.transformer_blocks.0.norm1.bias")
    return bias is not None and bias.float().std(correction=0).item() <= 0.09
