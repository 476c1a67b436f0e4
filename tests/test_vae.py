"""The autoencoder equals diffusers' on the same weights."""

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from counterparts import diffusers_vae, randomise, rel
from torch.utils._python_dispatch import TorchDispatchMode

import vae.vae as vae_file
from clip import preprocess
from files.pictures import open_picture
from vae import SD_VAE, VAE, strips, winograd
from weights import open_base
from weights.configs import vae_config

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture(scope="module")
def their_vae(vae):
    return diffusers_vae(vae)


@pytest.mark.parametrize("height, width", [(64, 64), (40, 72), (8, 8)])
def test_encoded_mean_equals_diffusers(vae, their_vae, draw, height, width):
    pixels = draw(2, 3, height, width).clamp(-1, 1)
    mean, logvar = vae.moments(pixels)
    theirs = their_vae.encode(pixels).latent_dist
    assert rel(mean, theirs.mean) <= 1e-5
    assert rel(logvar, theirs.logvar) <= 1e-5
    mean, std = vae.posterior(pixels)
    assert rel(mean, 0.18215 * theirs.mean) <= 1e-5
    assert rel(std, 0.18215 * theirs.std) <= 1e-5


@pytest.mark.parametrize("height, width", [(8, 8), (5, 9), (1, 1)])
def test_decoded_pictures_equal_diffusers(vae, their_vae, draw, height, width):
    latents = draw(2, 4, height, width)
    assert rel(vae.decode(latents), their_vae.decode(latents / 0.18215).sample) <= 1e-5


@pytest.mark.parametrize("height, width", [(8, 8), (33, 30), (1, 5)])
def test_convolutions_in_fewer_multiplications(draw, height, width):
    """As an ordinary one in fp64, tiles that reach over the edges too, one after the other where there are many."""
    x, weight, bias = draw(2, 16, height, width), draw(24, 16, 3, 3), draw(24)
    with patch.object(winograd, "TILES", 16):
        found = winograd.convolve(x.to(memory_format=torch.channels_last), weight, bias)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert found.shape == wanted.shape and rel(found, wanted) <= 5e-6


def test_a_hastened_encoder_equals_diffusers(vae, their_vae, draw):
    """Only what is wide enough, in fp32, is changed."""
    hastened, half = copy.deepcopy(vae), copy.deepcopy(vae).bfloat16()
    with patch.object(winograd, "CHANNELS", 64):
        winograd.hasten(hastened.encoder)
        winograd.hasten(half.encoder)
    found = [layer for layer in hastened.modules() if isinstance(layer, winograd.Winograd)]
    assert len(found) == 15 and not any(isinstance(layer, winograd.Winograd) for layer in half.modules())
    pixels = draw(2, 3, 40, 72).clamp(-1, 1)
    assert rel(hastened.moments(pixels)[0], their_vae.encode(pixels).latent_dist.mean) <= 1e-5


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
    ours, theirs = wide.moments(pixels)[1], diffusers_vae(wide).encode(pixels).latent_dist.logvar
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
    assert rel(quiet.moments(pixels)[0], means) <= 1e-5
    assert rel(quiet.decode(latents), pictures) <= 1e-5
    for norm in [module for module in quiet.modules() if isinstance(module, torch.nn.GroupNorm)]:
        norm.eps = 1e-5  # the comparison above would have seen it
        assert max(rel(quiet.moments(pixels)[0], means), rel(quiet.decode(latents), pictures)) > 1e-4
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


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(16, 8), (5, 9), (1, 1)])
def test_strips_give_what_the_whole_gives(vae, draw, height, width):
    latents, pixels = draw(2, 4, height, width), draw(2, 3, 8 * height, 8 * width).clamp(-1, 1)

    def made(rows: int | None = None) -> list[torch.Tensor]:
        noise = torch.Generator().manual_seed(5)
        return [vae.decode(latents, rows), vae.encode(pixels, rows=rows), vae.encode(pixels, noise, rows)]

    whole = made()
    for rows in (1, 3, 16, 64):
        for part, wanted in zip(made(rows), whole, strict=True):
            assert rel(part, wanted) <= 1e-5, rows


