"""What an adapter reads of pictures: as files, against other pictures, noise or a text."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counterparts import Order, assert_same_picture, opened, our_picture, published, randomise, their_picture
from narrow import NARROW_IMAGE, NARROW_TEXT
from PIL import Image
from safetensors.torch import save_file
from test_sample import pixels, sample

from clip import CLIPImage, CLIPText, preprocess, tokenize
from files.errors import Notice, UserError
from files.features import Features, read_features, write_features
from generate import ImageGroup, Models, features, open_models, pictures, prompts
from generate.again import again as repeated
from generate.embeddings import noise_picture, signed
from ipadapter import FacePlusProjection, FaceProjection, ImageProjection, IPAdapter, Prompt
from weights.presets import PRESETS

ROOT = Path(__file__).parent.parent
EXAMPLE, WEIGHTS = ROOT / "tiny/example.png", ROOT / "tiny/weights"


def drawn(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def same(one: tuple[Prompt, ...], other: tuple[Prompt, ...]) -> bool:
    """Bit for bit what cross-attention hears."""
    pairs = [(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p.images, q.images, strict=True)]
    return all(
        torch.equal(x, y)
        for a, b in pairs
        for kv, wv in zip(a.key_values, b.key_values, strict=True)
        for x, y in zip(kv, wv, strict=True)
    )


@pytest.fixture(scope="module", params=["tiny", "tiny-full-face"])
def models(request) -> Models:
    """Of embeddings and of patches."""
    return open_models(adapter=request.param, device="cpu")


@pytest.fixture
def narrow(sd1, base_adapter, image_tower) -> Models:
    return opened(sd1, base_adapter, image_tower)


@pytest.fixture
def narrow_patches(sd1, plus_adapter, image_tower) -> Models:
    return opened(sd1, plus_adapter, image_tower)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base_adapter", "plus_adapter"])
def test_a_picture_on_the_unconditional_side_is_as_in_diffusers(kind, request, sd1, image_tower, tmp_path):
    adapter = request.getfixturevalue(kind)
    torch.save(published(adapter), tmp_path / "ip-adapter.bin")
    order = Order(pictures=(drawn(1), drawn(2)), negatives=(drawn(3), drawn(4)))
    ours = our_picture(sd1, order, adapter, image_tower)
    assert_same_picture(ours, their_picture(sd1, order, tmp_path / "ip-adapter.bin", image_tower))
    without = our_picture(sd1, replace(order, negatives=()), adapter, image_tower)
    assert np.abs(ours[1].astype(int) - without[1].astype(int)).max() > 1


def test_one_negative_picture_stands_for_all_and_is_framed_likewise(narrow, image_tower, base_adapter):
    group = ImageGroup([drawn(1), drawn(2)], negative_image=[drawn(3)], framing="pad", crop_position="top")
    found = features(narrow, group)
    seen = lambda i: image_tower(preprocess(drawn(i), 64, "pad", "top"))
    assert torch.equal(found.negative, seen(3).expand(2, -1))
    assert (found.image - torch.cat([seen(1), seen(2)])).abs().max() < 1e-5
    with pytest.raises(UserError, match="`negative_image`: 2 given for 3 pictures: one for all, or one for each"):
        features(narrow, replace(group, images=[drawn(i) for i in range(3)], negative_image=[drawn(3)] * 2))


def test_noise_is_blended_into_the_features_of_absence(narrow, narrow_patches, image_tower):
    for models in (narrow, narrow_patches):
        plain, noisy, all_noise = (features(models, ImageGroup([drawn(1)], negative_noise=x)) for x in (0.0, 0.25, 1.0))
        read = image_tower if models is narrow else image_tower.penultimate
        noise = read(noise_picture(64))
        assert torch.allclose(noisy.negative, 0.75 * plain.negative + 0.25 * noise, atol=1e-5)
        assert torch.equal(all_noise.negative, noise) and torch.equal(noisy.image, plain.image)
    assert torch.equal(noise_picture(32), noise_picture(32))


@pytest.fixture
def whole_clip(tmp_path, image_tower) -> tuple[Path, CLIPText]:
    """Both towers of a CLIP in one file."""
    text = randomise(CLIPText(replace(NARROW_TEXT, quick_gelu=False)), 14)
    save_file(image_tower.state_dict() | text.state_dict(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors", text


def of_file(models: Models, file: Path) -> Models:
    return replace(models, adapters=(replace(models.adapters[0], image_encoder=file),))


def test_a_text_is_taken_off_the_embedding(narrow, whole_clip):
    """f - s t, in the one space of both towers; absence stays as it is."""
    file, text = whole_clip
    models = of_file(narrow, file)
    plain = features(models, ImageGroup([drawn(1)]))
    for less, strength in (("a red fox", 1.0), (("a red fox", 0.4), 0.4)):
        found = features(models, ImageGroup([drawn(1)], less=less))
        wanted = plain.image - strength * text.embed(tokenize("a red fox"))
        assert (found.image - wanted).abs().max() < 1e-5 and torch.equal(found.negative, plain.negative)


@pytest.mark.slow
def test_of_sdxl_it_is_the_second_text_tower(sdxl, draw):
    tower = sdxl.parts[0].second
    encoder = randomise(CLIPImage(replace(NARROW_IMAGE, projection=32)), 15)
    shapes = sdxl.base.layers
    adapter = randomise(IPAdapter(ImageProjection(32, 96, 4), shapes), 16)
    models = opened(sdxl, adapter, encoder)
    plain, found = (features(models, ImageGroup([drawn(1)], less=less)) for less in (None, "a red fox"))
    assert (plain.image - found.image - tower.embed(tokenize("a red fox", 0))).abs().max() < 1e-5


def test_of_the_tiny_model_it_is_the_base_and_a_projection():
    """A picture of the text itself is nearer to it than one less the text."""
    models = open_models(adapter="tiny", device="cpu")
    plain, less = (features(models, ImageGroup([EXAMPLE], less=text)) for text in (None, "cat face"))
    text = plain.image - less.image
    other = plain.image - features(models, ImageGroup([EXAMPLE], less="a truck")).image
    near = torch.nn.functional.cosine_similarity
    assert near(plain.image, text) > near(plain.image, other)


def test_what_cannot_be_taken_off_is_refused(narrow, narrow_patches, image_tower, tmp_path):
    save_file(image_tower.state_dict(), tmp_path / "image.safetensors")
    with pytest.raises(UserError, match=r"`less`: .*image.safetensors has no text tower beside the image encoder"):
        features(of_file(narrow, tmp_path / "image.safetensors"), ImageGroup([drawn(1)], less="a fox"))
    with pytest.raises(UserError, match="`less`: adapter reads patches of the picture"):
        features(narrow_patches, ImageGroup([drawn(1)], less="a fox"))


# Files


def test_an_embedding_gives_what_the_picture_gives_bit_for_bit(models, tmp_path):
    group = ImageGroup([EXAMPLE, drawn(1)], weights=[1, 0.5], negative_noise=0.3, framing="squash")
    wanted = prompts(models, "a", images=[group])
    write_features(tmp_path / "x.safetensors", signed(features(models, group), models, 0))
    alone = open_models(adapter=models.adapters[0].file, device="cpu", encode=False)
    assert alone.adapters[0].image_encoder is None and "image_encoder" not in alone.files
    found = prompts(alone, "a", images=[ImageGroup([tmp_path / "x.safetensors"], weights=[1, 0.5])])
    assert same(wanted, found) and not [part for part in alone.held if "image encoder" in part]
    # Pictures and embeddings in one group are as the pictures together, but for the rounding of a batch.
    mixed = features(models, ImageGroup([tmp_path / "x.safetensors", drawn(2)]))
    assert len(mixed) == 3 and (mixed.image[2:] - features(models, ImageGroup([drawn(2)])).image).abs().max() < 1e-5


def test_tiles_are_kept_with_their_masks(models, tmp_path):
    group = ImageGroup([drawn(1, 128, 50)], framing="tile", mask=Image.new("L", (8, 8), 128))
    wanted = prompts(models, images=[group])
    assert len(wanted[0].images) == 3 and [image.group for image in wanted[0].images] == [0] * 3
    assert torch.allclose(sum(image.mask for image in wanted[0].images), torch.full((1, 1, 8, 8), 128 / 255), atol=1e-3)
    write_features(tmp_path / "x.safetensors", features(models, group))
    found = prompts(models, images=[replace(group, images=[tmp_path / "x.safetensors"], framing="crop")])
    assert same(wanted, found)
    for ours, theirs in zip(wanted[0].images, found[0].images, strict=True):
        assert torch.equal(ours.mask, theirs.mask)


@pytest.mark.slow
def test_one_tile_is_the_picture(models):
    square = drawn(1, 64, 64)
    (tile,), (plain,) = (
        list(
            pictures(models, *prompts(models, images=[ImageGroup([square], framing=how)]), steps=1, height=64, width=64)
        )
        for how in ("tile", "crop")
    )
    assert np.abs(np.asarray(tile).astype(int) - np.asarray(plain).astype(int)).max() <= 1


def test_ipadpt_files_of_both_kinds(narrow, narrow_patches, tmp_path):
    """diffusers' is a list of [negative; positive], ComfyUI_IPAdapter_plus' the positive alone."""
    for models in (narrow, narrow_patches):
        group = ImageGroup([drawn(1), drawn(2)], negative_noise=0.5)
        found = features(models, group)
        torch.save([torch.stack([found.negative, found.image])], tmp_path / "d.ipadpt")
        torch.save(found.image, tmp_path / "p.ipadpt")
        torch.save(found.negative, tmp_path / "n.ipadpt")
        wanted = prompts(models, images=[group])
        assert same(wanted, prompts(models, images=[tmp_path / "d.ipadpt"]))
        both = ImageGroup([tmp_path / "p.ipadpt"], negative_image=[tmp_path / "n.ipadpt"])
        assert same(wanted, prompts(models, images=[both]))
        without = prompts(models, images=[ImageGroup([tmp_path / "p.ipadpt"])])
        assert same(without, prompts(models, images=[replace(group, negative_noise=0.0)]))


def test_who_needs_an_image_encoder(tmp_path):
    x, many = torch.randn(1, 96), torch.randn(1, 17, 128)
    for group, wanted in (
        (ImageGroup([drawn(1)]), True),
        (ImageGroup([Features(x, x)]), False),
        (ImageGroup([Features(x)]), False),
        (ImageGroup([Features(many)]), True),
        (ImageGroup([Features(many, many)]), False),
        (ImageGroup([Features(many)], negative_image=[Features(many)]), False),
        (ImageGroup([Features(x, x)], negative_image=[drawn(1)]), True),
        (ImageGroup([Features(x, x)], negative_noise=0.1), True),
        (ImageGroup([Features(x, x)], less="a"), True),
    ):
        assert group.encodes == wanted


def test_embeddings_that_do_not_fit_are_refused(narrow, models, monkeypatch):
    with pytest.raises(UserError, match=r"the embedding: holds patches of 128; adapter reads embeddings of 96"):
        features(narrow, ImageGroup([Features(torch.ones(1, 17, 128))]))
    with pytest.raises(UserError, match=r"holds faces alone; adapter reads embeddings of 96"):
        features(narrow, ImageGroup([Features(faces=torch.ones(1, 512))]))
    found = features(models, ImageGroup([EXAMPLE]))
    other = {"adapter": "a" * 64, "image_encoder": "b" * 64}
    with pytest.raises(UserError, match="made by the image encoder with SHA-256 bbbbbbbbbb... for another adapter"):
        features(models, ImageGroup([replace(found, sha256=other)]))
    ours = signed(found, models, 0).sha256
    features(models, ImageGroup([replace(found, sha256=ours | {"adapter": "a" * 64})]))  # of the same encoder
    features(models, ImageGroup([replace(found, sha256=ours | {"image_encoder": "b" * 64})]))  # of the same adapter
    alone = replace(models, adapters=(replace(models.adapters[0], image_encoder=None),))
    with pytest.warns(Notice, match="is of another adapter; its widths fit"):
        features(alone, ImageGroup([replace(found, sha256=other)]))
    with monkeypatch.context() as patched:  # the published one is known, fetched or not
        plus = PRESETS["adapter", "plus"]
        patched.setattr("generate.fit.model_sha256", lambda path: plus.sha256)
        features(
            alone,
            ImageGroup([replace(found, sha256=other | {"image_encoder": PRESETS["image_encoder", "vit-h"].sha256})]),
        )
        with pytest.raises(UserError, match="reads that with 6ca9667da1"):
            features(alone, ImageGroup([replace(found, sha256=other)]))
    with pytest.raises(UserError, match="`image`: no image encoder was opened, which a picture wants"):
        features(alone, ImageGroup([EXAMPLE]))


@pytest.mark.parametrize("plus", [False, True])
def test_embeddings_hold_the_faces_of_faceid_adapters(plus, sd1, image_tower, tmp_path):
    projection = FacePlusProjection(512, 128, 1, 1, 4, 64) if plus else FaceProjection(512, 64, 4)
    adapter = randomise(IPAdapter(projection, sd1.base.layers), 17)
    models = opened(sd1, adapter, image_tower if plus else None, faceid_v2=plus)
    faces = torch.nn.functional.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(0)))
    group = ImageGroup([drawn(1)] if plus else [], faces=[faces], structure_scale=0.5 if plus else None)
    write_features(tmp_path / "x.safetensors", features(models, group))
    alone = replace(group, images=[tmp_path / "x.safetensors"], faces=())
    assert same(prompts(models, images=[group]), prompts(models, images=[alone]))
    with pytest.raises(UserError, match="the embedding: holds no faces, which adapter reads|holds embeddings of 4"):
        features(models, ImageGroup([Features(torch.ones(1, 17, 128) if plus else torch.ones(1, 4))]))


DAMAGED = {
    "of something else": ({"weight": torch.ones(1, 4)}, "an embedding of pictures is wanted here"),
    "without a picture": ({"negative": torch.ones(1, 4)}, "an embedding without `image` or `faces`"),
    "not finite": ({"image": torch.full((1, 4), torch.nan)}, r"its image are float32 \(1, 4\); finite numbers"),
    "of whole numbers": ({"image": torch.ones(1, 4).long()}, r"its image are int64 \(1, 4\)"),
    "of a line": ({"image": torch.ones(4)}, r"its image are float32 \(4,\)"),
    "apart": ({"image": torch.ones(1, 4), "negative": torch.ones(1, 5)}, "parts that do not go together"),
    "of several adapters": ([torch.ones(2, 1, 4)] * 2, "holds embeddings for 2 adapters; those of one are wanted"),
    "of no pair": ([torch.ones(3, 1, 4)], r"of shape \(3, 1, 4\); diffusers' are \(2, pictures, ...\)"),
    "of words": ({"a": torch.ones(1, 4)}, "a tensor, or a list of them; it has a"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_are_no_embeddings_are_refused(name, tmp_path):
    content, message = DAMAGED[name]
    path = tmp_path / ("x.ipadpt" if name.endswith(("words", "adapters", "pair")) else "x.safetensors")
    torch.save(content, path) if path.suffix == ".ipadpt" else save_file(content, path)
    with pytest.raises(UserError, match=message) as told:
        read_features(path)
    assert str(told.value).startswith(str(path))


# At the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    for i, name in enumerate(("a.png", "b.png", "c.jpg", "wide.png")):
        drawn(i, 120 if name == "wide.png" else 60, 60).save(path / name)
    (path / "notes.txt").write_text("no picture")
    return path


SMALL = ["--steps", 1, "--height", 64, "--width", 64]


def made(*given: object) -> np.ndarray:
    result = sample(*given, *SMALL)
    assert result.returncode == 0, result.stderr
    return pixels(given[given.index("--output") + 1])


@pytest.mark.slow
def test_an_embedding_is_saved_and_makes_the_picture_again(folder, tmp_path):
    x, out = tmp_path / "x.safetensors", tmp_path / "out.png"
    group = ["--image", folder / "a.png", folder / "b.png", "--framing", "pad", "--crop-position", "top"]
    group += ["--negative-image", folder / "c.jpg", "--negative-noise", 0.2, "--adapter", "tiny", "--less", "a fox:0.5"]
    first = made(*group, "--save-embedding", x, "--output", out)
    assert (made("--image", x, "--adapter", "tiny", "--output", tmp_path / "x.png") == first).all()
    settings = json.loads(Image.open(tmp_path / "x.png").text["ipadapter"])
    assert "image_encoder" not in settings["groups"][0] or settings["groups"][0]["image_encoder"] is None
    assert [one["image_encoder"] for one in repeated(tmp_path / "x.png", (), [{"image"}])["groups"]] == ["tiny"]
    settings = json.loads(Image.open(out).text["ipadapter"])["groups"][0]
    assert settings["less"] == "a fox:0.5" and settings["framing"] == "pad" and "save_embedding" not in settings
    assert (made("--again", out, "--output", tmp_path / "again.png") == first).all()
    assert (made("--again", out, "--less", "a fox:0", "--output", tmp_path / "other.png") != first).any()
    again = sample("--image", folder / "a.png", "--save-embedding", x, "--output", tmp_path / "new.png")
    assert again.returncode == 2 and "x.safetensors: exists; another name is wanted, or --overwrite" in again.stderr


@pytest.mark.slow
def test_each_picture_of_a_folder_has_a_result(folder, tmp_path):
    flags = ["--image", folder, "--each", "--scale", 0, 1, "--image", folder / "b.png", "--scale", 0.5]
    result = sample(*flags, "--output", tmp_path / "out", *SMALL)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{stem}_{i}.png" for stem in ("a", "b", "c", "wide") for i in (0, 1)]
    two = ["--image", folder / "c.jpg", "--image", folder / "b.png", "--scale", 0.5]
    alone = made(*two, "--output", tmp_path / "c.png")
    assert abs(pixels(tmp_path / "out/c_1.png") - alone).max() <= 1
    settings = json.loads(Image.open(tmp_path / "out/c_1.png").text["ipadapter"])
    assert settings["groups"][0]["image"] == [str(folder / "c.jpg")] and "each" not in settings["groups"][0]
    assert abs(made("--again", tmp_path / "out/c_1.png", "--output", tmp_path / "d.png") - alone).max() <= 1


@pytest.mark.slow
def test_each_picture_has_its_sheet_its_embedding_and_a_row_on_a_sheet(folder, tmp_path):
    """All as of the picture alone, though four go through the UNet together."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    flags = ["--prompt", "red apple", "--attention", *SMALL]
    all_of_it = ["--image", folder, "--each", "--scale", 0.3, 1, "--save-embedding", kept, "--grid", "--output", out]
    result = sample(*all_of_it, *flags)
    assert result.returncode == 0, result.stderr
    made = [f"{name}_{i}{end}.png" for name in ("a", "b", "c", "wide") for i in (0, 1) for end in ("", "_attention")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*made, "grid.png"])
    assert result.stdout.split() == [str(out / name) for name in (*made[::2], *made[1::2], "grid.png")]
    wide = "--image", folder / "wide.png", "--scale", 1
    assert sample(*wide, *flags, "--output", tmp_path / "wide.png").returncode == 0
    for end in ("", "_attention"):
        assert abs(pixels(tmp_path / f"wide{end}.png") - pixels(out / f"wide_1{end}.png")).max() <= 1
    assert sorted(path.name for path in kept.iterdir()) == [f"{x}.safetensors" for x in ("a", "b", "c", "wide")]
    page, gap = Image.open(out / "grid.png"), 4  # a row for each: the picture beside its results
    rows = [page.crop((2 * gap + 64, page.height - (4 - i) * (64 + gap), page.width, page.height)) for i in range(4)]
    assert all(
        (np.asarray(row)[:64, :64] == pixels(out / f"{x}_0.png")).all() for row, x in zip(rows, ("a", "b", "c", "wide"))
    )
    again = sample("--again", out / "grid.png")
    assert again.returncode == 2 and "holds no settings" in again.stderr


