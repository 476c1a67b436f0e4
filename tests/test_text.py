"""The text's half of a prompt, and how it is followed."""

import base64
import copy
import json
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from counterparts import Order, Twin, assert_same_picture, rel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from test_sample import sample

from clip.encode import Text
from clip.tokenizer import encode
from files.errors import Notice, UserError
from files.pictures import read_settings
from generate import ImageGroup, Models, open_models, pictures, prompts
from generate.picture import decode
from generate.syntax import SYNTAXES, parts, told
from generate.text import by_commas, by_words, encoded, even, pieces, words_of
from ipadapter import Prompt
from sampler import SD, guided
from unet import UNet
from weights.inversion import Embedding, check_embeddings, read_embeddings

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "tiny/example.png"
AT_500 = SD.level(500)


# Weights

SAID = {  # what A1111's and ComfyUI's users write, and what it means there
    "a1111": {
        "a cat": [("a cat", 1.0)],
        "": [],
        "a (red) cat": [("a ", 1.0), ("red", 1.1), (" cat", 1.0)],
        "((red)) [[cat]]": [("red", 1.1**2), (" ", 1.0), ("cat", 1 / 1.1**2)],
        "(a (red:1.2) cat:1.5)": [("a ", 1.5), ("red", 1.8), (" cat", 1.5)],
        "((x:1.2))": [("x", 1.32)],
        r"smile \(happy\), \[x\] \\": [("smile (happy), [x] \\", 1.0)],
        "a (red cat": [("a ", 1.0), ("red cat", 1.1)],
        "a [red (cat": [("a ", 1.0), ("red ", 1 / 1.1), ("cat", 1.0)],
        "a) b] c": [("a) b] c", 1.0)],
        "(style: noon) (16:9)": [("style: noon", 1.1), (" ", 1.0), ("16", 9.0)],
        "a:1.2) b": [("a:1.2) b", 1.0)],
        "(a:-.5)(b: +2. )": [("a", -0.5), ("b", 2.0)],
        "red BREAK blue": [("red ", 1.0), None, (" blue", 1.0)],
        "(red BREAK blue:1.2) BREAKING": [("red ", 1.2), None, (" blue", 1.2), (" BREAKING", 1.0)],
        "BREAK": [None],
        "[red:1.2]": [("red:1.2", 1 / 1.1)],
    },
    "comfy": {
        "": [],
        "a (red) cat": [("a ", 1.0), ("red", 1.1), (" cat", 1.0)],
        "((x:1.2))": [("x", 1.2)],
        "(a (red:1.2) cat:1.5)": [("a ", 1.5), ("red", 1.2), (" cat", 1.5)],
        "((x):1.5)": [("x", 1.65)],
        "(a:1.2 b)": [("a:1.2 b", 1.1)],
        r"smile \(happy\) [x] BREAK": [("smile (happy) [x] BREAK", 1.0)],
        "(embedding:name:0.8)": [("embedding:name", 0.8)],
        "(:1.2)": [(":1.2", 1.1)],
        "(a:1e1)(b:-1)": [("a", 10.0), ("b", -1.0)],
    },
    "plain": {"((a:1.2)) [b] BREAK": [("((a:1.2)) [b] BREAK", 1.0)]},
}


@pytest.mark.parametrize(("syntax", "text"), [(syntax, text) for syntax, texts in SAID.items() for text in texts])
def test_weights_are_read_as_their_users_mean_them(syntax, text):
    found, wanted = parts(text, syntax, "prompt"), SAID[syntax][text]
    assert [one and one[0] for one in found] == [one and one[0] for one in wanted]
    assert [one and one[1] for one in found] == pytest.approx([one and one[1] for one in wanted])


