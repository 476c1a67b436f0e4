"""ControlNets and T2I-Adapters: the same random weights in ours and in diffusers."""

import copy
import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from counterparts import (
    Twin,
    assert_same_picture,
    diffusers_unet_with,
    listed_once,
    opened,
    published,
    randomise,
    rel,
    set_scales,
    transformers_image,
)
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from diffusers import T2IAdapter as TheirT2IAdapter
from narrow import NARROW_SD2, NARROW_UNET, NARROW_XL
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from test_memory import BOUNDS, rounded
from test_sample import sample
from torch import Tensor, nn
from torch.nn.functional import conv2d, layer_norm, pixel_unshuffle, relu

from cli.groups import Group, control_groups
from clip import preprocess
from control import Control, ControlNet, StyleAdapter, T2IAdapter, attentions, controlled, joined
from control.canny import canny
from control.controlled import added
from files.errors import Notice, UserError
from files.pictures import read_settings
from generate import Hint, open_models, pictures, prompts
from generate.picture import decode
from ipadapter import ImageProjection, IPAdapter, Prompt, prepared
from unet import UNetConfig
from weights import Base, WeightsError, open_base
from weights.configs import t2i_config
from weights.control import build_control, control_state, load_control, task_of
from weights.diffusers_names import control_from_diffusers, t2i_from_diffusers
from weights.fill import under
from weights.storage import STORAGES, store

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


@pytest.mark.parametrize(("types", "task"), ((6, 0), (8, 7)))
def test_a_union_is_diffusers_own(types, task, draw):
    """ProMax has two types more."""
    theirs = their_controlnet(UNION, 31, kind=ControlNetUnionModel, num_control_type=types)
    ours, x, text, hint = ours_of(theirs), draw(2, 4, 8, 8), draw(2, 77, 96), draw(1, 3, 64, 64)
    vector, added = told(UNION, draw, theirs)
    flags = torch.zeros(2, types)
    flags[:, task] = 1
    wanted = theirs(
        x, T, text, [torch.cat([hint, hint])], flags, [task], 1.0, added_cond_kwargs=added, return_dict=False
    )
    close(ours(x, T, Prompt(text, vector=vector), *ours.encode(hint, task)).skips, residuals(wanted))


def test_hints_of_several_types_in_one_pass_are_diffusers_own(draw):
    theirs = their_controlnet(UNION, 31, kind=ControlNetUnionModel)
    ours, x, text, hints = ours_of(theirs), draw(2, 4, 8, 8), draw(2, 77, 96), draw(2, 3, 64, 64)
    vector, added = told(UNION, draw, theirs)
    flags = torch.zeros(2, 6)
    flags[:, [4, 1]] = 1
    both = [torch.cat([one, one]) for one in hints.split(1)]
    wanted = theirs(x, T, text, both, flags, [4, 1], [0.7, 1.2], added_cond_kwargs=added, return_dict=False)
    found = ours(x, T, Prompt(text, vector=vector), *ours.encode(hints, 4, 1, scales=(0.7, 1.2))).skips
    close(found, residuals(wanted))


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


def test_a_t2i_adapter_of_the_first_releases_halves_by_convolutions(draw):
    """Against the public module's description: no later code reads such files."""
    their = randomise(TheirT2IAdapter(1, [32, 64, 96, 96], 2, 8, "full_adapter"), 33)
    state = dict(t2i_from_diffusers(under("adapter.", their.state_dict())))
    for i, width in ((2, 32), (4, 64), (6, 96)):
        state[f"body.{i}.down_opt.op.weight"] = draw(width, width, 3, 3) * 0.1
        state[f"body.{i}.down_opt.op.bias"] = draw(width)
    ours, hint = T2IAdapter(t2i_config(state)), draw(1, 1, 64, 128)
    ours.load_state_dict(state, strict=True)

    def conv(x: Tensor, key: str, **how: int) -> Tensor:
        return conv2d(x, state[f"{key}.weight"], state[f"{key}.bias"], **how)

    x, wanted = conv(pixel_unshuffle(hint, 8), "conv_in", padding=1), []
    for i in range(8):
        x = conv(x, f"body.{i}.down_opt.op", stride=2, padding=1) if i in (2, 4, 6) else x
        x = conv(x, f"body.{i}.in_conv") if i in (2, 4) else x
        x = x + conv(relu(conv(x, f"body.{i}.block1", padding=1)), f"body.{i}.block2")
        wanted += [x] if i % 2 else []
    assert [rel(a, b) <= 1e-5 for a, b in zip(ours.encode(hint), wanted, strict=True)] == [True] * 4


