"""sample.py at the command line: what it makes, what it says, what it refuses."""

import errno
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from processes import started
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "tiny/weights"
FAST = ["--steps", "2", "--height", "64", "--width", "64"]


def sample(*flags: object) -> subprocess.CompletedProcess:
    """Run the script in this process: starting Python and torch anew each time would take minutes in all."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["sample.py", *map(str, flags)]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (100, 80), "red").save(path)
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("first")
    command = [sys.executable, str(ROOT / "sample.py")]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_no_flags_makes_a_picture_in_outputs_and_says_how_to_go_on(first):
    folder, result = first
    assert result.returncode == 0, result.stderr
    made = list((folder / "outputs").iterdir())
    assert [path.name for path in made] == ["00000.png"]
    assert Image.open(made[0]).size == (128, 128)
    assert result.stdout.strip() == "outputs/00000.png"
    assert "python sample.py --image" in result.stderr and "50/50" in result.stderr


@pytest.mark.slow
def test_the_picture_shows_the_image_prompt(first):
    """Of all bundled unseen drawings, the result's nearest 16x16 thumbnail is among the closest to the prompt's own."""
    from tiny import drawings

    data = drawings.load("unseen-drawings", limit=200)
    result = torch.from_numpy(pixels(first[0] / "outputs/00000.png")).permute(2, 0, 1)[None]
    example = torch.from_numpy(pixels(ROOT / "tiny/example.png")).permute(2, 0, 1)[None]

    def thumbnail(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x.float(), size=16, mode="area").flatten(1)

    candidates = torch.cat([thumbnail(example), thumbnail(data.pixels)])
    distances = torch.cdist(thumbnail(result), candidates)[0]
    assert (distances < distances[0]).sum() <= 5  # by chance about 100


@pytest.mark.slow
def test_settings_in_the_png_repeat_the_picture(first, tmp_path):
    path = first[0] / "outputs/00000.png"
    settings = json.loads(Image.open(path).text["ipadapter"])
    assert settings["seed"] == 0 and settings["steps"] == 50 and settings["scale"] == 1.0
    assert len(settings["sha256"]) == 4 and all(len(value) == 64 for value in settings["sha256"].values())
    again = tmp_path / "again.png"
    flags = [
        f"--{name.replace('_', '-')}={settings[name]}"
        for name in ("steps", "guidance_scale", "height", "width", "seed")
    ]
    assert (
        sample("--image", *settings["image"], "--scale", settings["scale"], *flags, "--output", again).returncode == 0
    )
    assert (pixels(again) == pixels(path)).all()


@pytest.mark.slow
def test_scale_zero_is_the_text_only_picture(tmp_path, red):
    assert sample("--prompt", "a rocket", "--output", tmp_path / "text.png", *FAST).returncode == 0
    flags = ["--image", red, "--prompt", "a rocket", "--scale", 0, "--output", tmp_path / "zero.png", *FAST]
    assert sample(*flags).returncode == 0
    assert (pixels(tmp_path / "text.png") == pixels(tmp_path / "zero.png")).all()


@pytest.mark.slow
def test_the_default_scale_is_one_without_text_and_less_with(tmp_path, red):
    for name, flags in (("image", []), ("both", ["--prompt", "a rocket"])):
        assert sample("--image", red, *flags, "--output", tmp_path / f"{name}.png", *FAST).returncode == 0
    scales = [json.loads(Image.open(tmp_path / f"{n}.png").text["ipadapter"])["scale"] for n in ("image", "both")]
    assert scales == [1.0, 0.6]


@pytest.mark.slow
def test_several_images_seeds_and_scales_and_a_sheet(tmp_path, red):
    images = ["--image", red, ROOT / "tiny/example.png"]
    result = sample(*images, "--num-images", 2, "--scale", 0.5, 1, "--grid", "--output", tmp_path / "x.png", *FAST)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x_0.png", "x_1.png", "x_2.png", "x_3.png", "x_grid.png"]
    assert json.loads(Image.open(tmp_path / "x_3.png").text["ipadapter"])["seed"] == 1
    assert Image.open(tmp_path / "x_grid.png").width > 3 * 64
    one = sample(
        *images, "--seed", 1, "--output", tmp_path / "one.png", *FAST
    )  # picture 1 of seed 0 is picture 0 of seed 1
    assert one.returncode == 0
    assert abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "x_3.png")).max() <= 1


@pytest.mark.slow
def test_a_folder_is_numbered_on_and_nothing_is_overwritten(tmp_path, red):
    for _ in range(2):
        assert sample("--image", red, "--output", tmp_path / "new", *FAST).returncode == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["00000.png", "00001.png"]


def test_sizes_that_are_multiples_of_8_but_not_of_64_work(tmp_path):
    size = ["--height", 136, "--width", 88]
    assert sample("--prompt", "a", *FAST, *size, "--output", tmp_path / "x.png").returncode == 0
    assert Image.open(tmp_path / "x.png").size == (88, 136)


def test_a_long_prompt_is_cut_with_a_warning(tmp_path):
    prompt = "word " * 80 + "tail"
    result = sample("--prompt", prompt, "--output", tmp_path / "x.png", *FAST)
    assert result.returncode == 0
    assert "--prompt is longer than 75 tokens" in result.stderr and "tail" in result.stderr


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, red: Path) -> Path:
    """A folder of things that are not what they seem."""
    folder = tmp_path_factory.mktemp("broken")
    base = (WEIGHTS / "sd-tiny.safetensors").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "cut.png").write_bytes((ROOT / "tiny/example.png").read_bytes()[:900])
    (folder / "cut.safetensors").write_bytes(base[: len(base) // 2])
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    (folder / "noise.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "folder.png").mkdir()
    state = load_file(WEIGHTS / "sd-tiny.safetensors")
    sdxl = {f"conditioner.embedders.0.transformer.{key}": torch.zeros(1) for key in ("a", "b")}
    save_file(
        state | sdxl | {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(8, 8)}, folder / "sdxl.safetensors"
    )
    save_file(
        {"cond_stage_model.model.ln_final.weight": torch.zeros(4), "model.diffusion_model.x": torch.zeros(1)},
        folder / "sd2.safetensors",
    )
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, folder / "lora.safetensors")
    save_file(
        {key: v for key, v in state.items() if "input_blocks.1.0.in_layers.0" not in key}, folder / "holes.safetensors"
    )
    adapter = load_file(WEIGHTS / "ip-adapter-tiny.safetensors")
    wide = {k: torch.zeros(v.shape[0], 768) if "ip_adapter." in k else v for k, v in adapter.items()}
    wide |= {"image_proj.proj.weight": torch.zeros(4 * 768, 128), "image_proj.proj.bias": torch.zeros(4 * 768)}
    save_file(
        wide | {"image_proj.norm.weight": torch.zeros(768), "image_proj.norm.bias": torch.zeros(768)},
        folder / "sd15-adapter.safetensors",
    )
    big = {"image_proj.proj.weight": torch.zeros(256, 1280)}
    save_file(adapter | big, folder / "bigg-adapter.safetensors")
    return folder


class Payload:
    def __reduce__(self):
        return (os.system, ("touch ran",))


MISTAKES = {
    "missing picture": (["--image", "nowhere.png"], "nowhere.png: no such picture"),
    "empty picture": (["--image", "empty.png"], "empty.png: the file is empty"),
    "not a picture": (["--image", "text.png"], "text.png: not a picture"),
    "cut picture": (["--image", "cut.png"], "cut.png: the picture is damaged or cut short"),
    "folder as picture": (["--image", "folder.png"], "folder.png: a folder, not a picture"),
    "missing base": (["--prompt", "x", "--base", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    "cut base": (["--prompt", "x", "--base", "cut.safetensors"], "cut.safetensors: damaged or cut short"),
    "web page": (["--prompt", "x", "--base", "page.safetensors"], "page.safetensors: a web page"),
    "noise": (["--prompt", "x", "--base", "noise.safetensors"], "noise.safetensors: neither safetensors nor"),
    "sdxl": (["--prompt", "x", "--base", "sdxl.safetensors"], "SDXL"),
    "sd2": (["--prompt", "x", "--base", "sd2.safetensors"], "SD 2.x"),
    "lora": (["--prompt", "x", "--base", "lora.safetensors"], "a LoRA"),
    "holes": (["--prompt", "x", "--base", "holes.safetensors"], "2 missing: input_blocks.1.0.in_layers.0"),
    "adapter as base": (["--prompt", "x", "--base", WEIGHTS / "ip-adapter-tiny.safetensors"], "this is an IP-Adapter"),
    "base as adapter": (
        ["--adapter", WEIGHTS / "sd-tiny.safetensors"],
        "an IP-Adapter for SD 1.x, SD 2.x or SDXL is wanted here",
    ),
    "base as encoder": (
        ["--image-encoder", WEIGHTS / "sd-tiny.safetensors"],
        "a CLIP image encoder (ViT) is wanted here",
    ),
    "encoder as vae": (["--vae", WEIGHTS / "clip-tiny.safetensors"], "an autoencoder is wanted here"),
    "adapter of another base": (["--adapter", "sd15-adapter.safetensors"], "for SD 1.x (tokens of 768)"),
    "adapter of another encoder": (
        ["--adapter", "bigg-adapter.safetensors"],
        "wants ViT-bigG/14 image embeddings of 1280",
    ),
    "no adapter": (
        ["--base", WEIGHTS / "sd-tiny.safetensors", "--image", ROOT / "tiny/example.png"],
        "--adapter is wanted beside",
    ),
    "nothing to draw": (["--base", WEIGHTS / "sd-tiny.safetensors"], "--image or --prompt is wanted"),
    "size": (["--height", "130"], "--height: 130 given, a multiple of 8 is wanted (the nearest is 128)"),
    "huge": (["--height", "80000000000000000000"], "a whole number, 8 to 16384, is wanted"),
    "no steps": (["--steps", "0"], "--steps: '0' given, a whole number, 1 to 1000, is wanted"),
    "too many steps": (["--steps", "1001"], "--steps: '1001' given"),
    "no number": (["--scale", "one"], "--scale: 'one' given, a number is wanted"),
    "nan": (["--scale", "nan"], "--scale: 'nan' given"),
    "infinite guidance": (["--guidance-scale", "inf"], "--guidance-scale: 'inf' given"),
    "no pictures": (["--num-images", "0"], "--num-images: '0' given"),
    "device": (["--device", "tpu9"], "--device: 'tpu9' cannot be used here"),
    "scale of nothing": (["--prompt", "x", "--scale", "0.5"], "--scale is the weight of an image prompt"),
    "output kind": (
        ["--output", "x.gif"],
        "--output x.gif: a name that ends in .png, .jpg, .jpeg, .webp, or a folder,",
    ),
    "output under a file": (["--output", "text.png/x.png"], "--output text.png/x.png: cannot write there"),
    "unknown flag": (["--steeps", "3"], "unrecognized arguments: --steeps 3; near it --steps"),
    "a flag spelt otherwise": (["--guidance_scale", "3"], "--guidance_scale 3; near it --guidance-scale"),
    "words without marks": (
        ["--prompt", "a", "red", "fox"],
        "red fox; a text of several words stands in quotation marks",
    ),
    "stdout as a folder": (["--prompt", "x", "--output", "-"], "--output -: a name that ends in .png"),
    "a file as a folder": (["--prompt", "x", "--output", "/dev/null"], "(/dev/null is not a folder)"),
    "a file's address": (
        ["--image", "file:///a.png"],
        "file:///a.png: the address of a file; its path alone is wanted",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, broken, monkeypatch):
    flags, message = MISTAKES[name]
    before = sorted(broken.rglob("*"))
    output = ["--output", "out.png"] if "--output" not in flags else []
    monkeypatch.chdir(broken)
    result = sample(*flags, *output)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert sorted(broken.rglob("*")) == before


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    monkeypatch.chdir(tmp_path)
    result = sample("--prompt", "x", "--base", "evil.ckpt")
    assert result.returncode == 2 and "refused, the pickle asks to run code" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_gets_one_line_and_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = sample("--output", tmp_path / "x.png", *FAST)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"{tmp_path / 'x.png'}: cannot write (No space left on device)"
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    process = started(ROOT / "sample.py", "--steps", 1000, "--output", tmp_path / "x.png")
    while "/1000" not in process.err.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    done = process.ended()
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
