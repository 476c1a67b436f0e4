"""Other people's layouts: the same tensors under other names and in other containers, and what is told of the rest."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from counterparts import diffusers_unet, randomise, transformers_image, transformers_shape
from narrow import NARROW_IMAGE, NARROW_XL
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from clip import CLIPImage
from ipadapter import FaceProjection, ImageProjection, IPAdapter
from unet import UNet
from weights import WeightsError, load_adapter, load_image_encoder, load_vae, open_base, read
from weights.clip import load_clip
from weights.diffusers import model_sha256
from weights.lora import read_lora

pytestmark = pytest.mark.slow

State = dict[str, Tensor]


def same(model: nn.Module, wanted: nn.Module) -> bool:
    found, wanted = model.state_dict(), wanted.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def refused(call, *args) -> str:
    """The one-line message of the WeightsError that the call must raise."""
    with pytest.raises(WeightsError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def saved(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


# Image encoders


@pytest.fixture
def pixels(draw) -> Tensor:
    return draw(2, 3, NARROW_IMAGE.image_size, NARROW_IMAGE.image_size)


def renamed(change) -> object:
    return lambda image: {change(key): value for key, value in image.state_dict().items()}


LAYOUTS = {
    "DataParallel": lambda image: nn.DataParallel(image).state_dict(),
    "torch.compile": lambda image: torch.compile(image).state_dict(),
    "FSDP": renamed(lambda key: f"_fsdp_wrapped_module.{key.replace('layers.1.', 'layers.1._fsdp_wrapped_module.')}"),
    "checkpointed": renamed(lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")),
    "part of something larger": lambda image: (
        {f"image_encoder.{key}": value for key, value in image.state_dict().items()} | {"unet.weight": torch.ones(3)}
    ),
    "DeepSpeed": lambda image: {"module": image.state_dict(), "optimizer": {"m": torch.ones(3)}, "ds_version": "0.14"},
    "a trainer's": lambda image: {"model": image.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_trainers_and_wrappers_put_around_an_image_encoder_is_taken_off(tmp_path, image_tower, layout):
    path = saved(tmp_path / "x.pt", LAYOUTS[layout](image_tower))
    assert same(load_image_encoder(path), image_tower)


@pytest.mark.parametrize("shards", [False, True])
def test_image_encoder_out_of_a_folder_of_transformers(tmp_path, image_tower, pixels, shards):
    theirs = transformers_image(image_tower)
    theirs.save_pretrained(tmp_path / "image_encoder", max_shard_size="300KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("image_encoder/*.safetensors"))) > 1) == shards
    for path in [tmp_path / "image_encoder", tmp_path, *tmp_path.glob("image_encoder/*.index.json")]:
        encoder = load_image_encoder(path)
        assert same(encoder, image_tower) and encoder.config == image_tower.config
        assert close(encoder(pixels), theirs(pixels).image_embeds)


def test_image_encoder_as_transformers_5_saves_it_without_projection(tmp_path, image_tower, pixels):
    theirs = CLIPVisionModel(transformers_image(image_tower).config)
    theirs.load_state_dict(
        {k.removeprefix("vision_model."): w for k, w in image_tower.state_dict().items()}, strict=False
    )
    theirs.save_pretrained(tmp_path)
    assert "embeddings.class_embedding" in read(tmp_path / "model.safetensors")
    encoder = load_image_encoder(tmp_path)
    assert encoder.config == replace(image_tower.config, projection=None)
    assert close(encoder.penultimate(pixels), theirs.eval()(pixels, output_hidden_states=True).hidden_states[-2])


def test_a_folder_is_told_apart_by_all_its_files(tmp_path, image_tower):
    theirs = transformers_image(image_tower)
    for name in ("a", "b"):
        theirs.save_pretrained(tmp_path / name, max_shard_size="300KB")
    assert model_sha256(tmp_path / "a") == model_sha256(tmp_path / "b")
    index = "model.safetensors.index.json"
    before = model_sha256(tmp_path / "a" / index)
    shard = max((tmp_path / "a").glob("*.safetensors"))
    save_file({key: value + 1 for key, value in read(shard).items()}, shard)
    assert model_sha256(tmp_path / "a") != model_sha256(tmp_path / "b")
    assert model_sha256(tmp_path / "a" / index) != before
    theirs.save_pretrained(tmp_path / "c" / "image_encoder")
    before = model_sha256(tmp_path / "c")
    (tmp_path / "c" / "image_encoder" / "config.json").write_text("{}")
    assert model_sha256(tmp_path / "c") != before


@pytest.mark.parametrize(
    "listed, said",
    [
        ({"a": "model-2.safetensors"}, "of its 1 files 1 are missing: model-2.safetensors"),
        ({"a": "../model.safetensors"}, "lists files elsewhere than beside it (../model.safetensors)"),
        ({}, "lists no files of weights"),
        ("nonsense", "lists no files of weights"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(tmp_path, listed, said):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": listed}))
    for loader in (load_image_encoder, load_adapter, load_vae, open_base):
        assert refused(loader, path) == f"{path}: {said}"


# What the config beside them says


def with_config(folder: Path, config: CLIPVisionConfig | CLIPConfig, image: CLIPImage) -> Path:
    config.save_pretrained(folder)
    return saved(folder / "model.safetensors", image.state_dict())


def wide(width: int = 768, quick: bool = True) -> CLIPImage:
    config = replace(NARROW_IMAGE, width=width, heads=width // 64, layers=2, mlp=64, quick_gelu=quick)
    return randomise(CLIPImage(config), 3)


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])
def test_the_config_says_which_gelu_whatever_the_width(tmp_path, pixels, kind):
    image = wide()
    theirs = transformers_image(image, kind)
    theirs.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        encoder = load_image_encoder(path)
        assert encoder.config.quick_gelu == (kind == "quick_gelu")
        assert close(encoder(pixels), theirs(pixels).image_embeds)


def test_the_config_says_how_many_heads_there_are(tmp_path, image_tower, pixels):
    theirs = transformers_image(replace_heads(image_tower, 8))
    theirs.save_pretrained(tmp_path)
    assert load_image_encoder(tmp_path).config.heads == 8
    assert close(load_image_encoder(tmp_path)(pixels), theirs(pixels).image_embeds)


def replace_heads(image: CLIPImage, heads: int) -> CLIPImage:
    other = CLIPImage(replace(image.config, heads=heads))
    other.load_state_dict(image.state_dict())
    return other


WRONG_CONFIGS = [
    ({"hidden_size": 64}, "hidden_size is 64, but the tensors beside it have 128"),
    ({"num_hidden_layers": 12}, "num_hidden_layers is 12, but the tensors beside it have 4"),
    ({"projection_dim": 512}, "projection_dim is 512, but the tensors beside it have 96"),
    ({"image_size": 224}, "image_size is 224, but the tensors beside it have 64"),
    ({"hidden_act": "gelu_new"}, "the hidden_act is 'gelu_new'; quick_gelu and gelu are supported"),
    ({"hidden_act": ["gelu"]}, "the hidden_act is ['gelu']; quick_gelu and gelu are supported"),
    ({"num_attention_heads": "2"}, "num_attention_heads is '2'; a whole number is wanted"),
    ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06; 1e-05 is supported"),
]


@pytest.mark.parametrize("values, said", WRONG_CONFIGS)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path, image_tower, values, said):
    path = with_config(tmp_path, transformers_image(image_tower).config, image_tower)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    assert refused(load_image_encoder, path) == f"{tmp_path / 'config.json'}: {said}"


def test_heads_that_cannot_share_the_width_are_refused(tmp_path, image_tower):
    path = with_config(tmp_path, transformers_image(image_tower).config, image_tower)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    assert "a width of 128 cannot be shared by 3 heads" in refused(load_image_encoder, path)


def test_configs_of_other_models_say_nothing(tmp_path, image_tower):
    path = saved(tmp_path / "model.safetensors", image_tower.state_dict())
    for text in ("{}", '{"model_type": "siglip_vision_model", "hidden_size": 7}', '{"_class_name": "UNet"}', "[1]"):
        (tmp_path / "config.json").write_text(text)
        assert load_image_encoder(path).config == image_tower.config
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json: not readable as JSON" in refused(load_image_encoder, path)


# OpenCLIP and OpenAI


def open_clip_model(quick_gelu: bool = False) -> CLIP:
    vision = CLIPVisionCfg(layers=3, width=128, head_width=64, patch_size=16, image_size=64)
    return randomise(CLIP(96, vision, CLIPTextCfg(width=64, heads=4, layers=2), quick_gelu=quick_gelu), 8)


OPENAI = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


def script(theirs: CLIP, path: Path, openai: bool) -> Path:
    """A TorchScript archive, as OpenAI published its models."""
    for name, value in OPENAI.items() if openai else ():
        if hasattr(theirs, name):
            delattr(theirs, name)
        theirs.register_buffer(name, value)
    inputs = torch.ones(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace_module(theirs, {"forward": inputs}, strict=False), path)
    return path


@pytest.mark.parametrize("openai", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_torch_script_archive_is_read_and_not_run(tmp_path, monkeypatch, pixels, openai):
    theirs = open_clip_model(quick_gelu=openai)
    wanted = theirs.encode_image(pixels)
    path = script(theirs, tmp_path / "ViT-L-14.pt", openai)
    monkeypatch.setattr(torch.jit, "load", None)
    assert {key for key in read(path) if key != "attn_mask"} == theirs.state_dict().keys()
    assert close(load_image_encoder(path)(pixels), wanted)
    image, text = load_clip(path)
    tokens = torch.randint(1, 49405, (2, 77), generator=torch.Generator().manual_seed(2))
    tokens[:, 20] = 49407
    assert close(image(pixels), wanted) and close(text.embed(tokens), theirs.encode_text(tokens))


@pytest.mark.parametrize("kind", ["whole", "the image tower alone", "without visual."])
@pytest.mark.parametrize("openai", [True, False])
def test_open_clips_names_and_openais_numbers(tmp_path, pixels, kind, openai):
    """OpenAI's files, whose GELU is the approximation, have the same names, and three numbers beside them."""
    theirs = open_clip_model(quick_gelu=openai)
    state = theirs.state_dict()
    if kind != "whole":
        state = {key: value for key, value in state.items() if key.startswith("visual.")}
    state |= OPENAI if openai else {}
    if kind == "without visual.":
        state = {key.removeprefix("visual."): value for key, value in state.items() if key not in OPENAI}
    if kind != "without visual." or not openai:
        encoder = load_image_encoder(saved(tmp_path / "x.pt", state))
        assert close(encoder(pixels), theirs.encode_image(pixels))


