"""The three verbs: open models, say what the picture should show, make pictures."""

import ast
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import generate.picture
from clip import preprocess, tokenize
from files.errors import Notice, UserError
from files.pictures import open_picture, to_pil
from generate import Models, Sweep, open_models, pictures, prompts, scaled, swept, threads
from ipadapter import Prompt
from sampler import SAMPLERS, guided, noise
from weights import load_adapter, load_image_encoder, open_base

ROOT = Path(__file__).parent.parent
EXAMPLE, WEIGHTS = ROOT / "tiny/example.png", ROOT / "tiny/weights"


@pytest.fixture(scope="module")
def models() -> Models:
    return open_models(device="cpu")


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_the_verbs_are_the_straight_line(models):
    """Written out by hand, from files to a picture."""
    base = open_base(WEIGHTS / "sd-tiny.safetensors")
    adapter = load_adapter(WEIGHTS / "ip-adapter-full-face-tiny.safetensors")
    encoder = load_image_encoder(WEIGHTS / "clip-tiny.safetensors")
    pixels = preprocess(open_picture(EXAMPLE), encoder.config.image_size)
    text, unet, sampler = base.text(), base.unet(), SAMPLERS["ddim"]
    with torch.no_grad():
        prompt = Prompt(text(tokenize("red apple")), (adapter.prompt(adapter.tokens(encoder, pixels), 0.5),))
        null = Prompt(text(tokenize("")), (adapter.prompt(adapter.null_tokens(encoder, pixels), 0.5),))
        eps = guided(unet, prompt, null, 7.5)
        *_, x = sampler.run(eps, noise(3, 1, 128, 128), sampler.levels(base.schedule, 3))
        wanted = to_pil(base.vae().decode(x))[0]
    made = list(pictures(models, *prompts(models, "red apple", images=[EXAMPLE], scale=0.5), seed=3, steps=3))
    assert len(made) == 1 and np.array_equal(array(made[0]), array(wanted))


def test_picture_j_is_that_of_seed_plus_j(models):
    pair = prompts(models, images=[open_picture(EXAMPLE)])
    three = list(pictures(models, *pair, seed=5, count=3, steps=2, height=64, width=72))
    assert [picture.size for picture in three] == [(72, 64)] * 3
    for j in range(3):
        (alone,) = pictures(models, *pair, seed=5 + j, steps=2, height=64, width=72)
        assert np.abs(array(alone) - array(three[j])).max() <= 1


@pytest.mark.slow
def test_several_prompts_seeds_and_rows(models):
    prompt, null = prompts(models, "red apple", images=[EXAMPLE])
    sweep = [scaled(prompt, s) for s in (0.0, 1.0)]
    four = [array(p) for p in pictures(models, sweep, [scaled(null, s) for s in (0.0, 1.0)], count=2, steps=2)]
    (text_only,) = pictures(models, replace(prompt, images=()), replace(null, images=()), steps=2)
    (silent,) = pictures(models, sweep[0], scaled(null, 0.0), steps=2)
    assert np.array_equal(array(silent), array(text_only))  # scale 0 is the base model, bit for bit
    assert np.abs(four[0] - array(silent)).max() <= 1 and np.abs(four[2] - four[0]).max() > 10
    rows = pictures(models, Prompt.cat(sweep), Prompt.cat([scaled(null, s) for s in (0.0, 1.0)]), seed=[0, 1], steps=2)
    for found, wanted in zip(rows, (four[0], four[3]), strict=True):
        assert np.abs(array(found) - wanted).max() <= 1


def test_a_sweep_makes_each_prompt_at_each_scale_from_each_seed(models):
    """Its pictures are those that are made one by one, and their numbers go prompt by prompt, scale by scale, seed by seed."""
    sweep = Sweep(2, (0.2, 1.0), seed=5, count=2)
    jobs = [job[:4] for part in sweep.parts for job in sweep.jobs(part)]
    assert jobs == [(i, (0.2, 1.0)[k], 5 + j, 4 * i + 2 * k + j) for i in (0, 1) for k in (0, 1) for j in (0, 1)]
    read = [prompts(models, text, images=[EXAMPLE]) for text in ("a cat", "a red cup")]
    small = {"steps": 1, "height": 64, "width": 64}
    found = list(swept(models, Sweep(2, (0.2, 1.0), seed=5, together=2), iter(read), **small))
    assert [(job.prompt, job.scale, job.number) for job, _ in found] == [
        (0, 0.2, 0),
        (1, 0.2, 2),
        (0, 1.0, 1),
        (1, 1.0, 3),
    ]
    for job, picture in found[1:3]:
        (alone,) = pictures(models, *(scaled(side, job.scale) for side in read[job.prompt]), job.seed, **small)
        assert abs(array(picture) - array(alone)).max() <= 1