@pytest.mark.parametrize(
    ("syntax", "text", "wrong"),
    [
        ("a1111", "a (red:1,2) cat", "`prompt`, character 8: '1,2' is no weight"),
        ("a1111", "(red: 1.2.3)", "`prompt`, character 7: '1.2.3' is no weight"),
        ("comfy", "a (red:1..2)", "`prompt`, character 8: '1..2' is no weight"),
        ("comfy", "(red:nan)", "`prompt`, character 6: 'nan' is no weight"),
        ("comfy", "a (red (cat)", "`prompt`, character 3: this \\( is not closed"),
        ("comfy", "a red) cat", "`prompt`, character 6: this \\) closes nothing"),
        ("comfy", r"\(a red) cat", "`prompt`, character 8: this \\) closes nothing"),
        ("a1111", "(" * 200, "`prompt`, character 101: more than 100 brackets in brackets"),
        ("comfy", "(" * 200, "`prompt`, character 101: more than 100 brackets in brackets"),
        ("a1111", "((x:1e300):1e300)", "`prompt`: the weights of brackets in brackets multiply without end"),
    ],
)
def test_what_cannot_be_read_is_pointed_at(syntax, text, wrong):
    with pytest.raises(UserError, match=f"^{wrong}"):
        parts(text, syntax, "prompt")


@pytest.mark.slow
@pytest.mark.parametrize("piece", [" ", ":", "[:", "(:1", "(a:1)", "(a) ", "\\", "[a|", "word ", "((a))"])
def test_the_longest_of_texts_are_read_at_once(piece):
    """As long as an argument of a process can be; none of these takes more than a second."""
    for syntax in SYNTAXES:
        told("prompt", piece * 20000, syntax)
        with suppress(UserError):
            parts(piece * 20000, syntax, "prompt", long=True)


@pytest.mark.parametrize(
    ("syntax", "text", "line"),
    [
        ("plain", "a cat (on a mat), 16:9", ""),
        (
            "plain",
            "(red:1.4) BREAK",
            "`prompt`: (red:1.4), BREAK: taken as plain text; weights are read with `prompt_syntax`",
        ),
        ("plain", "((red)) [x]", "`prompt`: ((red)), [x]: taken as plain text; weights are read with `prompt_syntax`"),
        ("plain", "<lora:foo:0.8>", "`prompt`: <lora:foo:0.8>: taken as plain text; LoRAs are given by `lora`"),
        ("a1111", "(red:1.4) BREAK [x]", ""),
        (
            "a1111",
            "[a:b:0.5] AND x",
            "`prompt`: [a:b:0.5], AND: taken as plain text; prompts that change over the steps",
        ),
        ("comfy", "(red:1.4) BREAK", "`prompt`: BREAK: taken as plain text; BREAK is read with `prompt_syntax` a1111"),
    ],
)
def test_marks_that_mean_nothing_here_are_told_in_a_line(syntax, text, line):
    assert told("prompt", text, syntax).startswith(line) and bool(told("prompt", text, syntax)) == bool(line)


@torch.no_grad()
def test_weights_act_as_in_a1111(sd1: Twin, sdxl: Twin):
    """Features times weights, and then the mean of the whole chunk, start and padding too, as it was; towers apart."""
    for twin in (sd1, sdxl):
        plain, weighed = (
            read(twin, "a fox in the snow", text) for text in ("a fox in the snow", "a (fox:1.5) in the snow")
        )
        widths = [config.width for config in twin.base.texts]
        for z, found in zip(plain[0].split(widths, -1), weighed[0].split(widths, -1), strict=True):
            w = torch.ones(77)
            w[2] = 1.5
            wanted = z * w[:, None]
            assert rel(found, wanted * (z.mean() / wanted.mean())) <= 1e-6 and rel(found, z) > 0.01
        assert plain[1] is None or torch.equal(plain[1], weighed[1])  # the pooled embedding has no weights


@torch.no_grad()
def test_weights_act_as_in_comfyui(sd1: Twin, sd2: Twin, sdxl: Twin):
    """As far from the empty text, padded like it."""
    for twin in (sd1, sd2, sdxl):
        encode = twin.parts[0]
        z, empty = encode("a fox in the snow")[0], encode("")[0]
        found = read(twin, "a fox in the snow", "a (fox:1.5) in the (snow:-1)", "comfy")[0]
        w = torch.ones(77)
        w[2], w[5] = 1.5, -1
        assert rel(found, empty + w[:, None] * (z - empty)) <= 1e-6 and rel(found, z) > 0.01


def read(twin: Twin, plain: str, text: str, syntax: str = "a1111", **how: object) -> tuple[torch.Tensor, ...]:
    return encoded(models_of(twin), text, "", syntax, **how)[0]