@pytest.mark.parametrize("quick", [True, False])
def test_open_clips_own_config_says_which_gelu_and_how_many_heads(tmp_path, pixels, quick):
    vision = {"layers": 3, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 64}
    text = {"width": 64, "heads": 4, "layers": 2, "context_length": 77, "vocab_size": 49408}
    theirs = randomise(CLIP(96, CLIPVisionCfg(**vision), CLIPTextCfg(**text), quick_gelu=quick), 8)
    saved(tmp_path / "open_clip_model.safetensors", theirs.state_dict())
    model = {"embed_dim": 96, "vision_cfg": vision, "text_cfg": text} | ({"quick_gelu": True} if quick else {})
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    image, text = load_clip(tmp_path)
    assert (image.config.heads, text.config.heads, image.config.quick_gelu, text.config.quick_gelu) == (
        4,
        4,
        quick,
        quick,
    )
    assert close(load_image_encoder(tmp_path)(pixels), theirs.encode_image(pixels))
    assert load_clip(tmp_path, quick_gelu=not quick)[0].config.quick_gelu != quick


def test_a_judge_out_of_a_folder_of_transformers(tmp_path, image_tower, text_tower, pixels):
    """Of the two projections that a config of both towers names, the outer one counts."""
    towers = {
        "text_config": transformers_shape(text_tower) | {"hidden_act": "gelu", "projection_dim": 7},
        "vision_config": transformers_shape(image_tower)
        | {"image_size": 64, "patch_size": 16, "hidden_act": "quick_gelu"},
    }
    theirs = randomise(CLIPModel(CLIPConfig(**towers, projection_dim=96)), 4)
    theirs.save_pretrained(tmp_path, max_shard_size="5MB")
    image, text = load_clip(tmp_path)
    assert (image.config.quick_gelu, text.config.quick_gelu) == (True, False)
    assert close(image(pixels), theirs.get_image_features(pixels).pooler_output)
    tokens = torch.full((1, 77), 49407)
    tokens[0, :3] = torch.tensor([49406, 320, 1125])
    assert close(text.embed(tokens), theirs.get_text_features(tokens).pooler_output)


