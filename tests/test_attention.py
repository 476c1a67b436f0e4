"""Decoupled cross-attention: equal to diffusers with the same adapter, and to the base model where it should be."""

import copy
from dataclasses import replace

import pytest
import torch
from counterparts import diffusers_unet_with, published, randomise, rel, set_scales
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image, ImageDraw

from ipadapter import ImageProjection, ImagePrompt, IPAdapter, Prompt, Resampler
from ipadapter.attention import DecoupledCrossAttention, mask_per_query
from unet import SD15, UNet

LAYERS = 16
T = torch.tensor([981, 1])


@pytest.fixture(scope="module")
def two_on_unet(unet, base_adapter, plus_adapter) -> UNet:
    """A UNet with the base adapter as number 0 and plus as number 1."""
    both = copy.deepcopy(unet)
    assert (base_adapter.attach(both), plus_adapter.attach(both)) == (0, 1)
    return both


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


def them(theirs, x, text, *image_embeds, masks=None):
    attention = None if masks is None else {"ip_adapter_masks": masks}
    added = {"image_embeds": list(image_embeds)}
    return theirs(x, T, text, added_cond_kwargs=added, cross_attention_kwargs=attention).sample


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.7])
def test_base_adapter_equals_diffusers(two_on_unet, base_adapter, theirs_with_base, x, text, embeds, scale):
    set_scales(theirs_with_base, scale)
    ours = two_on_unet(x, T, Prompt(text, (ImagePrompt(tokens(base_adapter, embeds), scale),)))
    assert rel(ours, them(theirs_with_base, x, text, embeds)) <= 1e-5


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_plus_adapter_equals_diffusers(two_on_unet, plus_adapter, theirs_with_plus, x, text, features, scale):
    set_scales(theirs_with_plus, scale)
    ours = two_on_unet(x, T, Prompt(text, (ImagePrompt(tokens(plus_adapter, features), scale, adapter=1),)))
    assert rel(ours, them(theirs_with_plus, x, text, features)) <= 1e-5


def test_adapter_of_sdxl_shape_equals_diffusers(unet_xl, draw):
    adapter = randomise(IPAdapter.for_unet(unet_xl, ImageProjection(80, 96, 4)), 8)
    theirs, ours = diffusers_unet_with(unet_xl, adapter), copy.deepcopy(unet_xl)
    adapter.attach(ours)
    x, text, embeds, pooled = draw(2, 4, 8, 8), draw(2, 77, 96), draw(2, 1, 80), draw(2, 32)
    sizes = torch.tensor([[1024.0, 768, 0, 64, 1024, 1024]] * 2)
    vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(2, -1)], dim=1)
    added = {"text_embeds": pooled, "time_ids": sizes, "image_embeds": [embeds]}
    wanted = theirs(x, T, text, added_cond_kwargs=added).sample
    prompt = Prompt(text, (ImagePrompt(tokens(adapter, embeds)),), vector)
    assert rel(ours(x, T, prompt), wanted) <= 1e-5


def test_the_image_prompt_shows(two_on_unet, base_adapter, x, text, embeds):
    """Otherwise the comparisons with diffusers would prove nothing."""
    prompt = Prompt(text, (ImagePrompt(tokens(base_adapter, embeds)),))
    assert rel(two_on_unet(x, T, prompt), two_on_unet(x, T, Prompt(text))) > 0.01


def test_one_scale_per_layer_in_the_order_of_the_keys(
    two_on_unet, base_adapter, theirs_with_base, x, text, embeds, draw
):
    scales = draw(LAYERS).abs().tolist()
    set_scales(theirs_with_base, scales)
    image = ImagePrompt(tokens(base_adapter, embeds), scales)
    ours, wanted = two_on_unet(x, T, Prompt(text, (image,))), them(theirs_with_base, x, text, embeds)
    assert rel(ours, wanted) <= 1e-5
    assert rel(two_on_unet(x, T, Prompt(text, (replace(image, scale=scales[::-1]),))), wanted) > 1e-3


def test_two_adapters_at_once_equal_diffusers(
    two_on_unet, base_adapter, plus_adapter, theirs_with_both, x, text, embeds, features
):
    set_scales(theirs_with_both, 0.6, 0.9)
    base = ImagePrompt(tokens(base_adapter, embeds), 0.6, adapter=0)
    plus = ImagePrompt(tokens(plus_adapter, features), 0.9, adapter=1)
    wanted = them(theirs_with_both, x, text, embeds, features)
    assert rel(two_on_unet(x, T, Prompt(text, (base, plus))), wanted) <= 1e-5
    assert rel(two_on_unet(x, T, Prompt(text, (plus, base))), wanted) <= 1e-5  # a sum: the order is free


