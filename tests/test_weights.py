"""Weight files: every layout in and out, and every kind of wrong file refused in one line that names it."""

import copy
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from counterparts import prefixed, published, randomise
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from clip import CLIPImage, CLIPImageConfig, CLIPText, CLIPTextConfig
from files.errors import Notice
from ipadapter import ImageProjection, IPAdapter, PatchProjection, Resampler
from unet import SD15, UNet
from vae import VAE, VAEConfig
from weights import WeightsError, check_fit, load_adapter, load_image_encoder, load_vae, open_base, read
from weights.families import SD1
from weights.kinds import what_is
from weights.settings import schedule_of

State = dict[str, Tensor]
UNET_CONFIG = SD15.__class__(**{**vars(SD15), "channels": (32, 32, 64, 64), "context_dim": 64})
VAE_CONFIG = VAEConfig(channels=(32, 32, 32, 32), res_blocks=2, latent_channels=4)
TEXT_CONFIG = CLIPTextConfig(64, 2, 4, 128, quick_gelu=True, projection=None)
IMAGE_CONFIG = CLIPImageConfig(128, 3, 2, 256, quick_gelu=False, projection=96, image_size=32, patch_size=16)

# Models and states, made once


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    unet = randomise(UNet(UNET_CONFIG), 1)
    return {
        "unet": unet,
        "vae": randomise(VAE(VAE_CONFIG), 2),
        "text": randomise(CLIPText(TEXT_CONFIG), 3),
        "image": randomise(CLIPImage(IMAGE_CONFIG), 4),
        "adapter": randomise(IPAdapter.for_unet(unet, ImageProjection(96, 64, 4)), 5),
        "plus": randomise(IPAdapter.for_unet(unet, Resampler(128, 64, 2, 2, 6, 64)), 6),
        "full-face": randomise(IPAdapter.for_unet(unet, PatchProjection(128, 64)), 7),
    }


@pytest.fixture(scope="module")
def base_state(models) -> State:
    """A whole SD 1.x checkpoint."""
    parts = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}
    state: State = {}
    for name, prefix in parts.items():
        state |= prefixed(prefix, models[name])
    return state


