"""evaluate.py: its scores against open_clip and transformers, what it makes and keeps, what it refuses."""

import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import open_clip
import pytest
import torch
from counterparts import randomise
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from clip import preprocess
from files.errors import UserError
from sampler import SAMPLERS
from training.data import open_pairs
from training.measures import centre, open_judge
from training.results import find_results, open_folder, result_names
from weights import WeightsError
from weights.clip import load_clip

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "tiny/weights"
FAST = ["--steps", "2", "--num-samples", "1", "--limit", "2"]
SIZES = [(128, 128), (131, 128), (128, 139), (90, 61), (64, 67), (333, 250)]  # some have no middle to crop


def script(name: str, *flags: object) -> subprocess.CompletedProcess:
    """Run a script in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", [name, *map(str, flags)]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def evaluate(*flags: object) -> subprocess.CompletedProcess:
    return script("evaluate.py", *flags)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawings with captions, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sub").mkdir()
    drawings = open_pairs(ROOT / "tiny/data/unseen-drawings-00000.tar.gz")
    for i, size in enumerate(SIZES):
        path = folder / ("sub/5" if i == 5 else str(i))
        drawings[i].image.resize(size).save(f"{path}.png")
        Path(f"{path}.txt").write_text(drawings[i].text + " one drawing of many" * 30 * (i == 4))  # one too long
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Two for most pairs, one for one: other drawings, laid over the prompts."""
    folder, drawings = tmp_path_factory.mktemp("results"), open_pairs(data)
    (folder / "sub").mkdir()
    for i, pair in enumerate(drawings):
        for j in range(2):
            other = drawings[(i + j + 1) % len(drawings)].image.resize(pair.image.size)
            name = pair.name if i == 3 else f"{pair.name}_{j}"
            Image.blend(pair.image, other, 0.4 + 0.2 * j).save(folder / f"{name}.png")
    return folder


def small_open_clip(quick_gelu: bool = False) -> CLIP:
    vision = CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=16, image_size=64)
    return randomise(CLIP(64, vision, CLIPTextCfg(width=128, heads=2, layers=2), quick_gelu=quick_gelu), 11)


def small_transformers(activation: str) -> CLIPModel:
    shared = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    shared |= {"hidden_act": activation}
    text = shared | {"eos_token_id": 49407, "bos_token_id": 49406}
    config = CLIPConfig(
        text_config=text, vision_config=shared | {"image_size": 64, "patch_size": 16}, projection_dim=64
    )
    return randomise(CLIPModel(config), 12)


def saved(model: nn.Module, path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_open_clip(), tmp_path_factory.mktemp("clip") / "clip.safetensors")


# Scores