@pytest.mark.slow
def test_each_with_tiles_and_seeds(folder, tmp_path):
    tiled = ["--image", folder, "--each", "--framing", "tile", "--num-images", 2, "--output", tmp_path / "out"]
    assert sample(*tiled, *SMALL).returncode == 0
    assert len(list((tmp_path / "out").iterdir())) == 8
    wide = ["--image", folder / "wide.png", "--framing", "tile", "--seed", 1]
    assert abs(made(*wide, "--output", tmp_path / "x.png") - pixels(tmp_path / "out/wide_1.png")).max() <= 1


MISTAKES = {
    "framing": (["--image", "a.png", "--framing", "cut"], "--framing: invalid choice: 'cut'"),
    "position": (["--image", "a.png", "--framing", "tile", "--crop-position", "top"], "--crop-position top: --framing"),
    "tiles": (["--image", "a.png", "b.png", "--framing", "tile"], "--framing tile: one picture to a group"),
    "noise": (["--image", "a.png", "--negative-noise", "2"], "--negative-noise: '2' given, a number from 0 to 1"),
    "negative": (["--image", "a.png", "--negative-image", "nowhere.png"], "nowhere.png: no such picture"),
    "negatives": (["--image", "a.png", "--negative-image", *["b.png"] * 2], "--negative-image: 2 given for 1 pictures"),
    "less": (
        ["--image", "a.png", "--less", "a fox", *SMALL],
        "ip-adapter-full-face-tiny.safetensors reads patches of the picture",
    ),
    "no number": (["--image", "a.png", "--less", "a fox:nan"], "--less: a fox:nan: the weight is nan"),
    "embedding": (["--image", "x.safetensors"], "x.safetensors: no such file"),
    "kind": (["--image", WEIGHTS / "clip-tiny.safetensors"], "an embedding of pictures is wanted here"),
    "save": (["--image", "a.png", "--save-embedding", "x.bin"], "--save-embedding x.bin: a name that ends in"),
    "saves": (["--save-embedding", "x.safetensors", *["--image", "a.png"] * 2], "given for 2 image prompts"),
    "less of nothing": (["--image", "a.png", "--less", ""], "--less: a text is wanted"),
    "a folder": (["--image", "."], ".: a folder, not a picture; with --each there is a result for each picture in it"),
    "each": ([*["--image", ".", "--each"] * 2], "--each: for one image prompt, not for more"),
    "each with weights": (["--image", ".", "--each", "--weights", 1], "--each: every picture prompts alone, so that"),
    "each with a face": (
        ["--image", ".", "--each", "--face-embedding", "f.npy"],
        "--each: a --face-embedding is of one",
    ),
    "each in one file": (
        ["--image", ".", "--each", "--save-embedding", "x.safetensors"],
        "a folder is wanted, for one of each",
    ),
    "each on a long sheet": (
        ["--image", ".", "--each", "--grid", "--num-images", 51],
        "--grid: a sheet has at most 200 rows",
    ),
    "no pictures": (["--image", "nothing", "--each"], "nothing: no pictures in this folder"),
    "a file": (["--image", ".", "--each", "--output", "x.png"], "--output x.png: a folder is wanted"),
    "text": (["--prompt", "a", "--less", "b"], "--less belongs to an image prompt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line(name, folder, monkeypatch):
    given, message = MISTAKES[name]
    monkeypatch.chdir(folder)
    (folder / "nothing").mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    result = sample(*given, *([] if "--output" in given else ["--output", "out.png"]))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr and sorted(folder.rglob("*")) == before


NAMED = {  # what is wrong with names alone, whose files are not here
    "patches": (
        ["--adapter", "plus", "--less", "a"],
        "--less: --adapter plus reads patches of the picture, from which",
    ),
    "no text tower": (["--adapter", "base", "--less", "a"], "--less: --image-encoder vit-h has no text tower beside"),
    "no text tower in a file": (
        ["--base", "sdxl", "--image-encoder", "image.safetensors", "--adapter", "sdxl-vit-h", "--less", "a"],
        "--less: image.safetensors has no text tower beside the image encoder",
    ),
    "layers": (
        ["--base", "sd15", "--layers", "up.block_0.1"],
        "at character 1: this base has no such layers; there are",
    ),
    "embeddings": (
        ["--image", "a.safetensors", "--adapter", "plus"],
        "holds embeddings of 64; --adapter plus reads patches of 1280",
    ),
    "of another encoder": (
        ["--image", "wide.safetensors", "--adapter", "base"],
        "made by the image encoder with SHA-256 bbbbbbbbbb... for another adapter; --adapter base reads that with 6ca9667da1",
    ),
    "weights": (
        ["--image", "wide.safetensors", "--adapter", "vit-g", "--weights", 1, 1],
        "holds embeddings of 1024; --adapter vit-g",
    ),
    "many weights": (
        ["--image", "wide.safetensors", "--adapter", "sdxl-vit-h", "--weights", 1, 2, 3],
        "3 given, 2 wanted",
    ),
    "negatives": (
        ["--adapter", "plus", "--negative-image", *["a.png"] * 3],
        "--negative-image: 3 given for 1 pictures",
    ),
    "a face": (
        ["--adapter", "plus", "--face-embedding", "face.npy"],
        "--face-embedding: for FaceID adapters; --adapter plus",
    ),
    "faces": (["--adapter", "faceid", "--negative-noise", 0.5], "--negative-noise: --adapter faceid reads faces"),
    "structure": (["--adapter", "plus-face", "--structure-scale", 1], "for FaceID-plus version 2; --adapter plus-face"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_names_tell_is_refused_before_anything_is_fetched(name, tmp_path, image_tower, monkeypatch):
    def fetched(*given: object) -> Path:
        raise AssertionError("fetched")

    given, message = NAMED[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("generate.models.fetch", fetched)
    drawn(1).save("a.png")
    np.save("face.npy", np.ones(512, np.float32))
    save_file(image_tower.state_dict(), "image.safetensors")
    write_features(Path("a.safetensors"), Features(torch.ones(1, 64)))
    other = {"adapter": "a" * 64, "image_encoder": "b" * 64 if name == "of another encoder" else ""}
    write_features(Path("wide.safetensors"), Features(torch.ones(2, 1024), sha256=other))
    result = sample(*(given if "--image" in given else ["--image", "a.png", *given]), "--output", "out.png")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr
