"""Image projections equal diffusers' own, filled by diffusers' own conversion."""

import copy

import pytest
import torch
from counterparts import published, randomise, rel
from torch import nn

from ipadapter import ImageProjection, IPAdapter, PatchProjection, Resampler


def convert(their_unet, projection: nn.Module) -> nn.Module:
    state = published(IPAdapter(projection, [(8, 64)]))["image_proj"]
    return their_unet._convert_ip_adapter_image_proj_to_diffusers(state, low_cpu_mem_usage=False).eval()


@torch.no_grad()
@pytest.mark.parametrize("embed_dim, context_dim", [(96, 64), (1024, 768), (1280, 2048)])
def test_global_projection_equals_diffusers(their_unet, draw, embed_dim, context_dim):
    ours = randomise(ImageProjection(embed_dim, context_dim, 4), 1)
    embeds = 5 * draw(3, embed_dim)
    assert rel(ours(embeds), convert(their_unet, ours)(embeds)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 6, 16])
@pytest.mark.parametrize("patches", [5, 257])
def test_resampler_equals_diffusers(their_unet, draw, num_tokens, patches):
    ours = randomise(Resampler(128, dim=96, depth=4, heads=3, num_tokens=num_tokens, context_dim=64), 2)
    features = 5 * draw(2, patches, 128)
    assert rel(ours(features), convert(their_unet, ours)(features)) <= 1e-5


@torch.no_grad()
def test_resampler_of_full_size_equals_diffusers(their_unet, draw):
    ours = randomise(Resampler(1280, dim=768, depth=4, heads=12, num_tokens=16, context_dim=768), 3)
    features = draw(1, 257, 1280)
    assert rel(ours(features), convert(their_unet, ours)(features)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("feature_dim, context_dim", [(128, 64), (1280, 768)])
def test_patch_projection_equals_diffusers(their_unet, draw, feature_dim, context_dim):
    ours = randomise(PatchProjection(feature_dim, context_dim), 6)
    features = 5 * draw(2, 17, feature_dim)
    assert rel(ours(features), convert(their_unet, ours)(features)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_resampler_of_other_depths_equals_diffusers(draw, depth):
    """diffusers converts files of depth 4 only; here its modules are filled by position."""
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    ours = randomise(Resampler(128, dim=96, depth=depth, heads=3, num_tokens=5, context_dim=64), 4)
    theirs = IPAdapterPlusImageProjection(128, 64, 96, depth, heads=3, num_queries=5).eval()
    for name in ("latents", "proj_in", "proj_out", "norm_out"):
        part, value = getattr(theirs, name), getattr(ours, name)
        part.data.copy_(value) if name == "latents" else part.load_state_dict(value.state_dict())
    for block, (attention, ff) in zip(theirs.layers, ours.layers, strict=True):
        block.ln0.load_state_dict(attention.norm1.state_dict())
        block.ln1.load_state_dict(attention.norm2.state_dict())
        block.attn.to_q.weight.data = attention.to_q.weight
        block.attn.to_k.weight.data, block.attn.to_v.weight.data = attention.to_kv.weight.chunk(2)
        block.attn.to_out[0].weight.data = attention.to_out.weight
        block.ff[0].load_state_dict(ff[0].state_dict())
        block.ff[1].net[0].proj.weight.data, block.ff[1].net[2].weight.data = ff[1].weight, ff[3].weight
    features = draw(2, 17, 128)
    assert rel(ours(features), theirs(features)) <= 1e-5


def test_resampler_survives_half_precision(draw):
    """The official code overflows in fp16 when features are large; softmax and norms must not."""
    ours = randomise(Resampler(128, dim=96, depth=4, heads=3, num_tokens=6, context_dim=64), 5)
    features = 30 * draw(1, 17, 128)
    half = copy.deepcopy(ours).half()(features.half())
    assert rel(half.float(), ours(features)) < 0.01


# Tokens of an image prompt, through the image tower


def test_tokens_of_the_base_adapter_come_from_the_embedding(base_adapter, image_tower, draw):
    pixels = draw(3, 3, 64, 64)
    tokens = base_adapter.tokens(image_tower, pixels)
    assert tokens.shape == (1, 12, 64)
    for i in range(3):  # side by side, in the order of the pictures
        wanted = base_adapter.image_proj(image_tower(pixels[i : i + 1]))
        assert rel(tokens[:, 4 * i : 4 * i + 4], wanted) <= 1e-5


def test_tokens_of_plus_come_from_the_penultimate_layer(plus_adapter, image_tower, draw):
    pixels = draw(2, 3, 64, 64)
    tokens = plus_adapter.tokens(image_tower, pixels)
    assert tokens.shape == (1, 12, 64)
    for i in range(2):
        wanted = plus_adapter.image_proj(image_tower.penultimate(pixels[i : i + 1]))
        assert rel(tokens[:, 6 * i : 6 * i + 6], wanted) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("pictures", [1, 3])
def test_null_tokens_equal_diffusers_pipeline(
    their_unet, base_adapter, plus_adapter, full_adapter, image_tower, draw, pictures
):
    """`StableDiffusionPipeline.encode_image`: zero embeddings for base, the features of zero pixels for the others."""
    from types import SimpleNamespace

    from counterparts import transformers_image
    from diffusers import StableDiffusionPipeline

    pixels = draw(pictures, 3, 64, 64)
    pipe = SimpleNamespace(image_encoder=transformers_image(image_tower))
    for adapter in (base_adapter, plus_adapter, full_adapter):
        positive, negative = StableDiffusionPipeline.encode_image(pipe, pixels, "cpu", 1, adapter.image_proj.patches)
        theirs = convert(their_unet, adapter.image_proj)
        for ours, embeds in (
            (adapter.tokens(image_tower, pixels), positive),
            (adapter.null_tokens(image_tower, pixels), negative),
        ):
            assert rel(ours, theirs(embeds).flatten(0, 1)[None]) <= 1e-5