# Adapters, as the official trainers save them


class Processor(nn.Module):
    """What the official trainers give to a cross-attention (Linear layers under these names), or with a LoRA to both."""

    def __init__(self, width: int, context: int | None, rank: int):
        super().__init__()
        if context:
            self.to_k_ip, self.to_v_ip = (nn.Linear(context, width, bias=False) for _ in range(2))
        for name in ("q", "k", "v", "out") if rank else ():
            lora = nn.Module()
            wide = context if context and name in "kv" else width
            lora.down, lora.up = nn.Linear(wide, rank, bias=False), nn.Linear(rank, width, bias=False)
            setattr(self, f"to_{name}_lora", lora)


class Trained(nn.Module):
    """The module that they hand to accelerate: the adapter's layers are there twice."""

    def __init__(self, unet: nn.Module, image_proj: nn.Module, adapter_modules: nn.Module):
        super().__init__()
        self.unet, self.image_proj_model, self.adapter_modules = unet, image_proj, adapter_modules


@pytest.fixture(scope="module", params=product(["SD 1.x", "SDXL"], ["base", "FaceID"]), ids=" ".join)
def trained(request, unet) -> Trained:
    family, kind = request.param
    model = unet if family == "SD 1.x" else many_layers()
    context, rank = model.config.context_dim, 4 if kind == "FaceID" else 0
    projection = ImageProjection(96, context, 4) if kind == "base" else FaceProjection(512, context, 4)
    theirs = diffusers_unet(model)
    processors = {}
    for name in theirs.attn_processors:
        attention = theirs.get_submodule(name.removesuffix(".processor"))
        processors[name] = Processor(
            attention.to_q.out_features, attention.to_k.in_features if "attn2" in name else None, rank
        )
    theirs.set_attn_processor(dict(processors))
    numbered = nn.ModuleList(theirs.attn_processors.values())  # from here their numbers come
    return randomise(Trained(theirs, projection, numbered), 6)


