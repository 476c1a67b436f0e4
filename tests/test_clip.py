"""CLIP: the tokenizer token for token, both towers on the same weights, and preprocessing."""

import copy
import json

import numpy as np
import open_clip
import pytest
import torch
from counterparts import randomise, rel, transformers_image, transformers_text
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from open_clip.transformer import VisionTransformer
from PIL import Image
from processes import started
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip import SD15_TEXT, VIT_H, CLIPImage, CLIPText, preprocess, tokenize
from clip.preprocess import MEAN, STD
from clip.tokenizer import CONTEXT, END, START, decode, encode
from weights.configs import image_config, text_config
from weights.openclip import from_openclip

TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "A Photo OF a CAT",
    "best quality, high quality",
    "  leading,   trailing and   inner   spaces  ",
    "tabs\tand\nnewlines\r\nhere",
    "don't can't won't it's I'm you're they've we'll she'd",
    "DON'T IT'S 'S 'T 'LL",
    "rock'n'roll 'quoted' \"double\" `back` l'été d'or",
    "1 12 123 1234 3.14 1,000,000 50% 1/2 2x4",
    "99bottles of beer4you",
    "café naïve façade über Ångström",
    "cafe\u0301 with a combining accent",
    "日本の風景、富士山",
    "中文 测试",
    "한국어 풍경",
    "Привет, мир",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "हिन्दी में",
    "ภาษาไทย",
    "😀 🎉👍🏽 👩‍👩‍👧‍👦 🇯🇵",
    "a 😀b",
    "♥ ★ → © ® ™ …",
    "#hashtag @user http://example.com/a?b=c&d=e",
    "under_score snake_case CamelCase kebab-case",
    "!!! ??? ... ,,, ;;; ::: ---",
    "(((masterpiece))), [low quality], {curly}",
    "<lora:foo:0.8> <b>bold</b>",
    "a&b a & b",
    "C++ C# .NET",
    "e=mc^2 $100 €50 £20 ¥1000",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "xqzjkvw",
    "a" * 49,
    "İstanbul ŞIŞLI",
    "straße GROß",
    "𝕳𝖊𝖑𝖑𝖔 𝓌𝑜𝓇𝓁𝒹",
    "zero\u200bwidth no\u00a0break \u3000wide soft\u00adhyphen",
    "\u202eright to left",
    "٣ ٤ ५ ①",
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "many different words that go on and on, " * 20,
    "🙂" * 60,
]
# transformers' tokenizer neither repairs text (ftfy) nor reads HTML entities; OpenAI's and open_clip's do.
REPAIRED = [
    "“curly quotes” and ‘these’ — dashes – too",
    "ﬁligature ½ ² Ⅷ",
    "&amp; &lt;b&gt; &quot;",
    "&amp;amp; &amp;lt;",
    "&eacute; &#233; &#x1F600;",
    "Ã©tÃ© mojibake",
    "ＦＵＬＬ width",
    "nul\x00 bell\x07 esc\x1b[0m",
    "\u1e9e ǅ",
    "a\u2028b\u2029c\x85d\x0be\x0cf",
]
SPECIAL = ["<|endoftext|>", "<|startoftext|>", "a <|endoftext|> b <|startoftext|>c"]


@pytest.fixture(scope="module")
def their_tokenizer(tmp_path_factory) -> CLIPTokenizer:
    """transformers' tokenizer, from vocabulary and merges as OpenAI published them."""
    folder, words = tmp_path_factory.mktemp("tokenizer"), SimpleTokenizer()
    vocabulary = {word: i for word, i in words.encoder.items() if i < START}
    vocabulary |= {"<|startoftext|>": START, "<|endoftext|>": END}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in words.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS + REPAIRED)
def test_tokens_equal_open_clip(text):
    assert tokenize(text, pad=0).tolist() == open_clip.tokenize(text).tolist()


@pytest.mark.parametrize("text", TEXTS + SPECIAL)
def test_tokens_equal_transformers(their_tokenizer, text):
    theirs = their_tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert tokenize(text)[0].tolist() == theirs


def test_a_list_of_texts_is_a_batch():
    tokens = tokenize(TEXTS)
    assert tokens.shape == (len(TEXTS), 77) and tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.cat([tokenize(text) for text in TEXTS]))


