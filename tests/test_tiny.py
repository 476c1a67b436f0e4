"""The stages of the tiny model go on from the files in the tree, and a full-face adapter from where its patches are."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clip import tokenize
from generate.layers import factors
from ipadapter import PatchProjection, Prompt
from tiny import drawings, presets
from tiny.judge import STYLES, known, looked_at, open_network, told
from tiny.latents import scaled_vae, towers
from tiny.places import cells, collect_queries, describe, place, place_features
from tiny.train_adapter import new_adapter
from tiny.train_unet import new_unet
from tiny.trainer import WEIGHTS, arguments, load_ema, train
from training.pairs import BadSample
from unet import layer_names
from weights import load_image_encoder, open_base
from weights.families import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    return Namespace(runs=tmp_path_factory.mktemp("runs"), device="cpu")


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stage", ["clip", "vae", "unet"])
def test_without_a_checkpoint_a_stage_is_what_the_tree_holds(stage: str, args: Namespace) -> None:
    base = open_base(WEIGHTS / "sd-tiny.safetensors")
    if stage == "clip":
        found = towers(args)
        assert same(found.image, load_image_encoder(WEIGHTS / "clip-tiny.safetensors"))
        assert same(found.text.text_model, base.text().text_model)
    elif stage == "vae":
        assert same(scaled_vae(args, drawings.load("train", limit=8)), base.vae())
    else:
        assert same(load_ema(new_unet(), "unet", args), base.unet())


def test_a_stage_run_again_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: str) -> dict[str, torch.Tensor]:
        flags = ["stage", "--steps", "3", "--runs", str(tmp_path / folder), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", flags)
        args = arguments("A stage.", steps=1, batch_size=4, learning_rate=1e-2)
        model, x = torch.nn.Linear(5, 3), torch.randn(8, 5)  # weights and data are random, too
        train("stage", model, lambda: model(x[torch.randint(8, (args.batch_size,))]).square().mean(), args)
        return model.state_dict()

    first, second = run("first"), run("second")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_patches_are_looked_at_from_where_they_are(args: Namespace) -> None:
    torch.manual_seed(0)
    base, data = open_base(WEIGHTS / "sd-tiny.safetensors"), drawings.load("train", limit=40)
    unet, empty = base.unet(), base.text()(tokenize("")).detach()
    x = drawings.to_unit(data.pixels)
    with torch.no_grad():
        latents = torch.cat([base.vae().encode(part) for part in x.split(8)])
        features = towers(args).image.penultimate(drawings.clip_pixels(x))
    adapter = new_adapter(unet, "full-face")
    place(adapter, unet, empty, latents[:32], features[:32], steps=120)
    with torch.no_grad():  # on drawings that the keys were not made of
        tokens = adapter.image_proj(features[32:])
        for layer, q in zip(unet.cross_attentions(), collect_queries(unet, empty, latents[32:]), strict=True):
            positions = q.shape[1]
            if positions != 16:
                continue
            k = adapter.key_values()[layer.layer].to_k_ip(tokens)
            looks = torch.einsum("nqhd,nkhd->nhqk", *(y.unflatten(-1, (layer.heads, -1)) for y in (q, k)))
            looks = (looks / (q.shape[2] // layer.heads) ** 0.5).softmax(-1)[..., 1:]
            there = torch.arange(positions)[:, None] == cells(8, 4)[None]
            assert (looks * there).sum(-1).mean() > 2 / positions  # chance is 1 / positions
        t = torch.full((8,), 900)
        assert torch.equal(
            unet(latents[32:], t, Prompt(empty.expand(8, -1, -1), (adapter.prompt(tokens),))),
            unet(latents[32:], t, Prompt(empty.expand(8, -1, -1))),
        )


def test_style_and_layout_are_layers_apart() -> None:
    style, layout = (factors(spec, layer_names(presets.TINY_UNET), TINY).heard for spec in ("style", "layout"))
    assert {i for i, factor in enumerate(style) if factor} == {9, 10, 11, 12, 13, 14}
    assert {i for i, factor in enumerate(layout) if factor} == {2, 3}


def test_the_judge_tells_drawings_that_it_has_not_learned_from() -> None:
    """By their styles, which are as sure as it gets."""
    data = drawings.load("unseen-drawings")
    some = [i for i in range(len(data)) if not known(data.captions[i], data.styles[i])]
    _, styles = looked_at(open_network(), drawings.to_unit(data.pixels[some]))
    right = [STYLES[n] == data.styles[i] for n, i in zip(styles.argmax(1).tolist(), some, strict=True)]
    assert len(some) > 60 and sum(right) / len(right) > 0.75  # chance is 1 / 7


def test_what_the_judge_tells_is_counted_among_what_was_asked_for() -> None:
    """Four pictures: the second shows more of the third's thing; the third is in another style; the fourth's thing is unknown."""
    shown = torch.tensor([[0.9, 0.1, 0.2, 0.95], [0.1, 0.5, 0.6, 0.9], [0.0, 0.1, 0.8, 0.0]])
    drawn = torch.eye(7)[[3, 3, 5]]

    class Stub:
        things = ("a", "b", "c", "never asked for")

        def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            assert x[:, 0, 0, 0].tolist() == [0, 1, 2]
            return shown, drawn

    x = torch.arange(4.0).view(4, 1, 1, 1).expand(-1, 3, 8, 8)
    found = told(Stub(), x, ["a", "b", "c", "d"], [STYLES[3]] * 4)
    wanted = {
        "thing": 2 / 3,
        "thing of five": 1.0,
        "style": 2 / 3,
        "both": 1 / 3,
        "both, of five": 2 / 3,
        "pictures": 3,
    }
    assert found == pytest.approx(wanted)
    assert told(Stub(), x, ["a", "b", "c", "d"], [STYLES[3]] * 4, among=1)["thing"] == 1.0


def test_one_picture_alone_is_described_too():
    """Of which nothing varies; overfitting one is how people try a trainer."""
    projection = PatchProjection(32, 48)
    describe(projection, torch.randn(1, 1 + 64, 32, generator=torch.Generator().manual_seed(0)), 8, steps=2)
    assert all(p.isfinite().all() for p in projection.parameters())


def test_data_of_which_nothing_can_be_read_say_why():
    def take(i: int) -> None:
        raise BadSample(f"{i}.png: not a picture")

    source = type("Source", (), {"__len__": lambda self: 2, "take": staticmethod(take)})()
    with pytest.raises(BadSample, match="0.png: not a picture"):
        place_features(None, None, SimpleNamespace(source=source))
