"""sample.py with image prompts in groups: what belongs to which, what a picture keeps of it, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_sample import FAST, ROOT, pixels, sample

pytestmark = pytest.mark.slow

FULL_FACE = "tiny-full-face"


def settings(path: Path) -> dict:
    return json.loads(Image.open(path).text["ipadapter"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    Image.new("RGB", (100, 80), "red").save(folder / "red.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(folder / "left.png")
    Image.new("L", (64, 64)).save(folder / "black.png")
    mask.resize((64, 32)).save(folder / "wide.png")
    shutil.copy(ROOT / "tiny/example.png", folder / "drawing.png")
    return folder


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """Two image prompts, all that can be said of each."""
    first = [
        "--image",
        folder / "red.png",
        folder / "drawing.png",
        "--adapter",
        "tiny",
        "--weights",
        1,
        0.5,
        "--mask",
        folder / "left.png",
    ]
    second = ["--image", folder / "drawing.png", "--adapter", FULL_FACE, "--layers", "style", "--curve", "1,0.5"]
    flags = [*first, "--scale", 0.7, *second, "--until", 0.5, "--prompt", "a fox", *FAST]
    result = sample(*flags, "--output", folder / "two.png")
    assert result.returncode == 0, result.stderr
    assert "red.png" in result.stderr and "(scale 0.7)" in result.stderr and "(scale 0.6)" in result.stderr
    return folder / "two.png"


def test_a_picture_holds_its_groups(two, folder):
    first, second = settings(two)["groups"]
    assert [Path(name).name for name in first["image"]] == ["red.png", "drawing.png"]
    assert Path(first["mask"]).name == "left.png" and first["weights"] == [1, 0.5] and first["scale"] == 0.7
    assert (second["layers"], second["until"], second["curve"], second["scale"]) == ("style", 0.5, [1, 0.5], 0.6)
    assert "layers" not in first and "mask" not in second
    assert first["adapter"].endswith("ip-adapter-tiny.safetensors") and "full-face" in second["adapter"]
    assert {Path(name).name for name in settings(two)["sha256"]} >= {
        "left.png",
        "ip-adapter-full-face-tiny.safetensors",
    }


def test_made_again_it_is_the_same_and_with_flags_another(two, folder, tmp_path):
    def again(*flags: object) -> dict:
        assert sample("--again", two, *flags, "--output", tmp_path / "x.png", "--overwrite").returncode == 0
        return settings(tmp_path / "x.png")

    assert again()["groups"] == settings(two)["groups"] and (pixels(tmp_path / "x.png") == pixels(two)).all()
    assert [group["scale"] for group in again("--scale", 0.1)["groups"]] == [0.1, 0.1]
    assert (pixels(tmp_path / "x.png") != pixels(two)).any()
    (only,) = again("--image", folder / "drawing.png", "--weights", 1)["groups"]  # in the place of the first
    assert only["mask"] == settings(two)["groups"][0]["mask"] and only["scale"] == 0.7
    first, second = again("--image", folder / "red.png", "--weights", 2, "--image", folder / "red.png")["groups"]
    assert first["scale"] == 0.7 and "full-face" in second["adapter"] and second["layers"] == "style"


def test_what_stands_before_the_first_group_holds_for_all(folder, tmp_path):
    images = ["--image", folder / "red.png", "--until", 1, "--image", folder / "drawing.png"]
    result = sample("--adapter", FULL_FACE, "--until", 0.5, *images, *FAST, "--output", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    first, second = settings(tmp_path / "x.png")["groups"]
    assert first["adapter"] == second["adapter"] and "until" not in first and second["until"] == 0.5


@pytest.mark.slow
def test_one_group_may_have_several_scales(folder, tmp_path):
    images = ["--image", folder / "red.png", "--scale", 0.3, "--image", folder / "drawing.png", "--scale", 0, 1]
    assert sample(*images, *FAST, "--grid", "--output", tmp_path / "x.png").returncode == 0
    made = [settings(tmp_path / f"x_{i}.png")["groups"] for i in (0, 1)]
    assert [[group["scale"] for group in groups] for groups in made] == [[0.3, 0], [0.3, 1]]
    assert (pixels(tmp_path / "x_0.png") != pixels(tmp_path / "x_1.png")).any() and (tmp_path / "x_grid.png").exists()


def test_a_picture_from_before_there_were_groups_is_made_again(folder, tmp_path):
    assert sample("--image", folder / "red.png", *FAST, "--output", tmp_path / "new.png").returncode == 0
    old = settings(tmp_path / "new.png")
    del old["groups"]
    info = PngInfo()
    info.add_itxt("ipadapter", json.dumps(old))
    Image.new("RGB", (8, 8)).save(tmp_path / "old.png", pnginfo=info)
    assert sample("--again", tmp_path / "old.png", "--output", tmp_path / "again.png").returncode == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "new.png"))


def test_settings_that_nobody_may_type_are_refused_by_their_names(two, tmp_path):
    """A picture may come from anywhere; what is said anew holds instead."""
    good, path = settings(two), tmp_path / "x.png"

    def again(wrong: dict, *flags: object) -> str:
        info = PngInfo()
        info.add_itxt("ipadapter", json.dumps(good | wrong))
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
        done = sample("--again", path, *flags, "--output", tmp_path / "made.png")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"--again {path}: " in done.stderr, done.stderr
        return done.stderr

    def of_group(**wrong: object) -> dict:
        return {"groups": [good["groups"][0] | wrong]}

    for wrong, told in (
        ({"steps": -3}, "its --steps: '-3' given, a whole number, 1 to 1000, is wanted"),
        ({"steps": 10**9}, "its --steps: '1000000000' given"),
        ({"steps": "many"}, "(its steps is none)"),
        ({"height": 7}, "its --height: '7' given, a whole number, 8 to"),
        ({"width": 1001}, "its --width: 1001 given, a multiple of 8 is wanted"),
        ({"seed": -7}, "its --seed: "),
        ({"seed": None}, "(its seed is none)"),
        ({"sampler": "best"}, "its --sampler: invalid choice: 'best'"),
        ({"storage": "int4"}, "its --storage: invalid choice"),
        ({"dtype": "float1"}, "its --dtype: invalid choice"),
        ({"prompt_syntax": "mine"}, "its --prompt-syntax: invalid choice"),
        ({"guidance_scale": float("nan")}, "its --guidance-scale: 'nan' given, a number is wanted"),
        ({"guidance_rescale": -1}, "its --guidance-rescale: '-1' given"),
        ({"strength": 1.5}, "its --strength: '1.5' given, a number from 0 to 1 is wanted"),
        ({"outpaint": [8]}, "its --outpaint: 1 given, 4 are wanted"),
        ({"outpaint": [8, 0, -8, 0]}, "its --outpaint: '-8' given"),
        ({"clip_skip": True}, "its --clip-skip: 'True' given"),
        ({"lora": [[good["base"], float("inf")]]}, "its --lora: the weight of"),
        ({"lora": [["x"]]}, "(its lora is none)"),
        ({"controls": [{}]}, "(its controls is none)"),
        (of_group(scale="loud"), "(its scale is none)"),
        (of_group(scale=float("inf")), "its --scale: 'inf' given"),
        (of_group(until=2), "its --until: '2' given"),
        (of_group(framing="round"), "its --framing: invalid choice"),
        (of_group(weights=[1, float("nan")]), "its --weights: 'nan' given"),
    ):
        assert told in again(wrong), told
    assert "its --height" in again({"steps": -3, "height": 7}, "--steps", 2)
    assert not (tmp_path / "made.png").exists()


IMAGE = ["--image", "red.png"]
MISTAKES = {
    "no picture": (["--image", "--image", "red.png"], "--image: a group without a picture; a file"),
    "mask of nothing": (["--prompt", "x", "--mask", "left.png"], "--mask belongs to an image prompt"),
    "window of nothing": (
        ["--prompt", "x", "--from", "0.5"],
        "--from belongs to an image prompt: it goes with --image",
    ),
    "missing mask": ([*IMAGE, "--mask", "nowhere.png"], "nowhere.png: no such picture"),
    "black mask": ([*IMAGE, "--mask", "black.png"], "--mask: it is all black"),
    "coloured mask": ([*IMAGE, "--mask", "red.png"], "red.png: has colours; a mask is grey"),
    "backwards": ([*IMAGE, "--from", "0.7", "--until", "0.2"], "--from 0.7 to --until 0.2: "),
    "beyond": ([*IMAGE, "--until", "1.5"], "--until: '1.5' given, a number from 0 to 1 is wanted"),
    "layer": ([*IMAGE, "--layers", "up.block_9"], "--layers 'up.block_9': 'up.block_9' at character 1: unknown"),
    "layer of others": (
        [*IMAGE, "--layers", "up.block_0.1"],
        "at character 1: this base has no such layers; there are all",
    ),
    "curve": ([*IMAGE, "--curve", "1,a"], "--curve '1,a': 'a' at character 3; constant, fade-in"),
    "weights": ([*IMAGE, "--weights", "1", "2"], "--weights: 2 given, 1 wanted"),
    "no weight": (["--image", "red.png:x"], "--image red.png:x: its weight is x, a number is wanted"),
    "weights twice": (["--image", "red.png:2", "--weights", "2"], "--weights: given behind the pictures too"),
    "no weights": ([*IMAGE, "--weights", "x"], "--weights: 'x' given, a number is wanted"),
    "scales": ([*IMAGE, "--scale", "0", "1", *IMAGE, "--scale", "0", "1"], "--scale: several of them are for one"),
    "twice": ([*IMAGE, "--mask", "left.png", "--mask", "left.png"], "--mask: given twice for one --image"),
    "adapter": ([*IMAGE, "--image", "drawing.png", "--adapter", "nowhere.bin"], "--adapter nowhere.bin: no such file"),
    "encoders": ([*IMAGE, "--image-encoder", "tiny", "tiny"], "--image-encoder: 2 given, for 1 adapters"),
    "families": ([*IMAGE, "--adapter", "plus", *IMAGE, "--adapter", "sdxl"], "--adapter sdxl is for SDXL"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, folder, monkeypatch):
    flags, message = MISTAKES[name]
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    result = sample(*flags, "--output", "out.png")
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1 and sorted(folder.rglob("*")) == before


def test_a_weight_may_stand_behind_its_picture(folder, tmp_path):
    for name, flags in (("a", ["red.png", "drawing.png:0.5"]), ("b", ["red.png", "drawing.png", "--weights", 1, 0.5])):
        flags = [folder / flag if str(flag).startswith(("red", "drawing")) else flag for flag in flags]
        assert sample("--image", *flags, *FAST, "--output", tmp_path / f"{name}.png").returncode == 0
    assert settings(tmp_path / "a.png")["groups"] == settings(tmp_path / "b.png")["groups"]
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_a_mask_of_another_aspect_is_told(folder, tmp_path):
    result = sample("--image", folder / "red.png", "--mask", folder / "wide.png", *FAST, "--output", tmp_path / "x.png")
    assert result.returncode == 0
    assert "warning: --mask: 64x32 pixels, of another aspect than 64x64, to which it is brought" in result.stderr
