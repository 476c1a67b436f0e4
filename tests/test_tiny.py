"""The stages of the tiny model go on from the files in the tree."""

from argparse import Namespace

import pytest
import torch

from tiny import drawings
from tiny.latents import scaled_vae, towers
from tiny.train_unet import new_unet
from tiny.trainer import WEIGHTS, load_ema
from weights import load_image_encoder, open_base


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