@cache
def tiny() -> Models:
    return open_models(image=False)


def models_of(twin: Twin) -> Models:
    encode, unet, vae = twin.parts
    return replace(tiny(), base=twin.base, side=64, held={"text encoder": encode, "unet": unet, "vae": vae})


# Chunks


def words(count: int) -> list[list[tuple[int, float]]]:
    return [[(1000 + i, 1.0)] for i in range(count)]


COMMA = [(267, 1.0)]


def test_a_full_chunk_ends_at_its_last_comma_if_that_is_near():
    for before, lengths in ((60, [61, 19]), (54, [75, 5]), (55, [56, 24]), (74, [75, 5]), (75, [75, 6])):
        found = by_commas([*words(before), COMMA, *words(80)[before : -1 if before < 75 else None]])
        assert list(map(len, found)) == lengths or before == 75, before
    assert list(map(len, by_commas([*words(75), COMMA, *words(3)]))) == [75, 4]  # a comma may begin a chunk
    assert list(map(len, by_commas(words(160)))) == [75, 75, 10]
    assert list(map(len, by_commas([*words(3), None, *words(2), None]))) == [3, 2]
    assert list(map(len, by_commas([None, *words(2)]))) == [0, 2]
    assert by_commas([]) == [[]]
    vectors = [(-1 - i, 1.0) for i in range(8)]
    assert list(map(len, by_commas([*words(70), vectors]))) == [70, 8]  # an embedding is not divided


def test_comfyui_keeps_words_whole_but_for_long_ones():
    assert list(map(len, by_words([*words(73), [(1, 1.0)] * 7, *words(1)]))) == [73, 8]
    assert list(map(len, by_words([*words(73), [(1, 1.0)] * 8, *words(1)]))) == [75, 7]
    assert list(map(len, by_words([[(1, 1.0)] * 160]))) == [75, 75, 10]
    assert by_words([]) == [[]]


LONG = (
    ", ".join(
        f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("fox", "house", "tree", "boat")
    )
    * 3
)


@torch.no_grad()
def test_long_prompts_are_read_chunk_by_chunk(sd1: Twin, sd2: Twin, sdxl: Twin):
    numbers = encode(LONG)
    assert 75 < len(numbers) <= 150
    for twin in (sd1, sd2, sdxl):
        encoder, models = twin.parts[0], models_of(twin)
        (long, pooled), (null, _) = encoded(models, LONG, "a dog", long=True)
        chunks = [[(t, 1.0) for t in encode(LONG)]]
        split = by_commas([[token] for token in chunks[0]])
        alone = [encoder(Text([chunk])) for chunk in split]
        assert long.shape[1] == 77 * len(split) == 154 and rel(long, torch.cat([x for x, _ in alone], 1)) <= 1e-5
        assert pooled is None or rel(pooled, alone[0][1]) <= 1e-5  # that of the first chunk
        assert torch.equal(null, encoder.null("a dog")[0].repeat(1, 2, 1))  # made equally long
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divided = encoded(models_of(sd1), "a fox BREAK a dog", "", long=True)[0][0]
    assert rel(divided, torch.cat([sd1.parts[0](text)[0] for text in ("a fox", "a dog")], 1)) <= 1e-5


def test_the_words_of_a_prompt_have_their_places_in_the_features(sd1: Twin, draw):
    """What --attention shows of each word."""
    models = replace(models_of(sd1), embeddings=(Embedding(Path("x.pt"), ("sks",), (draw(2, 64),)),))
    assert words_of(models, "a (red:1.2) fox, sks cat", syntax="a1111") == [
        ("a", [1]),
        ("red", [2]),
        ("fox", [3]),
        ("sks", [5, 6]),
        ("cat", [7]),
    ]
    found = dict(words_of(models, "red BREAK sks fox", LONG + LONG, "a1111"))
    assert (
        found == {"red": [1, 155, 309], "sks": [78, 79, 232, 233, 386, 387], "fox": [80, 234, 388]} or len(found) == 3
    )
    assert words_of(models, "red fox " * 50)[-1] == ("red", [75])


