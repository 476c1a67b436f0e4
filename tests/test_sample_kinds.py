"""sample.py with what people bring along: faces, LoRAs, other bases, other samplers, little memory."""

import hashlib
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from counterparts import randomise
from PIL import Image
from safetensors.torch import save_file
from test_sample import FAST, ROOT, WEIGHTS, pixels, sample
from torch import Tensor

from ipadapter import FacePlusProjection, FaceProjection, ImageProjection, IPAdapter
from weights import open_base, read
from weights.diffusers import PLACES

pytestmark = pytest.mark.slow

EXAMPLE, TINY = ROOT / "tiny/example.png", WEIGHTS / "sd-tiny.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Face embeddings and FaceID adapters for the tiny base, a LoRA."""
    folder = tmp_path_factory.mktemp("kinds")
    generator = torch.Generator().manual_seed(0)
    faces = torch.nn.functional.normalize(torch.randn(3, 512, generator=generator)).numpy()
    np.save(folder / "face.npy", faces[0])
    np.save(folder / "other.npy", 20 * faces[1:2])  # not normalised, as insightface's `embedding`
    np.save(folder / "two.npy", faces[:2])
    save_file({"face": torch.from_numpy(faces[0])}, folder / "face.safetensors")
    layers = open_base(TINY).layers
    width = read(WEIGHTS / "clip-tiny.safetensors")["vision_model.pre_layrnorm.weight"].numel()
    projections = {"faceid": FaceProjection(512, 64, 4), "plus": FacePlusProjection(512, width, 2, 1, 4, 64)}
    for seed, (name, projection) in enumerate(projections.items()):
        adapter = randomise(IPAdapter(projection, layers, lora_rank=4), seed)
        save_file(adapter.state_dict(), folder / f"{name}.safetensors")
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {
        f"{key}.lora_down.weight": torch.randn(2, 64, generator=generator),
        f"{key}.lora_up.weight": torch.randn(64, 2, generator=generator),
    }
    save_file(lora, folder / "lora.safetensors")
    return folder


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, ...], tuple[np.ndarray, dict]]:
    """What these flags have made already: many pictures are compared with the same few."""
    return {}


@pytest.fixture
def make(tmp_path, folder, made):
    """Run the script on these flags; `folder/` stands for the fixture's. Returns pixels and settings."""

    def run(*flags: object) -> tuple[np.ndarray, dict]:
        flags = (*(str(flag).replace("folder/", f"{folder}/") for flag in flags), *FAST)
        if flags not in made:
            result = sample(*flags, "--output", path := tmp_path / "x.png", "--overwrite")
            assert result.returncode == 0, result.stderr
            made[flags] = pixels(path), json.loads(Image.open(path).text["ipadapter"])
        return made[flags]

    return run


FACE = ["--adapter", "folder/faceid.safetensors", "--face-embedding"]
PLUS = ["--adapter", "folder/plus.safetensors", "--image", EXAMPLE, "--face-embedding", "folder/face.npy"]


def test_a_face_embedding_prompts(make):
    found, settings = make(*FACE, "folder/face.npy")
    assert [Path(path).name for path in settings["face_embedding"]] == ["face.npy"]
    assert any(path.endswith("face.npy") for path in settings["sha256"])
    assert np.array_equal(make(*FACE, "folder/face.safetensors")[0], found)
    assert not np.array_equal(make(*FACE, "folder/other.npy")[0], found)
    two = make(*FACE, "folder/two.npy")[0]
    assert not np.array_equal(two, found)
    both = make(*FACE, "folder/face.npy", "folder/other.npy")[0]  # two files, or one file of two
    assert np.abs(both - two).max() <= 1


def test_faceid_plus_has_two_versions_and_a_weight_of_the_structure(make):
    one = make(*PLUS)[0]
    two, settings = make(*PLUS, "--faceid-v2")
    assert settings["structure_scale"] == 1.0
    half = make(*PLUS, "--faceid-v2", "--structure-scale", "0.5")[0]
    assert not np.array_equal(one, two) and not np.array_equal(two, half)