@torch.no_grad()
def by_hand(model: CLIP, data: Path, results: Path, prefix: str = "") -> list[tuple[float, float, float]]:
    """The two scores of each pair, plainly, one picture at a time, by open_clip alone."""
    transform = open_clip.image_transform(model.visual.image_size, is_train=False)

    def image(path: Path) -> Tensor:
        return normalize(model.encode_image(transform(Image.open(path))[None]), dim=-1)[0]

    rows = []
    for path in sorted(data.rglob("*.png")):
        name = path.relative_to(data).with_suffix("")
        made = sorted([*results.glob(f"{name}.png"), *results.glob(f"{name}_*.png")])
        caption = open_clip.tokenize(prefix + path.with_suffix(".txt").read_text())
        text = normalize(model.encode_text(caption), dim=-1)[0]
        clip_i = [float(image(p) @ image(path)) for p in made]
        clip_t = [float(image(p) @ text) for p in made]
        rows.append((np.mean(clip_i), np.mean(clip_t), np.mean([2.5 * max(cosine, 0) for cosine in clip_t])))
    return rows


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_scores_equal_open_clip(tmp_path, data, results, quick_gelu):
    model, prefix = small_open_clip(quick_gelu), "A photo depicts " if quick_gelu else ""
    file = saved(model, tmp_path / "clip.safetensors")
    flags = ["--clip", file, "--clip-gelu", "quick" if quick_gelu else "erf", "--caption-prefix", prefix]
    run = evaluate("--data", data, "--results", results, *flags, "--output", tmp_path / "x.json")
    assert run.returncode == 0, run.stderr
    found, wanted = json.loads((tmp_path / "x.json").read_text()), by_hand(model, data, results, prefix)
    rows = [(pair["clip_i"], pair["clip_t"], pair["clip_t_x2.5"]) for pair in found["pairs"]]
    assert len(rows) == 6 and np.abs(np.subtract(rows, wanted)).max() <= 1e-5
    assert np.std(wanted, axis=0).min() > 1e-3  # scores that tell something
    for i, key in enumerate(("clip_i", "clip_t", "clip_t_x2.5")):
        values = [row[i] for row in wanted]
        mean, half = np.mean(values), 1.96 * np.std(values, ddof=1) / len(values) ** 0.5
        assert abs(found[key] - mean) <= 1e-5
        assert np.abs(np.subtract(found[f"{key}_interval"], (mean - half, mean + half))).max() <= 1e-5
        assert f"{found[key]:.4f}" in run.stdout
    assert found["n"] == 6 and found["samples"] == 11
    assert found["settings"]["clip"] == str(file) and found["settings"]["made_with"] is None


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_both_towers_equal_transformers(tmp_path, draw, activation):
    model = small_transformers(activation)
    file = saved(model, tmp_path / "clip.safetensors")
    image, text = load_clip(file, quick_gelu=activation == "quick_gelu")
    picture, tokens = draw(2, 3, 64, 64), open_clip.tokenize(["a red apple", "two words, and more"])
    theirs = model(input_ids=tokens, pixel_values=picture)
    assert torch.allclose(normalize(image(picture), dim=-1), theirs.image_embeds, atol=1e-5)
    assert torch.allclose(normalize(text.embed(tokens), dim=-1), theirs.text_embeds, atol=1e-5)


@torch.no_grad()
def test_both_towers_equal_open_clip(clip_file, draw):
    model, (image, text) = small_open_clip(), load_clip(clip_file)
    picture, tokens = draw(2, 3, 64, 64), open_clip.tokenize(["a red apple", "two words, and more"])
    assert torch.allclose(image(picture), model.encode_image(picture), rtol=1e-5, atol=1e-5)
    assert torch.allclose(text.embed(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-5)


def test_a_clip_of_openais_size_has_openais_gelu(tmp_path):
    vision = CLIPVisionCfg(layers=1, width=1024, head_width=64, mlp_ratio=0.1, patch_size=8, image_size=16)
    model = CLIP(8, vision, CLIPTextCfg(width=768, heads=12, layers=1), quick_gelu=True)
    towers = load_clip(saved(model, tmp_path / "clip.safetensors"))
    assert [(tower.config.quick_gelu, tower.config.heads) for tower in towers] == [(True, 16), (True, 12)]


@pytest.mark.parametrize("size", [*SIZES, (227, 224), (37, 500), (224, 227), (64, 64), (1, 3)])
def test_the_crop_is_open_clips(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), dtype=np.uint8))
    theirs = open_clip.image_transform(64, is_train=False)(picture)
    assert (preprocess(centre(picture, 64), 64)[0] - theirs).abs().max() <= 1e-6


def test_a_name_goes_through_open_clip(tmp_path, data, results, clip_file, monkeypatch):
    model, asked = small_open_clip(), []

    def create(*names: str, **rest: object) -> tuple:
        asked.append((names, rest["force_quick_gelu"]))
        return model, open_clip.image_transform(64, is_train=False)

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    flags = ["--data", data, "--results", results, "--output"]
    assert evaluate(*flags, tmp_path / "name.json", "--clip", "ViT-L-14/openai").returncode == 0
    assert evaluate(*flags, tmp_path / "file.json", "--clip", clip_file).returncode == 0
    assert asked == [(("ViT-L-14", "openai"), True)]  # OpenAI's GELU, which the model's name does not say
    name, file = (json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("name", "file"))
    assert abs(name["clip_i"] - file["clip_i"]) <= 1e-5 and abs(name["clip_t"] - file["clip_t"]) <= 1e-5
    assert "same_thing" not in name and "same_style" not in file


