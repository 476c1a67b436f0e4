"""Which picture, how loudly, in which steps and layers: one value, and groups of pictures at the command line."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from counterparts import (
    assert_same_picture,
    diffusers_unet_with,
    listed_once,
    opened,
    published,
    randomise,
    rel,
    transformers_image,
)
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.loaders import IPAdapterMixin
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import generate.models
from files.errors import Notice, UserError
from generate import ImageGroup, Models, open_models, pictures, prompts
from generate.layers import factors, read_curve
from generate.memory import check_adapters
from generate.models import Adapter
from generate.picture import decode
from ipadapter import ImageProjection, ImagePrompt, IPAdapter, Prompt, Scale
from unet import SD15, SDXL, layer_names
from weights.families import SD1
from weights.families import SDXL as SDXL_FAMILY

LAYERS = 16
T = torch.tensor([981])


@pytest.fixture
def prompt(base_adapter, draw) -> Prompt:
    return Prompt(draw(1, 77, 64), (base_adapter.prompt(base_adapter.image_proj(3 * draw(1, 96)), 0.7),))


def with_scale(prompt: Prompt, scale: object, step: tuple[int, int] = (0, 1)) -> Prompt:
    return replace(prompt, images=tuple(replace(image, scale=scale) for image in prompt.images), step=step)


def acts(scale: Scale, steps: int) -> list[float]:
    return [scale.at(0, (i, steps)) for i in range(steps)]


def test_a_constant_scale_is_its_number_bit_for_bit(unet, prompt, draw):
    x = draw(1, 4, 8, 8)
    for scale in (Scale(0.7), Scale(0.7, [1.0] * LAYERS), Scale(torch.tensor([0.7])), Scale(0.7, curve=[1])):
        assert torch.equal(unet(x, T, with_scale(prompt, scale)), unet(x, T, prompt))
    layers = [0.3] * 8 + [0.0] * 8
    assert torch.equal(unet(x, T, with_scale(prompt, Scale(1.0, layers))), unet(x, T, with_scale(prompt, layers)))


def test_a_window_is_of_whole_steps_by_their_share_of_the_run():
    assert acts(Scale(2.0, until=0.5), 4) == [2, 2, 0, 0] and acts(Scale(2.0, start=0.5), 4) == [0, 0, 2, 2]
    assert acts(Scale(until=0.5), 5) == [1, 1, 0, 0, 0]  # the third ends at 0.6
    assert acts(Scale(start=0.3), 10) == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert acts(Scale(until=0.0), 3) == acts(Scale(start=1.0), 3) == acts(Scale(start=0.5, until=0.5), 3) == [0, 0, 0]


def test_curves_go_over_the_run():
    assert acts(Scale(2.0, curve=[1, 0.5]), 4) == [2, 2, 1, 1] and acts(Scale(curve=[1, 2, 3]), 3) == [1, 2, 3]
    assert acts(Scale(curve=[1, 2, 3]), 2) == [1, 2]
    assert acts(Scale(curve="fade-in"), 4) == [0.125, 0.375, 0.625, 0.875]
    assert acts(Scale(until=0.5, curve="fade-out"), 8) == [0.875, 0.625, 0.375, 0.125, 0, 0, 0, 0]


def test_where_a_scale_comes_to_nothing_nothing_is_computed(unet, prompt, draw, monkeypatch):
    x, calls, kernel = draw(1, 4, 8, 8), [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("ipadapter.attention.scaled_dot_product_attention", lambda *a: calls.append(1) or kernel(*a))
    out = unet(x, T, with_scale(prompt, Scale(0.7, until=0.5), (1, 2)))
    assert len(calls) == LAYERS and torch.equal(out, unet(x, T, replace(prompt, images=())))


@pytest.mark.parametrize("step", [(0, 4), (3, 4)])
def test_rows_of_a_batch_keep_scales_that_change_over_the_run(unet, prompt, draw, step):
    rows = [with_scale(prompt, scale, step) for scale in (0.4, Scale(0.9, until=0.5), Scale(curve="fade-in"), 0.0)]
    both = Prompt.cat([Prompt.cat(rows[:2]), *rows[2:]])
    x = draw(4, 4, 8, 8)
    together = unet(x, T, both)
    for i, row in enumerate(rows):
        assert (together[i : i + 1] - unet(x[i : i + 1], T, row)).abs().max() <= 1e-5
    assert Prompt.cat([rows[1], rows[1]]).images[0].scale == Scale(0.9, until=0.5)


MISTAKES = {
    "back": (lambda: Scale(start=0.5, until=0.4), r"^`start` 0.5 to `until` 0.4: .* no way back$"),
    "beyond": (lambda: Scale(until=1.5), r"^`start` 0 to `until` 1.5: 0 to 1 is wanted"),
    "no curve": (lambda: Scale(curve="fade"), r"^`curve`: 'fade' given; constant, fade-in, fade-out or numbers"),
    "layers": (lambda: ImagePrompt([(T, T)], Scale(layers=[1, 1])), r"^`scale`: 2 given, one for each of 1 layers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_no_scale_can_be(name):
    wrong, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        wrong()


# The names of the layers


def test_layers_have_diffusers_names(unet, unet_xl):
    """In the order of an adapter's keys, as diffusers lists its processors: down, up, the middle last."""
    names = layer_names(SD15)
    assert names[:3] == ["down.block_0.0", "down.block_0.1", "down.block_1.0"] and names[-1] == "mid"
    assert names[6:9] == ["up.block_1.0", "up.block_1.1", "up.block_1.2"] and len(names) == LAYERS
    assert len(layer_names(SDXL)) == 70 and layer_names(SDXL).count("up.block_0.1") == 10
    for model in (unet, unet_xl):
        assert len(layer_names(model.config)) == len(list(model.cross_attentions()))


