"""Decoupled cross-attention: equal to diffusers with the same adapter, and to the base model where it should be."""

import copy
from dataclasses import replace

import pytest
import torch
from counterparts import diffusers_unet_with, published, randomise, rel, set_scales
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageDraw

from ipadapter import ImageProjection, ImagePrompt, IPAdapter, Prompt, Resampler
from ipadapter.attention import DecoupledCrossAttention, mask_per_query, number, prepared
from unet import SD15, UNet

LAYERS = 16
T = torch.tensor([981, 1])


@pytest.fixture(scope="module")
def theirs_with_base(unet, base_adapter):
    return diffusers_unet_with(unet, base_adapter)


@pytest.fixture(scope="module")
def theirs_with_plus(unet, plus_adapter):
    return diffusers_unet_with(unet, plus_adapter)


@pytest.fixture(scope="module")
def theirs_with_both(unet, base_adapter, plus_adapter):
    return diffusers_unet_with(unet, base_adapter, plus_adapter)


@pytest.fixture
def x(draw):
    return draw(2, 4, 16, 16)


@pytest.fixture
def text(draw):
    return draw(2, 77, 64)


@pytest.fixture
def embeds(draw):
    """Two rows, one picture each: (batch, pictures, width)."""
    return 3 * draw(2, 1, 96)


@pytest.fixture
def features(draw):
    return 3 * draw(2, 1, 17, 128)


def tokens(adapter: IPAdapter, features: torch.Tensor) -> torch.Tensor:
    """(batch, pictures, ...) -> (batch, pictures * num_tokens, context_dim)."""
    return adapter.image_proj(features.flatten(0, 1)).unflatten(0, features.shape[:2]).flatten(1, 2)


def said(adapter: IPAdapter, features: torch.Tensor, scale=1.0, mask=None) -> ImagePrompt:
    return adapter.prompt(tokens(adapter, features), scale, mask)


def them(theirs, x, text, *image_embeds, masks=None):
    attention = None if masks is None else {"ip_adapter_masks": masks}
    added = {"image_embeds": list(image_embeds)}
    return theirs(x, T, text, added_cond_kwargs=added, cross_attention_kwargs=attention).sample


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.7])
def test_base_adapter_equals_diffusers(unet, base_adapter, theirs_with_base, x, text, embeds, scale):
    set_scales(theirs_with_base, scale)
    ours = unet(x, T, Prompt(text, (said(base_adapter, embeds, scale),)))
    assert rel(ours, them(theirs_with_base, x, text, embeds)) <= 1e-5


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_plus_adapter_equals_diffusers(unet, plus_adapter, theirs_with_plus, x, text, features, scale):
    set_scales(theirs_with_plus, scale)
    ours = unet(x, T, Prompt(text, (said(plus_adapter, features, scale),)))
    assert rel(ours, them(theirs_with_plus, x, text, features)) <= 1e-5


def test_adapter_of_sdxl_shape_equals_diffusers(unet_xl, draw):
    adapter = randomise(IPAdapter.for_unet(unet_xl, ImageProjection(80, 96, 4)), 8)
    theirs = diffusers_unet_with(unet_xl, adapter)
    x, text, embeds, pooled = draw(2, 4, 8, 8), draw(2, 77, 96), draw(2, 1, 80), draw(2, 32)
    sizes = torch.tensor([[1024.0, 768, 0, 64, 1024, 1024]] * 2)
    vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(2, -1)], dim=1)
    added = {"text_embeds": pooled, "time_ids": sizes, "image_embeds": [embeds]}
    wanted = theirs(x, T, text, added_cond_kwargs=added).sample
    prompt = Prompt(text, (said(adapter, embeds),), vector)
    assert rel(unet_xl(x, T, prompt), wanted) <= 1e-5