LUGGAGE = {  # what released checkpoints carry beside the weights
    "betas": torch.zeros(1000),
    "alphas_cumprod": torch.zeros(1000),
    "alphas_cumprod_prev": torch.zeros(1000),
    "sqrt_alphas_cumprod": torch.zeros(1000),
    "sqrt_one_minus_alphas_cumprod": torch.zeros(1000),
    "log_one_minus_alphas_cumprod": torch.zeros(1000),
    "sqrt_recip_alphas_cumprod": torch.zeros(1000),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
    "posterior_variance": torch.zeros(1000),
    "posterior_log_variance_clipped": torch.zeros(1000),
    "posterior_mean_coef1": torch.zeros(1000),
    "posterior_mean_coef2": torch.zeros(1000),
    "logvar": torch.zeros(1000),
    "scale_factor": torch.tensor(0.18215),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(470000),
    "model_ema.diffusion_modelinput_blocks00weight": torch.ones(4, 4, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "first_stage_model.loss.logvar": torch.tensor(0.0),
    "first_stage_model.loss.discriminator.main.0.weight": torch.ones(4),
}


def same(model: nn.Module, wanted: nn.Module) -> bool:
    found, wanted = model.state_dict(), wanted.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def refused(path, call) -> str:
    """The one-line message of the WeightsError that the call must raise; it names the file first."""
    with pytest.raises(WeightsError) as error:
        call()
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    return message[len(f"{path}: ") :]


def reads(monkeypatch, read) -> None:
    """Let the loaders find other tensors in their files."""
    for name in ("base.read", "adapter.read_part", "clip.read_part", "vae.read_part"):
        monkeypatch.setattr(f"weights.{name}", read)


# Whole checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("luggage", [{}, LUGGAGE], ids=["bare", "luggage"])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "ckpt in state_dict", "old ckpt"])
def test_checkpoint_round_trip(tmp_path, models, base_state, kind, luggage):
    state, path = base_state | luggage, tmp_path / f"base.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "ckpt in state_dict":
        torch.save({"epoch": 3, "global_step": 470000, "state_dict": state, "optimizer_states": [{}]}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "old ckpt")
    base = open_base(path)
    assert same(base.unet(), models["unet"]) and same(base.vae(), models["vae"]) and same(base.text(), models["text"])
    assert base.unet().config == UNET_CONFIG and base.vae().config == VAE_CONFIG and base.text().config == TEXT_CONFIG


def test_checkpoint_of_the_first_trainer_with_its_callbacks(tmp_path, monkeypatch, models, base_state):
    """sd-v1-*.ckpt: a class of PyTorch Lightning, which is not installed here, stands as a key in the pickle."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    stand_in = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        sys.modules[name].ModelCheckpoint = stand_in
        best = {"monitor": "val/loss_simple_ema", "best_model_score": torch.tensor(0.15), "best_model_path": "x.ckpt"}
        torch.save({"state_dict": base_state, "callbacks": {stand_in: best}}, tmp_path / "base.ckpt")
    assert same(open_base(tmp_path / "base.ckpt").unet(), models["unet"])


def test_half_files_are_brought_to_the_dtype_asked_for(tmp_path, models, base_state):
    save_file({key: value.half() for key, value in base_state.items()}, tmp_path / "base.safetensors")
    base = open_base(tmp_path / "base.safetensors")
    assert same(base.vae(), copy.deepcopy(models["vae"]).half().float())
    base = open_base(tmp_path / "base.safetensors", torch.bfloat16)
    assert {p.dtype for p in base.unet().parameters()} == {torch.bfloat16}


def test_loaded_models_are_frozen_and_in_eval_mode(tmp_path, base_state):
    save_file(base_state, tmp_path / "base.safetensors")
    base = open_base(tmp_path / "base.safetensors")
    for model in (base.unet(), base.vae(), base.text()):
        assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_text_projection_beside_the_text_tower_is_left_aside(tmp_path, models, base_state):
    extra = {"cond_stage_model.transformer.text_projection.weight": torch.ones(64, 64)}
    save_file(base_state | extra, tmp_path / "base.safetensors")
    assert same(open_base(tmp_path / "base.safetensors").text(), models["text"])


# Names of which somebody made something else


@pytest.mark.parametrize("wrap", ["model.", "module.net."])
def test_what_stands_before_all_names_is_taken_off(tmp_path, models, base_state, wrap):
    adapter = models["adapter"]
    for name, state in {"base": base_state, "adapter": adapter.state_dict(), "vae": models["vae"].state_dict()}.items():
        save_file({wrap + key: value for key, value in state.items()}, tmp_path / name)
    assert same(open_base(tmp_path / "base").unet(), models["unet"])
    assert same(load_adapter(tmp_path / "adapter"), adapter)
    assert same(load_vae(tmp_path / "vae"), models["vae"])


def test_what_a_pickle_holds_within_something_is_found(tmp_path, models, base_state):
    for content in ({"params": base_state, "step": 3}, {"state_dict": {"state_dict": base_state}}):
        torch.save(content, tmp_path / "base.ckpt")
        assert same(open_base(tmp_path / "base.ckpt").text(), models["text"])
    state = models["adapter"].state_dict()
    torch.save({key.replace("image_proj.", "image_proj.module."): w for key, w in state.items()}, tmp_path / "a.bin")
    assert same(load_adapter(tmp_path / "a.bin"), models["adapter"])


def test_other_models_beside_are_left_aside_and_told(tmp_path, models, base_state):
    beside = {"safety_checker.x": torch.ones(1), "control_model.x": torch.ones(1), "lora_unet_x.alpha": torch.ones(1)}
    save_file(base_state | beside, tmp_path / "base.safetensors")
    with pytest.warns(
        Notice, match=r"base.safetensors: other models .* \(control_model., lora_unet_, safety_checker.\)"
    ):
        assert same(open_base(tmp_path / "base.safetensors").unet(), models["unet"])
    save_file(models["adapter"].state_dict() | {"vae.x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.warns(Notice, match=r"a.safetensors: other models in it are left aside \(vae.\)"):
        assert same(load_adapter(tmp_path / "a.safetensors"), models["adapter"])


def test_attention_that_a_converter_passed_over(tmp_path, models, base_state):
    """As many files of 2023 have it: linear layers, in diffusers' names, within an autoencoder in the original ones."""
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0.", ".norm.": ".group_norm."}
    for renamed in ({}, names):
        state = dict(base_state)
        for key in [key for key in state if ".mid.attn_1." in key]:
            name = key
            for ours, theirs in renamed.items():
                name = name.replace(ours, theirs)
            value = state.pop(key)
            state[name] = value[:, :, 0, 0] if value.ndim == 4 else value
        save_file({k: w for k, w in state.items() if k.startswith("first_stage_model.")}, tmp_path / "vae.safetensors")
        assert same(load_vae(tmp_path / "vae.safetensors"), models["vae"])
    save_file(state, tmp_path / "base.safetensors")
    assert same(open_base(tmp_path / "base.safetensors").vae(), models["vae"])


def test_the_only_file_of_a_folder_is_read_whatever_its_name(tmp_path, models, base_state):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    save_file(base_state, tmp_path / "b" / "my model v2.safetensors")
    save_file(models["adapter"].state_dict(), tmp_path / "a" / "ip-adapter_sd15.safetensors")
    assert same(open_base(tmp_path / "b").unet(), models["unet"])
    assert same(load_adapter(tmp_path / "a"), models["adapter"])
    save_file(base_state, tmp_path / "a" / "another.safetensors")
    assert "another.safetensors, ip-adapter_sd15" in refused(tmp_path / "a", lambda: load_adapter(tmp_path / "a"))


def test_how_metadata_spell_what_is_predicted(tmp_path):
    def predicts(said: str) -> str:
        save_file({"x": torch.ones(1)}, tmp_path / "base.safetensors", {"modelspec.prediction_type": said})
        return schedule_of(tmp_path / "base.safetensors", {}, SD1).prediction

    assert list(map(predicts, ("V", "v-prediction", "Epsilon"))) == ["v", "v", "eps"]
    with pytest.warns(Notice, match="says that it predicts 'flow'"):
        assert predicts("flow") == "eps"


# Autoencoders


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_vae_round_trip(tmp_path, models, prefix, wrapper):
    state = prefixed(prefix, models["vae"]) | {f"{prefix}loss.logvar": torch.tensor(0.0)}
    if wrapper:
        path = tmp_path / "vae.pt"
        torch.save({wrapper: state}, path)
    else:
        path = tmp_path / "vae.safetensors"
        save_file(state, path)
    assert same(load_vae(path), models["vae"])


def test_vae_is_taken_out_of_a_whole_checkpoint(tmp_path, models, base_state):
    save_file(base_state, tmp_path / "base.safetensors")
    assert same(load_vae(tmp_path / "base.safetensors"), models["vae"])


# Image encoders


def test_image_encoder_in_the_transformers_layout(tmp_path, models):
    state = models["image"].state_dict() | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    save_file(state, tmp_path / "clip.safetensors")
    assert same(load_image_encoder(tmp_path / "clip.safetensors"), models["image"])


def test_image_encoder_out_of_a_whole_transformers_model(tmp_path, draw):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
    image |= {"image_size": 32, "patch_size": 16, "hidden_act": "gelu"}
    theirs = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=96)), 7)
    for kind in ("safetensors", "bin"):
        path = tmp_path / f"model.{kind}"
        save_file(theirs.state_dict(), path) if kind == "safetensors" else torch.save(theirs.state_dict(), path)
        ours, pixels = load_image_encoder(path), draw(2, 3, 32, 32)
        wanted = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        assert torch.allclose(ours(pixels), wanted, rtol=1e-5, atol=1e-5)