def test_several_pictures_in_one_prompt_equal_diffusers(two_on_unet, base_adapter, theirs_with_base, x, text, draw):
    embeds = draw(2, 3, 96)
    set_scales(theirs_with_base, 0.8)
    image = ImagePrompt(tokens(base_adapter, embeds), 0.8)
    assert image.tokens.shape == (2, 12, 64)
    assert rel(two_on_unet(x, T, Prompt(text, (image,))), them(theirs_with_base, x, text, embeds)) <= 1e-5


# Laws of the base model


def test_scale_zero_and_no_image_prompt_are_the_base_model(
    unet, two_on_unet, base_adapter, plus_adapter, x, text, embeds, features
):
    wanted = unet(x, T, Prompt(text))
    base, plus = tokens(base_adapter, embeds), tokens(plus_adapter, features)
    silent = (ImagePrompt(base, 0), ImagePrompt(base, [0.0] * LAYERS), ImagePrompt(plus, 0.0, adapter=1))
    assert torch.equal(two_on_unet(x, T, Prompt(text)), wanted)
    assert torch.equal(two_on_unet(x, T, Prompt(text, silent)), wanted)


def test_attach_and_detach_leave_no_trace(unet, base_adapter, plus_adapter, x, text, embeds):
    unet = copy.deepcopy(unet)
    before, keys = unet(x, T, Prompt(text)), {k: v.clone() for k, v in unet.state_dict().items()}
    base_adapter.attach(unet)
    assert unet.state_dict().keys() == keys.keys()
    assert not any("_ip" in name for name, _ in unet.named_parameters())
    image = ImagePrompt(tokens(base_adapter, embeds))
    alone = unet(x, T, Prompt(text, (image,)))
    plus_adapter.attach(unet)
    assert torch.equal(unet(x, T, Prompt(text, (image,))), alone)
    base_adapter.detach(unet)
    plus_adapter.detach(unet)
    assert all(layer.adapters == [] for layer in unet.cross_attentions())
    assert all(torch.equal(value, keys[key]) for key, value in unet.state_dict().items())
    assert torch.equal(unet(x, T, Prompt(text)), before)


@pytest.mark.parametrize("plus_first", [True, False])
def test_detaching_one_adapter_leaves_the_other(unet, base_adapter, plus_adapter, x, text, features, plus_first):
    unet = copy.deepcopy(unet)
    plus_adapter.attach(unet)
    prompt = Prompt(text, (ImagePrompt(tokens(plus_adapter, features), 0.7),))
    alone = unet(x, T, prompt)
    plus_adapter.detach(unet)
    for adapter in (plus_adapter, base_adapter) if plus_first else (base_adapter, plus_adapter):
        adapter.attach(unet)
    base_adapter.detach(unet)
    assert torch.equal(unet(x, T, prompt), alone)


# Masks

SHAPES = {"box": (0, 0, 63, 127), "off the middle": (40, 24, 100, 71)}