def told(spec: str, large: bool = False) -> dict[str, float]:
    """The factors by name, of those that are not 0."""
    names = layer_names(SDXL if large else SD15)
    found = factors(spec, names, SDXL_FAMILY if large else SD1)
    return {name: factor for name, factor in zip(names, found.factors, strict=True) if factor}


def test_lines_of_layers():
    assert told("style") == dict.fromkeys(("up.block_1.0", "up.block_1.1", "up.block_1.2"), 1.0)
    assert told("layout") == dict.fromkeys(("down.block_2.0", "down.block_2.1", "mid"), 1.0)
    assert told("style+layout") == told("style,layout") == told("style") | told("layout")
    assert told("style", True) == {"up.block_0.1": 1.0} and told("layout", True) == {"down.block_2.1": 1.0}
    assert told("mid=0.5") == told("middle=.5") == {"mid": 0.5} and len(told("up")) == 9 and len(told("down")) == 6
    assert told("down.block_2=0.3, up.block_1.1=-1") == {
        "down.block_2.0": 0.3,
        "down.block_2.1": 0.3,
        "up.block_1.1": -1,
    }
    assert told("all,down=0") == told("up,middle")
    theirs = "up_blocks.0.attentions.1, down_blocks.2=0.5, mid_block"
    assert told(theirs, True) == told("up.block_0.1,down.block_2=0.5,mid", True)
    for everywhere in ("all", "linear", "strong-style-and-composition", "down,middle,up"):
        assert factors(everywhere, layer_names(SD15), SD1) is None


# By a transformer's place in the order of execution, down, middle, up: 16 in SD 1.x, 11 in SDXL.
BY_PLACE = {
    "ease-in": (lambda t, n: 0.05 + 0.95 * (1 - t / n),) * 2,
    "ease-out": (lambda t, n: 0.05 + 0.95 * t / n,) * 2,
    "ease-in-out": (lambda t, n: 0.05 + 0.95 * (1 - abs(t - n / 2) / (n / 2)),) * 2,
    "reverse-in-out": (lambda t, n: 0.05 + 0.95 * abs(t - n / 2) / (n / 2),) * 2,
    "weak-input": (lambda t, n: 0.2 if t < 6 else 1, lambda t, n: 0.2 if t < 4 else 1),
    "weak-middle": (lambda t, n: 0.2 if t == 6 else 1, lambda t, n: 0.2 if t == 4 else 1),
    "weak-output": (lambda t, n: 0.2 if t > 6 else 1, lambda t, n: 0.2 if t > 4 else 1),
    "strong-middle": (lambda t, n: 1 if t == 6 else 0.2, lambda t, n: 1 if t == 4 else 0.2),
    "style-transfer": (lambda t, n: float(t in (0, 1, 2, 3, *range(9, 16))), lambda t, n: float(t == 6)),
    "composition": (lambda t, n: {4: 0.25, 5: 1}.get(t, 0), lambda t, n: float(t == 3)),
    "strong-style-transfer": (lambda t, n: float(t not in (4, 5)), lambda t, n: float(t != 3)),
    "style-and-composition": (lambda t, n: {4: 0.25, 6: 0, 7: 0, 8: 0}.get(t, 1), lambda t, n: float(t in (3, 6))),
    "style-precise": (lambda t, n: {4: 0.25, 6: 0, 7: 0, 8: 0}.get(t, 1), lambda t, n: float(t in (3, 6))),
    "composition-precise": (
        lambda t, n: {4: 0.25, 6: 0.1, 7: 0.1, 8: 0.1}.get(t, 1),
        lambda t, n: {3: 1, 6: 1}.get(t, 0.1),
    ),
}