def test_faces_are_read_off_pictures_where_insightface_is_installed(make, monkeypatch, folder):
    face, shown = np.load(folder / "face.npy"), []

    class FaceAnalysis:
        def __init__(self, name: str, allowed_modules: list[str]):
            assert name == "buffalo_l"
            self.det_model = SimpleNamespace(input_size=None)

        def prepare(self, ctx_id: int, det_size: tuple[int, int]) -> None:
            self.det_model.input_size = self.det_model.input_size or det_size  # only the first one counts

        def get(self, picture: np.ndarray) -> list[SimpleNamespace]:
            if self.det_model.input_size[0] > 320:  # the face fills the picture
                return []
            shown.append(picture)
            small = SimpleNamespace(bbox=[0, 0, 9, 9], normed_embedding=-face, kps=None)
            return [small, SimpleNamespace(bbox=[0, 0, 90, 90], normed_embedding=face, kps="kps")]

    def norm_crop(picture: np.ndarray, landmark: str, image_size: int) -> np.ndarray:
        assert landmark == "kps" and image_size == 224
        return picture

    package = types.ModuleType("insightface")
    package.__spec__ = importlib.machinery.ModuleSpec("insightface", None)
    for name, content in (("app", {"FaceAnalysis": FaceAnalysis}), ("utils.face_align", {"norm_crop": norm_crop})):
        module = types.ModuleType(f"insightface.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"insightface.{name}", module)
    monkeypatch.setitem(sys.modules, "insightface", package)
    runtime = types.ModuleType("onnxruntime")
    runtime.__spec__ = importlib.machinery.ModuleSpec("onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setitem(sys.modules, "insightface.utils", types.ModuleType("insightface.utils"))
    found = make(*PLUS[:4])[0]
    assert np.array_equal(found, make(*PLUS)[0])
    assert np.array_equal(shown[0][:, :, ::-1], pixels(EXAMPLE))  # told as BGR


def test_a_lora_changes_the_picture_by_its_weight(make):
    plain = make("--prompt", "cat")[0]
    assert np.array_equal(make("--prompt", "cat", "--lora", "folder/lora.safetensors:0")[0], plain)
    whole, settings = make("--prompt", "cat", "--lora", "folder/lora.safetensors")
    assert [weight for _, weight in settings["lora"]] == [1.0] and not np.array_equal(whole, plain)
    twice, settings = make("--prompt", "cat", "--lora", "folder/lora.safetensors:0.4", "folder/lora.safetensors:0.6")
    assert [weight for _, weight in settings["lora"]] == [0.4, 0.6]
    assert np.abs(twice - whole).max() <= 1


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++", "unipc", "lcm"])
def test_each_sampler_makes_a_picture_of_its_own(make, name):
    found, settings = make("--prompt", "cat", "--sampler", name)
    assert settings["sampler"] == name and settings["guidance_scale"] == (1.0 if name == "lcm" else 7.5)
    assert not np.array_equal(found, make("--prompt", "cat", "--guidance-scale", settings["guidance_scale"])[0])


def test_a_picture_of_a_random_sampler_does_not_depend_on_the_batch(make, tmp_path):
    flags = ["--prompt", "cat", "--sampler", "euler-a", "--guidance-scale", "2"]
    alone = make(*flags, "--seed", "5")[0]
    assert sample(*flags, "--seed", "3", "--num-images", "3", "--output", tmp_path / "n.png", *FAST).returncode == 0
    assert np.abs(pixels(tmp_path / "n_2.png") - alone).max() <= 1


def test_little_memory_gives_the_same_picture(make):
    plain = make("--image", EXAMPLE, "--prompt", "cat")[0]
    little, settings = make("--image", EXAMPLE, "--prompt", "cat", "--low-memory")
    assert settings["storage"] == "float16"  # as the bundled files are
    assert np.abs(little - plain).max() <= 1
    assert not np.array_equal(make("--image", EXAMPLE, "--prompt", "cat", "--storage", "float8")[0], plain)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families_make_pictures(request, tmp_path, make, image_tower, family):
    base = request.getfixturevalue(family).base
    adapter = IPAdapter(ImageProjection(96, base.layers[0][1], 4), base.layers)
    save_file(randomise(adapter, 3).state_dict(), tmp_path / "adapter.safetensors")
    save_file(image_tower.state_dict(), tmp_path / "encoder.safetensors")
    files = ["--base", base.path, "--adapter", tmp_path / "adapter.safetensors"]
    files += ["--image-encoder", tmp_path / "encoder.safetensors"]
    found, settings = make(*files, "--image", EXAMPLE, "--prompt", "cat", "--scale", "0.8")
    assert settings["prediction"] == ("v" if family == "sd2" else "eps")
    without = make(*files, "--image", EXAMPLE, "--prompt", "cat", "--scale", "0")[0]
    assert found.shape == (64, 64, 3) and not np.array_equal(found, without)
    other = make(*files, "--image", EXAMPLE, "--prompt", "cat", "--negative-prompt", "dog", "--scale", "0.8")[0]
    assert not np.array_equal(found, other)
    half = make(*files, "--image", EXAMPLE, "--prompt", "cat", "--scale", "0.8", "--low-memory")[0]
    assert np.abs(half - found).mean() < 8


def test_a_diffusers_folder_makes_the_pictures_of_the_file(make, tmp_path):
    state, lines = read(TINY), []
    for part, prefix in PLACES.items():
        file = tmp_path / "tiny" / part / "model.safetensors"
        file.parent.mkdir(parents=True)
        save_file({k.removeprefix(prefix): w for k, w in state.items() if k.startswith(prefix)}, file)
        lines.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {part}/model.safetensors\n")
    found, settings = make("--prompt", "cat", "--base", tmp_path / "tiny")
    assert np.array_equal(found, make("--prompt", "cat")[0])
    whole = "".join(sorted(lines, key=lambda line: line.split()[1]))
    assert settings["sha256"] == {str(tmp_path / "tiny"): hashlib.sha256(whole.encode()).hexdigest()}


def test_an_old_text_tower_without_its_inner_name(make, tmp_path):
    state = {k.replace(".transformer.text_model.", ".transformer."): w for k, w in read(TINY).items()}
    assert state.keys() != read(TINY).keys()
    save_file(state, tmp_path / "old.safetensors")
    old = make("--prompt", "cat", "--base", tmp_path / "old.safetensors")[0]
    assert np.array_equal(old, make("--prompt", "cat")[0])


def test_a_name_that_is_not_utf8(make, tmp_path):
    picture = tmp_path / os.fsdecode(b"caf\xe9.png")
    picture.write_bytes(EXAMPLE.read_bytes())
    found, settings = make("--image", picture)
    assert settings["image"] == [str(picture)] and np.array_equal(found, make("--image", EXAMPLE)[0])


def test_what_has_no_effect_is_said(tmp_path):
    flags = ["--prompt", "cat", "--adapter", WEIGHTS / "ip-adapter-tiny.safetensors", "--output", tmp_path / "x.png"]
    result = sample(*flags, "--guidance-scale", "1", "--negative-prompt", "dog", *FAST)
    assert result.returncode == 0 and "--negative-prompt has no effect" in result.stderr
    assert "--adapter has no effect without --image or --face-embedding" in result.stderr


def test_the_list_names_what_can_be_had(capsys):
    result = sample("--list")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("sd15", "sdxl-plus-face", "faceid-plusv2", "vit-bigg", "lcm"))


def array(values: Tensor | list) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


MISTAKES = {
    "no face": ([*FACE, "folder/none.npy"], "none.npy: a face embedding, .npy, .safetensors or .bin, is wanted here"),
    "short": ([*FACE, "folder/short.npy"], "short.npy: of shape (511,); a face embedding is 512 numbers"),
    "nan": ([*FACE, "folder/nan.npy"], "nan.npy: 512 finite numbers, not all zero, are wanted"),
    "zeros": ([*FACE, "folder/zeros.npy"], "zeros.npy: 512 finite numbers, not all zero, are wanted"),
    "pickled": ([*FACE, "folder/objects.npy"], "objects.npy: a face embedding"),
    "a picture": ([*FACE, EXAMPLE], "example.png: a face embedding, .npy, .safetensors or .bin, is wanted here"),
    "several tensors": ([*FACE, WEIGHTS / "clip-tiny.safetensors"], "tensors (", "one is wanted"),
    "face for a base adapter": (["--face-embedding", "folder/face.npy"], "--face-embedding: for FaceID adapters"),
    "v2 of a base adapter": (["--faceid-v2"], "--faceid-v2: for FaceID-plus adapters"),
    "v2 of plain FaceID": ([*FACE, "folder/face.npy", "--faceid-v2"], "--faceid-v2: for FaceID-plus adapters"),
    "faces and pictures": ([*PLUS[:4], "--face-embedding", "folder/two.npy"], "2 faces, --image: 1 pictures of them"),
    "no picture of the face": ([*PLUS[:2], "--face-embedding", "folder/face.npy"], "1 faces, --image: 0 pictures"),
    "base as LoRA": (["--prompt", "x", "--lora", WEIGHTS / "sd-tiny.safetensors"], "a LoRA is wanted here; this is a"),
    "no LoRA": (["--prompt", "x", "--lora", "none.safetensors"], "--lora none.safetensors: no such file"),
    "unknown name": (["--prompt", "x", "--base", "sd16"], "--base sd16: neither a file nor a name, near it sd"),
    "names apart": (
        ["--image", EXAMPLE, "--base", "sd15", "--adapter", "sdxl-plus"],
        "--adapter sdxl-plus is for SDXL",
    ),
    "LoRA of another base": (["--prompt", "x", "--base", "sdxl", "--lora", "lcm"], "--lora lcm is for SD 1.x"),
    "weight of a LoRA": (["--prompt", "x", "--lora", "folder/lora.safetensors:nan"], "the weight is nan"),
    "a face and a picture": ([*FACE, "folder/face.npy", "--image", EXAMPLE], "--image: ", "reads the face alone"),
    "structure of plain FaceID": (
        [*FACE, "folder/face.npy", "--structure-scale", "0.5"],
        "--structure-scale: for FaceID-plus version 2",
    ),
    "raw faces": (["--adapter", "folder/raw.safetensors", "--image", EXAMPLE], "a Resampler of raw face embeddings"),
    "another schedule": (
        ["--prompt", "x", "--base", "folder/ztsnr.safetensors"],
        "'eps' given, 'v' wanted with zero_snr",
    ),
    "a folder as picture": (["--prompt", "x", "--output", "folder/taken.png"], "taken.png: a folder"),
    "sampler": (["--prompt", "x", "--sampler", "plms"], "argument --sampler: invalid choice: 'plms'"),
    "too many steps": (
        ["--prompt", "x", "--sampler", "lcm", "--steps", "51"],
        "--steps 51: 1 to 50 with --sampler lcm",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2(name, tmp_path, folder):
    np.save(folder / "short.npy", array([1] * 511))
    np.save(folder / "nan.npy", array([np.nan] * 512))
    np.save(folder / "zeros.npy", array([0] * 512))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    raw = {"image_proj.latents": torch.zeros(1, 16, 64), "image_proj.proj_in.weight": torch.zeros(64, 512)}
    save_file(raw | {"ip_adapter.1.to_k_ip.weight": torch.zeros(64, 64)}, folder / "raw.safetensors")
    save_file(read(TINY) | {"ztsnr": torch.zeros(0)}, folder / "ztsnr.safetensors")
    (folder / "taken.png").mkdir(exist_ok=True)
    flags, *messages = MISTAKES[name]
    flags = [str(flag).replace("folder/", f"{folder}/") for flag in flags]
    result = sample("--output", tmp_path / "out.png", *flags)
    assert result.returncode == 2, result.stderr
    assert all(message in result.stderr for message in messages), result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out.png").exists()


def test_an_insightface_that_does_not_start_is_one_line(tmp_path, folder, monkeypatch):
    for name in ("insightface", "onnxruntime"):  # installed, and empty
        package = types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
    result = sample("--image", EXAMPLE, "--adapter", folder / "faceid.safetensors", "--output", tmp_path / "x.png")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("insightface does not start (")


def test_a_faceid_adapter_without_faces_says_what_to_do(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    result = sample("--image", EXAMPLE, "--adapter", folder / "faceid.safetensors", "--output", tmp_path / "x.png")
    assert result.returncode == 2 and "give --face-embedding FILE" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "x.png").exists()


def test_an_adapter_of_faces_alone_wants_no_image_encoder_beside_a_base_given_as_a_file(make):
    found, settings = make("--base", TINY, *FACE, "folder/face.npy")
    assert settings["image_encoder"] is None
    assert np.array_equal(found, make(*FACE, "folder/face.npy")[0])