def test_padding_is_end_of_text_or_zero():
    by_end, by_zero = tokenize("a cat")[0], tokenize("a cat", pad=0)[0]
    assert by_end[:4].tolist() == by_zero[:4].tolist() == [START, 320, 2368, END]
    assert (by_end[4:] == END).all() and (by_zero[4:] == 0).all()


def test_long_texts_end_with_end_of_text():
    tokens = tokenize("word " * 100)[0]
    assert len(tokens) == CONTEXT and tokens[-1] == END and (tokens[1:-1] == tokens[1]).all()


@pytest.mark.parametrize("text", TEXTS + REPAIRED)
def test_decoded_tokens_equal_open_clip(text):
    assert decode(encode(text)) == SimpleTokenizer().decode(encode(text)).strip()


@pytest.mark.slow
def test_tokenizer_imports_no_big_library():
    code = "import sys, clip; clip.tokenize('a cat'); print(*sys.modules)"
    modules = started(code).ended().stdout.split()
    assert "clip.tokenizer" in modules
    assert not {"open_clip", "torchvision", "timm", "transformers", "diffusers"} & set(modules)


# Towers


def test_text_tower_equals_transformers(text_tower):
    tokens = tokenize(TEXTS)
    theirs = transformers_text(text_tower)(tokens)
    assert rel(text_tower(tokens), theirs.last_hidden_state) <= 1e-5
    assert rel(text_tower.embed(tokens), theirs.text_embeds) <= 1e-5


def test_text_tower_has_the_quick_gelu(text_tower):
    tokens = tokenize(TEXTS)
    assert rel(text_tower(tokens), transformers_text(text_tower, "gelu")(tokens).last_hidden_state) > 1e-3


def test_text_tower_reads_no_token_ahead(text_tower):
    a, b = text_tower(tokenize(["a red apple", "a red car"]))
    assert torch.equal(a[:3], b[:3]) and not torch.equal(a[3], b[3])


def test_embedding_is_read_at_the_first_end_of_text(text_tower):
    by_end, by_zero = tokenize("a red apple"), tokenize("a red apple", pad=0)
    assert rel(text_tower.embed(by_zero), text_tower.embed(by_end)) <= 1e-6


def test_image_tower_equals_transformers(image_tower, draw):
    pixels = draw(2, 3, 64, 64)
    theirs = transformers_image(image_tower)(pixels, output_hidden_states=True)
    assert rel(image_tower(pixels), theirs.image_embeds) <= 1e-5
    assert rel(image_tower.penultimate(pixels), theirs.hidden_states[-2]) <= 1e-5


def test_penultimate_is_neither_another_layer_nor_normalised(image_tower, draw):
    pixels = draw(2, 3, 64, 64)
    theirs = transformers_image(image_tower)(pixels, output_hidden_states=True).hidden_states
    ours = image_tower.penultimate(pixels)
    assert all(rel(ours, theirs[i]) > 0.01 for i in (-1, -3))
    assert rel(ours, image_tower.vision_model["post_layernorm"](theirs[-2])) > 0.01


def test_image_tower_has_the_exact_gelu(image_tower, draw):
    pixels = draw(2, 3, 64, 64)
    assert rel(image_tower(pixels), transformers_image(image_tower, "quick_gelu")(pixels).image_embeds) > 1e-3
    quick = CLIPImage(type(image_tower.config)(**{**vars(image_tower.config), "quick_gelu": True}))
    quick.load_state_dict(image_tower.state_dict())
    assert rel(quick(pixels), transformers_image(image_tower, "quick_gelu")(pixels).image_embeds) <= 1e-5


def test_image_tower_equals_open_clip(draw):
    theirs = VisionTransformer(64, 16, width=128, layers=4, heads=2, mlp_ratio=4, output_dim=96)
    randomise(theirs, 20)
    state = from_openclip({f"visual.{key}": value for key, value in theirs.state_dict().items()})
    config = image_config(state)
    assert (config.width, config.layers, config.projection, config.image_size, config.patch_size) == (
        128,
        4,
        96,
        64,
        16,
    )
    ours = CLIPImage(config)
    ours.load_state_dict(state, strict=True)
    pixels, penultimate = draw(2, 3, 64, 64), []
    theirs.transformer.resblocks[-2].register_forward_hook(lambda module, inputs, out: penultimate.append(out))
    assert rel(ours(pixels), theirs(pixels)) <= 1e-5
    assert rel(ours.penultimate(pixels), penultimate[0]) <= 1e-5