@torch.no_grad()
def test_a_text_that_is_repeated_says_the_same(unet: UNet, draw):
    x, t, text = draw(1, 4, 8, 8), torch.tensor(500), draw(1, 77, 64)
    assert [part.shape[1] for part in even([text, draw(1, 154, 64), draw(1, 231, 64)])] == [462] * 3
    assert rel(unet(x, t, Prompt(even([text, draw(1, 154, 64)])[0])), unet(x, t, Prompt(text))) <= 1e-5


def test_without_being_asked_a_long_prompt_is_cut_and_told(sd1: Twin):
    with pytest.warns(
        Notice, match="`prompt` is longer than 75 tokens; cut off: '.*boat'; `long_prompt` reads it in chunks"
    ):
        found = encoded(models_of(sd1), LONG, "")[0][0]
    assert rel(found, sd1.parts[0](LONG)[0]) == 0 and found.shape[1] == 77


# Clip skip


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 1])
def test_clip_skip_is_that_of_diffusers(sd1: Twin, sd2: Twin, sdxl: Twin, skip):
    for twin in (sd1, sd2, sdxl):
        arguments = {
            "device": "cpu",
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "clip_skip": skip,
        }
        theirs = twin.pipeline.text_encoder  # which transformers 5 has made a level flatter than diffusers thinks
        level = SimpleNamespace(final_layer_norm=theirs.final_layer_norm)
        with patch.object(theirs, "text_model", level, create=True):
            wanted = twin.pipeline.encode_prompt("a red fox", negative_prompt="a dog", **arguments)
        halves = encoded(models_of(twin), "a red fox", "a dog", clip_skip=skip)
        found = [x for half in zip(*halves, strict=True) for x in half if x is not None]
        assert all(rel(ours, theirs) <= 1e-5 for ours, theirs in zip(found, wanted, strict=True))
        both = encoded(models_of(twin), "a red fox", "a dog", "a1111", clip_skip=skip)
        assert torch.equal(both[0][0], halves[0][0]) and torch.equal(both[1][0], halves[1][0]) == (not skip)
        (empty, _), (zeros, _) = (encoded(models_of(twin), "a", "", syntax)[1] for syntax in ("comfy", "plain"))
        assert rel(empty, twin.parts[0]("")[0]) == 0 and bool(zeros.any()) == (twin is not sdxl)
    with pytest.raises(UserError, match="`clip_skip`: 3 given, 0 to 2 is wanted"):
        encoded(models_of(sd1), "a", "", clip_skip=3)


# Textual inversion


def inversion(draw, *widths: int) -> list[torch.Tensor]:
    return [draw(2, width) for width in widths]


FORMS = {  # two vectors, or a pair of two
    "A1111": lambda v: {"string_to_token": {"*": 265}, "string_to_param": {"*": v[0]}, "name": "x", "step": 3},
    "older A1111": lambda v: {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(v[0])}), "name": "x"},
    "diffusers": lambda v: {"<sks>": v[0]},
    "kohya": lambda v: {"emb_params": v[0]},
    "list": lambda v: [{"<sks>": v[0]}],
    "SDXL": lambda v: {"clip_l": v[0], "clip_g": v[1]},
    "replicate": lambda v: {"text_encoders_0": v[0], "text_encoders_1": v[1]},
    "bundle": lambda v: {"bundle_emb.sks.string_to_param.*": v[0], "lora_unet_x.alpha": torch.ones(())},
    "bundled pair": lambda v: {"bundle_emb.sks.clip_l": v[0], "bundle_emb.sks.clip_g": v[1]},
}


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_of_all_forms_are_read(tmp_path: Path, draw, form):
    vectors = inversion(draw, 64, 32)
    torch.save(FORMS[form](vectors), tmp_path / "cat.pt")
    (found,) = read_embeddings(tmp_path / "cat.pt")
    pair = form in ("SDXL", "replicate", "bundled pair")
    assert all(map(torch.equal, found.vectors, vectors)) and len(found.vectors) == 1 + pair
    own = ["<sks>"] * (form in ("diffusers", "list")) + ["sks"] * form.startswith("bundle")
    assert found.names == (*own, "cat", "cat.pt")
    assert read_embeddings(tmp_path / "cat.pt", "dog")[0].names == ("dog",)