def test_strips_leave_their_input_as_it_was(vae, draw):
    latents, pixels = draw(1, 4, 6, 6), draw(1, 3, 48, 48)
    kept = latents.clone(), pixels.clone()
    vae.decode(latents, 8), vae.encode(pixels, rows=8)
    assert torch.equal(latents, kept[0]) and torch.equal(pixels, kept[1])


@pytest.mark.slow
def test_strips_of_a_picture_show_no_seam():
    """A drawing and a smooth picture of 256x256, trained weights."""
    in_strips = open_base(TINY / "weights/sd-tiny.safetensors").vae()
    # torch's GroupNorm loses digits on a CPU where the channels come last: 0.2/255 at 512x512, 0.9/255 at 768x768.
    whole = copy.deepcopy(in_strips).to(memory_format=torch.contiguous_format)
    ramp = torch.linspace(-0.8, 0.8, 256)
    smooth = torch.stack([ramp[:, None].expand(256, 256), ramp.expand(256, 256), ramp[:, None] * ramp])
    drawing = F.interpolate(preprocess(open_picture(TINY / "example.png"), 64), 256)[0].clamp(-1, 1)
    for pixels in (smooth[None], drawing[None]):
        latents = whole.encode(pixels)
        assert rel(in_strips.encode(pixels, rows=48), latents) <= 1e-5
        apart = (in_strips.decode(latents, 48) - whole.decode(latents)).abs() * 127.5
        assert apart.max() < 0.05  # of 255


def test_norms_of_a_map_far_from_zero_are_exact_in_strips(draw):
    """Mean 30, deviation 0.1: the mean of the squares less the square of the mean would leave no digit."""
    norm = randomise(torch.nn.GroupNorm(4, 8, eps=1e-6), 0)
    x = 30 + 0.1 * draw(2, 8, 50, 40)
    ours = strips.activate(norm, strips.in_memory(x), 7).read(0, 50)
    assert rel(ours.double(), F.silu(copy.deepcopy(norm).double()(x.double()))) <= 1e-4


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_strips_make_no_map_larger_than_the_one_that_is_held(vae, draw):
    """The enlarged map, of the next level's 64 channels, is never there as a whole; nor is a norm's output."""
    latents = draw(1, 4, 16, 16)
    with LargestTensor() as whole:
        vae.decode(latents)
    with LargestTensor() as in_strips:
        vae.decode(latents, 8)
    assert whole.numbers == 64 * 128 * 128
    assert in_strips.numbers == 32 * 128 * 128


def test_half_precision_in_strips(vae, draw):
    half = copy.deepcopy(vae).bfloat16()
    latents = draw(1, 4, 4, 4)
    exact = vae.decode(latents)
    whole, in_strips = (half.decode(latents.bfloat16(), rows) for rows in (None, 16))
    assert in_strips.dtype == torch.bfloat16
    assert rel(in_strips.float(), exact) <= 1.2 * rel(whole.float(), exact)


def test_attention_in_slices_gives_what_the_whole_gives(vae, draw, monkeypatch):
    latents = draw(2, 4, 9, 7)
    whole = vae.decode(latents)
    sizes, kernel = [], vae_file.scaled_dot_product_attention
    monkeypatch.setattr(
        vae_file,
        "scaled_dot_product_attention",
        lambda q, k, v: sizes.append(q.shape[2] * k.shape[2]) or kernel(q, k, v),
    )
    monkeypatch.setattr(vae_file, "SCORES", 2 * 10 * 63)
    assert rel(vae.decode(latents), whole) <= 1e-6
    assert sizes == [630] * 6 + [3 * 63]
