"""SD 1.x, SD 2.x and SDXL: each family's files are told, read and sampled as diffusers, open_clip and transformers do."""

import json
from collections.abc import Callable
from dataclasses import replace
from os import link
from pathlib import Path
from shutil import copy, copytree

import open_clip
import pytest
import torch
from counterparts import (
    Order,
    Twin,
    assert_same_picture,
    open_clip_state,
    our_picture,
    prefixed,
    rel,
    their_picture,
    transformers_open_clip,
)
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from narrow import NARROW_TEXT
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from test_diffusers_layout import FAMILIES as PUBLISHED
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from clip import CLIPText, tokenize
from sampler import SD, Schedule
from unet import SD15, SD21, SDXL, UNet, UNetConfig, size_vector
from vae import SD_VAE, VAE
from weights import WeightsError, open_base
from weights.base import Base
from weights.configs import unet_config
from weights.families import FAMILIES, SD2, SD2_BASE
from weights.fill import on_meta
from weights.settings import schedule_of, sd2_predicts_noise
from weights.text import text_state

pytestmark = pytest.mark.slow

State = dict[str, Tensor]
UNET, BIAS = "model.diffusion_model.", "model.diffusion_model.output_blocks.{}.1.transformer_blocks.0.norm1.bias"
TEXTS = ["", "a red fox in the snow, 35mm", "Don't STOP; 日本 🙂", "many words, " * 60]


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def twin(request) -> Twin:
    return request.getfixturevalue(request.param)


# At full size, without memory

DISTILLED = {
    "SSD-1B": replace(SDXL, down=((0, 0), (2, 2), (4, 4)), middle=(0,), up=((4, 4, 10), (2, 1, 1), (0, 0, 0))),
    "Segmind-Vega": replace(SDXL, down=((0, 0), (1, 1), (2, 2)), middle=(0,), up=((2, 2, 2), (1, 1, 1), (0, 0, 0))),
    "BK-SDM small": replace(SD15, down=((1,), (1,), (1,), (0,)), middle=(), up=((0, 0), (1, 1), (1, 1), (1, 1))),
}
CONFIGS: dict[str, UNetConfig] = {"SD 1.5": SD15, "SD 2.1": SD21, "SDXL": SDXL, **DISTILLED}


@pytest.mark.parametrize("name", CONFIGS)
def test_unet_of_each_family_is_the_published_one(name):
    """Parameters as diffusers counts them (tests/test_diffusers_layout.py), and the config is read back."""
    state = on_meta(lambda: UNet(CONFIGS[name])).state_dict()
    assert str(sum(w.numel() for w in state.values())).startswith(PUBLISHED[name][1])
    assert unet_config(state) == CONFIGS[name]


def open_clip_on_meta(name: str) -> CLIP:
    """The text side of a published model, with as little of the image side as goes."""
    config = open_clip.get_model_config(name)
    image = CLIPVisionCfg(layers=1, width=32, head_width=32, patch_size=16, image_size=32)
    return on_meta(lambda: CLIP(config["embed_dim"], image, CLIPTextCfg(**config["text_cfg"])))


def clip_l_on_meta() -> State:
    """CLIP ViT-L/14's text tower by transformers' names, as files have had it since 2022."""
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    state = on_meta(lambda: CLIPTextModel(config)).state_dict()
    assert sum(w.numel() for w in state.values()) == 123_060_480
    return {f"text_model.{key.removeprefix('text_model.')}": w for key, w in state.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + key: w for key, w in state.items()}


def whole_checkpoint(name: str) -> State:
    """In the original layout; the text towers as open_clip and transformers name their tensors."""
    state = prefixed(UNET, on_meta(lambda: UNet({"SD 1.x": SD15, "SD 2.x": SD21, "SDXL": SDXL}[name])))
    state |= prefixed("first_stage_model.", on_meta(lambda: VAE(SD_VAE)))
    if name == "SD 1.x":
        return state | under("cond_stage_model.transformer.", clip_l_on_meta())
    if name == "SD 2.x":
        state[BIAS.format(11)] = torch.zeros(320)  # as at 512 pixels: it varies little
        return state | open_clip_state("cond_stage_model.model.", open_clip_on_meta("ViT-H-14"))
    state |= under("conditioner.embedders.0.transformer.", clip_l_on_meta())
    return state | open_clip_state("conditioner.embedders.1.model.", open_clip_on_meta("ViT-bigG-14"))