def test_an_embedding_in_a_png_is_read(tmp_path: Path, draw):
    (vector,), info = inversion(draw, 64), PngInfo()
    content = {"string_to_param": {"*": {"TORCHTENSOR": vector.tolist()}}, "name": "x"}
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(content).encode()).decode())
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png", pnginfo=info)
    assert torch.equal(read_embeddings(tmp_path / "cat.png")[0].vectors[0], vector)
    Image.new("RGB", (8, 8)).save(tmp_path / "none.png")
    with pytest.raises(UserError, match="none.png: a picture without an embedding in it"):
        read_embeddings(tmp_path / "none.png")


@pytest.mark.slow
@torch.no_grad()
def test_embeddings_equal_diffusers(tmp_path: Path, sd1: Twin, sdxl: Twin, draw):
    """One vector and three, a name that another begins with, in both prompts; SDXL's pair by two calls there."""
    texts = "a photo of <cat>, near (<cat-toy>).", "a <cat> alone"
    for twin in (sd1, sdxl):
        widths, pipeline = [config.width for config in twin.base.texts], copy.copy(twin.pipeline)
        ends = ("", "_2")[: len(widths)]
        for end in ends:
            for part in ("text_encoder", "tokenizer"):
                setattr(pipeline, part + end, copy.deepcopy(getattr(twin.pipeline, part + end)))
        files = []
        for name, count in (("<cat>", 3), ("<cat-toy>", 1)):
            vectors = [draw(count, width) for width in widths]
            files.append(tmp_path / f"{len(widths)}{count}.safetensors")
            save_file(dict(zip(("clip_l", "clip_g"), vectors)) if len(widths) > 1 else {name: vectors[0]}, files[-1])
            for end, vector in zip(ends, vectors, strict=True):
                towers = {"tokenizer": getattr(pipeline, f"tokenizer{end}")}
                towers["text_encoder"] = getattr(pipeline, f"text_encoder{end}")
                pipeline.load_textual_inversion({name: vector}, token=name, **towers)
        opened = [
            e for file, name in zip(files, ("<cat>", "<cat-toy>"), strict=True) for e in read_embeddings(file, name)
        ]
        check_embeddings(opened, widths)
        models = replace(models_of(twin), embeddings=tuple(opened))
        found = [x for half in zip(*encoded(models, *texts), strict=True) for x in half if x is not None]
        arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        wanted = pipeline.encode_prompt(texts[0], negative_prompt=texts[1], **arguments)
        assert all(rel(ours, theirs) <= 1e-5 for ours, theirs in zip(found, wanted, strict=True))
        assert rel(found[0], twin.parts[0](texts[0])[0]) > 0.01


@pytest.mark.parametrize(
    ("syntax", "text", "called"),
    [
        ("plain", "a sks-2, (SKS) and skss, embedding:sks", [-3, -4, -1, -1]),
        ("a1111", "(sks:1.2) my  style", [-1, -2]),
        ("comfy", "sks embedding:sks, (embedding:sks-2:1.2) embedding:sks.pt.", [-1, -3, -4, -1]),
    ],
)
def test_embeddings_are_called_by_name_the_longest_first(syntax, text, called):
    opened = [("sks", "sks.pt"), ("my style",), ("sks-2",)]
    embeddings = [Embedding(Path("x"), names, (torch.ones(1 + (i == 2), 8),)) for i, names in enumerate(opened)]
    found = [token for piece in pieces(text, syntax, "prompt", embeddings) for token, _ in piece if token < 0]
    assert found == called


def test_an_embedding_costs_as_many_tokens_as_it_has_vectors(sd1: Twin, draw):
    opened = (Embedding(Path("x.pt"), ("x",), (draw(8, 64),)),)
    models = replace(models_of(sd1), embeddings=opened)
    assert sum(len(piece) for piece in pieces("a x cat", "plain", "prompt", opened)) == 10
    with pytest.warns(Notice, match="cut off: 'word word'"):
        encoded(models, "x " + "word " * 69, "")
    with pytest.warns(Notice, match="`embedding` x.pt is not used: no prompt calls it, as embedding:x"):
        encoded(models, "a x", "", "comfy")
    with pytest.raises(UserError, match="`prompt`, character 3: embedding:y is not opened by `embedding` .x"):
        encoded(models, "a embedding:y", "", "comfy")