# The composition's own weight, where a weight type has one, here 0.5
BY_PLACE |= {
    "style-and-composition,down.block_2.0=0.125,down.block_2.1=0.5": (
        lambda t, n: {4: 0.125, 5: 0.5, 6: 0, 7: 0, 8: 0}.get(t, 1),
        lambda t, n: {2: 0.125, 3: 0.5, 6: 1}.get(t, 0),
    ),
    "strong-style-and-composition,down.block_2.0=0.5,down.block_2.1=0.5": (
        lambda t, n: 0.5 if t in (4, 5) else 1,
        lambda t, n: {2: 0.5, 3: 0.5}.get(t, 1),
    ),
    "ease-in=0.5,middle=2": (
        lambda t, n: 2 if t == 6 else 0.5 * (0.05 + 0.95 * (1 - t / n)),
        lambda t, n: 2 if t == 4 else 0.5 * (0.05 + 0.95 * (1 - t / n)),
    ),
}


@pytest.mark.parametrize("name", BY_PLACE)
def test_weight_types_of_comfyui_are_their_formulas(name):
    for large, formula in enumerate(BY_PLACE[name]):
        names = layer_names(SDXL if large else SD15)
        place = ("down", "mid", "up")
        order = list(dict.fromkeys(sorted(names, key=lambda one: place.index(one.split(".")[0]))))
        found = factors(name, names, SDXL_FAMILY if large else SD1)
        wanted = [formula(order.index(one), len(order)) for one in names]
        assert len(order) == (11 if large else 16) and found.factors == pytest.approx(wanted)
        layout = {i for i, one in enumerate(names) if one.startswith("down.block_2.1" if large else "down.block_2")}
        swapped = {"style-precise": layout, "composition-precise": set(range(len(names))) - layout}
        assert found.swapped == swapped.get(name, set())
        assert found.heard == tuple(0 if i in found.swapped else factor for i, factor in enumerate(found.factors))