CLIP_L = (768, 12, 12, True)  # width, layers, heads, OpenAI's GELU
WHOLE = {  # config, latent scale, side, text towers, the first cross-attention and how many there are
    "SD 1.x": (SD15, 0.18215, 512, [CLIP_L], (320, 768), 16),
    "SD 2.x": (SD21, 0.18215, 512, [(1024, 23, 16, False)], (320, 1024), 16),
    "SDXL": (SDXL, 0.13025, 1024, [CLIP_L, (1280, 32, 20, False)], (640, 2048), 70),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_checkpoint_of_full_size_is_opened(monkeypatch, name):
    config, latent_scale, side, towers, layer, count = WHOLE[name]
    state = whole_checkpoint(name)
    monkeypatch.setattr("weights.base.read", lambda path: dict(state))
    base = open_base("x.safetensors", device="meta")
    assert (base.family.name, base.schedule, base.side, base.guidance_scale) == (name, SD, side, None)
    assert base.layers[0] == layer and len(base.layers) == count
    assert base.unet().config == config and base.vae().config == replace(SD_VAE, latent_scale=latent_scale)
    found = [m.config for m in base.text_encoder().modules() if isinstance(m, CLIPText)]
    assert [(c.width, c.layers, c.heads, c.quick_gelu) for c in found] == towers


@pytest.mark.parametrize("name, unused, parameters", [("ViT-H-14", 1, 354_032_641), ("ViT-bigG-14", 0, 694_659_841)])
def test_open_clip_towers_are_the_published_ones(name, unused, parameters):
    """What no tensor tells, the heads, and how many layers are not used; the temperature counts as a parameter."""
    text = open_clip_on_meta(name)
    assert sum(w.numel() for w in open_clip_state("", text).values()) == parameters
    _, layers, heads, _ = WHOLE["SD 2.x" if unused else "SDXL"][3][-1]
    assert (text.transformer.layers - unused, text.transformer.resblocks[0].attn.num_heads) == (layers, heads)


# Texts


@torch.no_grad()
def test_sd2_text_equals_open_clip_and_transformers(sd2, open_clip_tower):
    """All layers but the last, then the final LayerNorm (Stability's FrozenOpenCLIPEmbedder, layer "penultimate")."""
    encode, theirs = sd2.base.text_encoder(), transformers_open_clip(open_clip_tower, layers=2)
    found = []
    for text in TEXTS:
        tokens = open_clip.tokenize(text)
        assert torch.equal(tokens, tokenize(text, pad=0))
        x = open_clip_tower.token_embedding(tokens) + open_clip_tower.positional_embedding
        for block in open_clip_tower.transformer.resblocks[:-1]:
            x = block(x, attn_mask=open_clip_tower.attn_mask)
        ours, pooled = encode(text)
        assert pooled is None
        assert rel(ours, open_clip_tower.ln_final(x)) <= 1e-5
        assert rel(ours, theirs(tokens).last_hidden_state) <= 1e-5
        assert torch.equal(encode.null(text)[0], ours)
        found.append(ours)
    assert rel(found[0], found[1]) > 0.1
    assert rel(sd2.base.text()(tokenize(TEXTS[1])), found[1]) > 0.01  # padded otherwise, it says something else


@torch.no_grad()
def test_sdxl_second_tower_equals_open_clip(sdxl, open_clip_tower):
    """The pooled embedding is the whole tower's, at the end of the text, projected, and not normalised."""
    encode = sdxl.base.text_encoder()
    for text in TEXTS:
        _, pooled = encode(text)
        assert rel(pooled, open_clip_tower.encode_text(open_clip.tokenize(text))) <= 1e-5


TRANSFORMERS_TEXTS = [TEXTS[i] for i in (0, 1, 3)]  # its tokenizer has no repair of texts


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, "blurry, low quality"])
@pytest.mark.parametrize("text", TRANSFORMERS_TEXTS, ids=["empty", "short", "long"])
def test_text_equals_diffusers_pipeline(twin, text, negative):
    encode, _, _ = twin.parts
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    wanted = twin.pipeline.encode_prompt(text, negative_prompt=negative, **arguments)
    found = [x for half in zip(encode(text), encode.null(negative or ""), strict=True) for x in half if x is not None]
    assert len(found) == len(wanted) == (4 if twin.base.family.name == "SDXL" else 2)
    for ours, theirs in zip(found, wanted, strict=True):
        if negative or twin.base.family.name != "SDXL" or theirs.any():
            assert rel(ours, theirs) <= 1e-5
        else:
            assert torch.equal(ours, theirs)  # SDXL without a negative prompt: zeros
    if twin.base.family.name == "SDXL":
        assert (negative is None) == (not found[1].any()) == (not found[3].any()) and found[0].any()


