"""Which picture, how loudly, in which steps and layers: one value, and groups of pictures at the command line."""

from dataclasses import replace

import pytest
import torch

from ipadapter import ImagePrompt, Prompt, Scale

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
