"""Families of base models: what no tensor of them tells, one row each, under the names that messages and presets use."""

from dataclasses import dataclass, replace

from clip.tokenizer import END
from sampler import SD, Schedule
from unet import SD15, SD21, UNetConfig
from unet import SDXL as UNET_XL
from vae import SD_VAE


@dataclass(frozen=True)
class Tower:
    """A text tower of a family."""

    prefixes: tuple[str, ...]  # where its tensors stand: those of original files first, then those of folders
    quick_gelu: bool  # OpenAI's have the approximation, OpenCLIP's the exact GELU
    pad: int  # the token that fills a text up
    penultimate: bool = False  # the UNet was trained without the tower's last layer (SD 2.x)
    heads: int | None = None  # of its attention; None: its width tells


@dataclass(frozen=True)
class Family:
    """What goes together: a UNet's inputs, its text towers, its latents."""

    name: str
    base: str  # the preset to name where another family is brought
    context_dim: int  # width of the tokens that its UNet reads, at full size
    text: tuple[Tower, ...]
    side: int  # of the pictures that it was trained on, in pixels
    latent_scale: float = SD_VAE.latent_scale
    half_vae: bool = True  # its autoencoder computes in fp16 without overflow
    schedule: Schedule = SD
    # In which layers of the UNet (`unet.layer_names`) an image prompt brings its style, and where its layout; InvokeAI's.
    style: str = "up.block_1"
    layout: str = "down.block_2+middle"
    unet: UNetConfig | None = None  # whose layers are called as its own are; None: that, its file tells
    channels: tuple[int, ...] = ()  # of a narrower UNet, per level: its tokens alone do not tell it


CLIP_L = Tower(("cond_stage_model.transformer.",), True, END)
SD1 = Family("SD 1.x", "sd15", 768, (CLIP_L,), 512, unet=SD15)
TURBO = "conditioner.embedders.0.model."  # SD-Turbo's text tower, and nobody else's
OPENCLIP_H = Tower(("cond_stage_model.model.", "cond_stage_model.transformer.", TURBO), False, 0, penultimate=True)
SD2 = Family("SD 2.x", "sd21", 1024, (OPENCLIP_H,), 768, schedule=Schedule(prediction="v"), unet=SD21)
SD2_BASE = replace(SD2, base="sd21-base", side=512, schedule=SD)  # the same tensors, but for one bias
SDXL_TEXT = (
    Tower(("conditioner.embedders.0.transformer.",), True, END),
    Tower(("conditioner.embedders.1.model.", "conditioner.embedders.1.transformer."), False, 0),
)
SDXL = Family(
    "SDXL",
    "sdxl",
    2048,
    SDXL_TEXT,
    1024,
    0.13025,
    half_vae=False,
    style="up.block_0.1",  # InstantStyle's (arXiv 2404.02733, section 3.2)
    layout="down.block_2.1",
    unet=UNET_XL,
)
FAMILIES = {row.name: row for row in (SD1, SD2, SDXL)}

# Narrower ones, to which other adapters belong; their files are read as those of the family they come from.
TINY = replace(
    SD1,
    name="tiny",
    base="tiny",
    context_dim=64,
    side=128,
    style="up.block_2+up.block_3",  # measured: `python -m experiments.layers`
    layout="down.block_1",
    channels=(64, 96, 96, 96),
)
SSD = replace(SDXL, name="SSD-1B", base="ssd-1b", unet=None)
VEGA = replace(SDXL, name="Vega", base="segmind-vega", unet=None)


def drawn_by(family: Family, channels: tuple[int, ...]) -> Family:
    """The row of a base that was read as one of this family: the tiny model's own, by the channels of its UNet."""
    return TINY if channels == TINY.channels else family


def of_width(context_dim: int) -> Family | None:
    """The family whose UNet reads tokens of this width."""
    return next((row for row in FAMILIES.values() if row.context_dim == context_dim), None)


@dataclass(frozen=True)
class Encoder:
    """A published CLIP image encoder."""

    name: str
    preset: str
    width: int  # of its patch features
    projection: int  # of its image embedding


ENCODERS = (
    Encoder("ViT-H/14", "vit-h", 1280, 1024),
    Encoder("ViT-bigG/14", "vit-bigg", 1664, 1280),
    Encoder("ViT-L/14", "vit-l", 1024, 768),
)