@pytest.mark.parametrize("height, width", [(1024, 1024), (768, 1344), (64, 96)])
def test_vector_of_sizes_equals_diffusers_pipeline(sdxl, draw, height, width):
    pooled, pipeline = draw(2, 32), sdxl.pipeline
    sizes = pipeline._get_add_time_ids((height, width), (0, 0), (height, width), torch.float32, 32)
    sinusoids = pipeline.unet.add_time_proj(sizes.flatten()).reshape(1, -1).expand(2, -1)
    assert rel(size_vector(pooled, height, width, 8), torch.cat([pooled, sinusoids], dim=1)) <= 1e-6
    assert size_vector(draw(2, 1280), height, width).shape == (2, SDXL.vector_dim)
    if height != width:
        assert rel(size_vector(pooled, height, width, 8), size_vector(pooled, width, height, 8)) > 0.1


# Whole pictures


@pytest.mark.parametrize("negative_prompt", ["", "blurry, low quality"], ids=["alone", "with a negative prompt"])
def test_picture_equals_diffusers(twin, negative_prompt):
    order = Order(negative_prompt=negative_prompt)
    ours = our_picture(twin, order)
    assert_same_picture(ours, their_picture(twin, order))
    other = our_picture(twin, replace(order, negative_prompt="a house"))
    assert rel(other[0], ours[0]) > 0.01  # the negative prompt shows


def test_picture_of_a_v_model_is_not_that_of_an_eps_model(sd2):
    assert sd2.base.schedule.prediction == "v"
    wrong = Twin(replace(sd2.base, schedule=SD), sd2.pipeline)
    assert rel(our_picture(wrong, Order())[0], our_picture(sd2, Order())[0]) > 0.1


def test_a_folder_of_diffusers_is_the_same_base(twin, tmp_path):
    """As `save_pretrained` writes its parts: names, text towers and what the UNet predicts."""
    base = open_base(saved(twin, tmp_path))
    assert base.schedule == replace(twin.base.schedule, spacing="leading")
    towers = tuple(replace(tower, heads=None) for tower in base.family.text)  # how many heads they have a folder tells
    same = {"path": twin.base.path, "schedule": twin.base.schedule, "family": replace(base.family, text=towers)}
    assert replace(base, **same) == twin.base
    assert same_parts(base, twin)


# Other people's layouts, and parts from elsewhere


def same_parts(base: Base, twin: Twin) -> bool:
    """Whether all tensors are those of the twin's own file."""
    for found, wanted in zip((base.text_encoder(), base.unet(), base.vae()), twin.parts, strict=True):
        found, wanted = found.state_dict(), wanted.state_dict()
        if found.keys() != wanted.keys() or not all(torch.equal(w, wanted[key]) for key, w in found.items()):
            return False
    return True


TEXT = {  # where each family's text towers stand
    "sd1": ["cond_stage_model.transformer."],
    "sd2": ["cond_stage_model.model."],
    "sdxl": ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
}


def part_of(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): w for key, w in state.items() if key.startswith(prefix)}


def test_sd2_with_its_unused_layer_left_out_is_the_same(sd2, tmp_path):
    """As files are that were made of folders: all of their layers are used."""

    def change(state: State) -> None:
        without("cond_stage_model.model.transformer.resblocks.2.")(state)
        del state["cond_stage_model.model.text_projection"]

    assert same_parts(open_base(rewritten(sd2, tmp_path / "x.safetensors", change)), sd2)


@pytest.mark.parametrize("layers, used", [(24, 23), (23, 23)])
def test_of_a_full_tower_of_sd2_the_first_23_layers_are_used(layers, used):
    """Also where the projection that tells a whole tower was pruned away."""
    state = {f"transformer.resblocks.{i}.ln_1.weight": torch.ones(4) for i in range(layers)}
    found = text_state(state | {"positional_embedding": torch.ones(77, 4)}, FAMILIES["SD 2.x"].text[0])
    assert len([key for key in found if "layer_norm1" in key]) == used


def test_sd_turbo_has_its_text_tower_elsewhere(sd2, tmp_path):
    """And is made for pictures without guidance: no other file has it there."""

    def change(state: State) -> None:
        for key in [key for key in state if key.startswith("cond_stage_model.model.")]:
            state[key.replace("cond_stage_model.model.", "conditioner.embedders.0.model.")] = state.pop(key)
        state["denoiser.sigmas"] = torch.ones(1000)

    base = open_base(rewritten(sd2, tmp_path / "x.safetensors", change))
    assert same_parts(base, sd2) and base.family == sd2.base.family
    assert (base.guidance_scale, sd2.base.guidance_scale) == (1.0, None)