@pytest.mark.parametrize("safe", [True, False])
def test_what_accelerate_saves_of_the_official_trainers(tmp_path, trained, safe):
    Accelerator().save_model(trained, tmp_path, safe_serialization=safe)
    found = load_adapter(tmp_path)  # the folder; what lies in it is called model.safetensors or pytorch_model.bin
    state = read(next(tmp_path.glob("*model.*")))
    assert any(key.startswith("adapter_modules.") for key in state) != safe
    wanted = {f"ip_adapter.{key}": value for key, value in trained.adapter_modules.state_dict().items()}
    wanted |= {f"image_proj.{key}": value for key, value in trained.image_proj_model.state_dict().items()}
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())


def many_layers() -> UNet:
    """So deep that there is an eleventh block, which by name would come before the second."""
    depths = {"down": ((0,), (11,)), "middle": (11, 0), "up": ((11,) * 2, (0,) * 2)}
    return UNet(replace(NARROW_XL, channels=(32, 64), **depths))


def test_an_adapter_converted_by_hand_keeps_the_trainers_names(tmp_path, base_adapter):
    """A recipe that went round has diffusers' names under `ip_adapter`."""
    flat, places = base_adapter.state_dict(), []
    places += [f"down_blocks.{level}.attentions.{i}" for level in range(3) for i in range(2)]
    places += [f"up_blocks.{level}.attentions.{i}" for level in range(1, 4) for i in range(3)] + [
        "mid_block.attentions.0"
    ]
    state = {"image_proj": {}, "ip_adapter": {}}
    for key, value in flat.items():
        part, rest = key.split(".", 1)
        if part == "ip_adapter":
            number, rest = rest.split(".", 1)
            rest = f"{places[int(number) // 2]}.transformer_blocks.0.attn2.processor.{rest}"
        state[part][rest] = value
    assert same(load_adapter(saved(tmp_path / "ip_adapter.bin", state)), base_adapter)


# Pickles


def test_numpys_numbers_beside_the_weights_do_no_harm(tmp_path, image_tower):
    notes = {"best": np.float64(0.15), "epoch": np.int64(3), "rate": np.float32(1e-4), "seen": np.ones(3)}
    path = tmp_path / "x.ckpt"
    for zipped in (True, False):
        torch.save({"state_dict": image_tower.state_dict(), **notes}, path, _use_new_zipfile_serialization=zipped)
        assert same(load_image_encoder(path), image_tower)


