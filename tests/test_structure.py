"""ControlNets and T2I-Adapters: the same random weights in ours and in diffusers."""

import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from counterparts import Twin, assert_same_picture, opened, randomise, rel
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers import T2IAdapter as TheirT2IAdapter
from narrow import NARROW_SD2, NARROW_UNET, NARROW_XL
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from control import ControlNet, T2IAdapter
from files.errors import Notice
from generate import Hint, pictures, prompts
from generate.picture import decode
from ipadapter import Prompt
from unet import UNetConfig
from weights.configs import t2i_config
from weights.control import build_control
from weights.diffusers_names import control_from_diffusers, t2i_from_diffusers
from weights.fill import under

HINT = (3, 8, 16, 24, 32)


def their_controlnet(
    config: UNetConfig, seed: int, depths: list[int] | None = None, kind: type = ControlNetModel, **more
):
    added = {}
    if config.vector_dim:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (config.vector_dim - 32) // 6,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    theirs = kind(
        block_out_channels=config.channels,
        down_block_types=["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in config.down],
        transformer_layers_per_block=depths or [max(max(depths), 1) for depths in config.down],
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.heads or [width // config.head_dim for width in config.channels],
        use_linear_projection=config.linear_proj,
        conditioning_embedding_out_channels=HINT[1:],
        **added,
        **more,
    )
    return randomise(theirs, seed)


def ours_of(theirs: nn.Module) -> ControlNet:
    state = control_from_diffusers(theirs.state_dict())
    ours = build_control(state)
    ours.load_state_dict(state, strict=True)
    return ours.requires_grad_(False).eval()


def residuals(found: tuple[list[Tensor], Tensor]) -> list[Tensor]:
    return [*found[0], found[1]]


def close(ours: dict[int, Tensor], theirs: list[Tensor]) -> None:
    assert list(ours) == list(range(len(theirs)))
    assert max(rel(a, b) for a, b in zip(ours.values(), theirs, strict=True)) <= 1e-5


def told(config: UNetConfig, draw, theirs: nn.Module) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What SDXL hears beside the text, as ours and theirs take it."""
    if not config.vector_dim:
        return None, {}
    pooled, sizes = draw(2, 32), torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
    vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(2, -1)], dim=1)
    return vector, {"text_embeds": pooled, "time_ids": sizes}


NO_TRANSFORMERS = replace(NARROW_XL, down=((0, 0), (0, 0), (0, 0)))
UNION = replace(NARROW_XL, channels=(320, 64, 64))  # theirs knows no other width of the first level
SHAPES = {  # and the depths of diffusers' transformers, where they are not the config's
    "SD 1.x": (NARROW_UNET, None),
    "SD 2.x": (NARROW_SD2, None),
    "SDXL": (NARROW_XL, None),
    "SDXL mid": (NARROW_XL, [0, 0, 1]),
    "SDXL small": (NO_TRANSFORMERS, [0, 0, 0]),
}
T = torch.tensor(500)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_controlnet_is_diffusers_own(shape, draw):
    config, depths = SHAPES[shape]
    theirs = their_controlnet(config, 30, depths)
    ours, x, text, hint = ours_of(theirs), draw(2, 4, 8, 8), draw(2, 77, config.context_dim), draw(1, 3, 64, 64)
    vector, added = told(config, draw, theirs)
    wanted = theirs(x, T, text, hint, 1.0, added_cond_kwargs=added, return_dict=False)
    close(ours(x, T, Prompt(text, vector=vector), *ours.encode(hint)).skips, residuals(wanted))


@pytest.mark.parametrize("task", (0, 5))
def test_a_union_is_diffusers_own(task, draw):
    theirs = their_controlnet(UNION, 31, kind=ControlNetUnionModel)
    ours, x, text, hint = ours_of(theirs), draw(2, 4, 8, 8), draw(2, 77, 96), draw(1, 3, 64, 64)
    vector, added = told(UNION, draw, theirs)
    flags = torch.zeros(2, 6)
    flags[:, task] = 1
    wanted = theirs(
        x, T, text, [torch.cat([hint, hint])], flags, [task], 1.0, added_cond_kwargs=added, return_dict=False
    )
    close(ours(x, T, Prompt(text, vector=vector), *ours.encode(hint, task)).skips, residuals(wanted))


@pytest.mark.parametrize("kind", ("full_adapter", "light_adapter", "full_adapter_xl"))
def test_a_t2i_adapter_is_diffusers_own(kind, draw):
    light, xl = kind == "light_adapter", kind == "full_adapter_xl"
    channels = [32, 64, 96] if light else [32, 64, 96, 96]
    theirs = randomise(TheirT2IAdapter(3, channels, 4 if light else 2, 16 if xl else 8, kind), 32)
    ours = T2IAdapter(t2i_config(state := t2i_from_diffusers(under("adapter.", theirs.state_dict()))))
    ours.load_state_dict(state, strict=True)
    hint = draw(1, 3, 128, 192)
    for a, b in zip(ours.encode(hint), theirs(hint), strict=True):
        assert rel(a, b) <= 1e-5


# Whole pictures: ours from files, by the line that everybody calls; theirs by their pipelines

TEXT, SEED, STEPS = "a red fox in the snow, 35mm", 7, 4


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Coloured fields and lines."""
    generator = torch.Generator().manual_seed(seed)
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, a, b, *colour = torch.randint(0, 255, (7,), generator=generator).tolist()
        draw.rectangle(sorted_box(x % width, y % height, a % width, b % height), fill=tuple(colour))
    return image


def sorted_box(x: int, y: int, a: int, b: int) -> tuple[int, int, int, int]:
    return min(x, a), min(y, b), max(x, a), max(y, b)


def saved(theirs: nn.Module, path: Path) -> Path:
    save_file({key: w.contiguous() for key, w in theirs.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[str, tuple[nn.Module, Path]]:
    """diffusers' models, and files of the same weights in diffusers' layout."""
    folder = tmp_path_factory.mktemp("nets")
    made = {
        "first": their_controlnet(NARROW_UNET, 40),
        "second": their_controlnet(NARROW_UNET, 41),
        "shuffle": their_controlnet(NARROW_UNET, 42, global_pool_conditions=True),
        "xl": their_controlnet(NARROW_XL, 43),
        "t2i": randomise(TheirT2IAdapter(3, [32, 64, 96, 96], 2, 8, "full_adapter"), 44),
        "t2i-grey": randomise(TheirT2IAdapter(1, [32, 64, 96, 96], 2, 8, "full_adapter"), 45),
        "t2i-light": randomise(TheirT2IAdapter(3, [32, 64, 96], 4, 8, "light_adapter"), 46),
        "t2i-xl": randomise(TheirT2IAdapter(3, [64, 128, 192, 192], 2, 16, "full_adapter_xl"), 47),
    }
    return {name: (net, saved(net, folder / f"{name}.safetensors")) for name, net in made.items()}


def ours(twin: Twin, files: list[Path], hints: list[Hint], adapter=None, encoder=None, **how):
    models = replace(opened(twin, adapter, encoder), controls=tuple(files))
    images, scale = ([picture(9, 80, 80)], 0.7) if adapter else ([], None)
    pair, latents = prompts(models, TEXT, images=images, scale=scale), []
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        how = {"steps": STEPS, "height": 64, "width": 96} | how
        (made,) = pictures(models, *pair, SEED, controls=hints, **how)
    return latents[0], np.asarray(made)


def theirs(kind, pipeline: DiffusionPipeline, parts: dict[str, nn.Module], **how):
    found = kind(**{name: part for name, part in pipeline.components.items() if name in wanted(kind)} | parts)
    found.set_progress_bar_config(disable=True)
    latents = []
    if "adapter" in parts:  # of these pipelines the older has no other way
        how |= {"callback": lambda i, t, x: latents.append(x), "callback_steps": 1}
    else:
        how["callback_on_step_end"] = lambda pipeline, i, t, tensors: latents.append(tensors["latents"]) or {}
    made = found(
        TEXT,
        generator=torch.Generator().manual_seed(SEED),
        **{"num_inference_steps": STEPS, "height": 64, "width": 96} | how,
    )
    return latents[-1], np.asarray(made.images[0])


def wanted(kind: type) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)


CASES = {  # the nets, ours, theirs
    "one": (["first"], [Hint(picture(1), scale=0.8)], {"image": picture(1), "controlnet_conditioning_scale": 0.8}),
    "two, with windows": (
        ["first", "second"],
        [Hint(picture(1), 0, until=0.5), Hint(picture(2), 1, scale=-0.6, start=0.25)],
        {
            "image": [picture(1), picture(2)],
            "controlnet_conditioning_scale": [1.0, -0.6],
            "control_guidance_start": [0.0, 0.25],
            "control_guidance_end": [0.5, 1.0],
        },
    ),
    "guess": (["first"], [Hint(picture(1), guess=True)], {"image": picture(1), "guess_mode": True}),
    "pooled": (["shuffle"], [Hint(picture(1), scale=0.9)], {"image": picture(1), "controlnet_conditioning_scale": 0.9}),
    "another size": (["first"], [Hint(picture(1, 50, 90))], {"image": picture(1, 50, 90)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_picture_under_control_equals_diffusers(sd1, nets, case):
    names, hints, how = CASES[case]
    parts = [nets[name][0] for name in names]
    found = theirs(
        StableDiffusionControlNetPipeline, sd1.pipeline, {"controlnet": parts if len(parts) > 1 else parts[0]}, **how
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        assert_same_picture(ours(sd1, [nets[name][1] for name in names], hints), found)


@pytest.mark.slow
def test_with_sdxl_a_picture_under_control_equals_diffusers(sdxl, nets):
    net, file = nets["xl"]
    found = theirs(
        StableDiffusionXLControlNetPipeline, sdxl.pipeline, {"controlnet": net}, image=picture(1), guidance_scale=7.5
    )
    assert_same_picture(ours(sdxl, [file], [Hint(picture(1))]), found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("t2i", "t2i-light"))
def test_a_picture_with_a_t2i_adapter_equals_diffusers(sd1, nets, name):
    net, file = nets[name]
    how = {"image": picture(1, 128, 64), "adapter_conditioning_scale": 0.7, "width": 128}
    found = theirs(StableDiffusionAdapterPipeline, sd1.pipeline, {"adapter": net}, **how)
    assert_same_picture(ours(sd1, [file], [Hint(picture(1, 128, 64), scale=0.7)], width=128), found)


@pytest.mark.slow
def test_with_sdxl_a_picture_with_a_t2i_adapter_equals_diffusers(sdxl, nets):
    net, file = nets["t2i-xl"]
    how = {"image": picture(1), "adapter_conditioning_factor": 0.5, "guidance_scale": 7.5}
    found = theirs(StableDiffusionXLAdapterPipeline, sdxl.pipeline, {"adapter": net}, **how)
    assert_same_picture(ours(sdxl, [file], [Hint(picture(1), until=0.5)]), found)