def test_sdxl_with_its_projection_as_diffusers_converter_writes_it(sdxl, tmp_path):
    def change(state: State) -> None:
        key = "conditioner.embedders.1.model.text_projection"
        state[f"{key}.weight"] = state.pop(key).T.contiguous()

    assert same_parts(open_base(rewritten(sdxl, tmp_path / "x.safetensors", change)), sdxl)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("layout", ["original", "bare", "diffusers", "folder"])
def test_a_unet_alone_with_its_other_parts_from_elsewhere(request, name, layout, tmp_path):
    twin: Twin = request.getfixturevalue(name)
    state, unet = load_file(twin.base.path), tmp_path / "unet.safetensors"
    own = {key: w for key, w in state.items() if key.startswith(UNET)}
    if layout == "folder":
        twin.pipeline.unet.save_pretrained(unet := tmp_path / "unet")
    elif layout == "diffusers":
        save_file(twin.pipeline.unet.state_dict(), unet)
    else:
        save_file({key if layout == "original" else key.removeprefix(UNET): w for key, w in own.items()}, unet)
    save_file(part_of(state, "first_stage_model."), tmp_path / "vae.safetensors")
    texts = []
    for i, prefix in enumerate(TEXT[name]):
        texts.insert(0, tmp_path / f"text_{i}.safetensors")  # SDXL's in the wrong order
        save_file(part_of(state, prefix) | {"logit_scale": torch.ones(())}, texts[0])
    base = open_base(unet, vae=tmp_path / "vae.safetensors", text_encoder=texts)
    assert same_parts(base, twin)
    assert (base.family.name, base.layers, base.sinusoids) == (
        *(twin.base.family.name, twin.base.layers, twin.base.sinusoids),
    )


def test_text_towers_out_of_a_folder_of_diffusers(twin, tmp_path):
    files = sorted(saved(twin, tmp_path).glob("text_encoder*"))
    assert same_parts(open_base(twin.base.path, text_encoder=files), twin)


def test_a_folder_of_diffusers_may_lack_what_comes_from_elsewhere(sd1, tmp_path):
    sd1.pipeline.unet.save_pretrained(tmp_path / "unet")
    sd1.pipeline.text_encoder.save_pretrained(tmp_path / "text")
    base = open_base(tmp_path, vae=sd1.base.path, text_encoder=[tmp_path / "text"])
    assert same_parts(base, sd1)
    assert "no vae/; found" in refused(tmp_path, lambda path: open_base(path, text_encoder=[tmp_path / "text"]))


def test_a_part_from_elsewhere_that_does_not_fit_is_named(sd1, tmp_path):
    for name, prefix in (("vae", "first_stage_model."), ("text", TEXT["sd1"][0])):
        state = part_of(load_file(sd1.base.path), prefix)
        del state[next(key for key in state if key.endswith("bias"))]
        save_file(state, tmp_path / f"{name}.safetensors")
    assert "1 missing: " in refused(tmp_path / "vae.safetensors", lambda path: open_base(sd1.base.path, vae=path))
    text = tmp_path / "text.safetensors"
    assert "1 missing: " in refused(text, lambda path: open_base(sd1.base.path, text_encoder=[path]))


def test_text_towers_that_are_none_or_too_few(sd1, sdxl, tmp_path):
    save_file(part_of(load_file(sd1.base.path), UNET), unet := tmp_path / "unet.safetensors")
    assert refused(unet, lambda path: open_base(sd1.base.path, text_encoder=[path])).startswith(
        "a CLIP text tower is wanted here; this is a UNet alone, without autoencoder and text tower, of SD 1.x (it has "
    )
    with pytest.raises(WeightsError, match="^`text_encoder`: 1 given, SDXL has 2 text towers$"):
        open_base(sdxl.base.path, text_encoder=[unet])


# What the UNet predicts


def sd2_state(spread: float, blocks: int = 12) -> State:
    bias = torch.linspace(-1, 1, 320)
    return {BIAS.format(blocks - 1): bias * spread / bias.std(correction=0)}