def test_the_tiny_clip_knows_whose_caption_it_is(tmp_path, data):
    """The drawings themselves as results: CLIP-I is 1, and a drawing's own caption fits better than the next one's."""
    assert evaluate("--data", data, "--results", data, "--output", tmp_path / "o/x.json").returncode == 0
    found = json.loads((tmp_path / "o/x.json").read_text())
    assert abs(found["clip_i"] - 1) <= 1e-6 and found["clip_t"] > 0.3
    assert (
        abs(found["same_thing"] - 1) <= 1e-6 and found["same_style"] == 1
    )  # by the judge, which comes with the tiny CLIP
    pairs = open_pairs(data)
    for i, pair in enumerate(pairs):
        pair.image.save(tmp_path / f"{i}.png")
    entries = [{"image_file": f"{i}.png", "text": pairs[i - 1].text} for i in range(len(pairs))]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    run = evaluate("--data", tmp_path / "list.json", "--results", tmp_path, "--output", tmp_path / "o/y.json")
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "o/y.json").read_text())["clip_t"] < found["clip_t"] - 0.1


# Making


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("made")
    flags = ["--steps", 2, "--num-samples", 2, "--limit", 2, "--batch-size", 3]
    return folder, evaluate("--data", data, *flags, "--output", folder / "x.json")


def test_it_makes_pictures_scores_them_and_shows_the_best_and_the_worst(made):
    folder, run = made
    assert run.returncode == 0, run.stderr
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "x.json",
        "x.png",
        *(f"x/{i}_{j}.png" for i in range(2) for j in range(2)),
        "x/pictures.json",
    ]
    found = json.loads((folder / "x.json").read_text())
    assert found["n"] == 2 and found["samples"] == 4 and found["skipped"] == []
    assert found["settings"]["steps"] == 2 and found["settings"]["guidance_scale"] == 7.5
    assert found["settings"]["made_with"] == json.loads((folder / "x/pictures.json").read_text())
    assert Image.open(folder / "x.png").width > 4 * 192
    assert run.stdout.splitlines()[-2:] == [str(folder / "x.json"), str(folder / "x.png")]
    assert "4/4" in run.stderr


def test_without_flags_the_settings_are_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise_alone = replace(SAMPLERS["ddim"], run=lambda predict, x, levels, _: [x] if len(levels) == 51 else None)
    monkeypatch.setitem(SAMPLERS, "ddim", noise_alone)
    assert evaluate("--limit", 1).returncode == 0
    settings = json.loads(Path("outputs/evaluate.json").read_text())["settings"]
    wanted = {"steps": 50, "guidance_scale": 7.5, "text": False, "scale": 1.0, "num_samples": 4, "caption_prefix": ""}
    assert {name: settings[name] for name in wanted} == wanted
    assert len(list(Path("outputs/evaluate").glob("*_3.png"))) == 1


def test_its_pictures_are_those_of_sample(made, data, tmp_path):
    for i in range(2):
        flags = ["--image", data / f"{i}.png", "--steps", 2, "--num-images", 2, "--output", tmp_path / f"{i}.png"]
        assert script("sample.py", *flags).returncode == 0
        for j in range(2):
            assert np.abs(pixels(tmp_path / f"{i}_{j}.png") - pixels(made[0] / f"x/{i}_{j}.png")).max() <= 1


def test_pictures_that_exist_score_the_same(made, data, tmp_path):
    flags = ["--data", data, "--limit", 2, "--results", made[0] / "x", "--output", tmp_path / "x.json"]
    assert evaluate(*flags, "--batch-size", 1).returncode == 0
    before, after = (json.loads((folder / "x.json").read_text()) for folder in (made[0], tmp_path))
    for old, new in zip(before["pairs"], after["pairs"], strict=True):
        assert old["name"] == new["name"] and abs(old["clip_i"] - new["clip_i"]) <= 1e-5
    assert after["settings"]["made_with"] == before["settings"]["made_with"] and after["settings"]["steps"] is None