@pytest.mark.parametrize("model, parameters", [("ViT-H-14", 632_076_800), ("ViT-bigG-14", 1_844_907_264)])
def test_full_size_image_towers_have_open_clips_shapes(model, parameters):
    vision = open_clip.get_model_config(model)["vision_cfg"]
    with torch.device("meta"):
        theirs = open_clip.model._build_vision_tower(open_clip.get_model_config(model)["embed_dim"], vision)
        state = from_openclip({f"visual.{key}": value for key, value in theirs.state_dict().items()})
        config = image_config(state)
        ours = CLIPImage(config)
    assert config.heads == config.width // vision["head_width"]
    assert [sum(p.numel() for p in tower.parameters()) for tower in (ours, theirs)] == [parameters] * 2
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert config == VIT_H or model != "ViT-H-14"


def test_full_size_text_tower_has_the_published_size():
    with torch.device("meta"):
        state = CLIPText(SD15_TEXT).state_dict()
    assert len(state) == 196 and sum(w.numel() for w in state.values()) == 123_060_480
    assert text_config(state) == SD15_TEXT


def test_configs_are_read_back_from_the_tensors(text_tower, image_tower):
    assert text_config(text_tower.state_dict()) == text_tower.config
    assert image_config(image_tower.state_dict()) == image_tower.config


@pytest.mark.parametrize("tower", ["text_tower", "image_tower"])
def test_every_tensor_matters(tower, draw, request):
    live = copy.deepcopy(request.getfixturevalue(tower)).requires_grad_(True)
    out = live(draw(1, 3, 64, 64)) if tower == "image_tower" else live.embed(tokenize("all " * 75))
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in live.parameters())


# Preprocessing

SIZES = [(224, 224), (512, 512), (640, 480), (480, 640), (225, 224), (226, 224), (228, 224), (301, 199), (199, 301)]
SIZES += [(1000, 300), (30, 20), (1, 1), (1, 7), (3, 2), (1023, 767), (224, 1000), (100, 333), (50, 50)]
# Between an even and an odd width no crop is in the middle: transformers rounds down, torchvision to the even number.
ODD = [(227, 224), (224, 227), (37, 500), (500, 37)]


def picture(width: int, height: int) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


@pytest.mark.parametrize("width, height", SIZES + ODD)
def test_preprocessing_equals_transformers(width, height):
    image = picture(width, height)
    theirs = torch.from_numpy(np.stack(CLIPImageProcessorPil()(image, return_tensors="np").pixel_values))
    ours = preprocess(image)
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("width, height", SIZES)
def test_preprocessing_equals_open_clip(width, height):
    image = picture(width, height)
    assert (preprocess(image)[0] - image_transform(224, is_train=False)(image)).abs().max() <= 1e-6


def test_preprocessing_to_another_size_equals_transformers():
    image = picture(333, 250)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = torch.from_numpy(np.stack(processor(image, return_tensors="np").pixel_values))
    assert (preprocess(image, 64) - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("width, height", [(700, 1), (3, 300), (700, 5), (9, 601), (1500, 20)])
def test_of_a_strip_the_middle_alone_is_made(width, height):
    """As transformers, which resizes the whole of it, but for a rounding here and there."""
    image = picture(width, height)
    theirs = torch.from_numpy(np.stack(CLIPImageProcessorPil()(image, return_tensors="np").pixel_values))
    apart = (preprocess(image) - theirs).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert apart.max() <= 1.01 and apart.mean() <= 1e-3


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (20_000, 3)])
def test_a_strip_takes_no_memory(size):
    """Resized whole, the first would have 3e9 pixels."""
    found = preprocess(Image.new("RGB", size, (255, 0, 51)))[0]
    wanted = (torch.tensor([1.0, 0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert (found - wanted.view(3, 1, 1)).abs().max() <= 1e-6