@pytest.mark.parametrize("spread, said", [(0.02, "eps"), (0.085, "eps"), (0.095, "v"), (0.3, "v")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_versions_of_sd2_are_told_by_a_bias(spread, said, dtype):
    state = {key: w.to(dtype) for key, w in sd2_state(spread).items()}
    assert sd2_predicts_noise(state) == (said == "eps")


def test_the_versions_of_a_distilled_sd2_are_told_by_the_last_block():
    assert not sd2_predicts_noise(sd2_state(0.3, blocks=8))
    assert sd2_predicts_noise(sd2_state(0.02, blocks=8))


def rewritten(twin: Twin, path, change: Callable[[State], None]):
    """The twin's file with something changed."""
    state = load_file(twin.base.path)
    change(state)
    save_file(state, path)
    return path


def marked(**marks: Tensor) -> Callable[[State], None]:
    return lambda state: state.update(marks)


V_PRED, ZTSNR = torch.zeros(0), torch.zeros(1)


def test_a_file_with_the_mark_of_v_is_opened(sd1, sdxl, tmp_path):
    for twin in (sd1, sdxl):
        path = rewritten(twin, tmp_path / "x.safetensors", marked(v_pred=V_PRED))
        assert open_base(path).schedule == Schedule(prediction="v") and twin.base.schedule == SD


def test_a_file_that_ends_in_pure_noise(sdxl, tmp_path):
    """NoobAI-XL: betas rescaled, and the timesteps trailing, or the last of them would never be visited."""
    path = rewritten(sdxl, tmp_path / "x.safetensors", marked(v_pred=V_PRED, ztsnr=ZTSNR))
    base = open_base(path)
    assert base.schedule == Schedule(prediction="v", zero_snr=True, spacing="trailing")
    assert base.guidance_scale is None  # as ever
    rewritten(sdxl, path, marked(ztsnr=ZTSNR))
    assert "where all is noise, eps tells nothing" in refused(path)
    assert open_base(path, prediction="v").schedule == base.schedule


@pytest.mark.parametrize("said, prediction", [("v", "v"), ("epsilon", "eps"), ("something", "v"), (None, "v")])
def test_the_metadata_of_a_file_may_tell(sd2, tmp_path, said, prediction):
    """sd-scripts writes them (SAI model spec)."""
    path = tmp_path / "x.safetensors"
    save_file(load_file(sd2.base.path), path, said and {"modelspec.prediction_type": said})
    assert open_base(path).schedule.prediction == prediction


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_the_noise_levels_of_edm_are_refused(sdxl, tmp_path, mark):
    path = rewritten(sdxl, tmp_path / "x.safetensors", lambda state: state.update({mark: torch.zeros(4)}))
    assert refused(path) == f"made for the noise levels of EDM (its key {mark}), which are not supported"


def test_what_is_asked_for_outweighs_what_the_file_tells(sd1, sd2, tmp_path):
    assert open_base(sd1.base.path, prediction="v").schedule.prediction == "v"
    assert open_base(sd2.base.path, prediction="eps").schedule.prediction == "eps"
    assert open_base(sd1.base.path, spacing="trailing").schedule == Schedule(spacing="trailing")
    narrow = BIAS.format(11)
    path = rewritten(sd2, tmp_path / "x.safetensors", lambda state: state[narrow].mul_(0.1))
    base = open_base(path)
    assert (base.schedule.prediction, base.side) == ("eps", 512)
    assert (sd2.base.schedule.prediction, sd2.base.side) == ("v", 768)


def saved(twin: Twin, path: Path, scheduler: object = None, **settings: object) -> Path:
    """The twin as a folder of diffusers; its scheduler with other settings, or another one. Its weights are written once."""
    whole = twin.base.path.parent / f"folder {id(twin.pipeline)}"
    for name in ("unet", "vae", "text_encoder", "text_encoder_2") if not whole.exists() else ():
        if part := getattr(twin.pipeline, name, None):
            part.save_pretrained(whole / name)
    copytree(whole, path, dirs_exist_ok=True, copy_function=lambda a, b: (link if "safetensors" in a else copy)(a, b))
    config = twin.pipeline.scheduler.config
    (scheduler or DDIMScheduler).from_config(config, **settings).save_pretrained(path / "scheduler")
    return path


SCHEDULES = {  # the scheduler, its settings, what they mean
    "SD 1.5": ("sd1", PNDMScheduler, {"skip_prk_steps": True}, {"spacing": "leading"}),
    "SD 2.1": ("sd2", DDIMScheduler, {}, {"spacing": "leading", "prediction": "v"}),
    "SD 2.1 for 512 pixels": ("sd2", PNDMScheduler, {"prediction_type": "epsilon"}, {"spacing": "leading"}),
    "SDXL": ("sdxl", EulerDiscreteScheduler, {"timestep_spacing": "leading"}, {"spacing": "leading"}),
    "SDXL-Turbo": ("sdxl", EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, {"spacing": "trailing"}),
    "zero terminal SNR": (
        *("sd2", DDIMScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        {"prediction": "v", "zero_snr": True, "spacing": "trailing"},
    ),
    "other betas": (
        *(
            "sdxl",
            EulerDiscreteScheduler,
            {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "leading"},
        ),
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "spacing": "leading"},
    ),
    "to the end": ("sd1", DDIMScheduler, {"set_alpha_to_one": True}, {"set_alpha_to_one": True, "spacing": "leading"}),
    "without an offset": ("sdxl", DDIMScheduler, {"steps_offset": 0}, {"steps_offset": 0, "spacing": "leading"}),
    "corrected by diffusers": ("sd1", DDIMScheduler, {"steps_offset": 0}, {"spacing": "leading"}),
    "linspace": ("sd1", EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, {"spacing": "linspace"}),
}


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("case", SCHEDULES)
def test_the_scheduler_of_a_folder_is_heeded(request, case, tmp_path):
    """Its picture is the one that diffusers makes of that folder."""
    name, scheduler, settings, meant = SCHEDULES[case]
    twin: Twin = request.getfixturevalue(name)
    base = open_base(saved(twin, tmp_path, scheduler, **settings))
    assert base.schedule == Schedule(**meant)
    assert base.guidance_scale == (1.0 if case == "SDXL-Turbo" else None)
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    parts = {key: value for key, value in twin.pipeline.components.items() if key != "scheduler"}
    theirs = type(twin.pipeline)(**parts, scheduler=DDIMScheduler.from_config(config))
    theirs.set_progress_bar_config(disable=True)
    order = Order(steps=3)
    assert_same_picture(our_picture(found := Twin(base, theirs), order), their_picture(found, order))


REFUSED_SCHEDULES = {
    "prediction": (
        {"prediction_type": "sample"},
        "the prediction_type is 'sample'; epsilon and v_prediction supported",
    ),
    "steps": ({"num_train_timesteps": 500}, "the num_train_timesteps is 500; 1000 supported"),
    "betas of its own": ({"trained_betas": [0.1]}, "the trained_betas is [0.1]; none supported"),
    "a beta": ({"beta_start": "0.1"}, "the beta_start is '0.1'; a number above 0 and below 1 is wanted"),
    "no beta": ({"beta_end": 0}, "the beta_end is 0; a number above 0 and below 1 is wanted"),
    "an offset": ({"steps_offset": [1]}, "the steps_offset is [1]; 0 and 1 supported"),
    "no name": ({"_class_name": 5, "set_alpha_to_one": "no"}, "the set_alpha_to_one is 'no'; False and True supported"),
    "EDM": ({"_class_name": "EDMEulerScheduler"}, "made for the noise levels of EDM (arXiv 2206.00364), which are not"),
    "EDM in Euler": ({"timestep_type": "continuous"}, "made for the noise levels of EDM"),
    "a flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "made for a flow, not for a diffusion"),
}


@pytest.mark.parametrize("case", REFUSED_SCHEDULES)
def test_a_schedule_that_is_not_supported_is_refused(tmp_path, case):
    config, message = REFUSED_SCHEDULES[case]
    file = tmp_path / "scheduler/scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(config))
    with pytest.raises(WeightsError) as error:
        schedule_of(tmp_path, {}, FAMILIES["SD 1.x"])
    assert str(error.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    "config", [{"beta_schedule": "sigmoid"}, {"timestep_spacing": "odd"}, {"rescale_betas_zero_snr": True}]
)
def test_what_no_schedule_can_be_is_refused(tmp_path, config):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="given"):
        schedule_of(tmp_path, {}, FAMILIES["SD 1.x"])


@pytest.mark.parametrize("config, said", [("epsilon", "eps"), ("v_prediction", "v"), (None, "eps")])
def test_the_scheduler_of_a_folder_outweighs_the_tensors(tmp_path, config, said):
    (tmp_path / "scheduler").mkdir()
    content = {"prediction_type": config} if config else {}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(content))
    by_tensors = {"eps": SD2, "v": SD2_BASE}[said] if config else SD2_BASE
    assert schedule_of(tmp_path, {}, by_tensors).prediction == said


