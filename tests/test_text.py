"""The text's half of a prompt, and how it is followed."""

import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from counterparts import Order, Twin, rel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from test_sample import sample

from files.errors import UserError
from files.pictures import read_settings
from generate import open_models, pictures, prompts
from generate.picture import decode
from ipadapter import Prompt
from sampler import SD, guided
from unet import UNet

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "tiny/example.png"
AT_500 = SD.level(500)


# Guidance


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_rescaled_guidance_is_that_of_diffusers(unet: UNet, draw, prediction):
    """On the model's own output, and each picture by itself."""
    x, prompt, null = draw(2, 4, 8, 8), Prompt(draw(2, 77, 64)), Prompt(draw(2, 77, 64))
    toward, away = (unet(x, torch.tensor(500), p) for p in (prompt, null))
    wanted = rescale_noise_cfg(away + 7.5 * (toward - away), toward, guidance_rescale=0.7)
    eps, x_0 = guided(unet, prompt, null, 7.5, prediction, rescale=0.7)(x, AT_500)
    signal, noise = AT_500.alpha**0.5, (1 - AT_500.alpha) ** 0.5
    assert rel(eps if prediction == "eps" else signal * eps - noise * x_0, wanted) <= 1e-5
    assert rel(wanted, away + 7.5 * (toward - away)) > 0.01


@pytest.mark.parametrize("apart", [False, True])
def test_three_passes_are_the_formula(unet: UNet, base_adapter, draw, apart):
    x, t, batches = draw(2, 4, 8, 8), torch.tensor(500), []
    text, empty = draw(1, 77, 64).expand(2, -1, -1), draw(1, 77, 64).expand(2, -1, -1)
    image, nothing = ((base_adapter.prompt(draw(2, 4, 64), 0.7),) for _ in range(2))
    chain = Prompt(empty, nothing), Prompt(empty, image), Prompt(text, image)
    none, alone, full = (unet(x, t, p) for p in chain)
    handle = unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    found, _ = guided(unet, chain[2], chain[0], 7.5, apart=apart, middle=chain[1], middle_scale=2)(x, AT_500)
    handle.remove()
    assert rel(found, none + 2 * (alone - none) + 7.5 * (full - alone)) <= 1e-5
    assert batches == ([2, 2, 2] if apart else [6])


def test_a_middle_that_is_followed_like_the_rest_costs_no_pass(unet: UNet, draw):
    x, prompt, middle, null = draw(1, 4, 8, 8), *(Prompt(draw(1, 77, 64)) for _ in range(3))
    plain = guided(unet, prompt, null, 3)(x, AT_500)
    assert all(map(torch.equal, guided(unet, prompt, null, 3, middle=middle, middle_scale=3)(x, AT_500), plain))
    assert torch.equal(guided(unet, prompt, null, 1, middle=middle)(x, AT_500)[0], unet(x, torch.tensor(500), prompt))


@pytest.mark.parametrize("apart", [False, True])
def test_what_stands_beside_x_may_differ_from_pass_to_pass(draw, apart):
    """As instruct-pix2pix has it: the picture beside the first two rows, nothing beside the last."""
    x, picture, text = draw(2, 4, 8, 8), draw(2, 4, 8, 8), draw(2, 77, 8)

    def instructed(x: torch.Tensor, t: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        return x + 2 * prompt.beside + prompt.text.mean(dim=(1, 2))[:, None, None, None]

    full, middle = Prompt(text, beside=picture), Prompt(-text, beside=picture)
    null = replace(middle, beside=torch.zeros_like(picture))
    none, alone, all_of_it = (instructed(x, None, p) for p in (null, middle, full))
    found, _ = guided(instructed, full, null, 7.5, apart=apart, middle=middle, middle_scale=1.5)(x, AT_500)
    assert rel(found, none + 7.5 * (all_of_it - alone) + 1.5 * (alone - none)) <= 1e-6


def test_a_rescaled_picture_is_that_of_diffusers(sd1: Twin):
    order, latents = Order(negative_prompt="blurred"), []
    how = {"num_inference_steps": 2, "guidance_scale": 7.5, "guidance_rescale": 0.7, "height": 64, "width": 96}
    wanted = sd1.pipeline(
        order.prompt, negative_prompt="blurred", generator=torch.Generator().manual_seed(7), output_type="latent", **how
    ).images
    models = replace(open_models(image=False), base=sd1.base, side=64)
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        pair = prompts(models, order.prompt, "blurred")
        list(pictures(models, *pair, 7, steps=2, guidance_rescale=0.7, height=64, width=96))
    assert rel(latents[0], wanted) <= 1e-4


def test_guidance_flags_are_kept_and_repeated(tmp_path: Path):
    first, second, plain = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    flags = ["--image", EXAMPLE, "--prompt", "red apple", "--steps", 1, "--height", 64, "--width", 64]
    own = ["--guidance-rescale", 0.5, "--image-guidance-scale", 2]
    assert [sample(*flags, *extra).returncode for extra in (["--output", plain], [*own, "--output", first])] == [0, 0]
    assert sample("--again", first, "--output", second).returncode == 0
    a, b, c = (np.asarray(Image.open(path)).astype(int) for path in (first, second, plain))
    assert np.array_equal(a, b) and np.abs(a - c).max() > 1
    settings = read_settings(first)
    assert (settings["guidance_rescale"], settings["image_guidance_scale"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--prompt", "a", "--guidance-rescale", 1.5], "--guidance-rescale 1.5: 0 to 1"),
        (["--prompt", "a", "--image-guidance-scale", 2], "--image-guidance-scale is how far .* goes with --image"),
    ],
)
def test_guidance_that_cannot_be_is_one_line(flags, wrong):
    ended = sample(*flags)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert re.search(wrong, ended.stderr)


def test_guidance_of_its_own_wants_an_image_prompt():
    models = open_models(image=False)
    with pytest.raises(UserError, match="image_guidance_scale"):
        next(pictures(models, *prompts(models, "a"), image_guidance_scale=2, steps=1))