LINES = {
    "up.blok_1": r"^`layers` 'up.blok_1': 'up.blok_1' at character 1: unknown \(up.block_1\?\); there are all, style, .*mid",
    "style,styl": r"'styl' at character 7: unknown \(style\?\)",
    "up.block_0.1": r"'up.block_0.1' at character 1: this base has no such layers; there are .*up.block_1",
    "style=much": r"'much' at character 7, a number is wanted",
    "style,,up": r"a name is wanted at character 7$",
    "": r"a name is wanted at character 1$",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_layers_that_says_nothing_is_refused_at_its_character(line):
    with pytest.raises(UserError, match=LINES[line]):
        factors(line, layer_names(SD15), SD1)


def test_curves_are_read_with_their_characters():
    assert read_curve("1,0.5,-0") == (1, 0.5, 0) and read_curve("fade-in") == "fade-in"
    with pytest.raises(
        UserError, match=r"^`curve` '1,x,2': 'x' at character 3; constant, fade-in, fade-out or numbers"
    ):
        read_curve("1,x,2")


# Whole pictures against diffusers' pipeline: two adapters, opened once for all comparisons

SIDE, STEPS = 64, 4


def drawn(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).resize((70, 64))


def half(right: bool) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((SIDE // 2 * right, 0, SIDE // 2 * (1 + right) - 1, SIDE), fill=255)
    return mask


A, B, C = drawn(1), drawn(2), drawn(3)


@pytest.fixture(scope="module")
def with_both(sd1, base_adapter, plus_adapter, image_tower, tmp_path_factory):
    """Ours, and diffusers' pipeline, each with both adapters."""
    folder, pipeline = tmp_path_factory.mktemp("adapters"), sd1.pipeline
    for name, adapter in (("base", base_adapter), ("plus", plus_adapter)):
        state = published(adapter)
        flat = {f"{part}.{key}": value.contiguous() for part, rest in state.items() for key, value in rest.items()}
        save_file(flat, folder / f"{name}.safetensors")
    before = pipeline.unet, pipeline.image_encoder
    pipeline.unet, pipeline.image_encoder = copy.deepcopy(pipeline.unet), transformers_image(image_tower)
    with listed_once(pipeline.unet):
        names = ["base.safetensors", "plus.safetensors"]
        pipeline.load_ip_adapter([str(folder)] * 2, subfolder=["", ""], weight_name=names, image_encoder_folder=None)
    ours = opened(sd1, base_adapter, image_tower, SIDE)
    adapters = (*ours.adapters, Adapter(Path("plus"), plus_adapter, Path("encoder")))
    yield replace(ours, adapters=adapters, held=ours.held | {"adapter 1": plus_adapter}), pipeline
    pipeline.unet, pipeline.image_encoder = before


def ours(models: Models, groups: list[ImageGroup], steps: int = STEPS) -> tuple[torch.Tensor, np.ndarray]:
    latents = []
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        pair = prompts(models, "a red fox", images=groups)
        (picture,) = pictures(models, *pair, seed=7, steps=steps, height=SIDE, width=SIDE)
    return latents[0], np.asarray(picture)


def theirs(pipeline, images, scale, **how) -> tuple[torch.Tensor, np.ndarray]:
    pipeline.set_ip_adapter_scale(scale)
    stop, latents = how.pop("stop", None), []

    def silence(scale: float) -> None:
        pipeline.set_ip_adapter_scale([scale] * 2)  # it knows one adapter alone

    def each(pipeline, i, t, tensors):
        latents.append(tensors["latents"])
        return stop.callback_fn(SimpleNamespace(set_ip_adapter_scale=silence), i, t, tensors) if stop else {}

    made = pipeline(
        "a red fox",
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator().manual_seed(7),
        ip_adapter_image=images,
        callback_on_step_end=each,
        **how,
    )
    return latents[-1], np.asarray(made.images[0])


MASKS = torch.stack([torch.from_numpy(np.array(half(right))) / 255 for right in (False, True)])[None]
CASES = {
    "two adapters, several pictures": (
        [ImageGroup([A, B], scale=0.7), ImageGroup([B, C], adapter=1, scale=0.5)],
        ([[A, B], [B, C]], [0.7, 0.5]),
    ),
    "style": ([ImageGroup([A], scale=0.8, layers="style")], ([[A], [B]], [{"up": {"block_1": 0.8}}, 0.0])),
    "layout": (
        [ImageGroup([A], scale=0.8, layers="layout")],
        ([[A], [B]], [{"down": {"block_2": 0.8}, "mid": 0.8}, 0.0]),
    ),
    "blocks": (
        [ImageGroup([A], adapter=1, scale=0.5, layers="down.block_2=0.6,up.block_1.1=2")],
        ([[B], [A]], [0.0, {"down": {"block_2": 0.3}, "up": {"block_1": [0.0, 1.0, 0.0]}}]),
    ),
    "masks left and right": (
        [ImageGroup([A], scale=0.9, mask=half(False)), ImageGroup([B], scale=0.6, mask=half(True))],
        ([[A, B], [C]], [[0.9, 0.6], 0.0], {"cross_attention_kwargs": {"ip_adapter_masks": [MASKS, MASKS[:, :1]]}}),
    ),
    "until 0.5": (
        [ImageGroup([A], scale=0.8, until=0.5)],
        ([[A], [B]], [0.8, 0.0], {"stop": IPAdapterScaleCutoffCallback(None, STEPS // 2 - 1)}),
    ),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_whole_picture_equals_diffusers(with_both, name):
    models, pipeline = with_both
    groups, (images, scale, *how) = CASES[name]
    found = ours(models, groups)
    assert_same_picture(found, theirs(pipeline, images, scale, **dict(*how)))
    plain = [ImageGroup(group.images, group.adapter, group.scale) for group in groups]
    if plain != groups:  # otherwise the comparison would prove nothing
        assert (found[0] - ours(models, plain)[0]).abs().max() > 1e-2


@torch.no_grad()
def test_style_and_layout_of_sdxl_are_instantstyles(unet_xl, draw):
    adapter = randomise(IPAdapter.for_unet(unet_xl, ImageProjection(80, 96, 4)), 8)
    their_unet = diffusers_unet_with(unet_xl, adapter)
    x, text, embeds, vector = draw(1, 4, 8, 8), draw(1, 77, 96), 3 * draw(1, 1, 80), draw(1, 32 + 6 * 8)
    added = {"text_embeds": vector[:, :32], "time_ids": torch.zeros(1, 6), "image_embeds": [embeds]}
    vector = torch.cat([vector[:, :32], their_unet.add_time_proj(torch.zeros(6)).view(1, -1)], dim=1)
    image = adapter.prompt(adapter.image_proj(embeds[:, 0]))
    scales = {"style": {"up": {"block_0": [0.0, 0.9, 0.0]}}, "layout": {"down": {"block_2": [0.0, 0.9]}}}
    for name, scale in scales.items():
        IPAdapterMixin.set_ip_adapter_scale(SimpleNamespace(unet=their_unet), scale)
        found = factors(name, layer_names(unet_xl.config), SDXL_FAMILY)
        prompt = Prompt(text, (replace(image, scale=Scale(0.9, found.heard)),), vector)
        assert rel(unet_xl(x, T, prompt), their_unet(x, T, text, added_cond_kwargs=added).sample) <= 1e-5
        assert rel(unet_xl(x, T, prompt), unet_xl(x, T, Prompt(text, (image,), vector))) > 1e-3


# What others do not have


def test_weights_are_of_a_pictures_values(with_both):
    """Weight 1 changes nothing, 0 leaves a picture out, others multiply V' in the softmax that the pictures share."""
    models, _ = with_both

    def said(*weights: float, images=(A, B), side=0) -> ImagePrompt:
        return prompts(models, "", images=[ImageGroup(images, weights=weights)])[side].images[0]

    for side in (0, 1):
        plain, same, alone = said(side=side), said(1, 1, side=side), said(images=(A,), side=side)
        less, one = said(0.25, -2, side=side), said(1, 0, side=side)
        for i, (k, v) in enumerate(plain.key_values):
            weighed = torch.cat([v[:, :4] * 0.25, v[:, 4:] * -2], dim=1)
            assert torch.equal(same.key_values[i][0], k) and torch.equal(same.key_values[i][1], v)
            assert torch.equal(less.key_values[i][0], k) and torch.equal(less.key_values[i][1], weighed)
            assert max(rel(one.key_values[i][j], alone.key_values[i][j]) for j in (0, 1)) < 1e-6


def test_precise_style_swaps_the_halves_where_the_layout_is(with_both):
    models, _ = with_both
    plain, precise = (
        prompts(models, "", images=[ImageGroup([A], scale=0.5, layers=layers)]) for layers in ("all", "style-precise")
    )
    prompt, null = (side.images[0] for side in precise)
    for i, name in enumerate(layer_names(models.base.config)):
        layout = name.startswith("down.block_2")
        assert torch.equal(null.key_values[i][1], plain[0 if layout else 1].images[0].key_values[i][1])
        assert torch.equal(prompt.key_values[i][1], plain[0].images[0].key_values[i][1])
        factor = {"down.block_2.0": 0.125, "down.block_2.1": 0.5, "mid": 0, "up.block_1.0": 0, "up.block_1.1": 0}.get(
            name, 0.5
        )
        assert null.scale.at(i, (0, 1)) == factor and prompt.scale.at(i, (0, 1)) == (0 if layout else factor)
    assert ours(models, [ImageGroup([A], layers="style-precise")], 1)[1].std() > 10


def test_soft_masks_stay_soft_and_masks_of_another_aspect_are_told(with_both):
    models, _ = with_both
    grey = Image.linear_gradient("L").resize((SIDE, 2 * SIDE))
    with pytest.warns(Notice, match="^`mask`: 64x128 pixels, of another aspect than 64x64, to which it is brought$"):
        soft = ours(models, [ImageGroup([A], mask=grey)], 1)
    cut = ours(models, [ImageGroup([A], mask=grey.resize((SIDE, SIDE)).point(lambda x: 255 * (x > 127)))], 1)
    assert (soft[0] - cut[0]).abs().max() > 1e-3


def test_a_window_without_a_step_is_told(with_both):
    models, _ = with_both
    with pytest.warns(Notice, match="^`start` 0.3, `until` 0.6: no whole one of 2 steps lies between, so that"):
        found = ours(models, [ImageGroup([A], start=0.3, until=0.6)], 2)
    assert torch.equal(found[0], ours(models, [], 2)[0])


def test_a_group_is_a_picture_as_before(with_both):
    models, _ = with_both
    for group in (ImageGroup([A]), ImageGroup([A], layers="linear", weights=[1], curve="constant")):
        plain, grouped = (prompts(models, "x", images=[one])[0].images[0] for one in (A, group))
        assert grouped.scale == plain.scale == 0.6
        assert all(torch.equal(a, b) for x, y in zip(plain.key_values, grouped.key_values) for a, b in zip(x, y))


WRONG = {
    "weights": (lambda: ImageGroup([A, B], weights=[1]), "^`weights`: 1 given, 2 wanted, one for each picture"),
    "all weights 0": (lambda: ImageGroup([A], weights=[0]), "^`weights`: all are 0"),
    "window": (lambda: ImageGroup([A], start=0.5, until=0.2), "^`start` 0.5 to `until` 0.2: "),
    "empty mask": (lambda: ImageGroup([A], mask=Image.new("L", (8, 8))), "^`mask`: it is all black"),
    "no picture": (lambda: ImageGroup(), "^`image`: a group without a picture"),
    "no adapter": (lambda: ImageGroup([A], adapter=2), "^`adapter` 2: 2 adapters were opened, the first is 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_group_can_be(with_both, name):
    wrong, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        prompts(with_both[0], "", images=[wrong()])


def test_more_adapters_than_the_memory_holds_are_refused_before_they_are_read(base_adapter, plus_adapter, monkeypatch):
    kinds, how = [base_adapter, plus_adapter], (torch.float32, torch.device("cpu"))
    check_adapters(kinds, *how)
    monkeypatch.setattr("generate.memory.memory", lambda device: 1_000_000)
    check_adapters(kinds[:1], *how)  # one is told when it is read
    with pytest.raises(
        UserError, match=r"^`adapter`: 2 adapters want 0.0 GB, cpu has 0.0 GB: open fewer, or do not `keep`"
    ):
        check_adapters(kinds, *how)


@pytest.mark.parametrize("keep", [True, False])
def test_what_several_adapters_read_is_opened_once(keep, monkeypatch):
    read = []
    load = generate.models.load_image_encoder
    monkeypatch.setattr(generate.models, "load_image_encoder", lambda *a, **k: read.append((a, k)) or load(*a, **k))
    models = open_models(adapter=["tiny", "tiny-full-face"], device="cpu", keep=keep)
    assert [adapter.image_encoder for adapter in models.adapters] == [models.files["image_encoder"]] * 2
    read.clear()
    groups = [ImageGroup([A]), ImageGroup([B], adapter=1), ImageGroup([C])]
    prompt, null = prompts(models, images=groups)
    assert len(read) == 1 and bool(models.held) == keep
    assert [image.group for image in prompt.images] == [image.group for image in null.images] == [0, 1, 2]
    assert [image.key_values[0][0].shape[1] for image in prompt.images] == [4, 65, 4]


def test_each_adapter_has_its_encoder_and_its_version():
    with pytest.raises(UserError, match="^`image_encoder`: 2 given, for 1 adapters: one for all, or one for each$"):
        open_models(adapter="tiny", image_encoder=["tiny", "tiny"], device="cpu")
    with pytest.raises(UserError, match="^`faceid_v2`: for FaceID-plus adapters; .*full-face.* is another kind$"):
        open_models(adapter=["tiny", "tiny-full-face"], faceid_v2=[False, True], device="cpu")
