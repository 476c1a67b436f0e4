"""The autoencoder equals diffusers' on the same weights."""

import copy

import pytest
import torch
from counterparts import diffusers_vae, randomise, rel

from vae import SD_VAE, VAE
from weights.configs import vae_config


@pytest.fixture(scope="module")
def their_vae(vae):
    return diffusers_vae(vae)


@pytest.mark.parametrize("height, width", [(64, 64), (40, 72), (8, 8)])
def test_encoded_mean_equals_diffusers(vae, their_vae, draw, height, width):
    pixels = draw(2, 3, height, width).clamp(-1, 1)
    mean, logvar = vae.posterior(pixels)
    theirs = their_vae.encode(pixels).latent_dist
    assert rel(mean, theirs.mean) <= 1e-5
    assert rel(logvar, theirs.logvar) <= 1e-5


@pytest.mark.parametrize("height, width", [(8, 8), (5, 9), (1, 1)])
def test_decoded_pictures_equal_diffusers(vae, their_vae, draw, height, width):
    latents = draw(2, 4, height, width)
    assert rel(vae.decode(latents), their_vae.decode(latents / 0.18215).sample) <= 1e-5


def test_latent_scale_is_applied_once_each_way(vae, their_vae, draw):
    pixels = draw(1, 3, 32, 32).clamp(-1, 1)
    mean = their_vae.encode(pixels).latent_dist.mean
    assert rel(vae.encode(pixels), mean * 0.18215) <= 1e-5
    assert rel(vae.decode(vae.encode(pixels)), their_vae.decode(mean).sample) <= 1e-5


def test_posterior_draw_equals_diffusers(vae, their_vae, draw):
    pixels = draw(2, 3, 32, 32).clamp(-1, 1)
    ours = vae.encode(pixels, torch.Generator().manual_seed(5))
    theirs = their_vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(5)) * 0.18215
    assert rel(ours, theirs) <= 1e-5
    assert rel(ours, vae.encode(pixels)) > 0.1


def test_log_variance_is_clamped_as_in_diffusers(vae, draw):
    wide = copy.deepcopy(vae)
    wide.quant_conv.weight.data *= 100
    pixels = draw(2, 3, 32, 32).clamp(-1, 1)
    ours, theirs = wide.posterior(pixels)[1], diffusers_vae(wide).encode(pixels).latent_dist.logvar
    assert ours.min() == -30 and ours.max() == 20
    assert rel(ours, theirs) <= 1e-5


def test_every_norm_has_diffusers_epsilon(vae, draw):
    quiet = copy.deepcopy(vae)
    loud = ("norm", "quant_conv", "conv_out", "upsample.conv.weight", "nin_shortcut.weight", ".q.", ".k.", ".v.")
    for name, p in quiet.named_parameters():
        if not any(part in name for part in loud):
            p.data *= 0.01
    theirs = diffusers_vae(quiet)
    pixels, latents = draw(1, 3, 32, 32).clamp(-1, 1), draw(1, 4, 4, 4)
    means, pictures = theirs.encode(pixels).latent_dist.mean, theirs.decode(latents / 0.18215).sample
    assert rel(quiet.posterior(pixels)[0], means) <= 1e-5
    assert rel(quiet.decode(latents), pictures) <= 1e-5
    for norm in [module for module in quiet.modules() if isinstance(module, torch.nn.GroupNorm)]:
        norm.eps = 1e-5  # the comparison above would have seen it
        assert max(rel(quiet.posterior(pixels)[0], means), rel(quiet.decode(latents), pictures)) > 1e-4
        norm.eps = 1e-6


def test_every_tensor_matters(vae, draw):
    live = copy.deepcopy(vae).requires_grad_(True)
    latents = live.encode(draw(1, 3, 32, 32), torch.Generator().manual_seed(0))
    live.decode(latents).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in live.parameters())


def test_full_size_has_the_published_tensors():
    with torch.device("meta"):
        state = VAE(SD_VAE).state_dict()
    assert len(state) == 248
    assert sum(w.numel() for w in state.values()) == 83_653_863
    assert vae_config(state) == SD_VAE


def test_config_is_read_back_from_the_tensors(vae):
    assert vae_config(vae.state_dict()) == vae.config


def test_another_latent_scale_is_used(draw):
    sdxl = randomise(VAE(SD_VAE.__class__((32, 32), 1, 4, 0.13025)), 6)
    theirs, latents = diffusers_vae(sdxl), draw(1, 4, 4, 4)
    assert rel(sdxl.decode(latents), theirs.decode(latents / 0.13025).sample) <= 1e-5
