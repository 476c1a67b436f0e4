"""Where prompts act: equal to the attention computed by hand from diffusers' modules on the same random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counterparts import diffusers_unet_with, randomise, rel, set_scales
from diffusers import UNet2DConditionModel
from diffusers.image_processor import IPAdapterMaskProcessor
from narrow import NARROW_SD2
from PIL import Image
from test_sample import FAST, pixels, sample
from torch import Tensor
from torch.nn.functional import interpolate

from clip import tokenize
from clip.tokenizer import encode, words
from files.heat import heated
from generate import attention_sheet, open_models, pictures, prompts
from generate.seeing import SIDE, named
from ipadapter import ImageProjection, IPAdapter, Prompt, Scale, Seen, prepared, watched
from sampler import SAMPLERS, SD, guided, numbered
from unet import UNet, size_vector

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
T = torch.tensor(501)
GRID = 16, 24  # of the latents


@contextmanager
def asked(theirs: UNet2DConditionModel) -> Iterator[list]:
    """What each cross-attention is asked while we are in here: the module, the positions, the prompt."""
    found, hooks = [], []

    def keep(module, given, more) -> None:
        found.append((module, given[0] if given else more["hidden_states"], more["encoder_hidden_states"]))

    for name, module in theirs.named_modules():
        if name.endswith(".attn2"):
            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    yield found
    for hook in hooks:
        hook.remove()


def by_hand(found: list, grid: tuple[int, int], masks: list[Tensor | None] = ()) -> tuple[Tensor, list[Tensor], Tensor]:
    """Maps of the second half of the batch, each layer's brought to the finest grid by itself; then their mean."""
    rows: dict = {}
    size = max((grid_of(x, grid) for _, x, _ in found), key=lambda one: one[0] * one[1])
    for attn, x, prompt in found:
        text, images = prompt if isinstance(prompt, tuple) else (prompt, ())
        q, norms = attn.head_to_batch_dim(attn.to_q(x)), []
        pairs = [(attn.to_k(text), attn.to_v(text), 1.0, None)]
        for i, tokens in enumerate(images):
            tokens, ip = tokens.flatten(1, 2), attn.processor
            mask = masks[i][0] if masks else None
            pairs.append((ip.to_k_ip[i](tokens), ip.to_v_ip[i](tokens), ip.scale[i], mask))
        for i, (k, v, scale, mask) in enumerate(pairs):
            weights = attn.get_attention_scores(q, attn.head_to_batch_dim(k))
            z = scale * attn.batch_to_head_dim(weights @ attn.head_to_batch_dim(v))
            if mask is not None:
                z = z * IPAdapterMaskProcessor.downsample(mask, len(z), z.shape[1], z.shape[2])
            norms.append(z.norm(dim=-1))
            weights = weights.unflatten(0, (len(x), attn.heads)).mean(1)
            rows.setdefault(i, []).append(placed(weights, grid_of(x, grid), size))
        norms = torch.stack(norms, -1)
        rows.setdefault("shares", []).append(placed(norms / norms.sum(-1, keepdim=True), grid_of(x, grid), size))
    means = {name: torch.stack(maps).mean(0) for name, maps in rows.items()}
    return means[0], [means[i] for i in sorted(set(means) - {0, "shares"})], means["shares"]