def mask_of(box: tuple[int, int, int, int], height: int, width: int) -> torch.Tensor:
    """As diffusers prepares it: (1, 1, height, width), zeros and ones."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle(box, fill=255)
    return IPAdapterMaskProcessor().preprocess(image, height=height, width=width)


@pytest.mark.parametrize("height, width", [(16, 16), (16, 24), (24, 8), (17, 23), (20, 9)])
@pytest.mark.parametrize("box", SHAPES)
def test_mask_equals_diffusers(two_on_unet, base_adapter, theirs_with_base, draw, text, embeds, box, height, width):
    x, mask = draw(2, 4, height, width), mask_of(SHAPES[box], 8 * height, 8 * width)
    set_scales(theirs_with_base, 0.8)
    image = ImagePrompt(tokens(base_adapter, embeds), 0.8, mask)
    wanted = them(theirs_with_base, x, text, embeds, masks=[mask])
    assert rel(two_on_unet(x, T, Prompt(text, (image,))), wanted) <= 1e-5
    assert rel(two_on_unet(x, T, Prompt(text, (replace(image, mask=None),))), wanted) > 1e-3


def test_a_mask_for_each_picture_equals_diffusers(two_on_unet, base_adapter, theirs_with_base, x, text, draw):
    embeds = draw(2, 2, 96)
    masks = [mask_of(box, 128, 128) for box in SHAPES.values()]
    set_scales(theirs_with_base, 0.8)
    images = [ImagePrompt(tokens(base_adapter, embeds[:, i : i + 1]), 0.8, masks[i]) for i in range(2)]
    wanted = them(theirs_with_base, x, text, embeds, masks=[torch.cat(masks, dim=1)])
    assert rel(two_on_unet(x, T, Prompt(text, tuple(images))), wanted) <= 1e-5


def test_a_mask_of_ones_is_no_mask_and_of_zeros_no_image_prompt(two_on_unet, base_adapter, x, text, embeds):
    image = ImagePrompt(tokens(base_adapter, embeds))
    everywhere = two_on_unet(x, T, Prompt(text, (image,)))
    assert rel(two_on_unet(x, T, Prompt(text, (replace(image, mask=torch.ones(1, 1, 40, 40)),))), everywhere) <= 1e-5
    nowhere = two_on_unet(x, T, Prompt(text, (replace(image, mask=torch.zeros(1, 1, 40, 40)),)))
    assert rel(nowhere, two_on_unet(x, T, Prompt(text))) <= 1e-5


def test_each_row_of_a_batch_may_have_its_own_mask(two_on_unet, base_adapter, x, text, embeds):
    masks = torch.cat([mask_of(box, 128, 128) for box in SHAPES.values()])
    image = ImagePrompt(tokens(base_adapter, embeds))
    together = two_on_unet(x, T, Prompt(text, (replace(image, mask=masks),)))
    for i in range(2):
        alone = two_on_unet(x, T, Prompt(text, (replace(image, mask=masks[i : i + 1]),)))
        assert rel(together[i], alone[i]) <= 1e-5


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_mask_finds_the_grid_of_every_latent_size(factor):
    """The UNet halves latents and rounds up; the mask knows the picture's shape and how many positions are left."""
    for height in range(8, 66):
        for width in range(8, 66):
            rows, columns = -(-height // factor), -(-width // factor)
            ramp = torch.arange(1.0, height + 1)[:, None].expand(1, 1, height, width)
            small = mask_per_query(ramp, rows * columns)
            assert small.shape == (1, 1, rows * columns, 1), (height, width)
            small = small.view(rows, columns)
            assert torch.allclose(small, small[:, :1]), (height, width)
            assert (small.diff(dim=0) > 0).all(), (height, width)


# Prompts in batches


def test_cat_equals_one_prompt_after_the_other(two_on_unet, base_adapter, plus_adapter, draw):
    def prompt() -> Prompt:
        base = ImagePrompt(tokens(base_adapter, draw(1, 2, 96)), 0.7)
        plus = ImagePrompt(tokens(plus_adapter, draw(1, 1, 17, 128)), [0.1 * i for i in range(LAYERS)], adapter=1)
        return Prompt(draw(1, 77, 64), (base, plus))

    x, t, prompts = draw(3, 4, 8, 8), torch.tensor(500), [prompt() for _ in range(3)]
    together = two_on_unet(x, t, Prompt.cat(prompts))
    for i in range(3):
        assert rel(together[i : i + 1], two_on_unet(x[i : i + 1], t, prompts[i])) <= 1e-5


def test_cat_keeps_masks_in_their_rows(two_on_unet, base_adapter, draw):
    masks = [mask_of(box, 64, 64) for box in ((0, 0, 31, 63), (32, 0, 63, 63))]
    rows = [Prompt(draw(1, 77, 64), (ImagePrompt(tokens(base_adapter, draw(1, 1, 96)), 1.0, mask),)) for mask in masks]
    x, t = draw(2, 4, 8, 8), torch.tensor(500)
    together = two_on_unet(x, t, Prompt.cat(rows))
    for i in range(2):
        assert rel(together[i : i + 1], two_on_unet(x[i : i + 1], t, rows[i])) <= 1e-5


def test_cat_carries_one_shared_mask_once(draw):
    mask = torch.ones(1, 1, 8, 8)
    row = Prompt(draw(1, 77, 64), (ImagePrompt(draw(1, 4, 64), 0.5, mask, adapter=1),), draw(1, 10))
    both = Prompt.cat([row, row])
    assert both.images[0].mask is mask
    assert both.images[0].adapter == 1 and both.images[0].scale == 0.5
    assert both.text.shape == (2, 77, 64) and both.images[0].tokens.shape == (2, 4, 64) and both.vector.shape == (2, 10)


def test_cat_refuses_prompts_of_different_structure(draw):
    with pytest.raises(ValueError):
        Prompt.cat([Prompt(draw(1, 77, 64)), Prompt(draw(1, 77, 64), (ImagePrompt(draw(1, 4, 64)),))])


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
        adapter.attach(unet)
    middle = unet.middle_block[1].transformer_blocks[0].attn2
    assert middle.adapters == [adapter.ip_adapter["31"]]


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
    copy_of_unet = copy.deepcopy(unet)
    adapter.attach(copy_of_unet)
    return rel(copy_of_unet(x, T, Prompt(text, (ImagePrompt(tokens(adapter, embeds)),))), wanted)


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
    ip = randomise(IPAdapter(ImageProjection(8, 24, 2), [(32, 24)]), 10).ip_adapter["1"]
    layer.adapters.append(ip)
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
    assert rel(layer(x, Prompt(text, (ImagePrompt(image, 0.6),))), wanted) <= 1e-6