def test_a_second_run_goes_on_where_the_first_stopped(made, data):
    folder, _ = made
    flags = ["--steps", 2, "--num-samples", 2, "--limit", 2, "--batch-size", 3]
    files = sorted((folder / "x").glob("*.png"))
    json_before, before = (folder / "x.json").read_bytes(), [path.stat().st_mtime_ns for path in files]
    run = evaluate("--data", data, *flags, "--output", folder / "x.json")
    assert run.returncode == 0, run.stderr
    assert (folder / "x.json").read_bytes() == json_before
    assert [path.stat().st_mtime_ns for path in files] == before
    gone = pixels(files[1])
    files[1].unlink()  # as if it had been stopped before; alone it goes through the UNet in another batch
    assert evaluate("--data", data, *flags, "--output", folder / "x.json").returncode == 0
    assert np.abs(pixels(files[1]) - gone).max() <= 1
    assert [path.stat().st_mtime_ns for path in files if path != files[1]] == [before[0], *before[2:]]


def test_pictures_made_otherwise_are_not_taken(made, data, tmp_path):
    before = sorted(made[0].rglob("*"))
    run = evaluate("--data", data, *FAST, "--scale", 0.5, "--pictures", made[0] / "x", "--output", tmp_path / "y.json")
    assert run.returncode == 2
    assert run.stderr == (
        f"--pictures {made[0] / 'x'}: made with --scale 1.0, now it is 0.5; "
        "go on with the same settings, or name a new folder\n"
    )
    assert sorted(made[0].rglob("*")) == before and not list(tmp_path.iterdir())
    run = evaluate("--data", data, *FAST, "--pictures", data, "--output", tmp_path / "y.json")
    assert run.returncode == 2 and "holds other files" in run.stderr


def test_a_folder_in_which_nothing_was_made_is_in_nobodys_way(tmp_path):
    open_folder(tmp_path / "x", {"scale": 1.0})
    open_folder(tmp_path / "x", {"scale": 0.5})
    touched(tmp_path, "x/sub/a_0.png")
    with pytest.raises(UserError, match="made with `scale` 0.5, now it is 1.0"):
        open_folder(tmp_path / "x", {"scale": 1.0})


def test_captions_as_text_prompts(made, data, tmp_path):
    assert evaluate("--data", data, *FAST, "--text", "--output", tmp_path / "x.json").returncode == 0
    assert np.abs(pixels(tmp_path / "x/0_0.png") - pixels(made[0] / "x/0_0.png")).max() > 8


# What cannot be used


def test_bad_pairs_are_skipped_counted_and_named(tmp_path, data, results):
    (tmp_path / "d").mkdir()
    (tmp_path / "r").mkdir()
    for i in range(4):
        (tmp_path / f"d/{i}.png").write_bytes((data / f"{i}.png").read_bytes()[: 100 if i == 1 else None])
        (tmp_path / f"d/{i}.txt").write_text("a drawing")
    (tmp_path / "d/3.txt").unlink()
    for i in (0, 1):
        (tmp_path / f"r/{i}_0.png").write_bytes((results / f"{i}_0.png").read_bytes())
    run = evaluate("--data", tmp_path / "d", "--results", tmp_path / "r", "--output", tmp_path / "o/x.json")
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "o/x.json").read_text())
    assert (
        found["n"] == 1
        and found["skipped_count"] == 3
        and found["clip_i_interval"] is None
        and "of one pair: none" in run.stdout
    )
    told = run.stderr.splitlines()[-1]
    for part in ("3.png: no caption", "1.png", "2.png: no such picture"):
        assert part in told and any(part in reason for reason in found["skipped"])


