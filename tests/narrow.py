"""Narrow models, made once; no test may change their weights."""

from dataclasses import replace

import pytest
import torch
from counterparts import (
    Twin,
    diffusers_pipeline,
    diffusers_unet,
    open_clip_state,
    open_clip_text,
    prefixed,
    randomise,
    transformers_open_clip,
    transformers_text_alone,
)
from open_clip.model import CLIP
from safetensors.torch import save_file

from clip import CLIPImage, CLIPImageConfig, CLIPText, CLIPTextConfig
from ipadapter import ImageProjection, IPAdapter, PatchProjection, Resampler
from unet import SD15, SD21, UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import open_base

NARROW_UNET = replace(SD15, channels=(32, 64, 96, 96), context_dim=64)
# SDXL's peculiarities: two transformer depths, none at the finest level, heads of 64, linear projections, a vector.
NARROW_XL = UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(32, 64, 128),
    down=((0, 0), (2, 2), (3, 3)),
    middle=(3, 0),
    up=((3, 3, 3), (2, 2, 2), (0, 0, 0)),
    context_dim=96,
    heads=None,
    head_dim=64,
    linear_proj=True,
    vector_dim=32 + 6 * 8,
)
NARROW_SD2 = replace(SD21, channels=(64, 64, 128, 128), context_dim=64)
NARROW_TEXT = CLIPTextConfig(width=64, layers=3, heads=4, mlp=256, quick_gelu=True, projection=96)
NARROW_XL_TEXT = CLIPTextConfig(width=32, layers=3, heads=1, mlp=128, quick_gelu=True, projection=None)
NARROW_IMAGE = CLIPImageConfig(
    width=128, layers=4, heads=2, mlp=512, quick_gelu=False, projection=96, image_size=64, patch_size=16
)
NARROW_VAE = VAEConfig(channels=(32, 64, 96, 96), res_blocks=2, latent_channels=4)


@pytest.fixture(scope="session")
def unet() -> UNet:
    return randomise(UNet(NARROW_UNET), 1)


@pytest.fixture(scope="session")
def their_unet(unet):
    return diffusers_unet(unet)


@pytest.fixture(scope="session")
def unet_xl() -> UNet:
    return randomise(UNet(NARROW_XL), 2)


@pytest.fixture(scope="session")
def vae() -> VAE:
    return randomise(VAE(NARROW_VAE), 3)


@pytest.fixture(scope="session")
def text_tower() -> CLIPText:
    return randomise(CLIPText(NARROW_TEXT), 4)


@pytest.fixture(scope="session")
def image_tower() -> CLIPImage:
    return randomise(CLIPImage(NARROW_IMAGE), 5)


@pytest.fixture(scope="session")
def base_adapter(unet) -> IPAdapter:
    """Global embeddings of 96, 4 tokens."""
    return randomise(IPAdapter.for_unet(unet, ImageProjection(96, 64, 4)), 6)


@pytest.fixture(scope="session")
def plus_adapter(unet) -> IPAdapter:
    """Patch features of 128, 6 tokens."""
    resampler = Resampler(feature_dim=128, dim=96, depth=4, heads=2, num_tokens=6, context_dim=64)
    return randomise(IPAdapter.for_unet(unet, resampler), 7)


@pytest.fixture(scope="session")
def full_adapter(unet) -> IPAdapter:
    """Patch features of 128, as many tokens as there are patches, and one."""
    return randomise(IPAdapter.for_unet(unet, PatchProjection(128, 64)), 8)


# Whole base models, each in ours and in diffusers' code

END, ZERO = "<|endoftext|>", "!"  # what a text is filled up with: token 49407, and token 0


@pytest.fixture(scope="session")
def sd1(tmp_path_factory, unet, vae, text_tower, image_tower) -> Twin:
    path = tmp_path_factory.mktemp("sd1") / "base.safetensors"
    state = prefixed("model.diffusion_model.", unet) | prefixed("first_stage_model.", vae)
    save_file(state | prefixed("cond_stage_model.transformer.", text_tower), path)
    texts = [transformers_text_alone(text_tower)]
    return Twin(open_base(path), diffusers_pipeline(unet, vae, texts, image_tower, [END]))


@pytest.fixture(scope="session")
def open_clip_tower() -> CLIP:
    """As wide as the narrow SD 2.x UNet's context, and the narrow SDXL's second tower."""
    return open_clip_text(width=64, heads=4, layers=3, projection=32, seed=9)


@pytest.fixture(scope="session")
def sd2(tmp_path_factory, vae, open_clip_tower, image_tower) -> Twin:
    """At 768 pixels: it predicts v."""
    path, unet = tmp_path_factory.mktemp("sd2") / "base.safetensors", randomise(UNet(NARROW_SD2), 10)
    state = prefixed("model.diffusion_model.", unet) | prefixed("first_stage_model.", vae)
    save_file(state | open_clip_state("cond_stage_model.model.", open_clip_tower), path)
    texts = [transformers_open_clip(open_clip_tower, layers=2)]
    return Twin(open_base(path), diffusers_pipeline(unet, vae, texts, image_tower, [ZERO], "v_prediction"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory, unet_xl, open_clip_tower, image_tower) -> Twin:
    path = tmp_path_factory.mktemp("sdxl") / "base.safetensors"
    vae = randomise(VAE(replace(NARROW_VAE, latent_scale=0.13025)), 11)
    first = randomise(CLIPText(NARROW_XL_TEXT), 12)
    state = prefixed("model.diffusion_model.", unet_xl) | prefixed("first_stage_model.", vae)
    state |= prefixed("conditioner.embedders.0.transformer.", first)
    save_file(state | open_clip_state("conditioner.embedders.1.model.", open_clip_tower), path)
    texts = [transformers_text_alone(first), transformers_open_clip(open_clip_tower)]
    return Twin(open_base(path), diffusers_pipeline(unet_xl, vae, texts, image_tower, [END, ZERO]))


@pytest.fixture
def draw():
    """Reproducible noise: draw(2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)