WRONG = {
    "a LoRA": ({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, None, "is wanted here; this is a LoRA"),
    "no vectors": ({"emb_params": torch.ones(2, 3, 4)}, None, "no vectors of an embedding"),
    "unequal": ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(3, 8)}, None, "for each tower alike"),
    "whole numbers": ({"<x>": torch.ones(2, 8, dtype=torch.int)}, None, "no vectors of an embedding"),
    "too many": ({"<x>": torch.ones(76, 8)}, None, "76 vectors; 1 to 75 fit into a prompt"),
    "not finite": ({"<x>": torch.full((1, 8), torch.nan)}, None, "its vectors are not finite"),
    "no name": ({"<x>": torch.ones(8)}, " ", "wants a name behind the colon"),
    "another name": ({"<x>": torch.ones(8), "<y>": torch.ones(8)}, "z", "holds <x>, <y>, and no z"),
    "SDXL's": (
        {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)},
        None,
        "for SDXL, its vectors are 768 and 1280 wide; this base reads 64",
    ),
    "SD 2's": ({"<x>": torch.ones(1024)}, None, "for SD 2.x, its vectors are 1024 wide; this base reads 64"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_embedding_that_does_not_fit_is_refused_in_a_line(tmp_path: Path, kind):
    state, called, wrong = WRONG[kind]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}.*{re.escape(wrong)}"):
        check_embeddings(read_embeddings(tmp_path / "x.safetensors", called), [64])


@pytest.mark.slow
def test_an_embedding_is_kept_and_repeated_wherever_it_is(tmp_path: Path, draw):
    width = open_models(image=False).base.texts[0].width
    file = tmp_path / "sks.safetensors"
    save_file({"emb_params": draw(2, width)}, file)
    flags = ["--prompt", "a (sks:1.3) apple", "--prompt-syntax", "a1111", "--clip-skip", 1, "--steps", 1]
    flags += ["--height", 64, "--width", 64, "--output"]
    first, second, plain = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert sample("--embedding", file, *flags[-1:], first, *flags[:-1]).returncode == 0
    assert sample(*flags, plain).returncode == 0
    file.rename(tmp_path / "renamed.safetensors")
    ended = sample("--again", first, "--output", second)
    assert ended.returncode == 0 and "warning" not in ended.stderr, ended.stderr
    a, b, c = (np.asarray(Image.open(path)).astype(int) for path in (first, second, plain))
    assert np.array_equal(a, b) and np.abs(a - c).max() > 1
    settings = read_settings(first)
    assert settings["embedding"] == [[str(file), "sks"]] and settings["clip_skip"] == 1


# Guidance


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_rescaled_guidance_is_that_of_diffusers(unet: UNet, draw, prediction):
    """On the model's own output, and each picture by itself."""
    x, prompt, null = draw(2, 4, 8, 8), Prompt(draw(2, 77, 64)), Prompt(draw(2, 77, 64))
    toward, away = (unet(x, torch.tensor(500), p) for p in (prompt, null))
    wanted = rescale_noise_cfg(away + 7.5 * (toward - away), toward, guidance_rescale=0.7)
    eps, x_0 = guided(unet, prompt, null, 7.5, prediction, rescale=0.7)(x, AT_500)
    signal, noise = AT_500.alpha**0.5, (1 - AT_500.alpha) ** 0.5
    assert rel(eps if prediction == "eps" else signal * eps - noise * x_0, wanted) <= 1e-5
    assert rel(wanted, away + 7.5 * (toward - away)) > 0.01


@pytest.mark.parametrize("apart", [False, True])
def test_three_passes_are_the_formula(unet: UNet, base_adapter, draw, apart):
    x, t, batches = draw(2, 4, 8, 8), torch.tensor(500), []
    text, empty = draw(1, 77, 64).expand(2, -1, -1), draw(1, 77, 64).expand(2, -1, -1)
    image, nothing = ((base_adapter.prompt(draw(2, 4, 64), 0.7),) for _ in range(2))
    chain = Prompt(empty, nothing), Prompt(empty, image), Prompt(text, image)
    none, alone, full = (unet(x, t, p) for p in chain)
    handle = unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    found, _ = guided(unet, chain[2], chain[0], 7.5, apart=apart, middle=chain[1], middle_scale=2)(x, AT_500)
    handle.remove()
    assert rel(found, none + 2 * (alone - none) + 7.5 * (full - alone)) <= 1e-5
    assert batches == ([2, 2, 2] if apart else [6])


