"""Folders of diffusers give the same models as files in the original layout."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from counterparts import diffusers_unet, diffusers_vae, randomise, rel, transformers_text
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from narrow import NARROW_UNET, NARROW_XL
from safetensors.torch import save_file

from files.tensors import WeightsError
from ipadapter import Prompt
from unet import UNet
from vae import SD_VAE, VAE
from weights import open_base
from weights.configs import unet_config, vae_config
from weights.diffusers import read_folder, read_part
from weights.diffusers_names import from_diffusers, unet_key, unet_shape
from weights.settings import scheduler_says

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15 = {"cross_attention_dim": 768}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LEAN = {"layers_per_block": 1, "mid_block_type": None}
TINY = {"block_out_channels": (320, 640, 1280), "down_block_types": [CROSS_DOWN] * 3, "up_block_types": [CROSS_UP] * 3}
FAMILIES = {  # the published configs, and the published numbers of parameters as far as they are exact
    "SD 1.5": (SD15, "859520964"),
    "SD 2.1": (SD21, "865910724"),
    "SDXL": (SDXL, "2567463684"),
    "SSD-1B": (
        SDXL
        | {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [0, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], [0, 0, 0]],
        },
        "13",
    ),
    "Segmind-Vega": (SDXL | {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [0, 1, 2]}, "745"),
    "KOALA-700M": (SDXL | LEAN | {"transformer_layers_per_block": [0, 2, 5]}, "782"),
    "BK-SDM base": (SD15 | {"layers_per_block": 1}, "579384964"),
    "BK-SDM small": (SD15 | LEAN, "482346884"),
    "BK-SDM tiny": (SD15 | LEAN | TINY, "323384964"),
    "BK-SDM v2 tiny": (SD21 | LEAN | TINY | {"attention_head_dim": [5, 10, 20]}, "326825604"),
}


@cache
def theirs(family: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**FAMILIES[family][0])


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: w.shape for key, w in state.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unet_of_every_family_at_full_size(family):
    state = theirs(family).state_dict()
    assert str(sum(w.numel() for w in state.values())).startswith(FAMILIES[family][1])
    ours = from_diffusers(state)
    assert len(ours) == len(state)
    # The same tensors: way back by diffusers' own rules, each must come home to its name.
    back = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{key}": w for key, w in ours.items()}, theirs(family).config
    )
    assert back.keys() == state.keys()
    assert all(back[key] is w for key, w in state.items())
    with torch.device("meta"):
        assert shapes(ours) == shapes(UNet(unet_config(ours)).state_dict())


def test_names_that_the_way_back_would_not_tell_apart():
    """diffusers finds an upsampler at either place; a file has it behind the attention."""
    for family, upsamplers in {
        "SD 1.5": {"output_blocks.2.1", "output_blocks.5.2", "output_blocks.8.2"},
        "SDXL": {"output_blocks.2.2", "output_blocks.5.2"},
        "BK-SDM small": {"output_blocks.1.1", "output_blocks.3.2", "output_blocks.5.2"},
        "BK-SDM tiny": {"output_blocks.1.2", "output_blocks.3.2"},
    }.items():
        ours = from_diffusers(theirs(family).state_dict())
        found = {key for key in ours if key.startswith("output_blocks") and key.split(".")[3] == "conv"}
        assert found == {f"{name}.conv.{kind}" for name in upsamplers for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    "family, middle",
    [("SDXL", {"0", "1", "2"}), ("SSD-1B", {"0"}), ("Segmind-Vega", {"0"}), ("BK-SDM tiny", set())],
)
def test_the_middle_may_be_a_part_or_nothing(family, middle):
    ours = from_diffusers(theirs(family).state_dict())
    assert {key.split(".")[1] for key in ours if key.startswith("middle_block.")} == middle


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_of_a_unet_is_told_from_either_layout(family):
    state = theirs(family).state_dict()
    assert unet_shape(state) == unet_shape(from_diffusers(state))


def test_flat_names_follow_the_same_rules():
    state = theirs("SDXL").state_dict()
    shape = unet_shape(state)
    modules = {key.rpartition(".")[0] for key in state}
    for name in modules:
        assert unet_key(name.replace(".", "_"), *shape).replace(".", "_") == unet_key(name, *shape).replace(".", "_")


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("old", [False, True], ids=["to_q", "query"])
def test_the_autoencoder_at_full_size(old):
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=SD_VAE.channels,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )
        wanted = VAE(SD_VAE).state_dict()
    state = model.state_dict()
    named = state
    for new, name in OLD_ATTENTION.items() if old else ():
        named = {key.replace(f".{new}.", f".{name}."): w for key, w in named.items()}
    ours = from_diffusers(named)
    assert old == (state.keys() != named.keys())
    assert shapes(ours) == shapes(wanted)
    back = convert_ldm_vae_checkpoint({f"first_stage_model.{key}": w for key, w in ours.items()}, model.config)
    assert shapes(back) == shapes(state)
    assert all(back[key] is w for key, w in state.items() if ".attentions." not in key or w.ndim < 2)


@pytest.fixture(scope="module")
def folder(unet, vae, text_tower, tmp_path_factory):
    """What `save_pretrained` writes for a whole pipeline of our narrow models."""
    path = tmp_path_factory.mktemp("diffusers")
    diffusers_unet(unet).save_pretrained(path / "unet")
    diffusers_vae(vae).save_pretrained(path / "vae")
    transformers_text(text_tower).save_pretrained(path / "text_encoder")
    (path / "model_index.json").write_text("{}")
    return path


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: w for key, w in state.items() if key.startswith(prefix)}


def test_a_folder_holds_the_same_tensors_as_the_original_layout(folder, unet, vae, text_tower):
    state = read_folder(folder)
    for prefix, model in (
        ("model.diffusion_model.", unet),
        ("first_stage_model.", vae),
        ("cond_stage_model.transformer.", text_tower),
    ):
        found, wanted = part(state, prefix), model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], w) for key, w in wanted.items())
    assert all(key.startswith(("model.", "first_stage_model.", "cond_stage_model.")) for key in state)


@pytest.mark.parametrize("config", [NARROW_UNET, NARROW_XL], ids=["SD 1.x", "SDXL"])
def test_a_unet_of_diffusers_gives_the_same_output_in_ours(config, draw, tmp_path):
    model = randomise(diffusers_unet(UNet(config)), 11)
    model.save_pretrained(tmp_path / "unet")
    state = from_diffusers(read_part(tmp_path / "unet"))
    ours = UNet(unet_config(state)).eval()
    ours.load_state_dict(state, strict=True)
    x, t, text = draw(2, 4, 12, 8), torch.tensor([981, 3]), draw(2, 77, config.context_dim)
    vector, added = None, None
    if config.vector_dim:
        added = {"text_embeds": draw(2, 32), "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)}
        sizes = model.add_time_proj(added["time_ids"].flatten()).view(2, -1)
        vector = torch.cat([added["text_embeds"], sizes], dim=1)
    with torch.no_grad():
        wanted = model(x, t, text, added_cond_kwargs=added).sample
        assert rel(ours(x, t, Prompt(text, vector=vector)), wanted) <= 1e-5


def test_an_autoencoder_of_diffusers_gives_the_same_output_in_ours(vae, draw, tmp_path):
    model = randomise(diffusers_vae(vae), 12)
    model.save_pretrained(tmp_path / "vae")
    state = from_diffusers(read_part(tmp_path / "vae"))
    ours = VAE(vae_config(state)).eval()
    ours.load_state_dict(state, strict=True)
    pixels, latents = draw(1, 3, 32, 48), draw(1, 4, 6, 4)
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
        for found, wanted in zip(ours.moments(pixels), (posterior.mean, posterior.logvar), strict=True):
            assert rel(found, wanted) <= 1e-5
        assert rel(ours.decode(latents * ours.config.latent_scale), model.decode(latents).sample) <= 1e-5


def test_a_text_tower_with_and_without_its_inner_name(text_tower, tmp_path):
    """transformers 5 saves a tower without projection one level flatter than all before it."""
    state = {key: w for key, w in text_tower.state_dict().items() if key.startswith("text_model.")}
    flat = {key.removeprefix("text_model."): w for key, w in state.items()}
    assert from_diffusers(flat) == state == from_diffusers(state)


def test_two_text_towers_make_it_sdxl(folder, text_tower, tmp_path):
    for name in ("unet", "vae", "text_encoder"):
        (tmp_path / name).symlink_to(folder / name)
    save(tmp_path / "text_encoder_2/model.safetensors", text_tower.state_dict())
    state = read_folder(tmp_path)
    for i in (0, 1):
        tower = part(state, f"conditioner.embedders.{i}.transformer.")
        assert tower.keys() == text_tower.state_dict().keys()
    assert not part(state, "cond_stage_model.")


def save(path, state) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: w.contiguous() for key, w in state.items()}, path)


VARIANTS = {  # the file's name to what is in it; the 1 is wanted
    "plain before fp16": {".safetensors": 1, ".fp16.safetensors": 2},
    "fp16 alone": {".fp16.safetensors": 1},
    "plain .bin before fp16": {".bin": 1, ".fp16.safetensors": 2},
    "safetensors before .bin": {".safetensors": 1, ".bin": 2},
    "a second training's copy": {".safetensors": 1, ".non_ema.safetensors": 2},
    "other formats beside": {".bin": 1, ".onnx": 2, ".msgpack": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_of_several_variants_the_plain_one(tmp_path, variant):
    for ending, value in VARIANTS[variant].items():
        state, path = {"a": torch.full((2,), float(value))}, tmp_path / f"diffusion_pytorch_model{ending}"
        torch.save(state, path) if ending.endswith(".bin") else save_file(state, path)
    assert read_part(tmp_path)["a"].tolist() == [1, 1]


def test_the_text_tower_of_an_old_folder(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert read_part(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_as_diffusers_writes_them(unet, their_unet, tmp_path, variant):
    their_unet.save_pretrained(tmp_path, max_shard_size="2MB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert from_diffusers(read_part(tmp_path)).keys() == unet.state_dict().keys()
    next(iter(sorted(tmp_path.glob("*00002*.safetensors")))).unlink()
    with pytest.raises(WeightsError, match=r"index.*json: of its \d+ files 1 are missing: .*00002"):
        read_part(tmp_path)


def test_shards_as_transformers_writes_them(text_tower, tmp_path):
    transformers_text(text_tower).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert read_part(tmp_path).keys() == text_tower.state_dict().keys()


def test_a_folder_without_its_parts_says_what_is_there(folder, tmp_path):
    (tmp_path / "unet").symlink_to(folder / "unet")
    (tmp_path / "transformer").mkdir()
    with pytest.raises(WeightsError) as error:
        read_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: not a whole diffusers folder (unet/, vae/, text_encoder/): no vae/, text_encoder/; "
        "found: transformer/, unet/"
    )
    with pytest.raises(WeightsError, match="found: nothing"):
        read_part(tmp_path / "transformer")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}'])
def test_a_damaged_index_is_one_line(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match="model.safetensors.index.json"):
        read_part(tmp_path)


@pytest.mark.parametrize("config, found", [({"prediction_type": "v_prediction"}, {"prediction": "v"}), ({}, {})])
def test_prediction_type(tmp_path, config, found):
    assert scheduler_says(tmp_path) == {}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    assert scheduler_says(tmp_path) == found


def test_what_is_no_part_of_a_folder_stays_as_it_is(unet, vae):
    for state in (unet.state_dict(), vae.state_dict(), {"down_blocks.0.attn.processor.to_q_lora.up.weight": 0}):
        assert from_diffusers(state) is state


def said(folder: Path, tmp_path: Path, part: str, **changed: object) -> Path:
    """A folder of which one model's config says something else."""
    copy = tmp_path / "said"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / part / "config.json").write_text(json.dumps(changed))
    return copy