def test_a_picture_is_handed_out_before_the_next_batch_is_begun(models, monkeypatch):
    begun = []
    monkeypatch.setattr(generate.picture, "guided", lambda *a, **k: begun.append(1) or guided(*a, **k))
    made = pictures(models, *prompts(models, "a"), count=3, batch=1, steps=1)
    next(made)
    assert len(begun) == 1


def test_parts_are_held_only_where_they_are_kept(tmp_path):
    kept, freed = open_models(device="cpu"), open_models(device="cpu", keep=False)
    for models in (kept, freed):
        list(pictures(models, *prompts(models, images=[EXAMPLE]), steps=1))
    assert {"unet", "vae", "adapter"} <= kept.held.keys() and not freed.held


def test_sizes_steps_and_samplers_that_cannot_be_are_refused(models):
    pair = prompts(models, "a")
    for wrong, message in (
        ({"height": 100}, "`height` and `width`: 100 and 128 given, multiples of 8"),
        ({"sampler": "dim"}, "`sampler`: 'dim' given"),
        ({"steps": 0}, "`steps` 0: 1 to 1000 with ddim"),
    ):
        with pytest.raises(UserError, match=message):
            list(pictures(models, *pair, **wrong))


def test_an_image_prompt_without_an_adapter_is_refused():
    models = open_models(image=False)
    assert models.adapter_kind is None and "image_encoder" not in models.files
    with pytest.raises(UserError, match="no adapter was opened"):
        prompts(models, images=[EXAMPLE])
    with pytest.raises(UserError, match="`scale` is the weight of an image prompt"):
        prompts(models, "a", scale=0.5)


def test_a_long_text_is_told(models):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prompts(models, "word " * 80 + "tail")
    assert [w.category for w in told] == [Notice] and "`prompt` is longer than 75 tokens" in str(told[0].message)


def overflowing(tmp_path: Path) -> Path:
    """The tiny base with an autoencoder whose first activations fp16 cannot hold; a norm behind them hides it."""
    state = load_file(WEIGHTS / "sd-tiny.safetensors")
    key = "first_stage_model.decoder.conv_in."
    save_file({k: v * 3e4 if k.startswith(key) else v for k, v in state.items()}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.slow
def test_an_autoencoder_that_overflows_is_taken_in_fp32(tmp_path):
    made = {}
    for dtype in ("float32", "float16"):
        models = open_models(overflowing(tmp_path), image=False, device="cpu", dtype=dtype)
        (picture,) = pictures(models, *prompts(models, "red apple"), steps=1, height=64, width=64)
        made[dtype] = array(picture)
    assert made["float16"].max() > 0 and np.abs(made["float16"] - made["float32"]).mean() < 8


def test_a_unet_that_overflows_is_an_error_not_a_black_picture(tmp_path):
    state = load_file(WEIGHTS / "sd-tiny.safetensors")
    state["model.diffusion_model.out.2.bias"] += torch.inf
    save_file(state, tmp_path / "base.safetensors")
    models = open_models(tmp_path / "base.safetensors", image=False, device="cpu")
    with pytest.raises(UserError, match="the UNet's prediction is not finite"):
        list(pictures(models, *prompts(models, "a"), steps=1, height=64, width=64))


@pytest.mark.parametrize("script", ["sample.py", "train.py", "evaluate.py"])
def test_args_are_for_parse_and_main_alone(script):
    functions = [n for n in ast.walk(ast.parse((ROOT / script).read_text())) if isinstance(n, ast.FunctionDef)]
    assert {"parse", "main"} <= {f.name for f in functions}
    for function in functions:
        if function.name not in ("parse", "main"):
            names = {arg.arg for arg in (*function.args.args, *function.args.kwonlyargs)}
            assert "args" not in names, f"{script}: {function.name}"


@pytest.fixture
def threads_of_ours(monkeypatch):
    """As if nothing had been said of threads, of which there are two."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "usual", 2)
    monkeypatch.setattr(threads, "ours", 2)
    yield
    torch.set_num_threads(before)


def test_a_small_model_takes_one_thread_and_a_large_one_all(threads_of_ours):
    cpu = torch.device("cpu")
    threads.suit(96, cpu)
    assert torch.get_num_threads() == 1
    threads.suit(1280, cpu)
    assert torch.get_num_threads() == 2
    open_models(device="cpu")
    assert torch.get_num_threads() == 1


def test_what_a_user_says_of_threads_is_obeyed(threads_of_ours, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.suit(96, cpu)
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(3)
    threads.suit(96, cpu)
    assert torch.get_num_threads() == 3
    threads.suit(96, torch.device("meta"))
    assert torch.get_num_threads() == 3
