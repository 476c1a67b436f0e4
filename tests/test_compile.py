"""`torch.compile` takes the UNet whole, image prompts and all: no graph break, the same numbers, one graph for a run."""

from dataclasses import replace

import pytest
import torch
from counterparts import randomise
from torch._dynamo.testing import CompileCounter

from control import Control, ControlNet, controlled
from ipadapter import ImageProjection, IPAdapter, Prompt, Scale
from sampler import SAMPLERS, SD, guided, noise
from unet import SD15, UNet

CONFIG = replace(SD15, channels=(32,), down=((1,),), middle=(1,), up=((0, 1),), context_dim=32)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@torch.no_grad()
def test_a_run_with_every_kind_of_image_prompt_is_one_graph():
    """What changes from step to step, the latents and t, asks for no other; what a `Scale` makes of the step may."""
    unet = randomise(UNet(CONFIG), 1)
    adapter = randomise(IPAdapter.for_unet(unet, ImageProjection(16, 32, 4)), 2)
    counter, row = CompileCounter(), SAMPLERS["ddim"]
    compiled = torch.compile(unet, fullgraph=True, backend=counter)  # raises where it would break
    images = [adapter.prompt(draw(1, 4, 32), scale) for scale in (0.6, [0.1, 0.0, 0.5], torch.tensor([0.4]))]
    images.append(adapter.prompt(draw(1, 4, 32), 0.8, mask=draw(1, 1, 16, 16).sigmoid()))
    prompt, null = Prompt(draw(1, 77, 32), tuple(images)), Prompt(draw(1, 77, 32) + 1, tuple(images))
    ours, plain = (
        list(row.run(guided(model, prompt, null, 7.5), noise(0, 1, 64, 64), row.levels(SD, 3)))
        for model in (compiled, unet)
    )
    assert torch.equal(ours[-1], plain[-1]) and counter.frame_count == 1
    faded = adapter.prompt(draw(1, 4, 32), Scale(0.7, start=0.2, curve="fade-in"))
    x, t, prompt = draw(1, 4, 8, 8), torch.tensor(481), replace(prompt, images=(faded,), step=(2, 4))
    assert torch.equal(compiled(x, t, prompt), unet(x, t, prompt))
    assert not torch.allclose(compiled(x, t, prompt), unet(x, t, replace(prompt, images=())))


@pytest.mark.slow
@torch.no_grad()
def test_a_unet_that_follows_a_hint_in_one_half_of_the_guidance_is_one_graph():
    net = randomise(ControlNet(replace(CONFIG, up=(), out_channels=0), hint=(3, 8, 8, 8, 8)), 3)
    unet = controlled(randomise(UNet(CONFIG), 1), [Control(net, net.encode(draw(1, 3, 64, 64)), 0.7, guess=True)])
    x, t, prompt = draw(2, 4, 8, 8), torch.tensor(481), Prompt(draw(2, 77, 32), absent=(True, False))
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, prompt), unet(x, t, prompt))
