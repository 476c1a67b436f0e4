"""Base models: which family a checkpoint belongs to, and its parts as models."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from clip import CLIPText, CLIPTextConfig, TextEncoder, TwoTowerEncoder
from files.tensors import State, WeightsError, read
from sampler import Schedule
from unet import UNet, UNetConfig
from vae import VAE
from weights.configs import text_config, unet_config, vae_config
from weights.diffusers import read_folder
from weights.diffusers_names import from_diffusers
from weights.families import FAMILIES, SD2, SD2_BASE, TURBO, Family
from weights.fill import IGNORED, blank, build, fill, peeled, strangers, under
from weights.kinds import AUTOENCODER, UNET, family, what_is
from weights.lora import LoRA, check, merge
from weights.settings import MARKS, heed, schedule_of, sd2_predicts_noise
from weights.text import check_texts, read_text, text_state, text_width
from weights.vae import check_scale, vae_state

# Models that take so many channels.
CHANNELS = {5: "a depth", 7: "an upscaling"}
INSTRUCTED, INPAINTS = 8, 9  # channels: beside the latent that of the picture to change; a mask, and what stays
# The usual guidance scale of a UNet that is told it (diffusers, pipeline_latent_consistency_text2img.py).
EMBEDDED = 8.5
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
    family: Family  # its row, with what a folder says of its own autoencoder
    schedule: Schedule
    layers: list[tuple[int, int]]  # (dim, context_dim) of each cross-attention, in the order of an adapter's keys
    dtype: torch.dtype
    device: torch.device | str
    config: UNetConfig
    sinusoids: int = 0  # that stand for each size of a picture in `Prompt.vector`: 256 in SDXL, none elsewhere
    loras: Sequence[tuple[LoRA, float]] = ()  # merged into each part as it is built, each with its weight
    channels: int = 4  # that its UNet reads: of the latent, and of what stands beside it
    guidance_scale: float | None = None  # where none is asked for: 1, off, for a distilled model; None: the sampler's
    vae_file: Path | None = None  # where the autoencoder is, if not in `path`
    text_files: tuple[Path, ...] = ()  # where the text towers are, if not in `path`
    texts: tuple[CLIPTextConfig, ...] = ()  # of the text towers

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

    def parts(self) -> dict[str, Part]:
        """By their names. Read anew each time: a mapped file costs nothing to open, its pages can go once a model is built."""
        return parts(gather(self.path, self.vae_file, self.text_files), self.family)

    def part(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        part = self.parts()[name]
        file = files_of(self.path, self.vae_file, self.text_files)[name]
        model = fill(part.make, part.state, file, dtype or self.dtype, self.device)
        if self.loras and name in LORA_PARTS:
            merge(model, self.loras, LORA_PARTS[name], keep=False)
        return model


def open_base(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prediction: str | None = None,  # as in `Schedule`, where it is not what the file tells or nothing tells
    loras: Sequence[tuple[LoRA, float]] = (),  # with their weights; merged into the parts when these are built
    vae: str | Path | None = None,  # a file with another autoencoder
    text_encoder: Sequence[str | Path] = (),  # other text towers, as many as the family has; SDXL's in any order
    spacing: str | None = None,  # as `prediction`
) -> Base:
    """An SD 1.x, SD 2.x or SDXL base model: a checkpoint in the original layout (.safetensors, .ckpt), or a folder.

    It may be a UNet alone, in either layout, if the other parts are given.

    Raises:
        WeightsError: unreadable, another kind or family of file, keys missing or left over, or a LoRA that does not fit.
    """
    vae, text_encoder = vae and Path(vae), tuple(map(Path, text_encoder))
    state = gather(path, vae, text_encoder)
    kind = known_family(path, state)
    if kind is SD2 and sd2_predicts_noise(state):
        kind = SD2_BASE
    schedule = schedule_of(path, state, kind, prediction=prediction, spacing=spacing)
    if vae:
        check_scale(vae, kind.latent_scale)
    if os.path.isdir(path):
        kind = heed(path, kind, vae=not vae, texts=not text_encoder)
    found = parts(state, kind)
    check_whole(path, found, kind)
    used = (*(part.prefix for part in found.values()), *(prefix for tower in kind.text for prefix in tower.prefixes))
    left = [key for key in state if not key.startswith((*used, *MARKS)) and not IGNORED.match(key)]
    if left:
        left = strangers(left, path)
    files = files_of(path, vae, text_encoder)
    unet, _, *texts = (
        build(part.make, part.state, files[name], left if name == "UNet" else None) for name, part in found.items()
    )
    check_texts(files["text tower"], unet, texts)
    layers = [(layer.to_k.out_features, layer.to_k.in_features) for layer in unet.cross_attentions()]
    for lora, _ in loras:
        check(lora, dict(zip(LORA_PARTS.values(), (unet, *texts), strict=False)))
    # Distilled models are sampled so: few steps, from pure noise; and so are those that predict v with a zero SNR.
    trailing = not spacing and schedule.spacing == "trailing" and schedule.prediction == "eps"
    turbo = trailing or any(key.startswith(TURBO) for key in state)
    vector_dim = unet.config.vector_dim
    return Base(
        Path(path),
        kind,
        schedule,
        layers,
        dtype,
        device,
        unet.config,
        sinusoids=(vector_dim - texts[-1].config.projection) // 6 if vector_dim else 0,
        loras=loras,
        channels=unet.config.in_channels,
        guidance_scale=EMBEDDED if unet.config.guidance_dim else 1.0 if turbo else None,
        vae_file=vae,
        text_files=text_encoder,
        texts=tuple(text.config for text in texts),
    )


def gather(path: str | Path, vae: Path | None, text_encoder: Sequence[Path]) -> State:
    """A whole checkpoint: what is in a file or a folder, and parts from elsewhere in the place of its own.

    Raises:
        WeightsError: no base model of a family that is known here.
    """
    elsewhere = (*["vae"] * bool(vae), *["text_encoder", "text_encoder_2"] * bool(text_encoder))
    state = read_folder(path, elsewhere) if os.path.isdir(path) else read(path)
    if not any(key.startswith(UNET) for key in state):
        state = unpacked(path, state)
    return with_parts(path, state, vae, text_encoder) if elsewhere else state


def unpacked(path: str | Path, state: State) -> State:
    """A checkpoint within something larger; or a UNet alone, under the names of one. Raises WeightsError: none of them."""
    state = peeled(state, UNET, "input_blocks.", "down_blocks.")
    if any(key.startswith(UNET) for key in state):
        return state
    named = from_diffusers(state)
    if not any(key.startswith("output_blocks.") for key in named):
        raise WeightsError(
            f"{path}: a base model is wanted here (SD 1.x, SD 2.x or SDXL, a checkpoint in the original layout or a "
            f"folder of diffusers); this is {what_is(state)}"
        )
    return {UNET + key: w for key, w in named.items()}


def known_family(path: str | Path, state: State) -> Family:
    """The row of a checkpoint. Raises WeightsError for another than those that are read here."""
    if (name := family(state)) not in FAMILIES:
        raise WeightsError(f"{path}: an SD 1.x, SD 2.x or SDXL checkpoint is wanted here; this is {what_is(state)}")
    return FAMILIES[name]


def with_parts(path: str | Path, state: State, vae: Path | None, text_encoder: Sequence[Path]) -> State:
    """A checkpoint with the autoencoder, or the text towers, of other files in the place of its own."""
    kind = known_family(path, state)
    if vae:
        state = {key: w for key, w in state.items() if not key.startswith(AUTOENCODER)}
        state |= {AUTOENCODER + key: w for key, w in vae_state(vae).items()}
    if text_encoder:
        if len(text_encoder) != len(kind.text):
            told = f"{len(text_encoder)} given, {kind.name} has {len(kind.text)} text towers"
            raise WeightsError(f"`text_encoder`: {told}")
        state = {key: w for key, w in state.items() if not any(key.startswith(tower.prefixes) for tower in kind.text)}
        found = sorted(map(read_text, text_encoder), key=text_width)
        for tower, inner in zip(kind.text, found, strict=True):
            state |= {tower.prefixes[0] + key: w for key, w in inner.items()}
    return state


def files_of(path: str | Path, vae: Path | None, text_encoder: Sequence[Path]) -> dict[str, str | Path]:
    """Where each part comes from, for messages."""
    texts = " and ".join(map(str, text_encoder)) or path
    return {"UNet": path, "autoencoder": vae or path, "text tower": texts, "second text tower": texts}


def check_whole(path: str | Path, found: dict[str, Part], kind: Family) -> None:
    """Refuse a UNet that is made for something else, and a checkpoint without one of its parts."""
    first = found["UNet"].state.get("input_blocks.0.0.weight")
    if first is not None and first.ndim == 4 and first.shape[1] not in (4, INSTRUCTED, INPAINTS):
        raise WeightsError(f"{path}: {of_other_channels(first.shape[1])}")
    if any(not part.state for part in found.values()):
        raise WeightsError(f"{path}: {lacking(found, kind)}")


def of_other_channels(channels: int) -> str:
    what = f" ({CHANNELS[channels]} model)" if channels in CHANNELS else ""
    return f"its UNet takes {channels} channels{what}; 4 are wanted, or 9 (inpainting) or 8 (instruct-pix2pix)"


def lacking(found: dict[str, Part], kind: Family) -> str:
    missing = {name: part.prefix for name, part in found.items() if not part.state}
    parts = " and ".join(f"the {name} ({prefix}*)" for name, prefix in missing.items())
    bring = dict.fromkeys("`vae`" if name == "autoencoder" else "`text_encoder`" for name in missing)
    return (
        f"{parts} {'are' if len(missing) > 1 else 'is'} missing; a whole {kind.name} checkpoint has: {', '.join(found)}; "
        f"{' and '.join(bring)} can bring {'them' if len(missing) > 1 else 'it'}"
    )


def parts(state: State, kind: Family) -> dict[str, Part]:
    """The parts of a base model by their names, the UNet and the autoencoder first."""
    scale = kind.latent_scale
    unet = {key.replace("time_embed.cond_proj.", "cond_proj."): w for key, w in under(UNET, state).items()}
    vae = under(AUTOENCODER, state)
    if any(w.ndim == 2 or ".to_" in key or ".up_blocks." in key for key, w in vae.items()):
        vae = from_diffusers(vae)
    found = {
        "UNet": Part(UNET, unet, lambda part: blank(UNet, unet_config(part))),
        "autoencoder": Part(AUTOENCODER, vae, lambda part: blank(VAE, vae_config(part, scale))),
    }
    for name, tower in zip(("text tower", "second text tower"), kind.text, strict=False):
        prefix = next((p for p in tower.prefixes if any(key.startswith(p) for key in state)), tower.prefixes[0])
        part, how = text_state(under(prefix, state), tower), (tower.quick_gelu, tower.heads)
        found[name] = Part(prefix, part, lambda part, how=how: blank(CLIPText, text_config(part, *how)))
    return found