def test_a_middle_that_is_followed_like_the_rest_costs_no_pass(unet: UNet, draw):
    x, prompt, middle, null = draw(1, 4, 8, 8), *(Prompt(draw(1, 77, 64)) for _ in range(3))
    plain = guided(unet, prompt, null, 3)(x, AT_500)
    assert all(map(torch.equal, guided(unet, prompt, null, 3, middle=middle, middle_scale=3)(x, AT_500), plain))
    assert torch.equal(guided(unet, prompt, null, 1, middle=middle)(x, AT_500)[0], unet(x, torch.tensor(500), prompt))


@pytest.mark.parametrize("apart", [False, True])
def test_what_stands_beside_x_may_differ_from_pass_to_pass(draw, apart):
    """As instruct-pix2pix has it: the picture beside the first two rows, nothing beside the last."""
    x, picture, text = draw(2, 4, 8, 8), draw(2, 4, 8, 8), draw(2, 77, 8)

    def instructed(x: torch.Tensor, t: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        return x + 2 * prompt.beside + prompt.text.mean(dim=(1, 2))[:, None, None, None]

    full, middle = Prompt(text, beside=picture), Prompt(-text, beside=picture)
    null = replace(middle, beside=torch.zeros_like(picture))
    none, alone, all_of_it = (instructed(x, None, p) for p in (null, middle, full))
    found, _ = guided(instructed, full, null, 7.5, apart=apart, middle=middle, middle_scale=1.5)(x, AT_500)
    assert rel(found, none + 7.5 * (all_of_it - alone) + 1.5 * (alone - none)) <= 1e-6


@pytest.mark.slow
def test_a_picture_of_all_this_is_that_of_diffusers(sd1: Twin, draw):
    """Guidance rescale, clip skip and an embedding together."""
    order, latents, vectors = Order("a <sks> in the snow", "blurred"), [], draw(2, 64)
    pipeline = copy.copy(sd1.pipeline)
    for part in ("text_encoder", "tokenizer"):
        setattr(pipeline, part, copy.deepcopy(getattr(sd1.pipeline, part)))
    pipeline.load_textual_inversion({"<sks>": vectors})
    level = SimpleNamespace(final_layer_norm=pipeline.text_encoder.final_layer_norm)
    how = {"num_inference_steps": 2, "guidance_scale": 7.5, "guidance_rescale": 0.7, "clip_skip": 1}
    how |= {"height": 64, "width": 96, "generator": torch.Generator().manual_seed(7), "output_type": "latent"}
    with patch.object(pipeline.text_encoder, "text_model", level, create=True):
        wanted = pipeline(order.prompt, negative_prompt=order.negative_prompt, **how).images
    models = replace(models_of(sd1), embeddings=(Embedding(Path("x"), ("<sks>",), (vectors,)),))
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        pair = prompts(models, order.prompt, order.negative_prompt, clip_skip=1)
        (picture,) = pictures(models, *pair, 7, steps=2, guidance_rescale=0.7, height=64, width=96)
    assert_same_picture((latents[0], np.asarray(picture)), (wanted, np.asarray(next(decode(models, wanted)))))


@pytest.mark.slow
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_long_texts_go_with_image_prompts_and_three_passes(syntax):
    """Batched and one half at a time; the texts are of 4 chunks and of 1."""
    models = open_models(device="cpu")
    texts = LONG + LONG, "a (dog:1.2)" if syntax != "plain" else "a dog"
    pair = prompts(models, *texts, [EXAMPLE], prompt_syntax=syntax, long_prompt=True)
    assert {p.text.shape[1] // 77 for p in pair} == {4}
    how = {"steps": 2, "height": 64, "width": 64, "image_guidance_scale": 2.0}
    together, apart = (
        np.asarray(next(pictures(replace(models, low_memory=low), *pair, **how))).astype(int) for low in (False, True)
    )
    assert np.abs(together - apart).max() <= 1 and together.std() > 10


def followed(make: Callable[[], object]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What the loop of a run is told at its first noise, and that noise."""
    caught = []
    with (
        patch("generate.picture.denoise", lambda run, predict, x, *_: caught.append((predict(x, AT_500), x)) or x),
        torch.no_grad(),
    ):
        make()
    return caught[0]


def three_passes(models: Models, groups: list[ImageGroup], x: torch.Tensor, text: float, image: float) -> torch.Tensor:
    """none + G (image - none) + S (all - image), each pass by itself; all image prompts stand in `image`."""
    prompt, null = prompts(models, "red apple", "blurred", groups)
    unet, t = models.unet(), torch.tensor(500)
    none, alone, full = (unet(x, t, p) for p in (null, Prompt(null.text, prompt.images), prompt))
    assert min(rel(alone, none), rel(full, alone)) > 1e-3
    return none + image * (alone - none) + text * (full - alone)


@torch.no_grad()
def test_several_image_prompts_are_followed_by_themselves_together():
    models = open_models(adapter=["tiny", "tiny-full-face"], device="cpu")
    mask, other = Image.linear_gradient("L"), Image.new("RGB", (90, 70), "red")
    groups = [
        ImageGroup([EXAMPLE, other], scale=0.8, mask=mask, negative_image=[other]),
        ImageGroup([other], adapter=1, scale=0.5, layers="style", curve="fade-out"),
    ]
    how = {"guidance_scale": 5.0, "image_guidance_scale": 2.0, "steps": 1, "height": 64, "width": 64}
    pair = prompts(models, "red apple", "blurred", groups)
    (eps, _), x = followed(lambda: next(pictures(models, *pair, **how)))
    assert rel(eps, three_passes(models, groups, x, text=5, image=2)) <= 1e-5


@torch.no_grad()
def test_guidance_flags_are_of_the_text_and_of_the_image(tmp_path: Path):
    red = tmp_path / "red.png"
    Image.new("RGB", (90, 70), "red").save(red)
    flags = ["--image", EXAMPLE, "--scale", 0.8, "--image", red, "--until", 1, "--scale", 0.5, "--prompt", "red apple"]
    flags += [
        "--negative-prompt",
        "blurred",
        "--steps",
        1,
        "--height",
        64,
        "--width",
        64,
        "--output",
        tmp_path / "x.png",
    ]
    (eps, _), x = followed(lambda: sample(*flags, "--guidance-scale", 5, "--image-guidance-scale", 2))
    groups = [ImageGroup([EXAMPLE], scale=0.8), ImageGroup([red], scale=0.5)]
    assert rel(eps, three_passes(open_models(device="cpu"), groups, x, text=5, image=2)) <= 1e-5


@pytest.mark.slow
def test_guidance_flags_are_kept_and_repeated(tmp_path: Path):
    first, second, plain = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    flags = ["--image", EXAMPLE, "--prompt", "red apple", "--steps", 1, "--height", 64, "--width", 64]
    own = ["--guidance-rescale", 0.5, "--image-guidance-scale", 2]
    assert [sample(*flags, *extra).returncode for extra in (["--output", plain], [*own, "--output", first])] == [0, 0]
    assert sample("--again", first, "--output", second).returncode == 0
    a, b, c = (np.asarray(Image.open(path)).astype(int) for path in (first, second, plain))
    assert np.array_equal(a, b) and np.abs(a - c).max() > 1
    settings = read_settings(first)
    assert (settings["guidance_rescale"], settings["image_guidance_scale"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (
            ["--prompt", "a", "--guidance-rescale", 1.5],
            "--guidance-rescale: '1.5' given, a number from 0 to 1 is wanted",
        ),
        (["--prompt", "a", "--image-guidance-scale", 2], "--image-guidance-scale is how far .* goes with --image"),
    ],
)
def test_guidance_that_cannot_be_is_one_line(flags, wrong):
    ended = sample(*flags)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert re.search(wrong, ended.stderr)


def test_guidance_of_its_own_wants_an_image_prompt():
    models = open_models(image=False)
    with pytest.raises(UserError, match="image_guidance_scale"):
        next(pictures(models, *prompts(models, "a"), image_guidance_scale=2, steps=1))