def their_style(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """As the public module computes it, of torch's own parts: tokens first, attention over them by 8 heads."""
    tokens = state["style_embedding"].expand(len(features), -1, -1)

    def norm(x: Tensor, key: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"])

    def line(x: Tensor, key: str) -> Tensor:
        return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    x = norm(torch.cat([features, tokens], dim=1), "ln_pre").transpose(0, 1)
    for i in range(3):
        block, width = f"transformer_layes.{i}", x.shape[-1]
        attention = nn.MultiheadAttention(width, 8)
        attention.load_state_dict(under(f"{block}.attn.", state))
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = line(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + line(y * torch.sigmoid(1.702 * y), f"{block}.mlp.c_proj")
    return norm(x.transpose(0, 1)[:, -tokens.shape[1] :], "ln_post") @ state["proj"]


@pytest.fixture(scope="module")
def style(tmp_path_factory) -> tuple[dict[str, Tensor], Path]:
    """A style adapter for the narrow towers, in the original names."""
    path = tmp_path_factory.mktemp("style") / "style.pth"
    torch.save(state := randomise(StyleAdapter(128, 64, 8, 3), 48).state_dict(), path)
    return state, path


@torch.no_grad()
def test_a_style_adapter_joins_the_text_as_in_the_public_sampler(sd1, style, image_tower, tmp_path, draw):
    state, file = style
    net, pixels = load_control(file, sd1.base), draw(2, 3, 64, 64)
    tower = transformers_image(image_tower)
    hint = net.encode(image_tower.ultimate(image_tower.penultimate(pixels)))
    features = tower(pixels, output_hidden_states=True).hidden_states[-1]
    assert rel(hint[0], wanted := their_style(state, features)) <= 1e-5
    text, empty = Prompt(draw(2, 77, 64)), Prompt(draw(2, 77, 64))
    control = Control(net, hint, 0.6, until=0.5)
    prompt, null = joined(text, empty, [control])
    assert rel(prompt.text, torch.cat([text.text, 0.6 * wanted], dim=1)) <= 1e-5
    assert torch.equal(null.text, torch.cat([empty.text, empty.text[:, -8:]], dim=1))
    unet = sd1.base.unet()
    model, x = controlled(unet, [control]), draw(2, 4, 8, 8)
    for made in (prompt, prepared(prompt, unet.cross_attentions())):
        for i, seen in enumerate((prompt, text)):  # after its window the text is as long as before
            assert rel(model(x, T, replace(made, step=(i, 2))), unet(x, T, seen)) <= 1e-5
    assert joined(text, empty, [replace(control, scale=0.0)]) == (text, empty)


# Whole pictures: ours from files, by the line that everybody calls; theirs by their pipelines

TEXT, SEED, STEPS = "a red fox in the snow, 35mm", 7, 2


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
        "union": their_controlnet(NARROW_XL, 48, kind=ControlNetUnionModel, num_trans_channel=32, num_proj_channel=32),
        "t2i": randomise(TheirT2IAdapter(3, [32, 64, 96, 96], 2, 8, "full_adapter"), 44),
        "t2i-grey": randomise(TheirT2IAdapter(1, [32, 64, 96, 96], 2, 8, "full_adapter"), 45),
        "t2i-light": randomise(TheirT2IAdapter(3, [32, 64, 96], 4, 8, "light_adapter"), 46),
        "t2i-xl": randomise(TheirT2IAdapter(3, [32, 64, 128, 128], 2, 16, "full_adapter_xl"), 47),
    }
    return {name: (net, saved(net, folder / f"{name}.safetensors")) for name, net in made.items()}


@pytest.fixture(scope="module")
def adapter_xl(unet_xl) -> IPAdapter:
    return randomise(IPAdapter.for_unet(unet_xl, ImageProjection(96, NARROW_XL.context_dim, 4)), 49)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, sd1, sdxl, base_adapter, adapter_xl) -> dict[str, DiffusionPipeline]:
    """diffusers' pipelines with an adapter, by family."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for name, twin, adapter in (("sd1", sd1, base_adapter), ("sdxl", sdxl, adapter_xl)):
        torch.save(published(adapter), folder / f"{name}.bin")
        found[name] = type(twin.pipeline)(**twin.pipeline.components | {"unet": copy.deepcopy(twin.pipeline.unet)})
        with listed_once(found[name].unet):
            file = {"subfolder": "", "weight_name": f"{name}.bin", "image_encoder_folder": None}
            found[name].load_ip_adapter(str(folder), **file)
        found[name].set_ip_adapter_scale(0.7)
    return found


def ours(twin: Twin, files: list[Path], hints: list[Hint], adapter=None, encoder=None, **how):
    kinds = {file: load_control(file, twin.base, device="meta") for file in files}
    models = replace(opened(twin, adapter, encoder), controls=tuple(files), control_kinds=kinds)
    images, scale = ([picture(9, 80, 80)], 0.7) if adapter else ([], None)
    pair, latents = prompts(models, TEXT, images=images, scale=scale), []
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        how = {"steps": STEPS, "height": 64, "width": 96} | how
        (made,) = pictures(models, *pair, SEED, controls=hints, **how)
    return latents[0], np.asarray(made)


def theirs(kind, pipeline: DiffusionPipeline, parts: dict[str, nn.Module], **how):
    found = kind(**{name: part for name, part in pipeline.components.items() if name in wanted(kind)} | parts)
    found.set_progress_bar_config(disable=True)
    if getattr(pipeline.unet, "encoder_hid_proj", None) is not None:
        how["ip_adapter_image"] = [picture(9, 80, 80)]
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
            "num_inference_steps": 4,
        },
    ),
    "guess": (["first"], [Hint(picture(1), guess=True)], {"image": picture(1), "guess_mode": True}),
    "pooled": (["shuffle"], [Hint(picture(1), scale=0.9)], {"image": picture(1), "controlnet_conditioning_scale": 0.9}),
    "another size": (["first"], [Hint(picture(1, 50, 90))], {"image": picture(1, 50, 90)}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "prompting"), [("one", False), *((case, case != "another size") for case in CASES)])
def test_a_picture_under_control_equals_diffusers(sd1, nets, base_adapter, image_tower, prompted, case, prompting):
    """The nets hear the text alone: theirs gives the image tokens to the UNet only."""
    names, hints, how = CASES[case]
    parts = [nets[name][0] for name in names]
    pipeline = prompted["sd1"] if prompting else sd1.pipeline
    found = theirs(
        StableDiffusionControlNetPipeline, pipeline, {"controlnet": parts if len(parts) > 1 else parts[0]}, **how
    )
    reads, steps = (base_adapter, image_tower) if prompting else (), how.get("num_inference_steps", STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        assert_same_picture(ours(sd1, [nets[name][1] for name in names], hints, *reads, steps=steps), found)


@pytest.mark.slow
def test_with_sdxl_a_picture_under_control_equals_diffusers(sdxl, nets, adapter_xl, image_tower, prompted):
    net, file = nets["xl"]
    how = {"image": picture(1), "guidance_scale": 7.5}
    found = theirs(StableDiffusionXLControlNetPipeline, prompted["sdxl"], {"controlnet": net}, **how)
    assert_same_picture(ours(sdxl, [file], [Hint(picture(1))], adapter_xl, image_tower), found)


@torch.no_grad()
def test_a_picture_with_a_style_is_one_whose_text_has_its_tokens(sd1, style, image_tower):
    state, file = style
    tower = {f"image encoder {(path := Path('tower'))}": image_tower}
    kinds = {file: load_control(file, sd1.base, device="meta")}
    plain = opened(sd1)
    models = replace(
        plain, controls=(file,), control_kinds=kinds, files={"style_encoder": path}, held=plain.held | tower
    )
    pixels = preprocess(picture(9, 80, 60), 64)
    features = transformers_image(image_tower)(pixels, output_hidden_states=True).hidden_states[-1]
    pair = prompts(models, TEXT)
    texts = pair[0].text, 0.9 * their_style(state, features), pair[1].text, pair[1].text[:, -8:]
    wider = [replace(one, text=torch.cat(texts[i : i + 2], dim=1)) for one, i in zip(pair, (0, 2), strict=True)]
    how = {"seed": SEED, "steps": 2, "height": 64, "width": 64}
    (found,) = pictures(models, *pair, controls=[Hint(picture(9, 80, 60), scale=0.9)], **how)
    (wanted,), (without,) = pictures(models, *wider, **how), pictures(models, *pair, **how)
    apart = [np.abs(np.asarray(found, dtype=int) - np.asarray(one, dtype=int)).max() for one in (wanted, without)]
    assert apart[0] <= 1 < apart[1]


@pytest.mark.slow
@pytest.mark.parametrize("several", (False, True))
def test_a_picture_under_a_union_equals_diffusers(sdxl, nets, adapter_xl, image_tower, prompted, several):
    net, file = nets["union"]
    hints, kinds, scale = (
        ([picture(1), picture(2)], ["depth", "normal"], [0.8, 0.8]) if several else (picture(1), "depth", 0.8)
    )
    how = {"control_image": hints, "control_mode": [1, 4] if several else 1, "controlnet_conditioning_scale": 0.8}
    found = theirs(
        StableDiffusionXLControlNetUnionPipeline, prompted["sdxl"], {"controlnet": net}, **how, guidance_scale=7.5
    )
    hint = Hint(hints, scale=scale, control_type=kinds)
    assert_same_picture(ours(sdxl, [file], [hint], adapter_xl, image_tower), found)


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


@pytest.mark.parametrize("kind", ("t2i", "t2i-light", "t2i-xl"))
def test_a_t2i_adapter_acts_inside_the_unet_as_diffusers_has_it(
    nets, unet, unet_xl, base_adapter, adapter_xl, draw, kind
):
    model, adapter = (unet_xl, adapter_xl) if kind.endswith("xl") else (unet, base_adapter)
    theirs, (net, file) = diffusers_unet_with(model, adapter), nets[kind]
    set_scales(theirs, 0.7)
    x, text, hint, embed = draw(2, 4, 16, 16), draw(2, 77, model.config.context_dim), draw(1, 3, 128, 128), draw(2, 96)
    vector, more = told(model.config, draw, theirs)
    prompt = Prompt(text, (adapter.prompt(adapter.image_proj(embed), 0.7),), vector)
    ours = build_filled(file)
    found = controlled(model, [Control(ours, ours.encode(hint), 0.8)])(x, T, prompt)
    features = [0.8 * feature.expand(2, -1, -1, -1) for feature in net(hint)]
    more |= {"image_embeds": [embed[:, None]]}
    wanted = theirs(x, T, text, added_cond_kwargs=more, down_intrablock_additional_residuals=features).sample
    assert rel(found, wanted) <= 1e-5 < rel(model(x, T, prompt), wanted)


def test_a_t2i_adapter_and_a_controlnet_act_together_with_an_image_prompt(nets, unet, base_adapter, draw):
    theirs = diffusers_unet_with(unet, base_adapter)
    set_scales(theirs, 0.7)
    (net, file), (t2i, t2i_file) = nets["first"], nets["t2i"]
    x, text, hint, embed = draw(1, 4, 16, 16), draw(1, 77, 64), draw(1, 3, 128, 128), draw(1, 96)
    prompt = Prompt(text, (base_adapter.prompt(base_adapter.image_proj(embed), 0.7),))
    controls = [Control(one, one.encode(hint)) for one in map(build_filled, (file, t2i_file))]
    found = controlled(unet, controls)(x, T, prepared(prompt, attentions(unet, controls)))
    down, middle = net(x, T, text, hint, 1.0, return_dict=False)
    wanted = theirs(
        x,
        T,
        text,
        added_cond_kwargs={"image_embeds": [embed[:, None]]},
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        down_intrablock_additional_residuals=t2i(hint),
    ).sample
    assert rel(found, wanted) <= 1e-5


def test_a_union_whole_run_is_told_its_type_by_the_name_of_the_hint(draw):
    net = build_control(control_from_diffusers(their_controlnet(UNION, 31, kind=ControlNetUnionModel).state_dict()))
    assert task_of(net, None, "folder/my_depth_map.png") == 1
    assert task_of(net, "lineart", "depth.png") == 3 and task_of(net, None, "softedge.png") == 2
    for kind, name in ((None, "cat.png"), ("tile", "tile.png")):
        with pytest.raises(WeightsError, match="openpose, depth, scribble, canny, normal, segment"):
            task_of(net, kind, name)


def test_outside_of_its_window_a_net_does_not_run(nets, unet, draw):
    net, calls = build_filled(nets["first"][1]), []
    net.register_forward_hook(lambda *_: calls.append(1))
    model = controlled(unet, [Control(net, net.encode(draw(1, 3, 64, 64)), start=0.25, until=0.75)])
    x, prompt = draw(1, 4, 8, 8), Prompt(draw(1, 77, 64))
    acts = []
    for i in range(4):
        calls.clear()
        same = torch.equal(model(x, T, replace(prompt, step=(i, 4))), unet(x, T, prompt))
        acts.append(bool(calls))
        assert same != acts[-1]
    assert acts == [False, True, True, False]


def test_a_mask_says_where_a_net_acts(nets, unet, draw):
    net, mask = build_filled(nets["t2i"][1]), torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    hint = net.encode(draw(1, 3, 128, 128))
    found = added(Control(net, hint, mask=mask), draw(1, 4, 16, 16), T, Prompt(draw(1, 77, 64))).features[2]
    assert torch.equal(found[..., :8], hint[0][..., :8]) and not found[..., 8:].any()


@torch.no_grad()
def test_a_net_lies_in_fewer_bits(nets, draw):
    """Out of a file of fp16 weights bit for bit as in fp32, otherwise within what a UNet loses."""
    for name in ("first", "t2i"):
        net, prompt, hint = (
            rounded(build_filled(nets[name][1]), torch.float16),
            Prompt(draw(1, 77, 64)),
            draw(1, 3, 64, 64),
        )

        def made(net: nn.Module, prompt=prompt, hint=hint) -> Tensor:
            found = added(Control(net, net.encode(hint)), hint[:, :1].expand(-1, 4, -1, -1)[..., :8, :8], T, prompt)
            return torch.cat([one.flatten() for one in (*found.skips.values(), *found.features.values())])

        lost = {
            kind: rel(made(store(copy.deepcopy(net), dtype, torch.float32)), made(net))
            for kind, dtype in STORAGES.items()
        }
        assert lost["float16"] == 0 < lost["bfloat16"] < BOUNDS["bfloat16"] < lost["float8"] < BOUNDS["float8"]


# Files


def build_filled(file: Path) -> nn.Module:
    state = control_state(file, load_file(file))
    net = build_control(state)
    net.load_state_dict(state, strict=True)
    return net.requires_grad_(False).eval()


def original(net: nn.Module) -> dict[str, Tensor]:
    return {key: w.clone() for key, w in net.state_dict().items()}


LAYOUTS = {  # what stands in a file, of a net in the original names
    "bare": lambda state: state,
    "prefixed": lambda state: {f"control_model.{key}": w for key, w in state.items()},
    "beside its base": lambda state: (
        {f"control_model.{key}": w for key, w in state.items()}
        | {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}
    ),
    "half": lambda state: {key: w.half() for key, w in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_controlnet_is_read_in_each_layout(sd1, nets, tmp_path, layout):
    net, path = build_filled(nets["first"][1]), tmp_path / "net.safetensors"
    save_file(LAYOUTS[layout](original(net)), path)
    found = load_control(path, sd1.base)
    assert all(rel(found.state_dict()[key], w) <= 1e-3 for key, w in net.state_dict().items())


@pytest.mark.parametrize("nested", (False, True))
def test_a_t2i_adapter_is_read_in_each_layout(sd1, nets, tmp_path, nested):
    net, path = build_filled(nets["t2i-grey"][1]), tmp_path / "net.pth"
    torch.save({"adapter": original(net)} if nested else original(net), path)
    found = load_control(path, sd1.base)
    assert found.config == net.config and found.config.hint_channels == 1
    assert all(torch.equal(found.state_dict()[key], w) for key, w in net.state_dict().items())


def control_lora(base: Base, net: nn.Module, rank: int = 4) -> dict[str, Tensor]:
    """What Stability AI's files hold: thin pairs, biases and norms, and the parts that a UNet lacks."""
    unet, state = base.unet().state_dict(), {"lora_controlnet": torch.zeros(1)}
    generator = torch.Generator().manual_seed(50)
    for key, w in net.state_dict().items():
        if key not in unet or w.ndim < 2:
            state[key] = w.clone()
        elif not key.startswith("time_embed"):  # as the base has it
            state[key.replace(".weight", ".up")] = torch.randn(len(w), rank, *(1,) * (w.ndim - 2), generator=generator)
            state[key.replace(".weight", ".down")] = torch.randn(rank, *w.shape[1:], generator=generator) * 0.01
    return state


def test_a_control_lora_is_the_base_with_what_it_adds(sd1, nets, tmp_path):
    path, net = tmp_path / "lora.safetensors", build_filled(nets["first"][1])
    save_file(state := control_lora(sd1.base, net), path)
    found, unet = load_control(path, sd1.base).state_dict(), sd1.base.unet().state_dict()
    assert torch.equal(found["time_embed.0.weight"], unet["time_embed.0.weight"])
    for key in ("input_blocks.1.0.in_layers.2.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"):
        up, down = (state[key.replace(".weight", end)].flatten(1) for end in (".up", ".down"))
        assert rel(found[key], unet[key] + (up @ down).view_as(unet[key])) <= 1e-6
    assert torch.equal(found["zero_convs.3.0.weight"], state["zero_convs.3.0.weight"])
    first, state = "model.diffusion_model.input_blocks.0.0.weight", load_file(sd1.base.path)
    state[first] = torch.cat([state[first], torch.ones(len(state[first]), 5, 3, 3)], dim=1)
    save_file(state, wide := tmp_path / "wide.safetensors")  # a base for inpainting: of its channels the first 4
    beside = load_control(path, open_base(wide)).state_dict()
    assert all(torch.equal(beside[key], w) for key, w in found.items())


def damaged(change):
    def make(base: Base, net: nn.Module) -> dict[str, Tensor]:
        return change(original(net))

    return make


REFUSED = {
    "difference": (damaged(lambda s: s | {"difference": torch.zeros(1)}), "holds differences to its base"),
    "LLLite": (damaged(lambda s: {"lllite_unet_input_blocks_1.down.0.weight": torch.zeros(1)}), "LLLite"),
    "a style adapter, damaged": (damaged(lambda s: {"style_embedding": torch.zeros(1, 8, 1024)}), "proj"),
    "a style adapter for SD 2.x": (
        lambda base, net: StyleAdapter(64, 1024).state_dict(),
        "a style adapter for SD 2.x",
    ),
    "an adapter": (damaged(lambda s: {"image_proj.proj.weight": torch.zeros(8, 8)}), "this is an IP-Adapter"),
    "a key too many": (damaged(lambda s: s | {"zero_convs.99.0.bias": torch.zeros(1)}), "zero_convs.99.0.bias"),
    "a key missing": (
        damaged(lambda s: {key: w for key, w in s.items() if key != "zero_convs.2.0.bias"}),
        "missing: zero_convs.2.0.bias",
    ),
    "another context": (
        damaged(
            lambda s: {
                key: torch.zeros(len(w), 768) if "attn2.to_k" in key or "attn2.to_v" in key else w
                for key, w in s.items()
            }
        ),
        "a ControlNet for SD 1.x; the base",
    ),
    "a LoRA for another": (
        lambda base, net: control_lora(base, net) | {"input_blocks.1.0.in_layers.2.up": torch.zeros(7, 4, 1, 1)},
        "for another base: it changes input_blocks.1.0.in_layers.2.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_go_is_refused_in_a_line(sd1, nets, tmp_path, case):
    make, said = REFUSED[case]
    path = tmp_path / "net.safetensors"
    save_file(make(sd1.base, build_filled(nets["first"][1])), path)
    with pytest.raises(WeightsError) as caught:
        load_control(path, sd1.base, device="meta")
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_net_of_another_family_is_refused_with_what_would_fit(sd1, sdxl, nets):
    for base, name in ((sd1.base, "xl"), (sd1.base, "t2i-xl"), (sdxl.base, "t2i"), (sdxl.base, "first")):
        with pytest.raises(WeightsError, match="for that: (canny|none|sdxl-union)"):
            load_control(nets[name][1], base, device="meta")


@pytest.mark.parametrize("names", [{"controls": ["sdxl-union"]}, {"adapter": "sdxl", "image_encoder": "vit-bigg"}])
def test_names_of_another_family_than_a_file_is_are_refused_before_they_are_fetched(sd1, names):
    with (
        patch("generate.models.fetch", side_effect=AssertionError),
        pytest.raises(WeightsError, match="is for SDXL, `base` .*base.safetensors is SD 1.x; for that: (base|canny)"),
    ):
        open_models(sd1.base.path, image="adapter" in names, **names)


@pytest.mark.parametrize(
    ("hint", "how", "said"),
    [
        (Hint(picture(1), net=1), {}, "net 1 is wanted, 1 were opened"),
        (Hint(picture(1)), {"height": 72}, "multiples of 64; near them: 64 and 64"),
        (Hint(picture(1), guess=True), {"width": 128}, "T2I-Adapter"),
        (Hint(), {"width": 128}, "`hint`: a picture is wanted"),
        (Hint([picture(1), picture(2)]), {"width": 128}, "2 given, .*t2i.safetensors follows one"),
        (Hint(picture(1), mask=Image.new("L", (8, 8))), {"width": 128}, "all black"),
    ],
)
def test_a_hint_that_does_not_go_is_said_in_a_line(sd1, nets, hint, how, said):
    with pytest.raises(UserError, match=said):
        ours(sd1, [nets["t2i"][1]], [hint], width=how.pop("width", 64), **how)


def test_a_hint_of_another_aspect_is_told_and_a_hint_is_read_once_a_run(sd1, nets):
    with (
        patch.object(ControlNet, "encode", autospec=True, side_effect=ControlNet.encode) as encode,
        pytest.warns(Notice, match="50x90 pixels, of another aspect than 64x64"),
    ):
        ours(sd1, [nets["first"][1]], [Hint(picture(1, 50, 90))], width=64, steps=2)
    assert encode.call_count == 1


def test_the_edges_of_a_picture():
    """A bright field on dark: its outline, once, white on black; a step too weak is none unless it touches one."""
    field = Image.new("RGB", (32, 24), "black")
    field.paste((200, 180, 40), (8, 6, 24, 18))
    edges = np.asarray(canny(field))
    assert edges.shape == (24, 32, 3) and set(np.unique(edges)) == {0, 255}
    assert not edges[8:16, 10:22].any() and edges[6:18, 7:9, 0].any(1).all()
    faint = Image.new("RGB", (32, 24), (10, 10, 10))
    faint.paste((30, 30, 30), (8, 6, 24, 18))
    assert not np.asarray(canny(faint)).any() and np.asarray(canny(faint, 20, 40)).any()


# sample.py

EXAMPLE = Path(__file__).parent.parent / "tiny/example.png"
TINY_EDGES = ("--control", "tiny-edges", "--hint-from", EXAMPLE, "--edges")


@pytest.mark.slow
def test_a_bare_machine_follows_edges_beside_an_image_prompt_and_makes_it_again(tmp_path):
    silhouette, first, second = tmp_path / "silhouette.png", tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (128, 128), "white").save(silhouette)
    flags = (*TINY_EDGES, "--scale", "0.8", "--until", "0.9", "--image", EXAMPLE, "--scale", "0.5", "--steps", "2")
    flags = (*flags, "--control", "tiny-silhouette", "--hint", silhouette, "--from", "0.5")
    flags = (*flags, "--height", "64", "--width", "64")
    run = sample(*flags, "--output", first)
    assert run.returncode == 0 and f"structure of {EXAMPLE} by tiny-edges" in run.stderr, run.stderr
    told = read_settings(first)
    assert [(net["scale"], net.get("edges", False), net["until"], net["start"]) for net in told["controls"]] == [
        (0.8, True, 0.9, 0.0),
        (1.0, False, 1.0, 0.5),
    ]
    assert told["scale"] == 0.5 and all(net["control"] in told["sha256"] for net in told["controls"])
    assert sample("--again", first, "--output", second).returncode == 0
    same = [np.asarray(Image.open(path)) for path in (first, second)]
    assert np.array_equal(*same)
    third = tmp_path / "c.png"
    again = sample("--again", first, "--control", "tiny-edges", "--scale", "0", "--output", third)
    assert again.returncode == 0, again.stderr
    assert [(net["scale"], net.get("edges")) for net in read_settings(third)["controls"]] == [(0.0, True)]
    assert read_settings(third)["scale"] == 0.5 and not np.array_equal(np.asarray(Image.open(third)), same[0])


def test_a_scale_before_the_first_picture_is_not_of_a_net():
    nets = [Group(control="tiny-edges", hint=["a.png"]), Group(control="canny", hint=["b.png"], scale=[0.5])]
    found = control_groups(nets, {"scale": [0.3], "until": 0.6})
    assert [(net.scale, net.until) for net in found] == [(1.0, 0.6), (0.5, 0.6)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--control", "tiny-edges"), "a --hint is wanted"),
        (("--hint", EXAMPLE), "--hint belongs to a net for structure: it goes with --control"),
        (("--image", EXAMPLE, "--hint", EXAMPLE), "stands behind --image; it belongs to --control"),
        (("--control", "tiny-edges", "--layers", "all"), "stands behind --control; it belongs to --image"),
        (("--control", "tiny-edges", "--hint-from", EXAMPLE), "--hint-from and --edges go together"),
        (("--control", "tiny-edges", "--hint", EXAMPLE, "--edges"), "--hint-from and --edges go together"),
        ((*TINY_EDGES, "--hint", EXAMPLE), "one of them is wanted"),
        ((*TINY_EDGES, "--scale", "0.5", "1"), "one is wanted for each --control"),
        ((*TINY_EDGES, "--from", "0.5", "--until", "0.5"), "two numbers from 0 to 1 that rise"),
        (
            ("--control", "canny", "--hint", EXAMPLE),
            "--control canny is for SD 1.x, --base tiny is tiny; for that: tiny-edges",
        ),
        (("--control", "tiny-edgy", "--hint", EXAMPLE), "near it tiny-edges"),
        (("--control", "tiny-silhouette", "--hint", EXAMPLE, "--width", "72"), "multiples of 64"),
        (("--control", "tiny-edges", "--hint", "nowhere.png"), "nowhere.png"),
        (
            ("--control", "tiny/weights/clip-tiny.safetensors", "--hint", EXAMPLE),
            "a ControlNet or T2I-Adapter is wanted",
        ),
    ],
)
def test_flags_that_do_not_go_are_refused_in_a_line(tmp_path, flags, said):
    run = sample(*flags, "--output", tmp_path / "out.png")
    assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not list(tmp_path.iterdir())