def test_the_image_prompt_shows(unet, base_adapter, x, text, embeds):
    """Otherwise the comparisons with diffusers would prove nothing."""
    prompt = Prompt(text, (said(base_adapter, embeds),))
    assert rel(unet(x, T, prompt), unet(x, T, Prompt(text))) > 0.01


def test_one_scale_per_layer_in_the_order_of_the_keys(unet, base_adapter, theirs_with_base, x, text, embeds, draw):
    scales = draw(LAYERS).abs().tolist()
    set_scales(theirs_with_base, scales)
    image = said(base_adapter, embeds, scales)
    ours, wanted = unet(x, T, Prompt(text, (image,))), them(theirs_with_base, x, text, embeds)
    assert rel(ours, wanted) <= 1e-5
    assert rel(unet(x, T, Prompt(text, (replace(image, scale=scales[::-1]),))), wanted) > 1e-3


def test_two_adapters_at_once_equal_diffusers(
    unet, base_adapter, plus_adapter, theirs_with_both, x, text, embeds, features
):
    set_scales(theirs_with_both, 0.6, 0.9)
    base = said(base_adapter, embeds, 0.6)
    plus = said(plus_adapter, features, 0.9)
    wanted = them(theirs_with_both, x, text, embeds, features)
    assert rel(unet(x, T, Prompt(text, (base, plus))), wanted) <= 1e-5
    assert rel(unet(x, T, Prompt(text, (plus, base))), wanted) <= 1e-5  # a sum: the order is free


def test_several_pictures_in_one_prompt_equal_diffusers(unet, base_adapter, theirs_with_base, x, text, draw):
    embeds = draw(2, 3, 96)
    set_scales(theirs_with_base, 0.8)
    image = said(base_adapter, embeds, 0.8)
    assert image.rows == 2 and [k.shape[1] for pair in image.key_values for k in pair] == [12] * 2 * LAYERS
    assert rel(unet(x, T, Prompt(text, (image,))), them(theirs_with_base, x, text, embeds)) <= 1e-5


# Laws of the base model


def test_scale_zero_is_the_base_model(unet, base_adapter, plus_adapter, x, text, embeds, features):
    base, plus = said(base_adapter, embeds), said(plus_adapter, features)
    silent = (replace(base, scale=0), replace(base, scale=[0.0] * LAYERS), replace(plus, scale=0.0))
    assert torch.equal(unet(x, T, Prompt(text, silent)), unet(x, T, Prompt(text)))


def test_silent_layers_are_those_of_the_base_model(unet, base_adapter, x, text, embeds):
    """Only the last layer hears: what the others give is what they give without an image prompt."""
    outs = [[], []]
    prompts = Prompt(text), Prompt(text, (said(base_adapter, embeds, [0] * (LAYERS - 1) + [1]),))
    for out, prompt in zip(outs, prompts, strict=True):
        hooks = [m.register_forward_hook(lambda _, __, z, out=out: out.append(z)) for m in unet.cross_attentions()]
        unet(x, T, prompt)
        for hook in hooks:
            hook.remove()
    # In order of time the middle, which is the last in the order of the keys, comes behind the six on the way down.
    assert [torch.equal(a, b) for a, b in zip(*outs, strict=True)][:7] == [True] * 6 + [False]


def test_the_model_holds_nothing_of_an_adapter(unet, base_adapter, x, text, embeds):
    keys = unet.state_dict().keys()
    unet(x, T, Prompt(text, (said(base_adapter, embeds),)))
    assert unet.state_dict().keys() == keys and not any("_ip" in name for name, _ in unet.named_parameters())


@torch.enable_grad()
def test_gradients_reach_the_adapter_through_its_prompt(unet, base_adapter, x, text, embeds):
    adapter = copy.deepcopy(base_adapter).requires_grad_()
    unet(x, T, Prompt(text, (said(adapter, embeds, 0.5),))).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in adapter.parameters())


# Masks

SHAPES = {"box": (0, 0, 63, 127), "off the middle": (40, 24, 100, 71)}


