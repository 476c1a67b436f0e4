"""The UNet equals diffusers' on the same weights."""

import copy

import pytest
import torch
from counterparts import diffusers_unet, rel

from ipadapter import Prompt
from unet import SD15, UNet
from weights.configs import unet_config


@pytest.mark.parametrize("height, width", [(8, 8), (16, 16), (16, 24), (9, 8), (17, 23), (5, 40)])
def test_equals_diffusers_at_every_latent_size(unet, their_unet, draw, height, width):
    x, t, text = draw(2, 4, height, width), torch.tensor([981, 1]), draw(2, 77, 64)
    assert rel(unet(x, t, Prompt(text)), their_unet(x, t, text).sample) <= 1e-5


def test_equals_diffusers_on_a_single_position_in_double_precision(unet, their_unet, draw):
    """A GroupNorm over two numbers magnifies rounding without bound; in fp64 what is left is the formula."""
    unet, theirs = copy.deepcopy(unet).double(), copy.deepcopy(their_unet).double()
    x, t, text = draw(2, 4, 1, 1).double(), torch.tensor([981, 1]), draw(2, 77, 64).double()
    assert rel(unet(x, t, Prompt(text)), theirs(x, t, text).sample) <= 1e-9


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_equals_diffusers_at_every_timestep(unet, their_unet, draw, t):
    x, text = draw(1, 4, 8, 8), draw(1, 77, 64)
    assert rel(unet(x, torch.tensor(t), Prompt(text)), their_unet(x, t, text).sample) <= 1e-5


@pytest.mark.parametrize("height, width", [(16, 16), (13, 18)])
def test_equals_diffusers_with_the_shape_of_sdxl(unet_xl, draw, height, width):
    theirs = diffusers_unet(unet_xl)
    x, t, text = draw(2, 4, height, width), torch.tensor([999, 40]), draw(2, 77, 96)
    pooled, sizes = draw(2, 32), torch.tensor([[1024.0, 768, 0, 64, 1024, 1024], [512, 512, 8, 0, 640, 1024]])
    vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(2, -1)], dim=1)
    wanted = theirs(x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    assert rel(unet_xl(x, t, Prompt(text, vector=vector)), wanted) <= 1e-5


def test_one_timestep_serves_the_whole_batch(unet, draw):
    x, text = draw(2, 4, 8, 8), draw(2, 77, 64)
    assert torch.equal(unet(x, torch.tensor(7), Prompt(text)), unet(x, torch.tensor([7, 7]), Prompt(text)))


def test_bf16_stays_near_diffusers_fp32(unet, their_unet, draw):
    x, t, text = draw(1, 4, 16, 16), torch.tensor([981]), draw(1, 77, 64)
    half = copy.deepcopy(unet).bfloat16()
    eps = half(x.bfloat16(), t, Prompt(text.bfloat16()))
    assert eps.dtype == torch.bfloat16
    # bf16 has 8 bits: its own diffusers counterpart sets the measure of what is lost.
    wanted = their_unet(x, t, text).sample
    theirs = copy.deepcopy(their_unet).bfloat16()(x.bfloat16(), t, text.bfloat16()).sample
    assert rel(eps.float(), wanted) <= 1.5 * rel(theirs.float(), wanted) < 0.1


@pytest.fixture(scope="module")
def quiet_unet(unet) -> UNet:
    """A UNet whose activations are so small that the epsilon of a GroupNorm shows in the result."""
    quiet = copy.deepcopy(unet)
    loud = ("norm", "in_layers.0", "out_layers.0", "transformer_blocks", "time_embed")
    for name, p in quiet.named_parameters():
        if not (name.startswith("out.") or any(part in name for part in loud)):
            p.data *= 0.01
    return quiet


NORMS = {
    "in_layers": lambda unet: unet.input_blocks[1][0].in_layers[0],
    "out_layers": lambda unet: unet.input_blocks[1][0].out_layers[0],
    "transformer": lambda unet: unet.input_blocks[1][1].norm,
    "layer norm": lambda unet: unet.input_blocks[1][1].transformer_blocks[0].norm1,
    "out": lambda unet: unet.out[0],
}


@pytest.mark.parametrize("which", NORMS)
def test_each_norm_has_diffusers_epsilon(quiet_unet, draw, which):
    x, t, text = draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 77, 64)
    wanted = diffusers_unet(quiet_unet)(x, t, text).sample
    assert rel(quiet_unet(x, t, Prompt(text)), wanted) <= 1e-5
    wrong = copy.deepcopy(quiet_unet)
    norm = NORMS[which](wrong)
    norm.eps = 1e-5 if norm.eps == 1e-6 else 1e-6
    assert rel(wrong(x, t, Prompt(text)), wanted) > 1e-4  # so the comparison above would have seen it


def test_every_tensor_matters(unet, draw):
    """No weight is dead: the comparisons with diffusers read them all."""
    live = copy.deepcopy(unet).requires_grad_(True)
    live(draw(1, 4, 8, 8), torch.tensor([500]), Prompt(draw(1, 77, 64))).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in live.parameters())


def test_sd15_has_the_published_tensors():
    with torch.device("meta"):
        state = UNet(SD15).state_dict()
    assert len(state) == 686
    assert sum(w.numel() for w in state.values()) == 859_520_964
    assert unet_config(state) == SD15


def test_sd15_on_meta_has_diffusers_names_and_shapes():
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        state = {f"model.diffusion_model.{key}": w for key, w in UNet(SD15).state_dict().items()}
        theirs = UNet2DConditionModel(cross_attention_dim=768)
    converted = convert_ldm_unet_checkpoint(state, theirs.config)
    assert {k: w.shape for k, w in converted.items()} == {k: w.shape for k, w in theirs.state_dict().items()}


def test_config_is_read_back_from_the_tensors(unet, unet_xl):
    assert unet_config(unet.state_dict()) == unet.config
    assert unet_config(unet_xl.state_dict()) == unet_xl.config
