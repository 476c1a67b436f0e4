"""train.py at the command line: what a run leaves behind, how it goes on, what it refuses."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from counterparts import diffusers_unet, listed_once
from PIL import Image
from processes import Started, started, torchrun
from safetensors.torch import load_file, save_file
from test_sample import FAST, sample

from clip import preprocess, tokenize
from ipadapter import Prompt
from training.cache import Cache
from training.data import open_pairs
from training.features import Encoders, Prepared
from training.pairs import BadSample
from training.recipes import TINY_RUN
from weights import load_adapter, load_image_encoder, open_base

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train.py"
WEIGHTS = ROOT / "tiny/weights"
DRAWINGS = str(ROOT / "tiny/data/unseen-things-00000.tar.gz")
QUICK = ["--resolution", "64", "--batch-size", "2", "--steps", "2", "--validate-every", "0", "--device", "cpu"]


def train(*flags: object) -> subprocess.CompletedProcess:
    """Run the script in this process: starting Python and torch anew each time would take minutes in all."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    with patch.object(sys, "argv", ["train.py", *map(str, flags)]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def state(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint: adapter, averages, moments of the optimiser, all in fp32."""
    return load_file(max((run / "checkpoints").glob("*.safetensors")))


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def wait_for_step(step: int, run: Path, process: Started) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def same(a: Path, b: Path) -> bool:
    ours, theirs = state(a), state(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawings with captions."""
    folder = tmp_path_factory.mktemp("data")
    pairs = open_pairs(DRAWINGS)
    for i in range(8):
        pairs[i].image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(pairs[i].text)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data, cache) -> Path:
    """Six steps, straight through."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    done = train(*QUICK, "--data", data, "--cache", cache, "--output", folder, "--steps", 6, "--save-every", 2)
    assert done.returncode == 0, done.stderr
    assert "201,024 trainable parameters, 8 pairs" in done.stderr
    return folder


# What a run leaves behind


def test_a_run_is_a_folder(run, data):
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    kept = {f"checkpoints/{step:08d}.safetensors" for step in (4, 6)}
    assert names == kept | {"adapter.safetensors", "curve.png", "log.jsonl", "settings.json", "skipped.txt"}
    lines = log(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() == {"step", "loss", "lr", "seconds", "skipped"} for line in lines)
    assert all(0 < line["loss"] < 1 and line["skipped"] == 0 for line in lines)
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(lines))
    settings = json.loads((run / "settings.json").read_text())
    assert settings["steps"] == 6 and settings["learning_rate"] == 2e-3 and settings["data"] == [str(data)]
    assert len(settings["base (sha256)"]) == 64


def test_the_adapter_is_read_by_sample_and_by_diffusers(run, tmp_path):
    """In the released layout: our loader takes it, and their UNet with it gives what ours gives."""
    adapter = load_adapter(run / "adapter.safetensors")
    base = open_base(WEIGHTS / "sd-tiny.safetensors")
    unet = base.unet()
    theirs = diffusers_unet(unet)
    state = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(run / "adapter.safetensors").items():
        part, name = key.split(".", 1)
        state[part][name] = value.float()
    with listed_once(theirs):
        theirs._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    torch.manual_seed(0)
    x, text, patches = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64), torch.randn(1, 65, 128)
    with torch.no_grad():
        ours = unet(x, torch.tensor(500), Prompt(text, (adapter.prompt(adapter.image_proj(patches)),)))
        wanted = theirs(x, 500, text, added_cond_kwargs={"image_embeds": [patches[:, None]]}).sample
    assert (ours - wanted).norm() / wanted.norm() < 1e-5
    flags = ["--image", ROOT / "tiny/example.png", *FAST, "--output", tmp_path / "x.png"]
    done = sample("--adapter", run / "adapter.safetensors", *flags)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation pictures in a few steps; how many there are in earnest is seen beside `held_out`."""
    monkeypatch.setattr("training.validation.STEPS", 4)


def test_validation_and_curve_are_pictures(tmp_path, data, cache, sketched):
    flags = ["--data", data, "--cache", cache, "--output", tmp_path / "run", "--validate-every", 1]
    done = train(*QUICK, *flags)
    assert done.returncode == 0, done.stderr
    assert "held_out" not in (tmp_path / "run/log.jsonl").read_text()  # these are trained on
    strips = sorted((tmp_path / "run/validation").iterdir())
    assert [path.name for path in strips] == ["00000001.png", "00000002.png"]
    sizes = {Image.open(path).size for path in strips}
    assert sizes == {(6 * 64, 64)}
    first, second = (np.asarray(Image.open(path)).astype(int) for path in strips)
    assert 0 < abs(first - second).mean() < 30  # the same noise, another adapter
    assert Image.open(tmp_path / "run/validation.png").width > 3 * 64
    assert np.asarray(Image.open(tmp_path / "run/curve.png").convert("L")).min() == 0


def test_the_loss_of_pictures_held_out_is_logged_shown_and_drawn(tmp_path, data, cache, monkeypatch):
    flags = [*QUICK, "--data", data, "--cache", cache, "--output", tmp_path / "run", "--validate-every", 2]
    done = train(*flags, "--validation", data / "0.png", "--limit", 6)
    assert done.returncode == 2 and "a picture; give its folder" in done.stderr
    others = copy_pairs(data, tmp_path / "others", (6, 7))
    text = "red apple, noto style"
    done = train(*flags, "--validation", others, "--limit", 6, "--save-every", 2, "--validation-prompt", text)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 2: held-out loss") == 1
    *steps, line = log(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2] and line.keys() == {"step", "held_out", "levels"}
    for name, mean in line["held_out"].items():
        assert mean == pytest.approx(np.mean([level[name] for level in line["levels"]]))
    assert [level["t"] for level in line["levels"]] == [100, 300, 500, 700, 900]
    assert Image.open(tmp_path / "run/curve.png").size == (960, 2 * 480)
    strip = np.asarray(Image.open(tmp_path / "run/validation/00000002.png")).astype(int)
    assert strip.shape == (64, 2 * 64, 3)  # what sample.py draws with the same text
    flags = ["--adapter", tmp_path / "run/adapter.safetensors", "--image", others / "6.png", "--prompt", text]
    flags += ["--scale", 0.6, "--height", 64, "--width", 64, "--steps", 30]
    assert (done := sample(*flags, "--output", tmp_path / "drawn")).returncode == 0, done.stderr
    drawn = np.asarray(Image.open(next((tmp_path / "drawn").glob("*.png")))).astype(int)
    assert abs(strip[:, :64] - drawn).mean() < 1  # the file of the adapter is in fp16
    (tmp_path / "run/validation/00000002.png").unlink()  # as if it had been killed before they were drawn
    monkeypatch.setattr("training.validation.STEPS", 4)
    done = train("--output", tmp_path / "run", "--resume", "--steps", 3)
    assert done.returncode == 0 and (tmp_path / "run/validation/00000002.png").exists(), done.stderr
    assert [("held_out" in line, line["step"]) for line in log(tmp_path / "run")] == [
        *[(False, 1), (False, 2), (True, 2), (False, 3), (True, 3)]
    ]


class Board:
    """A stand-in for the writers of TensorBoard and wandb."""

    made: ClassVar[list["Board"]] = []

    def __init__(self, *given: object, **how: object):
        self.given, self.how, self.got, self.closed = given, how, [], False
        Board.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.got.append((step, name, value))

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        self.got.append((step, name, (picture.shape[2], dataformats)))

    def flush(self) -> None:
        pass

    def log(self, values: dict, step: int) -> None:
        self.got += [(step, name, value) for name, value in values.items()]

    def close(self) -> None:
        self.closed = True

    finish = close


def test_tensorboard_and_wandb_get_what_the_log_gets(tmp_path, data, cache, sketched):
    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.init, wandb.Image = Board, Board, lambda picture: picture.mode
    flags = [*QUICK, "--data", data, "--cache", cache, "--output", tmp_path / "run", "--save-every", 1]
    with patch.dict(sys.modules, {"torch.utils.tensorboard": tensorboard, "wandb": wandb}):
        Board.made.clear()
        done = train(*flags, "--validate-every", 2, "--log", "tensorboard", "wandb")
        assert done.returncode == 0, done.stderr
        assert train("--output", tmp_path / "run", "--resume", "--steps", 3).returncode == 0
    first, second, *again = Board.made
    numbers = [(line["step"], key, line[key]) for line in log(tmp_path / "run") for key in ("loss", "lr")]
    assert first.got == [*numbers[:4], (2, "validation", (3, "HWC"))]
    assert second.got == [*numbers[:4], (2, "validation", "RGB")]
    assert (first.given, first.how["purge_step"]) == ((str(tmp_path / "run/tensorboard"),), 1)
    assert second.how["config"]["steps"] == 2 and second.how["dir"] == str(tmp_path / "run")
    assert all(board.got[:2] == numbers[4:] and board.closed for board in again) and first.closed and second.closed
    assert again[0].how["purge_step"] == 3 and again[1].how["id"] == second.how["id"]  # gone on with


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_log_that_is_not_installed_is_one_line(tmp_path, data, name, module):
    with patch.dict(sys.modules, {module: None}):
        done = train(*QUICK, "--data", data, "--output", tmp_path / "run", "--log", name)
    assert done.returncode == 2 and re.fullmatch(
        rf"--log {name}: not installed \(.*\): pip install {name}\n", done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_a_faceid_adapter_with_all_that_can_be_asked_for(tmp_path, data):
    """Its run goes on with its own optimiser alone; sample.py reads what it wrote; a bad embedding is left out and named."""
    rows = []
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).normal(size=512 if i < 3 else 100))
        embedding = str(tmp_path / f"{i}.npy")
        rows.append({"image_file": f"{i}.png", "text": "a drawing", "id_embed_file": embedding})
    (tmp_path / "list.json").write_text(json.dumps(rows))
    recipe = ["--optimizer", "adafactor", "--loss", "min-snr", "--noise-offset", 0.1, "--storage", "float16"]
    flags = [*QUICK, "--data", tmp_path / "list.json", "--data-root", data, "--kind", "faceid-plusv2", *recipe]
    assert train(*flags, "--output", tmp_path / "a", "--steps", 2).returncode == 0
    assert "3.npy: of shape (100,)" in (tmp_path / "a/skipped.txt").read_text()
    assert train(*flags, "--output", tmp_path / "b", "--steps", 1).returncode == 0
    done = train("--output", tmp_path / "b", "--resume", "--steps", 2, "--optimizer", "adamw")
    assert done.returncode == 2 and "another optimizer (adafactor; now adamw)" in done.stderr
    assert train("--output", tmp_path / "b", "--resume", "--steps", 2).returncode == 0
    assert same(tmp_path / "a", tmp_path / "b")
    made = ["--image", data / "0.png", "--face-embedding", tmp_path / "0.npy", *FAST, "--output", tmp_path / "x.png"]
    done = sample("--adapter", tmp_path / "a/adapter.safetensors", "--faceid-v2", *made)
    assert done.returncode == 0, done.stderr


# One result, however it is come by


def test_killed_at_any_moment_and_resumed_it_ends_bit_for_bit_the_same(run, data, cache, tmp_path):
    flags = [*QUICK, "--data", data, "--cache", cache, "--output", tmp_path / "run", "--steps", 6, "--save-every", 2]
    process = started(SCRIPT, *flags)
    wait_for_step(3, tmp_path / "run", process)
    process.send_signal(signal.SIGKILL)
    assert process.ended().returncode == -signal.SIGKILL
    assert Image.open(tmp_path / "run/curve.png").size == (960, 480)  # as of the checkpoint: a run can be watched
    done = train(*flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "run", run)
    strip = [{key: line[key] for key in ("step", "loss", "lr", "skipped")} for line in log(tmp_path / "run")]
    assert strip == [{key: line[key] for key in ("step", "loss", "lr", "skipped")} for line in log(run)]


def test_ctrl_c_ends_behind_the_step_and_loses_nothing(run, data, cache, tmp_path):
    flags = [*QUICK, "--data", data, "--cache", cache, "--output", tmp_path / "run", "--steps", 6]
    process = started(SCRIPT, *flags)
    wait_for_step(1, tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    done = process.ended()
    assert done.returncode == 130
    assert "--resume goes on behind step" in done.stderr and "Traceback" not in done.stderr
    assert 1 <= len(log(tmp_path / "run")) < 6 and (tmp_path / "run/curve.png").exists()
    assert train(*flags, "--resume").returncode == 0
    assert same(tmp_path / "run", run)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, data, cache, tmp_path):
    flags = [*QUICK, "--data", data, "--cache", cache, "--output", tmp_path / "run", "--save-every", 2]
    assert train(*flags, "--steps", 4).returncode == 0
    newest = tmp_path / "run/checkpoints/00000004.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1  # one bit of one weight
    newest.write_bytes(content)
    done = train(*flags, "--steps", 6, "--resume")
    assert done.returncode == 0, done.stderr
    assert "00000004.safetensors: damaged" in done.stderr and "the checkpoint before it" in done.stderr
    assert same(tmp_path / "run", run)


def test_cached_or_not_and_with_workers_it_is_the_same_run(run, data, tmp_path):
    flags = [*QUICK, "--data", data, "--steps", 6, "--output"]
    assert train(*flags, tmp_path / "live").returncode == 0
    assert train(*flags, tmp_path / "workers", "--workers", 2).returncode == 0
    ours, cached, workers = (state(path) for path in (tmp_path / "live", run, tmp_path / "workers"))
    assert all(torch.equal(ours[key], workers[key]) for key in ours)
    # encoded two at a time or eight at a time: the same but for rounding
    assert all(
        torch.allclose(ours[key], cached[key], rtol=1e-3, atol=2e-5) for key in ours if key.startswith("adapter.")
    )


def test_two_processes_give_the_weights_of_one(data, cache, tmp_path):
    flags = [*QUICK, "--data", data, "--cache", cache, "--steps", 3, "--learning-rate", 1e-4]
    assert train(*flags, "--batch-size", 4, "--output", tmp_path / "one").returncode == 0
    torchrun(2, SCRIPT, *flags, "--batch-size", 2, "--output", tmp_path / "two")
    one, two = (
        torch.cat([v.flatten() for k, v in sorted(state(tmp_path / x).items()) if k.startswith("adapter.")])
        for x in ("one", "two")
    )
    assert (one - two).norm() / one.norm() < 1e-5
    # and the run goes on in one process
    assert train(*flags, "--batch-size", 4, "--output", tmp_path / "two", "--steps", 4, "--resume").returncode == 0
    assert [line["step"] for line in log(tmp_path / "two")] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_other_kinds_and_going_on_from_an_adapter(data, tmp_path, kind):
    done = train(*QUICK, "--data", data, "--steps", 1, "--kind", kind, "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    done = train(
        *QUICK,
        "--data",
        data,
        "--steps",
        1,
        "--adapter",
        tmp_path / "a/adapter.safetensors",
        "--output",
        tmp_path / "b",
    )
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / x / "adapter.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    moved = [(first[key].float() - second[key].float()).abs().max().item() for key in first]
    assert 0 < max(moved) < 0.01


# The cache


def test_the_cache_holds_what_the_encoders_make(run, data, cache):
    """Encoded one by one, here, by hand."""
    notes = json.loads((cache / "cache.json").read_text())
    base, pairs = open_base(WEIGHTS / "sd-tiny.safetensors"), open_pairs(data)
    found = Cache(cache, notes, pairs.identities())
    assert found.missing() == []
    vae, text, image = base.vae(), base.text(), load_image_encoder(WEIGHTS / "clip-tiny.safetensors")
    for i in (0, 7):
        features = found.take(i, 0)
        assert features.keys() == {"mean", "std", "text", "image"}
        small = np.asarray(pairs[i].image.resize((64, 64), Image.Resampling.BILINEAR))
        with torch.no_grad():
            mean, logvar = vae.moments(torch.tensor(small).permute(2, 0, 1)[None] / 127.5 - 1)
            wanted = {
                "mean": 0.18215 * mean[0],
                "std": 0.18215 * logvar[0].exp().sqrt(),
                "text": text(tokenize(pairs[i].text))[0],
                "image": image.penultimate(preprocess(pairs[i].image, 128))[0],
            }
        for key, value in wanted.items():
            assert torch.allclose(features[key], value, atol=1e-4), key


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def copy_pairs(data: Path, folder: Path, numbers: Iterable[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        for suffix in ("png", "txt"):
            (folder / f"{i}.{suffix}").write_bytes((data / f"{i}.{suffix}").read_bytes())
    return folder


def test_a_cache_grows_with_the_data(data, run, tmp_path):
    """Pairs that come before, behind, or with another caption: what was made stays and serves, what is new is made."""
    grown, cache = copy_pairs(data, tmp_path / "grown", range(2, 6)), tmp_path / "cache"
    flags = [*QUICK, "--steps", 2, "--cache", cache, "--data", grown]
    assert train(*flags, "--output", tmp_path / "a").returncode == 0
    before = held(cache)
    copy_pairs(data, grown, (0, 1, 6, 7))
    done = train(*flags, "--output", tmp_path / "b")
    assert done.returncode == 0 and "4/4" in done.stderr, done.stderr
    after = held(cache)
    assert len(before) == 1 and len(after) == 2 and before.items() < after.items()
    losses = [[line["loss"] for line in log(folder)][:2] for folder in (tmp_path / "b", run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # as of eight pairs made at once
    (grown / "3.txt").write_text("a drawing of something else")
    done = train(*flags, "--output", tmp_path / "c")
    assert done.returncode == 0 and "1/1" in done.stderr
    assert len(held(cache)) == 3 and after.items() < held(cache).items()
    done = train(*flags, "--output", tmp_path / "d", "--limit", 3)
    assert done.returncode == 0 and len(held(cache)) == 3


def test_a_damaged_file_of_the_cache_is_named(data, cache, run, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    flags = [*QUICK, "--data", data, "--cache", tmp_path / "cache", "--output", tmp_path / "x"]
    done = train(*flags)
    assert done.returncode == 2 and f"{file}: damaged or cut short" in done.stderr
    file.unlink()
    assert train(*flags).returncode == 0 and held(tmp_path / "cache").keys() == held(cache).keys()


def test_several_captions_in_the_cache(data, tmp_path):
    """Each picture has its own again; equal ones are kept once; a picture without any has the empty one."""
    captions = [["x", "y"], "x", ["z", "y", "x"]]
    entries = [{"image_file": f"{i}.png", "text": texts} for i, texts in enumerate(captions)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/7.png").write_bytes((data / "7.png").read_bytes())
    (tmp_path / "bare/8.png").write_bytes(b"no picture")
    pairs = open_pairs([tmp_path / "list.json", tmp_path / "bare"], data, uncaptioned=True)
    base = open_base(WEIGHTS / "sd-tiny.safetensors")
    encoders = Encoders(
        base.vae(), base.text_encoder(), load_image_encoder(WEIGHTS / "clip-tiny.safetensors"), patches=False
    )
    prepared = Prepared(pairs, len(pairs), 64, 128)
    cache = Cache(tmp_path / "cache", {}, prepared.identities())
    cache.begin(prepared, encoders.null())
    assert [len(bad) for bad in cache.fill(cache.missing(), encoders, prepared, workers=0)] == [0, 0, 0, 0, 1]
    cache.find()
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    assert load_file(file)["text"].shape[0] == 4  # x, y, z and ""
    for i, texts in enumerate((["x", "y"], ["x"], ["z", "y", "x"], [""])):
        wanted = encoders.texts(tokenize(texts))["text"]
        assert torch.allclose(cache[i]["text"], wanted, atol=1e-5)
        for place in range(7):
            assert torch.allclose(cache.take(i, place)["text"], wanted[place % len(texts)], atol=1e-5)
            assert torch.equal(prepared.take(i, place)["tokens"], tokenize(texts[place % len(texts)])[0])
    with pytest.raises(BadSample, match=r"8\.png: not a picture"):
        cache.take(4, 0)


def test_a_cache_made_by_other_models_or_settings_is_refused(data, cache, run, tmp_path):
    done = train(*QUICK, "--data", data, "--cache", cache, "--kind", "base", "--output", tmp_path / "x")
    assert done.returncode == 2 and "made with another features (patches; now embedding)" in done.stderr
    done = train(*QUICK, "--data", data, "--cache", cache, "--resolution", 32, "--output", tmp_path / "x")
    assert done.returncode == 2 and "another resolution (64; now 32)" in done.stderr


def test_a_cache_that_does_not_fit_on_the_disk_is_refused_before_it_is_begun(data, tmp_path):
    full = type("Usage", (), {"free": 1000})
    with patch.object(shutil, "disk_usage", lambda path: full):
        done = train(*QUICK, "--data", data, "--cache", tmp_path / "c", "--output", tmp_path / "x")
    assert done.returncode == 2 and "GB are needed for 8 pairs" in done.stderr
    assert not list((tmp_path / "c").iterdir())


def test_bad_pairs_are_left_out_counted_and_named(data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes((data / f"{i}.png").read_bytes())
        (folder / f"{i}.txt").write_text("x")
    (folder / "1.png").write_bytes((data / "1.png").read_bytes()[:300])
    (folder / "3.png").write_bytes((data / "3.png").read_bytes())  # no caption
    for extra in ([], ["--cache", tmp_path / "cache"]):
        out = tmp_path / f"run{len(extra)}"
        done = train(*QUICK, "--data", folder, "--output", out, "--steps", 3, *extra)
        assert done.returncode == 0, done.stderr
        noted = (out / "skipped.txt").read_text()
        assert "3.png: no caption" in noted
        assert "1.png" in noted and "damaged or cut short" in noted
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no picture")
    done = train(*QUICK, "--data", folder, "--output", tmp_path / "none")
    assert done.returncode == 2 and "none of the 3 pairs can be used" in done.stderr
    done = train(*QUICK, "--data", data, "--output", tmp_path / "none", "--steps", 1)
    assert done.returncode == 0, done.stderr  # what never made a step is no run, and in nobody's way


def test_what_is_left_out_and_what_has_no_caption_is_said(data, tmp_path):
    folder = copy_pairs(data, tmp_path / "data", range(4))
    (folder / "1.txt").unlink()
    done = train(*QUICK, "--data", folder, "--output", tmp_path / "some", "--steps", 1)
    assert f"1 left out of the data; the first: {folder}/1.png: no caption" in done.stderr and "3 pairs" in done.stderr
    for path in folder.glob("*.txt"):
        path.unlink()
    done = train(*QUICK, "--data", folder, "--output", tmp_path / "none", "--steps", 1)
    assert f"4 pictures have no caption; their text is empty; the first: {folder}/0.png" in done.stderr, done.stderr
    assert done.returncode == 0 and "4 pairs" in done.stderr and "left out" not in done.stderr


def test_a_run_goes_on_with_the_same_data_wherever_they_lie_and_not_with_others(data, tmp_path):
    folder, flags = copy_pairs(data, tmp_path / "data", range(4)), [*QUICK, "--output", tmp_path / "run"]
    assert train(*flags, "--data", folder, "--steps", 1).returncode == 0
    folder = folder.rename(tmp_path / "moved")
    assert train(*flags, "--data", f"{folder}/", "--steps", 2, "--resume").returncode == 0
    copy_pairs(data, folder, [7])
    done = train(*flags, "--steps", 3, "--resume")
    assert done.returncode == 2 and "has another data (pairs) (4; now 5)" in done.stderr
    for suffix in ("png", "txt"):
        (folder / f"3.{suffix}").unlink()
    done = train(*flags, "--steps", 3, "--resume")
    assert done.returncode == 2 and "has another data (sha256)" in done.stderr


# Mistakes


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--batch-size", "0"], "--batch-size: '0' given, a whole number, 1 or more, is wanted"),
        (["--steps", "0"], "--steps: '0' given"),
        (["--learning-rate", "nan"], "--learning-rate: 'nan' given, a number, 0 or more, is wanted"),
        (["--drop-text", "1.5"], "--drop-text: '1.5' given, a number from 0 to 1 is wanted"),
        (
            ["--drop-text", "0.9", "--drop-image", "0.2"],
            "--drop-text, --drop-image and --drop-both: more than 1 in all",
        ),
        (["--resolution", "100"], "--resolution: 100 given, a multiple of 8 is wanted"),
        (["--kind", "other"], "--kind: invalid choice: 'other'"),
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "none-*.tar"], "none-*.tar: matches nothing"),
        (["--base", "x.safetensors"], "--data is wanted beside --base"),
        (["--base", str(ROOT / "tiny/weights/sd-tiny.safetensors"), "--data", "d"], "--image-encoder is wanted beside"),
        (["--adapter", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--resume"], "holds no run to go on with"),
        # Told by the names alone, before anything is fetched.
        (["--base", "sdxl", "--adapter", "plus", "--data", "d"], "--adapter plus is for SD 1.x, --base sdxl is SDXL"),
        (["--base", "sd21", "--data", "d"], "--base sd21: no adapter is published for SD 2.x: --image-encoder FILE"),
        (
            ["--adapter", "faceid-plus", "--data", DRAWINGS],
            "no face embeddings, which an adapter of the kind faceid-plus",
        ),
        (["--kind", "faceid", "--data", DRAWINGS], "no face embeddings, which an adapter of the kind faceid reads"),
        (
            ["--kind", "faceid", "--image-encoder", "tiny"],
            "--image-encoder: an adapter of the kind faceid reads faces alone",
        ),
        (["--optimizer", "adamw8bit"], "--optimizer adamw8bit: not installed"),
        (["--storage", "float16", "--compile"], "--storage and --compile: one of them"),
        (["--noise-offset", "-1"], "--noise-offset: '-1' given, a number, 0 or more, is wanted"),
        (["--adapter", "plus"], "--data is wanted beside --adapter plus, which brings another base"),
        (["--base", "sd15", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", DRAWINGS, "--validation", "nowhere"], "nowhere: no such file or folder"),
        (["--log", "visdom"], "--log: invalid choice: 'visdom'"),
        (["--schedule", "step"], "--schedule: invalid choice: 'step'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, flags, wanted):
    done = train("--output", tmp_path / "run", *flags)
    assert done.returncode == 2
    assert wanted in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_not_overwritten(run, data):
    before = state(run)
    done = train(*QUICK, "--data", data, "--output", run)
    assert done.returncode == 2 and "holds a run already; go on with it by --resume" in done.stderr
    assert all(torch.equal(value, before[key]) for key, value in state(run).items())


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--kind", "base"], "has another kind (full-face; now base)"),
        (["--optimizer", "adafactor"], "has another optimizer (adamw; now adafactor)"),
        (["--seed", "1"], "has another seed (0; now 1)"),
        (["--resolution", "32"], "has another resolution (64; now 32)"),
        (["--image-encoder", "other.safetensors"], "has another image_encoder (sha256)"),
        (["--data", DRAWINGS], "has another data"),
        (["--steps", "3"], "is at step 6 already"),
    ],
)
def test_another_run_is_not_gone_on_with(run, data, cache, tmp_path, flags, wanted):
    if "other.safetensors" in flags:
        other = load_file(WEIGHTS / "clip-tiny.safetensors")
        save_file({key: value + 0.1 for key, value in other.items()}, tmp_path / "other.safetensors")
        flags = [flags[0], tmp_path / flags[1]]
    done = train(*QUICK, "--data", data, "--cache", cache, "--output", run, "--resume", *flags)
    assert done.returncode == 2 and wanted in done.stderr, done.stderr
    assert len(log(run)) == 6


def test_a_loss_that_stays_infinite_ends_the_run_and_keeps_the_state_before(data, cache, run, tmp_path):
    flags = [*QUICK, "--data", data, "--output", tmp_path / "run"]
    assert train(*flags, "--cache", cache, "--steps", 2).returncode == 0
    bad = tmp_path / "cache"
    bad.mkdir()
    for path in cache.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    (file,) = bad.glob("*.safetensors")
    broken = load_file(file)
    save_file(broken | {"mean": broken["mean"] * torch.inf}, file, {"notes": "{}"})
    before = state(tmp_path / "run")
    done = train(*flags, "--cache", bad, "--steps", 20, "--save-every", 1, "--resume")
    assert done.returncode == 2 and "for the 5th time in a row" in done.stderr
    assert [line["skipped"] for line in log(tmp_path / "run")] == [0, 0, 1, 2, 3, 4, 5]
    assert all(torch.equal(value, before[key]) for key, value in state(tmp_path / "run").items())


def test_what_is_not_said_anew_is_as_it_was(data, cache, tmp_path):
    flags = [*QUICK, "--data", data, "--cache", cache, "--learning-rate", "3e-4", "--drop-image", "0.1", "--ema", "0.5"]
    assert train(*flags, "--output", tmp_path / "run").returncode == 0
    before = json.loads((tmp_path / "run/settings.json").read_text())
    done = train("--resume", "--steps", 3, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/settings.json").read_text()) == before | {"steps": 3}
    assert [line["lr"] for line in log(tmp_path / "run")][-1] == pytest.approx(3e-4 * 3 / 21)
    finished = train("--resume", "--output", tmp_path / "run")
    assert finished.returncode == 0 and (tmp_path / "run/adapter.safetensors").exists()


def test_a_signal_to_the_whole_group_spares_the_workers(data, tmp_path):
    """As torchrun and schedulers send it."""
    flags = [*QUICK, "--data", data, "--output", tmp_path / "run", "--steps", 2000, "--workers", 1]
    process = started(SCRIPT, *flags, session=True)
    wait_for_step(2, tmp_path / "run", process)
    os.killpg(process.process.pid, signal.SIGTERM)
    done = process.ended()
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


@pytest.mark.parametrize(
    "name, content, wanted",
    [("settings.json", "{", "settings.json: damaged"), ("settings.json", "[1]", "settings.json: damaged")],
)
def test_damaged_notes_are_one_line(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content)
    done = train("--resume", "--output", tmp_path)
    assert done.returncode == 2 and wanted in done.stderr and done.stderr.count("\n") == 1


def test_places_that_cannot_be_written_to(data, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        done = train(*QUICK, "--data", data, "--output", path)
        assert done.returncode == 2 and "cannot write there" in done.stderr
    done = train(*QUICK, "--data", data, "--output", tmp_path / "run", "--cache", tmp_path / "file")
    assert done.returncode == 2 and f"--cache {tmp_path / 'file'}" in done.stderr


@pytest.mark.parametrize("flag", ["--base", "--vae", "--image-encoder"])
def test_missing_models_are_one_line(tmp_path, data, flag):
    others = {"--base": WEIGHTS / "sd-tiny.safetensors", "--image-encoder": WEIGHTS / "clip-tiny.safetensors"}
    given = [part for pair in (others | {flag: tmp_path / "nope"}).items() for part in pair]
    done = train(*QUICK, "--data", data, "--output", tmp_path / "run", *given)
    assert done.returncode == 2 and str(tmp_path / "nope") in done.stderr and done.stderr.count("\n") == 1


def test_a_thin_picture_is_left_out(data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (1, 30000)).save(folder / "thin.png")
    (folder / "good.png").write_bytes((data / "0.png").read_bytes())
    for name in ("thin", "good"):
        (folder / f"{name}.txt").write_text("x")
    done = train(*QUICK, "--data", folder, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "thin: a picture of 1 x 30000, too thin" in (tmp_path / "run/skipped.txt").read_text()


def test_a_plain_run_takes_what_suits_the_tiny_model_and_data_given_are_taken_whole():
    parse = runpy.run_path(str(ROOT / "train.py"))["parse"]
    for flags in ([], ["--data", "x"]):
        with patch.object(sys, "argv", ["train.py", *flags]):
            args = vars(parse())
        follows = {"data", "validation", "limit"} if flags else set()
        assert {name: args[name] for name in TINY_RUN if name not in follows} == {
            name: value for name, value in TINY_RUN.items() if name not in follows
        }
        assert not flags or (args["data"], args["validation"], args["limit"]) == (["x"], None, None)


def test_the_same_seed_gives_the_same_weights(run, data, cache, tmp_path):
    flags = [*QUICK, "--data", data, "--cache", cache, "--steps", 6, "--output", tmp_path / "again"]
    assert train(*flags).returncode == 0
    assert same(tmp_path / "again", run)