def mask_of(box: tuple[int, int, int, int], height: int, width: int) -> torch.Tensor:
    """As diffusers prepares it: (1, 1, height, width), zeros and ones."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle(box, fill=255)
    return IPAdapterMaskProcessor().preprocess(image, height=height, width=width)


@pytest.mark.parametrize("height, width", [(16, 16), (16, 24), (24, 8), (17, 23), (20, 9)])
@pytest.mark.parametrize("box", SHAPES)
def test_mask_equals_diffusers(unet, base_adapter, theirs_with_base, draw, text, embeds, box, height, width):
    x, mask = draw(2, 4, height, width), mask_of(SHAPES[box], 8 * height, 8 * width)
    set_scales(theirs_with_base, 0.8)
    image = said(base_adapter, embeds, 0.8, mask)
    wanted = them(theirs_with_base, x, text, embeds, masks=[mask])
    assert rel(unet(x, T, Prompt(text, (image,))), wanted) <= 1e-5
    assert rel(unet(x, T, Prompt(text, (replace(image, mask=None),))), wanted) > 1e-3


def test_a_mask_for_each_picture_equals_diffusers(unet, base_adapter, theirs_with_base, x, text, draw):
    embeds = draw(2, 2, 96)
    masks = [mask_of(box, 128, 128) for box in SHAPES.values()]
    set_scales(theirs_with_base, 0.8)
    images = [said(base_adapter, embeds[:, i : i + 1], 0.8, masks[i]) for i in range(2)]
    wanted = them(theirs_with_base, x, text, embeds, masks=[torch.cat(masks, dim=1)])
    assert rel(unet(x, T, Prompt(text, tuple(images))), wanted) <= 1e-5


def test_a_mask_of_ones_is_no_mask_and_of_zeros_no_image_prompt(unet, base_adapter, x, text, embeds):
    image = said(base_adapter, embeds)
    everywhere = unet(x, T, Prompt(text, (image,)))
    assert rel(unet(x, T, Prompt(text, (replace(image, mask=torch.ones(1, 1, 40, 40)),))), everywhere) <= 1e-5
    nowhere = unet(x, T, Prompt(text, (replace(image, mask=torch.zeros(1, 1, 40, 40)),)))
    assert rel(nowhere, unet(x, T, Prompt(text))) <= 1e-5


def test_each_row_of_a_batch_may_have_its_own_mask(unet, base_adapter, x, text, embeds):
    masks = torch.cat([mask_of(box, 128, 128) for box in SHAPES.values()])
    image = said(base_adapter, embeds)
    together = unet(x, T, Prompt(text, (replace(image, mask=masks),)))
    for i in range(2):
        alone = unet(x, T, Prompt(text, (replace(image, mask=masks[i : i + 1]),)))
        assert rel(together[i], alone[i]) <= 1e-5


@pytest.mark.parametrize("height, width", [(16, 16), (17, 23), (5, 40), (9, 2)])
def test_the_grid_is_that_of_the_feature_map(unet, draw, text, height, width):
    """The UNet halves latents and rounds up."""
    seen = set()
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.add((args[0].shape[1], args[2])))
        for layer in unet.cross_attentions()
    ]
    unet(draw(2, 4, height, width), T, Prompt(text))
    for hook in hooks:
        hook.remove()
    grids = [(-(-height // factor), -(-width // factor)) for factor in (1, 2, 4, 8)]
    assert seen == {(rows * columns, (rows, columns)) for rows, columns in grids}


def test_masks_are_soft_and_follow_the_grid():
    ramp = torch.linspace(0, 1, 64)[:, None].expand(1, 1, 64, 16)
    small = mask_per_query(ramp, (8, 3))
    assert small.shape == (1, 1, 24, 1)
    columns = small.view(8, 3)
    assert torch.allclose(columns, torch.linspace(3.5 / 63, 59.5 / 63, 8)[:, None].expand(8, 3), atol=1e-6)


def test_a_mask_without_a_grid_is_an_error(unet, base_adapter, draw, embeds):
    layer = next(unet.cross_attentions())
    image = said(base_adapter, embeds, 1.0, torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match="a mask: .* the `grid`"):
        layer(draw(2, 16, 32), Prompt(draw(2, 77, 64), (image,)))


# Prompts in batches


def test_cat_equals_one_prompt_after_the_other(unet, base_adapter, plus_adapter, draw):
    def prompt() -> Prompt:
        base = said(base_adapter, draw(1, 2, 96), 0.7)
        plus = said(plus_adapter, draw(1, 1, 17, 128), [0.1 * i for i in range(LAYERS)])
        return Prompt(draw(1, 77, 64), (base, plus))

    x, t, prompts = draw(3, 4, 8, 8), torch.tensor(500), [prompt() for _ in range(3)]
    together = unet(x, t, Prompt.cat(prompts))
    for i in range(3):
        assert rel(together[i : i + 1], unet(x[i : i + 1], t, prompts[i])) <= 1e-5


def test_cat_keeps_masks_in_their_rows(unet, base_adapter, draw):
    masks = [mask_of(box, 64, 64) for box in ((0, 0, 31, 63), (32, 0, 63, 63))]
    rows = [Prompt(draw(1, 77, 64), (said(base_adapter, draw(1, 1, 96), 1.0, mask),)) for mask in masks]
    x, t = draw(2, 4, 8, 8), torch.tensor(500)
    together = unet(x, t, Prompt.cat(rows))
    for i in range(2):
        assert rel(together[i : i + 1], unet(x[i : i + 1], t, rows[i])) <= 1e-5


SCALES = {
    "numbers": [0.3, 0.9, 0.0],
    "numbers of one kind and another": [1, 0.5, 1.0],
    "lists": [[0.1 * i for i in range(LAYERS)], [0.5] * LAYERS, [0.0] * 15 + [1.0]],
    "numbers beside lists": [0.7, [0.1 * i for i in range(LAYERS)], 0],
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("masks", ["none", "some", "all"])
def test_each_row_of_a_batch_keeps_its_scale_and_mask(unet, base_adapter, draw, scales, masks):
    """Different pictures at different scales, in different places, in one call."""
    boxes = {"none": [None] * 3, "some": [None, *SHAPES.values()], "all": [(0, 0, 31, 63), *SHAPES.values()]}[masks]
    rows = [
        Prompt(draw(1, 77, 64), (said(base_adapter, draw(1, 1, 96), scale, box and mask_of(box, 64, 64)),))
        for scale, box in zip(SCALES[scales], boxes, strict=True)
    ]
    x, t = draw(3, 4, 8, 8), torch.tensor(500)
    alone = [unet(x[i : i + 1], t, rows[i]) for i in range(3)]
    for prompt in (Prompt.cat(rows), Prompt.cat([Prompt.cat(rows[:2]), rows[2]])):
        assert rel(unet(x, t, prompt), torch.cat(alone)) <= 1e-5
    text_alone = unet(x, t, Prompt.cat([replace(row, images=()) for row in rows]))
    assert (
        sum(rel(a, b) > 1e-3 for a, b in zip(torch.cat(alone), text_alone, strict=True)) >= 2
    )  # all that is not silent


def test_guidance_with_a_scale_of_its_own_for_each_side(unet, base_adapter, draw):
    """The unconditional prompt, in the batch of `guided`, keeps its own scale."""
    prompt, null = (Prompt(draw(1, 77, 64), (said(base_adapter, draw(1, 1, 96), scale),)) for scale in (0.9, 0.3))
    x, t = draw(1, 4, 8, 8), torch.tensor(500)
    e_null, e_prompt = unet(x, t, null), unet(x, t, prompt)
    both = unet(torch.cat([x, x]), t, Prompt.cat([null, prompt]))
    assert rel(both, torch.cat([e_null, e_prompt])) <= 1e-5


def test_a_prepared_text_gives_the_same_bits(unet, base_adapter, x, text, embeds, draw):
    prompt = Prompt(text, (said(base_adapter, embeds, 0.7),))
    ready = prepared(prompt, unet.cross_attentions())
    assert torch.equal(unet(x, T, ready), unet(x, T, prompt))
    row = Prompt(draw(1, 77, 64), (said(base_adapter, draw(1, 1, 96), 0.4),))
    both = Prompt.cat([ready, prepared(row, unet.cross_attentions())])
    x, t = draw(3, 4, 8, 8), torch.tensor(500)
    assert torch.equal(unet(x, t, both), unet(x, t, Prompt.cat([prompt, row])))
    with pytest.raises(ValueError, match="^prompts that differ in how their texts are given do not stack"):
        Prompt.cat([ready, row])


def test_scales_that_agree_stay_numbers(base_adapter, draw):
    """So that a batch of silent rows is silent, and a batch of one picture is computed as ever."""
    row = Prompt(draw(1, 77, 64), (said(base_adapter, draw(1, 1, 96), 0.5),))
    per_layer = [0.0] * 8 + [0.5] * 8

    def cat(*scales: object) -> object:
        images = [(replace(row.images[0], scale=scale),) for scale in scales]
        return Prompt.cat([replace(row, images=image) for image in images]).images[0].scale

    assert cat(0.5, 0.5) == 0.5 and cat(0, 0.0) == 0 and cat(per_layer, list(per_layer)) == per_layer
    mixed = cat(per_layer, 0.5)
    assert all(torch.equal(scale, torch.tensor([0.0, 0.5])) for scale in mixed[:8]) and mixed[8:] == [0.5] * 8
    assert torch.equal(cat(1, 0.25), torch.tensor([1.0, 0.25]))


def test_cat_carries_one_shared_mask_once(base_adapter, draw):
    mask = torch.ones(1, 1, 8, 8)
    row = Prompt(draw(1, 77, 64), (said(base_adapter, draw(1, 1, 96), 0.5, mask),), draw(1, 10))
    both = Prompt.cat([row, row])
    assert both.images[0].mask is mask and both.images[0].scale == 0.5
    assert both.text.shape == (2, 77, 64) and both.images[0].rows == 2 and both.vector.shape == (2, 10)


def pairs(*shape: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(shape), torch.zeros(shape))] * 2


TEXT = torch.zeros(1, 77, 64)
UNLIKE = {
    "image prompts": (Prompt(TEXT, (ImagePrompt(pairs(1, 4, 8)),)), r"the number of image prompts .*: 0 and 1$"),
    "length of the text": (Prompt(torch.zeros(1, 154, 64)), r"the text .*: \(77, 64\) and \(154, 64\)$"),
    "vector": (Prompt(TEXT, vector=torch.zeros(1, 10)), r"the vector .*: None and \(10,\)$"),
}
UNLIKE_IMAGES = {
    "tokens": (ImagePrompt(pairs(1, 16, 8)), r"an image prompt .*: \(4, 8\) and \(16, 8\)$"),
    "width": (ImagePrompt(pairs(1, 4, 9)), r"an image prompt .*: \(4, 8\) and \(4, 9\)$"),
    "layers": (ImagePrompt(pairs(1, 4, 8) * 2), r"the number of layers .*: 2 and 4$"),
    "masks": (
        ImagePrompt(pairs(1, 4, 8), mask=torch.zeros(1, 1, 8, 9)),
        r"a mask .*: \(1, 8, 8\) and \(1, 8, 9\)$",
    ),
}


@pytest.mark.parametrize("case", [*UNLIKE, *UNLIKE_IMAGES])
def test_cat_refuses_what_cannot_stand_in_one_batch(case):
    first = Prompt(TEXT)
    if case in UNLIKE:
        other, message = UNLIKE[case]
    else:
        image, message = UNLIKE_IMAGES[case]
        first = replace(first, images=(ImagePrompt(pairs(1, 4, 8), mask=torch.zeros(1, 1, 8, 8)),))
        other = replace(first, images=(image,))
    with pytest.raises(ValueError, match="^prompts that differ in " + message):
        Prompt.cat([first, other])


def test_as_many_scales_as_layers(base_adapter, embeds):
    with pytest.raises(ValueError, match=r"^`scale`: 12 given, one for each of 16 layers wanted$"):
        said(base_adapter, embeds, [1.0] * 12)


# Numbers of layers


def test_a_layer_without_a_number_is_an_error(base_adapter, draw, embeds):
    layer = randomise(DecoupledCrossAttention(32, 64, heads=4, head_dim=8), 9)
    x, text, image = draw(2, 16, 32), draw(2, 77, 64), said(base_adapter, embeds)
    layer(x, Prompt(text))
    layers = [randomise(DecoupledCrossAttention(32, 64, heads=4, head_dim=8), 9) for _ in range(17)]
    with pytest.raises(ValueError, match="for 16 layers meets layer None: `number`"):
        layer(x, Prompt(text, (image,)))
    number(layers)
    assert [layer.layer for layer in layers] == list(range(17))
    layers[0](x, Prompt(text, (image,)))
    with pytest.raises(ValueError, match="for 16 layers meets layer 16: `number`"):
        layers[16](x, Prompt(text, (image,)))


# The order of the layers, and the names


def blocks_in_order(unet: UNet) -> list[DecoupledCrossAttention]:
    """Spelled out from the table of the published layout, for SD 1.5."""
    places = [unet.input_blocks[i] for i in (1, 2, 4, 5, 7, 8)] + [unet.output_blocks[i] for i in range(3, 12)]
    return [place[1].transformer_blocks[0].attn2 for place in [*places, unet.middle_block]]


def test_layers_count_down_up_and_the_middle_last(unet):
    layers = blocks_in_order(unet)
    assert list(unet.cross_attentions()) == layers
    assert [layer.layer for layer in layers] == list(range(LAYERS))


def test_the_middle_block_is_number_31():
    with torch.device("meta"):
        unet = UNet(SD15)
        adapter = IPAdapter.for_unet(unet, ImageProjection(1024, 768, 4))
    middle = unet.middle_block[1].transformer_blocks[0].attn2
    assert adapter.key_values()[middle.layer] is adapter.ip_adapter["31"]


@pytest.mark.parametrize("i, j", [(0, 1), (4, 5), (4, 15), (6, 15), (5, 8), (9, 11), (12, 14)])
def test_swapping_two_layers_shows(unet, base_adapter, theirs_with_base, x, text, embeds, i, j):
    """Layers of one width load without an error in the wrong order: only the numbers tell."""
    wrong = copy.deepcopy(base_adapter)
    a, b = (f"{2 * n + 1}" for n in (i, j))
    assert wrong.ip_adapter[a].to_k_ip.weight.shape == wrong.ip_adapter[b].to_k_ip.weight.shape
    state = wrong.state_dict()
    for name in ("to_k_ip", "to_v_ip"):
        keys = [f"ip_adapter.{n}.{name}.weight" for n in (a, b)]
        state[keys[0]], state[keys[1]] = state[keys[1]].clone(), state[keys[0]].clone()
    wrong.load_state_dict(state)
    assert difference(unet, wrong, theirs_with_base, x, text, embeds) > 1e-4


@pytest.mark.parametrize("number", [1, 15, 31])
def test_swapping_keys_and_values_of_a_layer_shows(unet, base_adapter, theirs_with_base, x, text, embeds, number):
    wrong = copy.deepcopy(base_adapter)
    layer = wrong.ip_adapter[str(number)]
    layer.to_k_ip, layer.to_v_ip = layer.to_v_ip, layer.to_k_ip
    assert difference(unet, wrong, theirs_with_base, x, text, embeds) > 1e-4


def difference(unet, adapter, theirs, x, text, embeds) -> float:
    set_scales(theirs, 1.0)
    wanted = them(theirs, x, text, embeds)
    return rel(unet(x, T, Prompt(text, (said(adapter, embeds),))), wanted)


HIDDEN = {1: 320, 3: 320, 5: 640, 7: 640, 9: 1280, 11: 1280, 13: 1280, 15: 1280, 17: 1280}
HIDDEN |= {19: 640, 21: 640, 23: 640, 25: 320, 27: 320, 29: 320, 31: 1280}


@pytest.mark.parametrize(
    "make, parameters, projection_tensors",
    [
        (lambda: ImageProjection(1024, 768, 4), 22_319_616, 4),
        (lambda: ImageProjection(1280, 768, 4), 23_106_048, 4),
        (lambda: Resampler(1280, 768, 4, 12, 16, 768), 49_087_488, 51),
    ],
    ids=["base", "base, ViT-bigG", "plus"],
)
def test_sd15_adapter_has_the_published_keys_shapes_and_size(make, parameters, projection_tensors):
    with torch.device("meta"):
        state = IPAdapter.for_unet(UNet(SD15), make()).state_dict()
    assert sum(w.numel() for w in state.values()) == parameters
    layers = {key: tuple(w.shape) for key, w in state.items() if key.startswith("ip_adapter.")}
    assert layers == {f"ip_adapter.{n}.to_{kv}_ip.weight": (dim, 768) for n, dim in HIDDEN.items() for kv in "kv"}
    assert sum(key.startswith("image_proj.") for key in state) == projection_tensors == len(state) - len(layers)


def test_a_new_adapter_starts_as_copies_of_the_base(unet):
    adapter = IPAdapter.for_unet(unet, ImageProjection(96, 64, 4))
    for layer, ip in zip(blocks_in_order(unet), adapter.ip_adapter.values(), strict=True):
        assert torch.equal(ip.to_k_ip.weight, layer.to_k.weight) and torch.equal(ip.to_v_ip.weight, layer.to_v.weight)
        assert ip.to_k_ip.weight.data_ptr() != layer.to_k.weight.data_ptr()
        assert ip.to_k_ip.weight.requires_grad and not layer.to_k.weight.requires_grad


def test_published_layout_is_what_diffusers_reads(base_adapter, plus_adapter):
    for adapter in (base_adapter, plus_adapter):
        assert set(published(adapter)) == {"image_proj", "ip_adapter"}
        assert set(published(adapter)["ip_adapter"]) == {f"{n}.to_{kv}_ip.weight" for n in HIDDEN for kv in "kv"}


def test_attention_is_the_equation_of_the_paper(draw):
    """Z = softmax(QK'/sqrt(d))V + scale * softmax(QK_i'/sqrt(d))V_i, written with plain matrix products."""
    layer = randomise(DecoupledCrossAttention(32, 24, heads=4, head_dim=8), 9)
    adapter = randomise(IPAdapter(ImageProjection(8, 24, 2), [(32, 24)]), 10)
    ip = adapter.ip_adapter["1"]
    number([layer])
    x, text, image = draw(2, 6, 32), draw(2, 5, 24), draw(2, 2, 24)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = x @ layer.to_q.weight.T
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            weights = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5, dim=-1)
            heads.append(weights @ v[..., part])
        return torch.cat(heads, dim=-1)

    z = attend(text @ layer.to_k.weight.T, text @ layer.to_v.weight.T)
    z = z + 0.6 * attend(image @ ip.to_k_ip.weight.T, image @ ip.to_v_ip.weight.T)
    wanted = z @ layer.to_out[0].weight.T + layer.to_out[0].bias
    assert rel(layer(x, Prompt(text, (adapter.prompt(image, 0.6),))), wanted) <= 1e-6