def test_a_picture_without_caption_has_a_clip_i_alone_and_one_with_several_its_first(tmp_path, data, results):
    captions = [(0, "a drawing"), (0, "another"), (1, ["a drawing", "another"])]
    entries = [{"image_file": f"{i}.png", "text": text} for i, text in captions]
    (tmp_path / "several.json").write_text(json.dumps(entries))
    (tmp_path / "single.json").write_text(json.dumps([entries[0], entries[2] | {"text": "a drawing"}]))
    (tmp_path / "none.json").write_text(json.dumps([entry | {"text": None} for entry in entries]))
    found = {}
    for name in ("several", "single", "none"):
        flags = ["--data", tmp_path / f"{name}.json", "--data-root", data, "--results", results]
        run = evaluate(*flags, "--output", tmp_path / f"out/{name}.json")
        assert run.returncode == 0, run.stderr
        found[name] = json.loads((tmp_path / f"out/{name}.json").read_text())
    assert found["several"]["pairs"] == found["single"]["pairs"] and found["several"]["n"] == 2
    assert found["none"]["clip_i"] == pytest.approx(found["single"]["clip_i"])
    assert (found["none"]["clip_t"], found["none"]["pairs"][1]["clip_t_x2.5"]) == (None, None)
    assert "CLIP-T             -    no captions" in run.stdout, run.stdout


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "files, found, left",
    [
        (["a.jpg", "b.WEBP", "b.txt"], {"a": ["a.jpg"], "b": ["b.WEBP"]}, []),
        (["a_00.png", "a_01.png", "a_10.png"], {"a": ["a_00.png", "a_01.png", "a_10.png"]}, []),
        (["a_1.jpeg", "a_3.jpeg", "a_20.jpeg"], {"a": ["a_1.jpeg", "a_3.jpeg", "a_20.jpeg"]}, []),
        (["a/0.png", "a/2.png", "a/x.png"], {"a": ["a/0.png", "a/2.png"]}, ["a/x.png"]),
        (["s/c_4.png", "s/c/x.png", "z.png", "z/0.png"], {"s/c": ["s/c_4.png"]}, ["z.png", "s/c/x.png"]),
        (["d.png", "d_1.png"], {"d": ["d.png"], "d_1": ["d_1.png"]}, []),  # the pair d_1's, not d's
        (["d_0.png", "d_1.png", "d_1_0.png"], {"d": ["d_0.png", "d_1.png"], "d_1": ["d_1_0.png"]}, []),
    ],
)
def test_results_under_other_hands_names(tmp_path, files, found, left):
    names = ["a", "b", "s/c", "d", "d_1"]
    results, others = find_results(touched(tmp_path, *files), names)
    assert {name: [str(p.relative_to(tmp_path)) for p in paths] for name, paths in results.items()} == found
    assert [str(path.relative_to(tmp_path)) for path in others] == left


@pytest.mark.parametrize(
    "file, number",
    [("café-1.png", 1), ("café (2).png", 2), ("café_seed42.png", 42), ("café.jpg.png", -1), ("cafe\u0301_0.png", 0)],
)
def test_results_as_other_programs_number_them(tmp_path, file, number):
    files = [file, "café_sample_7.png"] if number >= 0 else [file]
    found, left = find_results(touched(tmp_path, "._café.png", *files), ["café", "b"])
    assert {path.name for path in found["café"]} == set(files) and not left
    assert found["café"][0].name == (file if number < 7 else "café_sample_7.png")


@pytest.mark.parametrize(
    "files", [["a.png", "a.jpg"], ["a.png", "a_3.png"], ["a_0.png", "a/0.png"], ["a_1.png", "a_01.png"]]
)
def test_two_files_for_one_result_are_refused(tmp_path, files):
    with pytest.raises(UserError, match="both .* and .* are there; which is it"):
        find_results(touched(tmp_path, *files), ["a"])


def test_what_is_not_scored_is_told(tmp_path, data, results):
    for i in range(2):
        picture = Image.open(results / f"{i}_0.png")
        for name in (f"{i}_1.jpg", f"{i}_2.jpg", f"other{i}.png"):
            picture.save(tmp_path / name)
    flags = ["--data", data, "--results", tmp_path, "--limit", 2, "--output", tmp_path / "o/x.json"]
    run = evaluate(*flags, "--num-samples", 1)
    assert run.returncode == 0, run.stderr
    assert f"not scored: 4 pictures in {tmp_path}; the first: {tmp_path / 'other0.png'}" in run.stderr.splitlines()[-1]
    found = json.loads((tmp_path / "o/x.json").read_text())
    assert (found["n"], found["samples"], found["not_scored"], found["skipped"]) == (2, 2, 4, [])
    assert evaluate(*flags).returncode == 0
    again = json.loads((tmp_path / "o/x.json").read_text())
    assert (again["samples"], again["not_scored"]) == (4, 2)
    assert again["clip_i"] == pytest.approx(found["clip_i"], abs=1e-6)  # the same picture twice


def test_only_bad_pairs_are_an_error(tmp_path, data):
    (tmp_path / "r").mkdir()
    run = evaluate("--data", data, "--results", tmp_path / "r", "--output", tmp_path / "x.json")
    assert run.returncode == 2 and not (tmp_path / "x.json").exists()
    assert f"--data {data}: no pair can be scored: {tmp_path / 'r/0.png'}: no such picture" in run.stderr


def test_names_of_results_cannot_leave_the_folder(tmp_path):
    names = ["/etc/x.jpg", "../../y", "a/b.c", "z.png"]
    entries = [{"image_file": name, "text": ""} for name in names]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    Image.new("RGB", (4, 4)).save(tmp_path / "z.png")  # of a list of which nothing is there nothing is made
    found = result_names(open_pairs(tmp_path / "list.json"), None)
    assert found == ["etc/x", "y", "a/b.c", "z"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, data: Path, clip_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    (folder / "cut.safetensors").write_bytes(clip_file.read_bytes()[:5000])
    (folder / "notes.txt").write_text("hello")
    entry = {"image_file": str(data / "0.png"), "text": "x"}
    alike = [entry | {"image_file": name} for name in ("a.png", "a.jpg")]
    (folder / "twice.json").write_text(json.dumps(alike))
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged/pictures.json").write_text("{")
    (folder / "both").mkdir()
    for name in ("0", "0_0"):
        (folder / f"both/{name}.png").write_bytes((data / "0.png").read_bytes())
    model = CLIP(64, CLIPVisionCfg(1, 128, patch_size=16, image_size=64), CLIPTextCfg(50, width=64, layers=1))
    saved(model, folder / "short.safetensors")
    return folder


MISTAKES = {
    "no data": (["--data", "nowhere"], "nowhere"),
    "empty data": (["--data", "empty"], "empty"),
    "data of another kind": (["--data", "notes.txt"], "notes.txt"),
    "one name twice": (["--data", "twice.json"], "two pairs are called"),
    "no results": (["--results", "nowhere"], "--results nowhere: no such folder"),
    "results and a model": (["--results", "empty", "--adapter", "x"], "--adapter: --results makes no pictures"),
    "two kinds of results": (["--results", "both", "--limit", 1], "both 0.png and 0_0.png are there"),
    "unknown clip": (["--clip", "ViT-L-14/openia"], "--clip ViT-L-14/openia: no such file, nor a name"),
    "missing clip": (["--clip", "clip.safetensors"], "--clip clip.safetensors: no such file, nor a name"),
    "cut clip": (["--clip", "cut.safetensors"], "cut.safetensors: damaged or cut short"),
    "half a clip": (["--clip", WEIGHTS / "clip-tiny.safetensors"], "a whole CLIP (ViT), both towers, is wanted here"),
    "short clip": (["--clip", "short.safetensors"], "found spaces of 64 and 64, 50 tokens"),
    "adapter as clip": (["--clip", WEIGHTS / "ip-adapter-tiny.safetensors"], "this is an IP-Adapter"),
    "gelu of a name": (["--clip", "ViT-L-14/openai", "--clip-gelu", "erf"], "--clip-gelu erf: goes with --clip FILE"),
    "clip as base": (
        [
            "--base",
            WEIGHTS / "clip-tiny.safetensors",
            "--adapter",
            WEIGHTS / "ip-adapter-tiny.safetensors",
            "--image-encoder",
            WEIGHTS / "clip-tiny.safetensors",
        ],
        "a base model is wanted here",
    ),
    "faces by name": (["--adapter", "faceid"], "--adapter faceid: a FaceID adapter, it reads faces"),
    "base alone": (["--base", WEIGHTS / "sd-tiny.safetensors"], "--adapter is wanted beside"),
    "base as adapter": (
        ["--adapter", WEIGHTS / "sd-tiny.safetensors"],
        "an IP-Adapter for SD 1.x, SD 2.x or SDXL is wanted here",
    ),
    "damaged settings": (["--pictures", "damaged"], "pictures.json: damaged"),
    "pictures under a file": (["--pictures", "notes.txt/x"], "--pictures notes.txt/x: cannot write there"),
    "output kind": (["--output", "x.txt"], "--output x.txt: a name that ends in .json is wanted"),
    "output under a file": (["--output", "notes.txt/x.json"], "--output notes.txt/x.json: cannot write there"),
    "no samples": (["--num-samples", 0], "--num-samples: '0' given, a whole number, 1 or more, is wanted"),
    "no pairs": (["--limit", 0], "--limit: '0' given"),
    "steps": (["--steps", 1001], "--steps: '1001' given, a whole number, 1 to 1000"),
    "size": (["--height", 130], "--height: 130 given, a multiple of 8 is wanted"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, broken, data, monkeypatch):
    flags, message = MISTAKES[name]
    monkeypatch.chdir(broken)
    before = sorted(broken.rglob("*"))
    given = [] if "--data" in flags else ["--data", data]
    run = evaluate(*given, *flags, *([] if "--output" in flags else ["--output", "out.json"]))
    assert run.returncode == 2, run.stderr
    last = run.stderr.splitlines()[-1]
    assert message in last and "Traceback" not in run.stderr
    assert run.stderr.count("\n") == 1 or "pair/s" in run.stderr  # below a bar
    assert sorted(broken.rglob("*")) == before


def test_a_failed_download_is_one_line(tmp_path, data, monkeypatch):
    def offline(*names: str, **rest: object) -> None:
        raise RuntimeError("Failed to download weights\nfor tag 'openai'")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", offline)
    run = evaluate("--data", data, "--clip", "ViT-L-14/openai", "--output", tmp_path / "x.json")
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "--clip ViT-L-14/openai: open_clip cannot load it (Failed to download weights for tag" in run.stderr


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, data, results, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run = evaluate("--data", data, "--results", results, "--output", tmp_path / "x.json")
    assert run.returncode == 2 and run.stderr.splitlines()[-1].endswith("cannot write (No space left on device)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "index", "TorchScript"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_judge_scores_alike_whatever_it_comes_as(tmp_path, kind):
    """A folder of transformers in shards, or an archive as OpenAI published its models: no config there, but three numbers."""
    if kind == "TorchScript":
        theirs = small_open_clip()
        del theirs.context_length, theirs.vocab_size
        for name, value in {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}.items():
            theirs.register_buffer(name, torch.tensor(value))
        inputs = torch.ones(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.long)
        torch.jit.save(torch.jit.trace_module(theirs, {"forward": inputs}, strict=False), path := tmp_path / "x.pt")
        file = saved(small_open_clip(), tmp_path / "x.safetensors")
    else:
        theirs = small_transformers("quick_gelu")
        theirs.save_pretrained(tmp_path / "x", max_shard_size="5MB")
        path = tmp_path / "x" if kind == "folder" else tmp_path / "x" / "model.safetensors.index.json"
        file = saved(theirs, tmp_path / "x.safetensors")
    found, wanted = open_judge(str(path), "cpu"), open_judge(str(file), "cpu", "quick")
    picture = Image.effect_noise((80, 70), 50).convert("RGB")
    assert found.gelu == "quick"
    assert torch.equal(found.images([picture]), wanted.images([picture]))
    assert torch.equal(found.texts(["a red fox"]), wanted.texts(["a red fox"]))


def test_keys_of_another_clip_are_named(tmp_path):
    state = small_open_clip().state_dict()
    save_file(state | {"visual.attn_pool.query": torch.zeros(2, 2)}, tmp_path / "coca.safetensors")
    with pytest.raises(WeightsError, match=r"this is a CoCa \(it has visual.attn_pool.query\)"):
        load_clip(tmp_path / "coca.safetensors")
    save_file(state | {"visual.more.query": torch.zeros(2, 2)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"1 keys of no CLIP that is known here: visual\.more\.query"):
        load_clip(tmp_path / "more.safetensors")
    state.pop("transformer.resblocks.1.ln_2.weight")
    save_file(state, tmp_path / "hole.safetensors")
    with pytest.raises(WeightsError, match=r"1 missing: text_model\.encoder\.layers\.1\.layer_norm2\.weight"):
        load_clip(tmp_path / "hole.safetensors")