# What an autoencoder says


def test_the_autoencoder_of_a_folder_says_its_scale_and_its_precision(sd1, sdxl, tmp_path):
    for name, twin in (("sd1", sd1), ("sdxl", sdxl)):
        file = saved(twin, tmp_path / name) / "vae/config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"scaling_factor": 0.5, "force_upcast": False}))
        base = open_base(tmp_path / name, torch.float16)
        assert base.vae().config.latent_scale == 0.5 and base.vae_dtype == torch.float16
        assert open_base(tmp_path / name, vae=twin.base.path).vae().config == twin.base.vae().config
        file.write_text(json.dumps(config))
        assert open_base(tmp_path / name, torch.float16).vae_dtype == (torch.float16 if twin is sd1 else torch.float32)
        file.write_text(json.dumps(config | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
        assert refused(file, lambda path, name=name: open_base(tmp_path / name)) == (
            "has latents_mean; an autoencoder whose latents are scaled alone is wanted"
        )
        assert "has latents_mean" in refused(file, lambda path: open_base(twin.base.path, vae=path.parent))  # noqa: B023


# A UNet that is told the guidance scale


@pytest.fixture(scope="module")
def lcm(sd1) -> Twin:
    """A full latent consistency model, as LCM_Dreamshaper_v7 is."""
    theirs = UNet2DConditionModel.from_config(sd1.pipeline.unet.config, time_cond_proj_dim=256)
    theirs.load_state_dict(sd1.pipeline.unet.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(20)
    theirs.time_embedding.cond_proj.weight.data = torch.randn(32, 256, generator=generator) / 16
    parts = {key: value for key, value in sd1.pipeline.components.items() if key != "unet"}
    pipeline = type(sd1.pipeline)(**parts, unet=theirs.requires_grad_(False).eval(), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return Twin(sd1.base, pipeline)


@pytest.mark.parametrize("guidance_scale", [1.5, 8.5])
def test_a_unet_that_is_told_the_guidance_scale(lcm, tmp_path, guidance_scale):
    base = open_base(saved(lcm, tmp_path))
    assert base.guidance_scale == 8.5 and base.unet().config.guidance_dim == 256
    order = Order(guidance_scale=guidance_scale)
    ours = our_picture(Twin(base, lcm.pipeline), order)
    assert_same_picture(ours, their_picture(lcm, order))
    other = our_picture(Twin(base, lcm.pipeline), replace(order, guidance_scale=4.0))
    assert rel(other[0], ours[0]) > 0.001


def test_a_unet_that_is_told_the_guidance_scale_in_the_original_layout(lcm, sd1, tmp_path):
    weight = lcm.pipeline.unet.time_embedding.cond_proj.weight
    path = rewritten(
        sd1, tmp_path / "x.safetensors", lambda state: state.update({f"{UNET}time_embed.cond_proj.weight": weight})
    )
    assert torch.equal(open_base(path).unet().cond_proj.weight, weight)


# Files that are refused


def refused(path, loader=open_base) -> str:
    with pytest.raises(WeightsError) as error:
        loader(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message[len(f"{path}: ") :]


def without(*prefixes: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        left = [key for key in state if key.startswith(prefixes)]
        assert left
        for key in left:
            del state[key]

    return change


WANTED = "an SD 1.x, SD 2.x or SDXL checkpoint is wanted here; this is a whole "


def refiner(state: State) -> None:
    """One text tower, OpenCLIP's, and it is the first."""
    without("conditioner.embedders.0.")(state)
    for key in [key for key in state if key.startswith("conditioner.embedders.1.")]:
        state[key.replace("embedders.1.", "embedders.0.")] = state.pop(key)


def unclip(state: State) -> None:
    state[f"{UNET}label_emb.0.0.weight"] = torch.ones(256, 64)
    state["embedder.model.visual.proj"] = torch.ones(4, 4)
    state["noise_augmentor.data_mean"] = torch.ones(1, 4)


def reading(state: State, channels: int) -> None:
    weight = state[f"{UNET}input_blocks.0.0.weight"]
    state[f"{UNET}input_blocks.0.0.weight"] = torch.ones(len(weight), channels, 3, 3)


REFUSED = {
    "SDXL refiner": ("sdxl", refiner, WANTED + "SDXL refiner checkpoint"),
    "SD 2.x unCLIP": ("sd2", unclip, WANTED + "SD 2.x unCLIP checkpoint"),
    "SD 1.x for depth": ("sd1", lambda state: reading(state, 5), "its UNet takes 5 channels (a depth model); 4 are"),
    "SD 1.x without its autoencoder": (
        *("sd1", without("first_stage_model.")),
        "the autoencoder (first_stage_model.*) is missing; a whole SD 1.x checkpoint has: UNet, autoencoder, text tower; "
        + "`vae` can bring it",
    ),
    "SD 2.x without its text tower": (
        *("sd2", without("cond_stage_model.")),
        "the text tower (cond_stage_model.model.*) is missing; a whole SD 2.x checkpoint has: UNet, autoencoder, text tower"
        + "; `text_encoder` can bring it",
    ),
    "the UNet of SDXL": (
        *("sdxl", without("first_stage_model.", "conditioner.")),
        "the autoencoder (first_stage_model.*) and the text tower (conditioner.embedders.0.transformer.*) and the second "
        + "text tower (conditioner.embedders.1.model.*) are missing; a whole SDXL checkpoint has: UNet, autoencoder, text "
        + "tower, second text tower; `vae` and `text_encoder` can bring them",
    ),
    "Kolors": (
        *("sdxl", lambda state: state.update({f"{UNET}encoder_hid_proj.weight": torch.ones(96, 64)})),
        "an SD 1.x, SD 2.x or SDXL checkpoint is wanted here; this is a Kolors checkpoint (it has model.diffusion_model.",
    ),
    "SDXL without the projection of its second text tower": (
        *("sdxl", without("conditioner.embedders.1.model.text_projection")),
        "the second text tower has no text_projection, which this UNet reads",
    ),
    "SDXL without its first text tower": (
        *("sdxl", without("conditioner.embedders.0.")),
        "the text tower (conditioner.embedders.0.transformer.*) is missing; a whole SDXL checkpoint has: UNet, "
        + "autoencoder, text tower, second text tower",
    ),
    "SDXL without its second text tower": (
        *("sdxl", without("conditioner.embedders.1.")),
        "the second text tower (conditioner.embedders.1.model.*) is missing; a whole SDXL checkpoint has: UNet, "
        + "autoencoder, text tower, second text tower",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_base_is_refused_by_name(request, case, tmp_path):
    name, change, message = REFUSED[case]
    twin: Twin = request.getfixturevalue(name)
    assert refused(rewritten(twin, tmp_path / "x.safetensors", change)).startswith(message)


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("channels", [8, 9])
def test_a_base_for_editing_is_told_from_its_tensors(request, base, channels, tmp_path):
    path = rewritten(request.getfixturevalue(base), tmp_path / "x.safetensors", lambda state: reading(state, channels))
    found = open_base(path)
    assert found.channels == channels and found.family is request.getfixturevalue(base).base.family


def test_a_text_tower_of_another_width_is_refused(sd2, tmp_path):
    narrow: nn.Module = CLIPText(replace(NARROW_TEXT, width=32, heads=1, mlp=64))

    def change(state: State) -> None:
        without("cond_stage_model.")(state)
        state.update(prefixed("cond_stage_model.transformer.", narrow))

    message = refused(rewritten(sd2, tmp_path / "x.safetensors", change))
    assert message == "its UNet reads tokens of 64, its text towers give 32"


def test_a_text_tower_of_another_vocabulary_is_refused(sd1, tmp_path):
    def change(state: State) -> None:
        key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        state[key] = state[key][:32000].clone()

    assert refused(rewritten(sd1, tmp_path / "x.safetensors", change)) == (
        "a text tower for CLIP's tokenizer is wanted, 49408 words and 77 tokens; this one has 32000 words and 77 tokens"
    )


STRANGERS = {  # one key of each is enough
    "a FLUX checkpoint": "single_transformer_blocks.0.attn.to_q.weight",
    "an SD 3 checkpoint": "transformer_blocks.0.ff_context.net.2.weight",
    "an AuraFlow checkpoint": "double_layers.0.attn.w1q.weight",
    "a PixArt checkpoint": "caption_projection.linear_1.weight",
    "a Stable Cascade checkpoint": "clip_txt_pooled_mapper.weight",
    "a TAESD, an approximation of an autoencoder": "decoder.layers.3.conv.0.weight",
    "a decoder alone": "decoder.up_blocks.0.resnets.0.conv1.weight",
    "an autoencoder": "first_stage_model.encoder.conv_in.weight",
    "a CLIP text tower": "transformer.resblocks.0.ln_1.weight",
    "a T5 encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
}


@pytest.mark.parametrize("what", STRANGERS)
def test_what_is_no_base_model_is_told_by_name(tmp_path, what):
    save_file({STRANGERS[what]: torch.ones(4, 4)}, tmp_path / "x.safetensors")
    assert refused(tmp_path / "x.safetensors") == (
        "a base model is wanted here (SD 1.x, SD 2.x or SDXL, a checkpoint in the original layout or a folder of "
        f"diffusers); this is {what} (it has {STRANGERS[what]})"
    )


def test_a_folder_made_for_another_pipeline_says_which(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert refused(tmp_path).endswith("found: model_index.json, transformer/; it is made for FluxPipeline")


def test_the_autoencoder_of_sdxl_is_never_in_fp16(sd1, sdxl):
    for twin, dtype in ((sd1, torch.float16), (sdxl, torch.float32)):
        half = replace(twin.base, dtype=torch.float16)
        assert {p.dtype for p in half.vae().parameters()} == {dtype} == {half.vae_dtype}
        assert {p.dtype for p in half.unet().parameters()} == {torch.float16}
    assert replace(sdxl.base, dtype=torch.bfloat16).vae_dtype == torch.bfloat16