def test_what_a_text_tower_of_a_folder_says_of_itself_is_heeded(folder, text_tower, tmp_path):
    theirs = transformers_text(text_tower)
    theirs.config.hidden_act, theirs.config.num_attention_heads = "gelu", 8
    told = type(theirs)(theirs.config).eval()
    told.load_state_dict(theirs.state_dict())
    copy = said(folder, tmp_path, "text_encoder")
    told.save_pretrained(copy / "text_encoder")
    ids = torch.tensor([[49406, 320, 1125, 2368, 49407]])
    with torch.no_grad():
        wanted = told(ids, output_hidden_states=True).hidden_states[-2]
        assert rel(open_base(copy).text().hidden(ids, 1), wanted) < 1e-5
        assert rel(text_tower.hidden(ids, 1), wanted) > 0.01


UNTOLD = {
    "unet": {"act_fn": "gelu", "freq_shift": 1, "attention_head_dim": 4, "norm_eps": 1e-6},
    "vae": {"act_fn": "gelu", "norm_num_groups": 16},
    "text_encoder": {"layer_norm_eps": 1e-6, "hidden_act": "relu"},
}


@pytest.mark.parametrize("part", UNTOLD)
def test_what_no_tensor_tells_and_is_said_otherwise_is_refused(folder, tmp_path, part):
    for name, value in UNTOLD[part].items():
        config = {"model_type": "clip_text_model", "block_out_channels": [32, 64, 96, 96], name: value}
        with pytest.raises(WeightsError, match=rf"{part}/config.json: .*{name} is {value!r}"):
            open_base(said(folder, tmp_path, part, **config))