def grid_of(x: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    shrink = round((grid[0] * grid[1] / x.shape[1]) ** 0.5)
    return grid[0] // shrink, grid[1] // shrink


def placed(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(2 * batch, positions, maps) -> (batch, maps, *size) of the second half."""
    maps = maps[len(maps) // 2 :].transpose(1, 2).unflatten(2, grid)
    return interpolate(maps, size=size, mode="bilinear")


def equal(seen, theirs) -> None:
    text, images, shares = theirs
    assert len(seen) == len(text) and all(len(one.images) == len(images) for one in seen)
    assert rel(torch.stack([one.text for one in seen]), text) <= 1e-5
    assert rel(torch.stack([one.shares for one in seen]), shares) <= 1e-5
    for i, image in enumerate(images):
        assert rel(torch.stack([one.images[i] for one in seen]), image) <= 1e-5


def test_two_adapters_masks_and_a_batch_equal_diffusers(unet, base_adapter, plus_adapter, draw):
    """Pictures of two rows, their absence before them; left and right."""
    x, text, embeds, features = draw(4, 4, *GRID), draw(4, 77, 64), 3 * draw(4, 1, 96), 3 * draw(4, 1, 17, 128)
    masks = [torch.zeros(1, 1, 128, 192), torch.ones(1, 1, 128, 192)]
    masks[0][..., :100], masks[1][..., :64] = 1.0, 0.25
    scales = 0.7, [0.1 + 0.1 * i for i in range(16)]

    def said(half: slice) -> Prompt:
        tokens = base_adapter.image_proj(embeds[half, 0]), plus_adapter.image_proj(features[half, 0])
        adapters = zip((base_adapter, plus_adapter), tokens, scales, masks, strict=True)
        return Prompt(text[half], tuple(adapter.prompt(*given) for adapter, *given in adapters))

    null, prompt = said(slice(0, 2)), said(slice(2, 4))
    with watched(unet.cross_attentions(), prompt) as watch:
        together = unet(x, T, Prompt.cat([null, prompt]))
    seen = watch.seen()
    assert torch.equal(together, unet(x, T, Prompt.cat([null, prompt])))
    theirs = diffusers_unet_with(unet, base_adapter, plus_adapter)
    set_scales(theirs, *scales)
    with asked(theirs) as found:
        added = {"image_embeds": [embeds, features]}
        theirs(x, T, text, added_cond_kwargs=added, cross_attention_kwargs={"ip_adapter_masks": masks})
    expected = by_hand(found, GRID, masks)
    equal(seen, expected)
    assert torch.allclose(seen[0].text.sum(0), torch.ones(GRID)) and torch.allclose(
        seen[1].shares.sum(0), torch.ones(GRID)
    )
    with watched(unet.cross_attentions(), prompt) as watch:  # one after the other
        unet(x[:2], T, null), unet(x[2:], T, prompt)
    equal(watch.seen(), expected)


@pytest.mark.parametrize("family", ["SD 2.x", "SDXL"])
def test_other_topologies_equal_diffusers(family, unet_xl, draw):
    unet = unet_xl if family == "SDXL" else randomise(UNet(NARROW_SD2), 10)
    width = unet.config.context_dim
    adapter = randomise(IPAdapter.for_unet(unet, ImageProjection(96, width, 4)), 20)
    x, text, embeds = draw(2, 4, 16, 16), draw(2, 77, width), 3 * draw(2, 1, 96)
    added, vector = {"image_embeds": [embeds]}, None
    if family == "SDXL":
        pooled, sizes = draw(2, 32), torch.tensor([[128, 128, 0, 0, 128, 128]] * 2)
        added |= {"text_embeds": pooled, "time_ids": sizes}
        vector = size_vector(pooled, 128, 128, 8)
    halves = [slice(0, 1), slice(1, 2)]
    null, prompt = (
        Prompt(
            text[half], (adapter.prompt(adapter.image_proj(embeds[half, 0])),), None if vector is None else vector[half]
        )
        for half in halves
    )
    prompt = prepared(prompt, unet.cross_attentions())
    with watched(unet.cross_attentions(), prompt) as watch:
        unet(x, T, Prompt.cat([prepared(null, unet.cross_attentions()), prompt]))
    theirs = diffusers_unet_with(unet, adapter)
    with asked(theirs) as found:
        theirs(x, T, text, added_cond_kwargs=added)
    equal(watch.seen(), by_hand(found, (16, 16)))


def test_a_run_is_the_mean_of_its_steps_whatever_the_guidance(unet, base_adapter, draw):
    text, tokens = draw(2, 77, 64), base_adapter.image_proj(3 * draw(2, 96))
    null, prompt = (Prompt(text[i : i + 1], (base_adapter.prompt(tokens[i : i + 1]),)) for i in (0, 1))
    row, layers = SAMPLERS["ddim"], list(unet.cross_attentions())
    levels, noise, steps = numbered(row.levels(SD, 2)), draw(1, 4, 8, 8), []

    def kept(x: Tensor, t: Tensor, asked: Prompt) -> Tensor:
        steps.append((x[-1:], t))
        return unet(x, t, asked)

    three = {"middle": replace(null, images=prompt.images), "middle_scale": 2.0}
    for more in ({"guidance_scale": 1.0}, {}, {"apart": True}, three, three | {"apart": True}):
        steps.clear()
        with watched(layers, prompt) as watch:
            for _ in row.run(guided(kept, prompt, null, **{"guidance_scale": 7.5} | more), noise, levels):
                pass
        alone = []
        for x, t in steps:  # apart each stands there more than once, which leaves the mean as it is
            with watched(layers, prompt) as one:
                unet(x, t, prompt)
            alone += one.seen()
        (seen,) = watch.seen()
        assert rel(seen.text, torch.stack([one.text for one in alone]).mean(0)) <= 1e-5
        assert rel(seen.shares, torch.stack([one.shares for one in alone]).mean(0)) <= 1e-5
    assert not any(layer._forward_hooks for layer in layers)


def test_a_silent_image_prompt_has_no_share(unet, base_adapter, draw):
    x, text, tokens = draw(1, 4, 8, 8), draw(1, 77, 64), base_adapter.image_proj(3 * draw(1, 96))
    found = []
    for images in ((base_adapter.prompt(tokens, 0.0),), ()):
        prompt = Prompt(text, images)
        with watched(unet.cross_attentions(), prompt) as watch:
            unet(x, T, prompt)
        found += watch.seen()
    silent, bare = found
    assert silent.shares[1].abs().max() == 0 and torch.equal(silent.shares[:1], bare.shares)
    assert silent.images[0].shape == (4, 8, 8) and silent.images[0].abs().max() == 0 and bare.images == ()
    assert torch.equal(bare.text, silent.text)


def test_words_have_the_places_of_all_their_tokens():
    row = tokenize("an espressomachine, the cat's 🐱")[0].tolist()
    found = words(row)
    assert [word for word, _ in found] == ["an", "espressomachine", "the", "cat", "'s", "🐱"]
    assert found[0][1] == [1] and len(found[1][1]) > 1
    assert [row[i] for _, places in found for i in places] == [t for t in encode("an espressomachine the cat's 🐱")]
    again = words(row + row)  # two chunks
    assert again[:6] == found and again[6:] == [(word, [77 + i for i in places]) for word, places in found]
    assert words(tokenize("", pad=0)[0].tolist()) == [] and words(tokenize("a b", pad=0)[0].tolist()) == [
        ("a", [1]),
        ("b", [2]),
    ]


def test_a_map_is_laid_over_the_picture_in_its_place():
    heat = np.zeros((4, 6))
    heat[1, 2:] = 1
    shown = np.asarray(heated(Image.new("RGB", (120, 80), "white"), heat)).astype(int)
    assert shown.shape == (80, 120, 3)
    cold, hot = shown[70, 10], shown[30, 100]
    assert hot.sum() > cold.sum() + 200


def test_pictures_tell_what_was_seen_and_are_the_same_pictures():
    """Of each picture in its turn; on a sheet every word and every image prompt has a place."""
    models, seen = open_models(device="cpu"), []
    example = ROOT / "tiny/example.png"
    asked = prompts(models, "a red espressomachine", images=[example, example], scale=0.5)
    plain = list(pictures(models, *asked, count=2, steps=2, width=192, batch=1))
    watched = list(pictures(models, *asked, count=2, steps=2, width=192, batch=1, on_seen=seen.append))
    assert [picture.tobytes() for picture in plain] == [picture.tobytes() for picture in watched]
    assert [one.text.shape for one in seen] == [(77, 16, 24)] * 2 and not torch.equal(seen[0].text, seen[1].text)
    page = attention_sheet(watched[0], seen[0], "a red espressomachine", [["one.png", "other.png"]])
    # the picture, the text, the prompt and its two pictures; then three words
    assert page.width == SIDE // 32 + 5 * (SIDE + SIDE // 32)
    assert attention_sheet(watched[0], seen[0]).width == SIDE + 2 * (SIDE // 32)  # no text, no names


def test_at_the_command_line_a_sheet_lies_beside_each_picture(tmp_path):
    flags = ["--image", ROOT / "tiny/example.png", "--prompt", "red apple", "--num-images", 2, *FAST]
    result = sample(*flags, "--attention", "--grid", "--output", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    made = ["x_0.png", "x_1.png", "x_0_attention.png", "x_1_attention.png", "x_grid.png"]
    assert [Path(line).name for line in result.stdout.split()] == made
    assert sample(*flags, "--output", tmp_path / "y.png").returncode == 0
    assert (pixels(tmp_path / "x_1.png") == pixels(tmp_path / "y_1.png")).all()
    assert Image.open(tmp_path / "x_1_attention.png").width > 3 * SIDE


def test_where_a_part_is_worked_on_alone_the_maps_are_of_that_part():
    models, seen = open_models(device="cpu"), []
    picture, mask = Image.new("RGB", (160, 128), "white"), Image.new("L", (160, 128))
    mask.paste(255, (100, 20, 130, 50))
    asked = prompts(models, "red apple")
    part = {"init": picture, "inpaint": mask, "only_masked": 8, "height": 64, "width": 64}
    (made,) = pictures(models, *asked, steps=2, **part, on_seen=seen.append)
    assert made.size == (160, 128) and seen[0].box == (92, 12, 138, 58)
    page = attention_sheet(made, seen[0], "red apple")
    assert page.width == SIDE // 32 + 2 * (SIDE + SIDE // 32)


def test_a_window_of_steps_and_silent_layers_count_in_the_share(unet, base_adapter, draw):
    """Heard in one step of two its share is half of what it is there; its attention is that of where it is heard."""
    x, text, tokens = draw(1, 4, 8, 8), draw(1, 77, 64), base_adapter.image_proj(3 * draw(1, 96))

    def seen(scale: Scale | float, steps: list[tuple[int, int]]) -> Seen:
        prompt = Prompt(text, (base_adapter.prompt(tokens, scale),))
        with watched(unet.cross_attentions(), prompt) as watch:
            for step in steps:
                unet(x, T, replace(prompt, step=step))
        return watch.seen()[0]

    always, half = seen(0.7, [(0, 1)]), seen(Scale(0.7, until=0.5), [(0, 2), (1, 2)])
    assert rel(half.shares[1], always.shares[1] / 2) <= 1e-5 and rel(half.images[0], always.images[0]) <= 1e-5
    coarse = seen(Scale(0.7, layers=[0.0] * 15 + [1.0]), [(0, 1)])  # the middle, a single position here
    assert coarse.shares.shape == (2, 8, 8) and 0 < coarse.shares[1].max() <= 1 / 16
    assert coarse.images[0].std(dim=(1, 2)).max() < 1e-6 and rel(coarse.images[0].sum(0), torch.ones(8, 8)) <= 1e-5


def test_a_picture_of_weight_0_has_no_map_and_several_prompts_of_a_group_are_counted(tmp_path):
    example = ROOT / "tiny/example.png"
    flags = ["--image", example, example, "--weights", 0, 1, "--image", example, "--scale", 0.5]
    result = sample(*flags, *FAST, "--attention", "--output", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "x_attention.png").width == SIDE // 32 + 4 * (SIDE + SIDE // 32)
    assert named((0, 1, 1), [["a", "b"], ["long"]]) == [["a", "b"], ["long 1"], ["long 2"]]
