"""CLIP: the tokenizer token for token, both towers on the same weights, preprocessing, and pictures of every kind."""

import copy
import json
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from counterparts import randomise, rel, transformers_image, transformers_text
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from open_clip.transformer import VisionTransformer
from PIL import Image
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip import SD15_TEXT, VIT_H, CLIPImage, CLIPText, preprocess, tokenize
from clip.tokenizer import CONTEXT, END, START, cut, decode, encode
from files.pictures import PictureError, open_picture
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


@pytest.mark.parametrize("words, rest", [(0, ""), (74, ""), (75, ""), (76, "word"), (78, "word word word")])
def test_cut_is_what_does_not_fit(words, rest):
    assert cut("Word " * words) == rest


def test_cut_and_kept_tokens_are_the_whole_text():
    text = "café 😀, it's 12 o'clock " * 12
    kept = tokenize(text)[0, 1:-1].tolist()
    assert kept + encode(cut(text)) == encode(text)


@pytest.mark.parametrize("text", TEXTS + REPAIRED)
def test_decoded_tokens_equal_open_clip(text):
    assert decode(encode(text)) == SimpleTokenizer().decode(encode(text)).strip()


def test_tokenizer_imports_no_big_library():
    code = "import sys, clip; clip.tokenize('a cat'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
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


# Opening pictures

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def opened(path) -> list[list[tuple[int, int, int]]]:
    image = open_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def rows(*rows: list[tuple[int, int, int]]) -> list[list[list[int]]]:
    return [[list(colour) for colour in row] for row in rows]


def two_colours(width: int = 16, height: int = 8) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "ppm", "webp", "tga"])
def test_lossless_formats_give_exact_values(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    two_colours(2, 1).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert opened(path) == rows([RED, BLUE])


def test_the_name_may_lie_about_the_format(tmp_path):
    two_colours(2, 1).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert opened(tmp_path / "x.jpg") == rows([RED, BLUE])


@pytest.mark.parametrize("mode, red", [("RGB", RED), ("CMYK", (0, 255, 255, 0)), ("L", 76)])
def test_jpeg(tmp_path, mode, red):
    Image.new(mode, (16, 16), red).save(tmp_path / "x.jpg", quality=100)
    wanted = (76, 76, 76) if mode == "L" else RED
    assert np.abs(np.array(opened(tmp_path / "x.jpg")) - wanted).max() <= 2


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (4, 1))
    for i, ink in enumerate([(0, 255, 255, 0), (255, 255, 0, 0), (0, 0, 0, 0), (0, 0, 0, 255)]):
        image.putpixel((i, 0), ink)
    image.save(tmp_path / "x.tiff")
    assert opened(tmp_path / "x.tiff") == rows([RED, BLUE, WHITE, BLACK])


def test_an_animation_gives_its_first_frame(tmp_path):
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"x.{suffix}"
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
        extra = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **extra)
        assert Image.open(path).n_frames == 3
        assert opened(path) == rows(*[[RED] * 8] * 8)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257, 254 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    assert Image.open(tmp_path / f"x.{suffix}").mode == "I;16"
    assert opened(tmp_path / f"x.{suffix}") == rows([(v, v, v) for v in (0, 1, 128, 254, 255)])


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert opened(tmp_path / "x.png") == rows([(0, 0, 0), (0, 0, 0), (1, 1, 1)])


def test_grey_and_bilevel(tmp_path):
    Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    assert opened(tmp_path / "grey.png") == rows([(0, 0, 0), (7, 7, 7), (255, 255, 255)])
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert opened(tmp_path / "bits.png") == rows([WHITE, BLACK])


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *RED])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "x.png")
    assert opened(tmp_path / "x.png") == rows([RED, BLUE])
    image.save(tmp_path / "clear.png", transparency=0)  # entry 0 is see-through
    assert opened(tmp_path / "clear.png") == rows([RED, WHITE])


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for i, alpha in enumerate((255, 0, 51)):  # 51 is a fifth: 255 - 51 of white shines through
        image.putpixel((i, 0), (*RED, alpha))
    image.save(tmp_path / "rgba.png")
    assert opened(tmp_path / "rgba.png") == rows([RED, WHITE, (255, 204, 204)])
    grey = Image.new("LA", (3, 1))
    for i, alpha in enumerate((255, 0, 51)):
        grey.putpixel((i, 0), (0, alpha))
    grey.save(tmp_path / "la.png")
    assert opened(tmp_path / "la.png") == rows([BLACK, WHITE, (204, 204, 204)])
    two_colours(2, 1).save(tmp_path / "key.png", transparency=BLUE)
    assert opened(tmp_path / "key.png") == rows([RED, WHITE])


UPRIGHT = {  # what stands where when the stored rows are "12", "34" (EXIF 2.3, tag 274)
    1: ["12", "34"],
    2: ["21", "43"],
    3: ["43", "21"],
    4: ["34", "12"],
    5: ["13", "24"],
    6: ["31", "42"],
    7: ["42", "31"],
    8: ["24", "13"],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_turns_the_picture_upright(tmp_path, orientation):
    image = Image.fromarray(np.array([[1, 2], [3, 4]], dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    found = np.asarray(open_picture(tmp_path / "x.png"))[..., 0]
    assert ["".join(map(str, row)) for row in found] == UPRIGHT[orientation]


def test_exif_rotated_jpeg(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    two_colours(32, 16).save(tmp_path / "x.jpg", exif=exif, quality=100)
    image = open_picture(tmp_path / "x.jpg")
    assert image.size == (16, 32)
    assert np.abs(np.array(image.getpixel((8, 4))) - RED).max() <= 2  # what was left is on top
    assert np.abs(np.array(image.getpixel((8, 28))) - BLUE).max() <= 2


def broken(folder, kind: str):
    """A file of this kind, whose name is the kind."""
    path = folder / f"{kind}.png"
    whole = folder / "whole"
    picture(64, 64).save(whole, format=kind.split()[-1] if kind.startswith("cut") else "PNG")
    content = whole.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is no picture\n" * 100)
    elif kind == "only a signature":
        path.write_bytes(content[:8])
    elif kind == "zeros":
        path.write_bytes(bytes(5000))
    elif kind == "damaged":
        path.write_bytes(content[: len(content) // 2] + bytes(200) + content[len(content) // 2 + 200 :])
    elif kind.startswith("cut"):
        path.write_bytes(content[: len(content) * 2 // 3])
    return path


FAULTS = {
    "missing": "no such picture",
    "folder": "a folder, not a picture",
    "empty": "the file is empty",
    "text": "not a picture",
    "zeros": "not a picture",
    "only a signature": "not a picture",
    "damaged": "damaged or cut short",
    "cut PNG": "damaged or cut short",
    "cut JPEG": "damaged or cut short",
    "cut GIF": "damaged or cut short",
    "cut BMP": "damaged or cut short",
    "cut TIFF": "damaged or cut short",
    "cut WEBP": "damaged or cut short",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_file_that_is_no_whole_picture_is_named_in_one_line(tmp_path, kind):
    path = broken(tmp_path, kind)
    with pytest.raises(PictureError) as error:
        open_picture(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and FAULTS[kind] in message and "\n" not in message


def test_a_picture_beyond_all_measure_is_refused(tmp_path, monkeypatch):
    picture(64, 64).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match=r"x\.png: too large, over 2000 pixels$"):
        open_picture(tmp_path / "x.png")


def test_a_name_that_no_file_can_have_is_a_picture_error():
    with pytest.raises(PictureError):
        open_picture("a" * 300 + ".png")