@pytest.mark.parametrize(
    "thing",
    [np.load, os.getcwd, print, eval, Path("x"), slice(1)],
    ids=lambda thing: getattr(thing, "__name__", str(thing)),
)
def test_all_else_in_a_pickle_is_refused(tmp_path, thing):
    torch.save({"state_dict": {"a": torch.ones(3)}, "extra": thing}, tmp_path / "x.pt")
    assert "refused, the pickle asks to run code" in refused(read, tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind_are_read_as_they_were(tmp_path, draw, zipped):
    x = draw(6, 7)
    state = {
        str(dtype): x.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)
    }
    state |= {
        str(dtype): x.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint8)
    }
    state |= {"turned": x.T, "part": x[2:5, 1:3], "none": torch.zeros(0, 3), "one": torch.tensor(3.0)}
    state |= {"parameter": nn.Parameter(x), "expanded": torch.zeros(1).expand(4)}
    state["marked"] = nn.Parameter(x)
    state["marked"].note = "of mine"
    torch.save(OrderedDict(state), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "x.pt")
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype and found[key].stride() == value.stride(), key
        assert torch.equal(found[key], value.detach()), key


@pytest.mark.parametrize("state", [{"a": torch.ones(3).to_sparse()}, {"a": torch.ones(3, device="meta")}])
def test_tensors_that_are_not_plain_are_told(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    assert "quantised, sparse or without data" in refused(read, tmp_path / "x.pt")


def bomb(folder: Path, program: bytes) -> Path:
    """A PyTorch file whose pickle is this program."""
    path = folder / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", bytes(64))
    return path


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
TWICE = b"".join(b"}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cuq%c" % (i, i, i + 1) for i in range(90))
PROGRAMS = {  # behind b"\x80\x02", and before the stop
    "a table without end": b"}r\xff\xff\xff\x7f",
    "a dictionary in itself": b"}q\x00X\x01\x00\x00\x00ah\x00s",
    "dictionaries that hold the last one twice": b"}q\x00" + TWICE,
    "a long bytearray": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "two thousand million times one number": b"}X\x01\x00\x00\x00a"
    + REBUILD
    + STORAGE
    + b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85tRs",
    "numbers behind the end": b"}X\x01\x00\x00\x00a" + REBUILD + STORAGE + b"K\x0fK\x02\x85K\x01\x85tRs",
    "an object that was not made": b"}X\x01\x00\x00\x00a" + REBUILD + b")\x81s",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_small_file_cannot_claim_much(tmp_path, name):
    said = refused(read, bomb(tmp_path, b"\x80\x02" + PROGRAMS[name] + b"."))
    assert "damaged or cut short" in said or "holds no tensors" in said


def test_a_zip_archive_of_other_things_is_told(tmp_path, image_tower):
    saved(tmp_path / "clip.safetensors", image_tower.state_dict())
    with zipfile.ZipFile(tmp_path / "clip.zip", "w") as archive:
        archive.write(tmp_path / "clip.safetensors", "folder/clip.safetensors")
    said = refused(read, tmp_path / "clip.zip")
    assert "a zip archive of something else (folder/clip.safetensors), not weights" in said


KINDS = {
    b"\x08\x09\x12\x07pytorch": "an ONNX model",
    b"\x28\xb5\x2f\xfd": "an archive",
    b"\x93NUMPY": "an array of NumPy's",
    b"x" * 257 + b"ustar": "a tar archive",
    b"Entry not found": "a text, not weights; it says 'Entry not found'",
    b"GGUF\x03": "a GGUF file",
    b"\x89PNG\r\n": "a picture (PNG)",
    b"\xff\xd8\xff\xe0": "a picture (JPEG)",
    b"\x1f\x8b\x08": "an archive (gzip",
    b"7z\xbc\xaf": "an archive (gzip",
    b"\x89HDF\r\n": "an HDF5 file",
}


@pytest.mark.parametrize(
    "mark, said",
    [
        ("scaled_fp8", "fp8 weights with scales beside them"),
        ("model.diffusion_model.input_blocks.1.1.proj_in.scale_weight", "fp8 weights with scales beside them"),
        ("unet.to_q.weight.absmax", "quantised by bitsandbytes"),
        ("unet.to_q.weight.quant_state.bitsandbytes__nf4", "quantised by bitsandbytes"),
        ("unet.to_q.SCB", "quantised by bitsandbytes"),
        ("unet.to_q.qweight", "quantised in 4 bits"),
        ("unet.to_q.weight._data", "quantised by quanto"),
    ],
)
def test_quantised_weights_are_told_wherever_they_are_brought(tmp_path, image_tower, mark, said):
    path = saved(tmp_path / "x.safetensors", image_tower.state_dict() | ones(mark))
    for loader in (load_image_encoder, load_adapter, load_vae, open_base, read_lora):
        assert said in refused(loader, path) and f"(it has {mark})" in refused(loader, path)


def test_whole_numbers_are_no_weights(tmp_path, image_tower):
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    path = saved(tmp_path / "x.safetensors", image_tower.state_dict() | {key: torch.ones(512, 128, dtype=torch.int8)})
    assert f"1 of no floating-point numbers: {key} (torch.int8)" in refused(load_image_encoder, path)


@pytest.mark.parametrize("head", KINDS, ids=KINDS.get)
def test_files_of_other_kinds_are_told_by_their_first_bytes(tmp_path, head):
    (tmp_path / "x.safetensors").write_bytes(head + bytes(100))
    assert KINDS[head] in refused(read, tmp_path / "x.safetensors")


# What is brought by mistake


def vision(kind: type, config: object) -> State:
    return kind(config).state_dict()


def small() -> dict[str, int]:
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 32,
    }


def ones(*keys: str, shape: tuple[int, ...] = (4, 4)) -> State:
    return {key: torch.ones(shape) for key in keys}


TOWERS = {
    "a SigLIP": lambda: vision(SiglipVisionModel, SiglipVisionConfig(**small())),
    "a SigLIP ": lambda: {f"vision_model.{k}": w for k, w in TOWERS["a SigLIP"]().items()},
    "a SigLIP  ": lambda: ones("visual.trunk.pos_embed", "visual.trunk.attn_pool.q.weight"),
    "a DINO": lambda: vision(
        Dinov2Model, Dinov2Config(**{k: v for k, v in small().items() if k != "intermediate_size"})
    ),
    "a DINO ": lambda: ones("cls_token", "mask_token", "patch_embed.proj.weight", "blocks.0.ls1.gamma"),
    "an EVA-CLIP": lambda: ones("visual.cls_token", "visual.patch_embed.proj.weight", "logit_scale"),
    "an EVA-CLIP ": lambda: ones("visual.trunk.cls_token", "visual.trunk.blocks.0.attn.q_proj.weight"),
    "whose image tower is a ConvNeXt": lambda: ones("visual.trunk.stem.0.weight", "visual.head.proj.weight"),
    "whose image tower is one of timm's": lambda: ones("visual.trunk.patch_embed.proj.weight"),
    "whose image tower is a ResNet": lambda: ones(
        "visual.conv1.weight", "visual.bn1.weight", "visual.attnpool.q_proj.weight"
    ),
    "a CoCa": lambda: open_clip_model().state_dict() | ones("visual.attn_pool.query", "text_decoder.x"),
    "a vision transformer in timm's layout": lambda: ones("cls_token", "pos_embed", "blocks.0.attn.qkv.weight"),
    "the image encoder of a BLIP": lambda: ones("embeddings.class_embedding", "encoder.layers.0.attn.qkv.weight"),
    "without its class embedding": lambda: ones("vision_model.pre_layrnorm.weight"),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_other_image_encoders_are_refused_by_name(tmp_path, kind):
    path = saved(tmp_path / "x.safetensors", TOWERS[kind]())
    for loader in (load_image_encoder, load_clip):
        said = refused(loader, path)
        assert kind.strip() in said and "is wanted here; this is" in said
        assert "missing" not in said and "width 0" not in said


ADAPTERS = {
    "for FLUX (XLabs)": ones(
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "ip_adapter_proj_model.x"
    ),
    "for FLUX (InstantX)": ones("image_proj.proj.0.weight", "ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_k_ip.bias"),
    "for SD 3": ones("image_proj.latents", "ip_adapter.1.to_k_ip.weight", "ip_adapter.1.norm_ip_k.weight"),
    "for Kolors": {"image_proj.latents": torch.ones(1, 16, 2048), "image_proj.proj_in.weight": torch.ones(8, 1024)}
    | ones("ip_adapter.1.to_k_ip.weight"),
    "for a transformer": ones("image_proj.latents", "ip_adapter.0.to_k_ip.weight", "ip_adapter.1.to_k_ip.weight"),
    "for a transformer ": ones("blocks.0.attn2.to_k_ip.weight"),
    "a PuLID adapter": ones("pulid_ca.0.norm1.weight", "pulid_encoder.x"),
    "a T2I-Adapter": ones("body.0.block1.weight", "conv_in.weight"),
    "an AnimateDiff motion module": ones("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
    "the state of an optimizer": {
        "state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}},
        "param_groups": [],
    },
    "an upscaler": ones("params_ema.conv_first.weight"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_are_refused_by_name(tmp_path, kind):
    path = saved(tmp_path / "x.bin", ADAPTERS[kind])
    said = refused(load_adapter, path)
    assert "an IP-Adapter for SD 1.x, SD 2.x or SDXL is wanted here; this is" in said and kind.strip() in said


EMBEDDINGS = {
    "SD 1.x": {"emb_params": torch.ones(2, 768)},
    "SDXL": {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)},
    "a web interface's": {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "x"},
    "diffusers'": {"<cat-toy>": torch.ones(768)},
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_is_told_wherever_it_is_brought(tmp_path, kind):
    path = saved(tmp_path / "x.pt", EMBEDDINGS[kind])
    for loader in (read_lora, load_adapter, load_image_encoder, load_vae, open_base):
        assert "this is a textual-inversion embedding" in refused(loader, path)


def test_halves_are_told_as_such(tmp_path, base_adapter, vae, image_tower, text_tower):
    """No line says that what is wanted is what was brought."""
    for part, other in (("ip_adapter.", "image_proj."), ("image_proj.", "ip_adapter.")):
        half = {key: w for key, w in base_adapter.state_dict().items() if key.startswith(part)}
        said = refused(load_adapter, saved(tmp_path / "x.safetensors", half))
        assert said.endswith(f"only half of an IP-Adapter, without {other}*")
    state = base_adapter.state_dict()
    del state["ip_adapter.1.to_k_ip.weight"]
    assert "1 missing: ip_adapter.1.to_k_ip.weight" in refused(load_adapter, saved(tmp_path / "x.safetensors", state))
    state = vae.state_dict()
    del state["encoder.conv_in.weight"]
    assert "1 missing: encoder.conv_in.weight" in refused(load_vae, saved(tmp_path / "x.safetensors", state))
    both = image_tower.state_dict() | text_tower.state_dict()
    del both["text_projection.weight"]
    said = refused(load_clip, saved(tmp_path / "x.safetensors", both))
    assert "this is a CLIP model of width 128" in said and said.endswith(", without text_projection.weight")


def test_an_autoencoder_of_another_family_says_so_in_its_config(tmp_path, vae):
    from counterparts import diffusers_vae

    diffusers_vae(vae).save_pretrained(tmp_path)
    assert same(load_vae(tmp_path), vae)
    assert "config.json: its latents are scaled by 0.18215, the base's by 0.13025" in refused(
        lambda: load_vae(tmp_path, latent_scale=0.13025)
    )


def test_a_bare_pickle_is_refused(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    assert "PyTorch did not write it" in refused(read, tmp_path / "x.pkl")


def test_names_out_of_a_file_cannot_act_on_the_screen(tmp_path):
    path = saved(tmp_path / "x.safetensors", ones("one\nline", "\x1b[2Jgone"))
    said = refused(load_image_encoder, path)
    assert "\x1b" not in said and "\\x1b[2Jgone" in said and "one line" in said


def test_a_layer_with_a_large_number_does_not_make_a_large_model(tmp_path, image_tower):
    extra = ones("vision_model.encoder.layers.999999999.mlp.fc1.weight")
    path = saved(tmp_path / "x.safetensors", image_tower.state_dict() | extra)
    assert "vision_model.encoder.layers.999999999.mlp.fc1.weight" in refused(load_image_encoder, path)


def test_an_adapters_class_is_still_an_ip_adapter(base_adapter, tmp_path):
    assert isinstance(load_adapter(saved(tmp_path / "x.safetensors", base_adapter.state_dict())), IPAdapter)
