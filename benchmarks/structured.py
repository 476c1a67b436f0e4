"""Whole runs beside the plus adapter that follow a structure or begin with a picture, ours and diffusers'.

`benchmarks.exact` compares them. Each side makes its pictures by itself, so that both need not be in memory at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from benchmarks.reference import Files, diffusers_controlnet, drawn, randomize
from control import ControlNet, T2IAdapter, T2IConfig
from files.pictures import from_pil, open_picture
from generate import Hint, open_models, pictures, prompts
from unet import UNetConfig
from weights import open_base
from weights.diffusers_names import t2i_from_diffusers

CONTROLNET, T2I = "ControlNet", "T2I-Adapter"
TO_IMAGE, INPAINTING, NINE = "image to image", "inpainting", "inpainting, 9 channels"
STRUCTURE, EDITING = (CONTROLNET, T2I), (TO_IMAGE, INPAINTING, NINE)
SCALE, STRENGTH = 0.8, 0.8  # of hints and of the image prompt; of image to image


@dataclass(frozen=True)
class Asked:
    """What both sides are asked for."""

    text: str
    negative: str
    seed: int
    side: int
    steps: int
    guidance: float


def ours(files: Files, asked: Asked, names: tuple[str, ...]) -> Iterator[tuple[str, Image.Image]]:
    """Our pictures by name."""
    models = open_models(files.base, files.plus, files.image_encoder, device="cpu", dtype="float32")
    seen, init, mask = shown(files, asked.side)
    pair = prompts(models, asked.text, asked.negative, [seen], SCALE)
    how = {"steps": asked.steps, "guidance_scale": asked.guidance, "height": asked.side, "width": asked.side}
    more = {
        TO_IMAGE: {"init": init, "strength": STRENGTH},
        INPAINTING: {"init": init, "inpaint": mask},
        NINE: {"init": init, "inpaint": mask},
    }
    for name in names:
        if name in STRUCTURE:
            models.held[f"control {name}"] = net = made(name, models.base.config)
            read = replace(models, controls=(Path(name),), control_kinds={Path(name): net})
            yield name, next(pictures(read, *pair, asked.seed, controls=[Hint(init, scale=SCALE)], **how))
            del models.held[f"control {name}"], net, read
            continue
        if name == NINE:
            models.unet().input_blocks[0][0] = first_convolution(models.base.config)
            models = replace(models, base=replace(models.base, channels=9))
        yield name, next(pictures(models, *pair, asked.seed, **more[name], **how))


def theirs(pipe: nn.Module, files: Files, asked: Asked, names: tuple[str, ...]) -> Iterator[tuple[str, Image.Image]]:
    """Those of diffusers' pipeline, which has the plus adapter, on the same weights."""
    import diffusers

    pipe.set_ip_adapter_scale(SCALE)
    seen, init, mask = shown(files, asked.side)
    size = {"height": asked.side, "width": asked.side}
    paint = {"image": init, "mask_image": mask} | size
    config = open_base(files.base).config
    for name in names:
        whole, more, features = pipe, size, None
        if name == CONTROLNET:
            net = diffusers_controlnet(made(name, config))
            whole = diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net)
            more = size | {"image": init, "controlnet_conditioning_scale": SCALE}
        elif name == T2I:
            features = [SCALE * one for one in diffusers_t2i(made(name, config))(from_pil(init) / 2 + 0.5)]
        elif name == TO_IMAGE:
            whole = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
            more = {"image": init, "strength": STRENGTH}
        else:
            if name == NINE:
                pipe.unet.conv_in = first_convolution(config)
                pipe.unet.register_to_config(in_channels=9, encoder_hid_dim_type="ip_image_proj")
            whole, more = diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe), paint
        whole.set_progress_bar_config(disable=True)
        with beside(pipe.unet, features):
            yield name, drawn(whole, asked.text, asked.negative, seen, asked.steps, asked.guidance, asked.seed, **more)


def shown(files: Files, side: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The image prompt, the picture to begin with or to follow, and a mask."""
    seen = open_picture(files.picture)
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, side // 8, side // 2, side))
    return seen, seen.resize((side, side)), mask


def made(name: str, config: UNetConfig) -> ControlNet | T2IAdapter:
    """A net for this UNet, of random weights; the same each time."""
    with torch.device("meta"):
        shape = T2IConfig(3, config.channels)
        net = ControlNet(replace(config, up=(), out_channels=0)) if name == CONTROLNET else T2IAdapter(shape)
    net.load_state_dict(randomize(net.state_dict(), len(name), torch.float32), assign=True)
    return net.requires_grad_(False).eval()


def first_convolution(config: UNetConfig) -> nn.Module:
    """Of a base for inpainting, of random weights; the same each time."""
    conv = nn.Conv2d(9, config.channels[0], 3, padding=1)
    conv.load_state_dict(randomize(conv.state_dict(), len(NINE), torch.float32))
    return conv.requires_grad_(False)


def diffusers_t2i(net: T2IAdapter) -> nn.Module:
    """The same weights in diffusers' T2IAdapter."""
    from diffusers import T2IAdapter

    theirs = T2IAdapter(net.config.hint_channels, list(net.config.channels)).requires_grad_(False).eval()
    keys = list(theirs.state_dict())
    names = t2i_from_diffusers({key.removeprefix("adapter."): torch.empty(0) for key in keys})
    theirs.load_state_dict({key: net.state_dict()[name] for key, name in zip(keys, names, strict=True)})
    return theirs


@contextmanager
def beside(unet: nn.Module, features: list[torch.Tensor] | None) -> Iterator[None]:
    """What a T2I-Adapter made is given to diffusers' UNet: no pipeline of theirs has one and an image prompt."""
    forward = unet.forward
    if features is not None:
        both = [one.expand(2, -1, -1, -1) for one in features]  # of which each step takes its own list apart
        unet.forward = lambda *args, **given: forward(*args, down_intrablock_additional_residuals=[*both], **given)
    yield
    unet.forward = forward