def open_clip_model() -> CLIP:
    vision = CLIPVisionCfg(layers=3, width=128, head_width=64, mlp_ratio=2, patch_size=16, image_size=32)
    return randomise(CLIP(96, vision, CLIPTextCfg(width=32, heads=2, layers=1, vocab_size=100)), 8)


@pytest.mark.parametrize("whole", [True, False])
def test_image_encoder_in_the_open_clip_layout(tmp_path, draw, whole):
    theirs, path = open_clip_model(), tmp_path / "open_clip.bin"
    state = {key: value for key, value in theirs.state_dict().items() if whole or key.startswith("visual.")}
    torch.save(state, path)
    ours, pixels = load_image_encoder(path), draw(2, 3, 32, 32)
    assert torch.allclose(ours(pixels), theirs.encode_image(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width, quick", [(128, False), (768, True), (1024, True), (1280, False), (1664, False)])
def test_gelu_of_an_image_encoder_follows_from_its_family(tmp_path, width, quick):
    """OpenAI's ViT-B and ViT-L have the approximation, OpenCLIP's ViT-H and ViT-bigG the exact one."""
    heads = {128: 2, 768: 12, 1024: 16, 1280: 16, 1664: 16}[width]
    model = CLIPImage(CLIPImageConfig(width, 1, heads, 64, quick, projection=16, image_size=16, patch_size=16))
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    assert load_image_encoder(tmp_path / "clip.safetensors").config == model.config


# Adapters


@pytest.mark.parametrize("which", ["adapter", "plus", "full-face"])
@pytest.mark.parametrize(
    "kind", ["safetensors", "nested bin", "flat bin", "trainer bin", "trainer safetensors", "mixed"]
)
def test_adapter_round_trip(tmp_path, models, which, kind):
    adapter, path = models[which], tmp_path / f"adapter.{kind.split()[-1]}"
    flat = adapter.state_dict()
    if "trainer" in kind:  # as the official scripts' accelerate checkpoints: other names, and the frozen UNet
        flat = {k.replace("image_proj.", "image_proj_model.", 1): v for k, v in flat.items()}
        flat = {k.replace("ip_adapter.", "adapter_modules.", 1): v for k, v in flat.items()}
        flat |= {"unet.conv_in.weight": torch.ones(4), "unet.mid_block.attn2.processor.to_k_ip.weight": torch.ones(4)}
    if kind == "mixed":  # the released plus .bin is fp32 in the projection and fp16 in the attention
        state = published(adapter)
        state["ip_adapter"] = {key: value.half() for key, value in state["ip_adapter"].items()}
        torch.save(state, path)
        adapter = copy.deepcopy(adapter)
        adapter.ip_adapter.half().float()
    elif kind.endswith("safetensors"):
        save_file(flat, path)
    else:
        torch.save(published(adapter) if kind == "nested bin" else flat, path)
    found = load_adapter(path)
    assert same(found, adapter)
    assert type(found.image_proj) is type(adapter.image_proj)
    assert found.image_proj.patches == (which != "adapter")


def test_saved_adapter_has_the_published_keys(tmp_path, models):
    save_file(models["adapter"].state_dict(), tmp_path / "x.safetensors")
    keys = {f"ip_adapter.{n}.to_{kv}_ip.weight" for n in range(1, 32, 2) for kv in "kv"}
    assert set(read(tmp_path / "x.safetensors")) == keys | {
        "image_proj.proj.weight",
        "image_proj.proj.bias",
        "image_proj.norm.weight",
        "image_proj.norm.bias",
    }


def test_resampler_shape_is_read_back(tmp_path, models):
    save_file(models["plus"].state_dict(), tmp_path / "x.safetensors")
    resampler = load_adapter(tmp_path / "x.safetensors").image_proj
    assert len(resampler.layers) == 2 and resampler.layers[0][0].heads == 2 and resampler.latents.shape == (1, 6, 64)


# Files that are no weights

LOADERS = {"base": open_base, "vae": load_vae, "encoder": load_image_encoder, "adapter": load_adapter}


class Payload:
    """Pickled code: unpickling it would create the file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def whole_file(folder: Path, kind: str) -> bytes:
    state, path = {"weight": torch.randn(64, 64), "bias": torch.randn(64)}, folder / "whole"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.unlink()
    return content


NO_WEIGHTS = {
    "missing": (None, "no such file"),
    "a" * 300: (None, "no such file"),
    "folder": (None, "a folder"),
    "empty": (b"", "the file is empty"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "web page after blanks": (b"\n\n  <html></html>", "a web page"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n", "a Git LFS pointer"),
    "text": (b"these are no weights at all", "a text, not weights; it says 'these are no"),
    "json": (b'{"error": "not found"}', "a text, not weights"),
    "zeros": (bytes(4096), "begins with zeros; the download is not finished"),
    "short": (b"PK\x03\x04", "damaged or cut short"),
    "zip of nothing": (b"PK\x05\x06" + bytes(18), "damaged or cut short"),
    "no header": ((8).to_bytes(8, "little") + b"{nonsens", "damaged or cut short"),
    "huge header": ((2**60).to_bytes(8, "little") + b'{"a"', "damaged or cut short"),
    "empty safetensors": ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    "empty pickle": (pickle.dumps({}, protocol=2), "damaged or cut short"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_is_no_weight_file_is_refused(tmp_path, name, loader):
    content, wanted = NO_WEIGHTS[name]
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        wanted = "not a whole diffusers folder" if loader == "base" else wanted
    elif content is not None:
        path.write_bytes(content)
    assert wanted in refused(path, lambda: LOADERS[loader](path))


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_files_cut_short_are_refused(tmp_path, kind, kept):
    content = whole_file(tmp_path, kind)
    path = tmp_path / "x"
    path.write_bytes(content[: int(len(content) * kept)])
    assert "cut short" in refused(path, lambda: read(path))


def test_a_damaged_safetensors_header_is_refused(tmp_path):
    content, path = whole_file(tmp_path, "safetensors"), tmp_path / "x"
    path.write_bytes(content.replace(b'"F32"', b'"F99"', 1))
    assert "damaged or cut short" in refused(path, lambda: read(path))
    path.write_bytes(content.replace(b"[64,64]", b"[64,63]", 1))
    assert "damaged or cut short" in refused(path, lambda: read(path))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    path, trace = tmp_path / "x.bin", tmp_path / "it ran"
    content = {"state_dict": {"weight": torch.ones(4)}, "extra": Payload(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for loader in LOADERS.values():
        assert "refused, the pickle asks to run code" in refused(path, lambda: loader(path))  # noqa: B023
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # so the payload was a live one


def test_a_bare_pickle_with_code_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "x.bin", tmp_path / "it ran"
    path.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    refused(path, lambda: read(path))
    assert not trace.exists()


def test_a_pickle_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3, "names": ["a"]}, tmp_path / "x.pt")
    assert "holds no tensors" in refused(tmp_path / "x.pt", lambda: read(tmp_path / "x.pt"))


# Weights of another kind


@pytest.fixture(scope="module")
def kinds(models, base_state) -> dict[str, State]:
    """Small files of many kinds, told by their names and shapes."""
    one = torch.ones(1)
    unet, vae = prefixed("", models["unet"]), prefixed("", models["vae"])
    adapter, plus = models["adapter"].state_dict(), models["plus"].state_dict()
    return {
        "SDXL refiner": base_state
        | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(8, 8), "conditioner.embedders.0.model.x": one},
        "SD 2": {k: v for k, v in base_state.items() if not k.startswith("cond_stage")}
        | {"cond_stage_model.model.ln_final.weight": one},
        "SD 2 unCLIP": base_state | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(8, 8)},
        "SD 3": {"model.diffusion_model.joint_blocks.0.x": one},
        "FLUX in a checkpoint": {"model.diffusion_model.double_blocks.0.x": one},
        "FLUX": {"double_blocks.0.img_attn.proj.weight": one},
        "kohya LoRA": {"lora_unet_down_blocks_0.lora_down.weight": one, "lora_unet_down_blocks_0.lora_up.weight": one},
        "PEFT LoRA": {"base_model.model.x.lora_A.weight": one, "base_model.model.x.lora_B.weight": one},
        "diffusers LoRA": {"unet.down_blocks.0.attn.to_q.lora.down.weight": one},
        "adapter": adapter,
        "plus": plus,
        "FaceID": {
            "image_proj.proj.0.weight": torch.ones(8, 512),
            "image_proj.proj.2.weight": one,
            "image_proj.norm.weight": one,
            "ip_adapter.0.to_q_lora.down.weight": one,
            "ip_adapter.1.to_k_ip.weight": torch.ones(320, 768),
        },
        "unknown projection": {
            "image_proj.mlp.0.weight": torch.ones(8, 512),
            "ip_adapter.1.to_k_ip.weight": torch.ones(320, 768),
        },
        "full-face": models["full-face"].state_dict(),
        "VAE": vae,
        "diffusers VAE": {
            "encoder.conv_in.weight": one,
            "encoder.down_blocks.0.resnets.0.conv1.weight": one,
            "decoder.conv_in.weight": one,
        },
        "UNet": unet,
        "diffusers UNet": {"down_blocks.0.resnets.0.conv1.weight": one, "conv_in.weight": one},
        "ControlNet": {"control_model.input_hint_block.0.weight": one},
        "bare ControlNet": {"input_hint_block.0.weight": one, "input_blocks.0.0.weight": one},
        "diffusers ControlNet": {"controlnet_cond_embedding.conv_in.weight": one, "down_blocks.0.x": one},
        "image encoder": models["image"].state_dict(),
        "text tower": models["text"].state_dict(),
        "embedding": {"emb_params": torch.ones(4, 768)},
    }


WRONG = [  # loader, file, what the message says was found
    (
        "base",
        "SDXL refiner",
        "an SD 1.x, SD 2.x or SDXL checkpoint is wanted here; this is a whole SDXL refiner checkpoint",
    ),
    ("base", "SD 2", "the key 'text_model.embeddings.token_embedding.weight' is missing"),
    ("base", "SD 2 unCLIP", "this is a whole SD 2.x unCLIP checkpoint"),
    ("base", "SD 3", "this is an SD 3 checkpoint (it has model.diffusion_model.joint_blocks.0.x)"),
    ("base", "FLUX in a checkpoint", "this is a FLUX checkpoint"),
    ("base", "FLUX", "a base model is wanted here (SD 1.x, SD 2.x or SDXL, a checkpoint in the original layout or a"),
    ("base", "FLUX", "this is a FLUX checkpoint (it has double_blocks.0.img_attn.proj.weight)"),
    ("base", "kohya LoRA", "this is a LoRA"),
    ("base", "PEFT LoRA", "this is a LoRA"),
    ("base", "diffusers LoRA", "this is a LoRA"),
    ("base", "adapter", "this is an IP-Adapter (base, reads embeddings of 96, for a base with 64 wide tokens)"),
    ("base", "plus", "this is an IP-Adapter (plus, reads 128 wide patch features"),
    ("base", "FaceID", "IP-Adapter (FaceID, reads faces, for SD 1.x)"),
    ("base", "VAE", "this is an autoencoder"),
    (
        "base",
        "UNet",
        "autoencoder (first_stage_model.*) and the text tower (cond_stage_model.transformer.*) are missing; ",
    ),
    ("base", "UNet", "has: UNet, autoencoder, text tower; `vae` and `text_encoder` can bring them"),
    ("base", "diffusers UNet", "this is a UNet of a diffusers folder"),
    ("base", "ControlNet", "this is a ControlNet"),
    ("base", "bare ControlNet", "this is a ControlNet"),
    ("base", "diffusers ControlNet", "this is a ControlNet"),
    ("base", "image encoder", "this is a CLIP image encoder of width 128"),
    ("base", "text tower", "this is a CLIP text tower"),
    ("base", "embedding", "this is a textual-inversion embedding, which `embedding` opens (it has emb_params)"),
    ("vae", "adapter", "an autoencoder is wanted here; this is an IP-Adapter"),
    ("vae", "diffusers VAE", "the key 'post_quant_conv.weight' is missing; the file is an autoencoder"),
    ("vae", "image encoder", "this is a CLIP image encoder"),
    ("vae", "UNet", "this is a UNet alone"),
    ("encoder", "adapter", "a CLIP image encoder (ViT) is wanted here; this is an IP-Adapter"),
    ("encoder", "text tower", "this is a CLIP text tower"),
    ("encoder", "VAE", "this is an autoencoder"),
    ("encoder", "SD 3", "this is an SD 3 checkpoint"),
    (
        "adapter",
        "image encoder",
        "an IP-Adapter for SD 1.x, SD 2.x or SDXL is wanted here; this is a CLIP image encoder",
    ),
    ("adapter", "kohya LoRA", "this is a LoRA"),
    ("adapter", "VAE", "this is an autoencoder"),
    ("adapter", "SD 2", "this is a whole SD 2.x checkpoint"),
    ("adapter", "FaceID", "its keys do not fit a IPAdapter"),
    ("adapter", "unknown projection", "whose image projection is none of: base, light, plus, full-face, FaceID"),
]


@pytest.mark.parametrize("loader, kind, wanted", WRONG, ids=[f"{kind} as {loader}" for loader, kind, _ in WRONG])
def test_weights_of_another_kind_are_refused_by_name(tmp_path, kinds, loader, kind, wanted):
    path = tmp_path / "x.safetensors"
    save_file({key: value.clone() for key, value in kinds[kind].items()}, path)
    assert wanted in refused(path, lambda: LOADERS[loader](path))


@pytest.mark.parametrize("kind", ["adapter", "plus", "FaceID", "full-face"])
def test_a_damaged_file_can_still_be_described(kinds, kind):
    """The words for a message must not fail on the key that is missing."""
    for left_out in kinds[kind]:
        assert what_is({key: value for key, value in kinds[kind].items() if key != left_out})


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_checkpoint_without_one_of_its_parts_is_refused(tmp_path, base_state, part):
    path = tmp_path / "x.safetensors"
    save_file({key: value for key, value in base_state.items() if not key.startswith(part)}, path)
    message = refused(path, lambda: open_base(path))
    assert "a base model is wanted" in message if part.startswith("model.") else f"({part}" in message


def test_checkpoint_whose_unet_reads_a_depth_is_refused(tmp_path, base_state):
    path = tmp_path / "x.safetensors"
    save_file(base_state | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 5, 3, 3)}, path)
    assert "takes 5 channels (a depth model); 4 are wanted" in refused(path, lambda: open_base(path))


def test_autoencoder_of_16_channels_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(VAE(VAEConfig((32, 32), 1, 16, 1.0)).state_dict(), path)
    assert "4 latent channels is wanted here; this one has 16" in refused(path, lambda: load_vae(path))


# One wrong key, any key


@pytest.fixture(scope="module")
def right(models, base_state) -> dict[str, tuple]:
    return {
        "base": (open_base, base_state),
        "vae": (load_vae, models["vae"].state_dict()),
        "encoder": (load_image_encoder, models["image"].state_dict()),
        "open_clip encoder": (load_image_encoder, open_clip_model().state_dict()),
        "adapter": (load_adapter, models["adapter"].state_dict()),
        "plus": (load_adapter, models["plus"].state_dict()),
        "full-face": (load_adapter, models["full-face"].state_dict()),
    }


RIGHT = ["base", "vae", "encoder", "open_clip encoder", "adapter", "plus", "full-face"]
OPTIONAL = {"visual_projection.weight", "visual.proj"}  # an encoder for plus adapters alone needs none


def keys_to_try(kind: str, state: State) -> list[str]:
    """All keys that a loader reads; where there are hundreds, the first and last, and some between."""
    keys = [key for key in state if kind != "open_clip encoder" or key.startswith("visual.")]
    return keys if len(keys) < 100 else sorted({*keys[:6], *keys[:: len(keys) // 15], *keys[-6:]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT)
def test_each_missing_key_is_refused(monkeypatch, right, kind):
    loader, state = right[kind]
    for left_out in keys_to_try(kind, state):
        if left_out in OPTIONAL:
            continue
        reads(monkeypatch, lambda path, k=left_out: {key: state[key] for key in state if key != k})
        refused("x.safetensors", lambda: loader("x.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT)
def test_each_wrong_shape_is_refused(monkeypatch, right, kind):
    loader, state = right[kind]
    for key in keys_to_try(kind, state):
        for shape in ((7,), (7, *state[key].shape[1:])):
            if kind == "encoder" and key == "visual_projection.weight" and shape == (7, 128):
                continue  # an encoder with embeddings of 7: unusual, but whole
            wrong = {**state, key: torch.ones(shape)}
            reads(monkeypatch, lambda path, wrong=wrong: dict(wrong))
            refused("x.safetensors", lambda: loader("x.safetensors"))


@pytest.mark.parametrize("extra", ["something.else", "model.diffusion_model.input_blocks.99.x", "unknown"])
@pytest.mark.parametrize("kind", RIGHT)
def test_each_unknown_key_is_refused(monkeypatch, right, kind, extra):
    loader, state = right[kind]
    reads(monkeypatch, lambda path: {**state, extra: torch.ones(1)})
    message = refused("x.safetensors", lambda: loader("x.safetensors"))
    assert "not known" in message or "missing" in message


def test_missing_extra_and_wrong_keys_are_listed_side_by_side(tmp_path, models):
    state = models["adapter"].state_dict()
    del state["image_proj.norm.bias"]
    state |= {"image_proj.nrom.bias": torch.ones(64), "image_proj.proj.bias": torch.ones(5)}
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    assert refused(path, lambda: load_adapter(path)) == (
        "its keys do not fit a IPAdapter: 1 missing: image_proj.norm.bias; 1 not known: image_proj.nrom.bias; "
        "1 of a wrong shape: image_proj.proj.bias (5,) for (256,)"
    )


# Files that do not fit together


@pytest.fixture(scope="module")
def opened(tmp_path_factory, models, base_state):
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(base_state, path)
    return open_base(path)


def adapter_of(
    projection: nn.Module, context_dim: int, widths: tuple[int, ...] = (32,) * 4 + (64,) * 8 + (32,) * 3
) -> IPAdapter:
    return IPAdapter(projection, [(width, context_dim) for width in widths])


def encoder_of(width: int, projection: int | None) -> CLIPImage:
    with torch.device("meta"):
        return CLIPImage(CLIPImageConfig(width, 1, 1, 8, False, projection, image_size=16, patch_size=16))


def test_files_that_fit_pass(models, opened):
    check_fit(models["adapter"], "a", opened, models["image"], "e")
    check_fit(models["plus"], "a", opened, models["image"], "e")
    check_fit(models["full-face"], "a", opened, models["image"], "e")


@pytest.mark.parametrize("context_dim, said", [(768, "for SD 1.x"), (2048, "for SDXL"), (1024, "for SD 2.x")])
def test_adapter_for_another_base_is_refused(models, opened, context_dim, said):
    with torch.device("meta"):
        for adapter in (
            adapter_of(ImageProjection(96, context_dim, 4), context_dim),
            adapter_of(Resampler(128, 64, 1, 1, 4, context_dim), context_dim),
        ):
            message = refused("a", lambda: check_fit(adapter, "a", opened, models["image"], "e"))  # noqa: B023
            assert said in message and f"tokens of {context_dim}" in message
            assert f"the base {opened.path} is SD 1.x and has tokens of 64" in message


HINTS = {"ViT-H/14 ": "; `image_encoder` vit-h", "ViT-bigG/14 ": "; `image_encoder` vit-bigg"}
HINTS |= {"ViT-L/14 ": "; `image_encoder` vit-l", "": ""}


@pytest.mark.parametrize("embed_dim, name", [(1024, "ViT-H/14 "), (1280, "ViT-bigG/14 "), (768, "ViT-L/14 "), (80, "")])
def test_base_adapter_for_another_encoder_is_refused(models, opened, embed_dim, name):
    adapter = IPAdapter.for_unet(models["unet"], ImageProjection(embed_dim, 64, 4))
    message = refused("a", lambda: check_fit(adapter, "a", opened, models["image"], "e"))
    assert message == (
        f"this adapter wants {name}image embeddings of {embed_dim}, the image encoder given (e) yields 96{HINTS[name]}"
    )


@pytest.mark.parametrize("width, name", [(1280, "ViT-H/14 "), (1664, "ViT-bigG/14 "), (1024, "ViT-L/14 "), (80, "")])
def test_plus_adapter_for_another_encoder_is_refused(models, opened, width, name):
    adapter = IPAdapter.for_unet(models["unet"], Resampler(width, 64, 1, 1, 4, 64))
    message = refused("a", lambda: check_fit(adapter, "a", opened, models["image"], "e"))
    assert message == (
        f"this adapter wants {name}patch features of {width}, the image encoder given (e) yields 128{HINTS[name]}"
    )


def test_base_adapter_with_an_encoder_without_projection_is_refused(models, opened):
    assert "96" in refused("a", lambda: check_fit(models["adapter"], "a", opened, encoder_of(128, None), "e"))
    check_fit(models["plus"], "a", opened, encoder_of(128, None), "e")


@pytest.mark.parametrize(
    "widths",
    [(32, 32, 64), (32,) * 16, (64,) * 15 + (32,)],
    ids=["too few layers", "other widths", "the middle is missing"],
)
def test_adapter_with_other_layers_than_the_base_is_refused(models, opened, widths):
    """Same tokens, another UNet: it would fail later, in the middle of a matrix product."""
    adapter = adapter_of(ImageProjection(96, 64, 4), 64, widths)
    refused("a", lambda: check_fit(adapter, "a", opened, models["image"], "e"))
