"""LoRAs merged into our models give what diffusers and peft compute with the same files."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
from counterparts import assert_same_picture, diffusers_unet, opened, randomise, rel, transformers_text
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, set_weights_and_activate_adapters
from narrow import NARROW_TEXT, NARROW_UNET, NARROW_XL
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d

from clip import CLIPText
from files.errors import Notice
from files.tensors import WeightsError
from generate import pictures, prompts
from generate.picture import decode
from ipadapter import FaceProjection, IPAdapter, Prompt, low_rank
from ipadapter.low_rank import LowRank
from unet import UNet
from weights import open_base
from weights.lora import check, merge, read_lora
from weights.lora_forms import change_of

pytestmark = pytest.mark.slow

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "samplers.0.conv", "time_emb_proj")  # of a LoCon
ORIGINAL_CONVOLUTIONS = ("in_layers.2", "out_layers.3", "skip_connection", ".op", ".conv", "emb_layers.1")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")
DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight")
ALPHA = 3.0


def layers(model: nn.Module, endings: tuple[str, ...]) -> dict[str, nn.Module]:
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {name: m for name, m in modules.items() if name.endswith(endings)}


def pair(module: nn.Module, seed: int, rank: int = 4) -> tuple[Tensor, Tensor]:
    """Down and up for a layer; their product is a third as large as its own weights."""
    generator = torch.Generator().manual_seed(seed)
    out, width, *kernel = module.weight.shape
    down = torch.randn(rank, width, *kernel, generator=generator) / module.weight[0].numel() ** 0.5
    return down, torch.randn(out, rank, *[1] * len(kernel), generator=generator) / (3 * rank**0.5)


def kohya(prefix: str, modules: dict[str, nn.Module], seed: int = 0) -> dict[str, Tensor]:
    """Ranks of 2 to 4 and one alpha: another scale in each layer."""
    state = {}
    for i, (name, module) in enumerate(modules.items()):
        flat = prefix + name.replace(".", "_")
        matrices = pair(module, 1000 * seed + i, rank=2 + i % 3)
        state |= {f"{flat}.{which}.weight": w for which, w in zip(KOHYA, matrices, strict=True)}
        state[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return state


def dotted(prefix: str, modules: dict[str, nn.Module], which: tuple[str, str], seed: int = 0) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.{kind}.weight": w
        for i, (name, module) in enumerate(modules.items())
        for kind, w in zip(which, pair(module, 1000 * seed + i), strict=True)
    }


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: w.contiguous() for key, w in state.items()}, path, metadata)
    return path


def load_theirs(pipeline: type, unet: UNet2DConditionModel, text: nn.Module | None, paths: list[Path]) -> None:
    """diffusers' loader, without a whole pipeline."""
    for i, path in enumerate(paths):
        state, alphas = pipeline.lora_state_dict(path, unet_config=unet.config)[:2]
        pipeline.load_lora_into_unet(state, alphas, unet, adapter_name=f"lora_{i}")
        if text:
            pipeline.load_lora_into_text_encoder(state, alphas, text, adapter_name=f"lora_{i}")


def tuned(model: nn.Module) -> int:
    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())


@torch.no_grad()
def outputs(unet: UNet, theirs: UNet2DConditionModel, draw) -> tuple[Tensor, Tensor]:
    x, t, text = draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 77, unet.config.context_dim)
    if not unet.config.vector_dim:
        return unet(x, t, Prompt(text)), theirs(x, t, text).sample
    pooled, sizes = draw(1, 32), torch.tensor([[64.0, 96, 0, 0, 64, 96]])
    vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(1, -1)], dim=1)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return unet(x, t, Prompt(text, vector=vector)), theirs(x, t, text, added_cond_kwargs=added).sample


@pytest.fixture(scope="module")
def shallow_xl() -> UNet:
    """SDXL's shape, but depths of 1 and 2: peft takes its time for each layer."""
    depths = {"down": ((0, 0), (1, 1), (2, 2)), "middle": (2, 0), "up": ((2, 2, 2), (1, 1, 1), (0, 0, 0))}
    return randomise(UNet(replace(NARROW_XL, **depths)), 13)


LAYOUTS = {  # from diffusers' modules and ours to a file
    "kohya": lambda theirs, _: kohya("lora_unet_", layers(theirs, TRANSFORMER + CONVOLUTIONS)),
    "kohya, original names": lambda _, ours: kohya("lora_unet_", layers(ours, TRANSFORMER + ORIGINAL_CONVOLUTIONS)),
    "peft": lambda theirs, _: dotted("unet.", layers(theirs, TRANSFORMER + CONVOLUTIONS), PEFT),
    "diffusers": lambda theirs, _: dotted("unet.", layers(theirs, ATTENTION), ("lora.down", "lora.up")),
}


@pytest.mark.parametrize(
    "base, layout",
    [
        ("unet", "kohya"),
        ("unet", "peft"),
        ("unet", "diffusers"),
        ("shallow_xl", "kohya, original names"),
        ("shallow_xl", "peft"),
    ],
)
def test_unet_equals_diffusers(request, base, layout, draw, tmp_path):
    unet = copy.deepcopy(request.getfixturevalue(base))
    theirs = diffusers_unet(unet)
    state = LAYOUTS[layout](theirs, unet)
    path = write(tmp_path / "lora.safetensors", state)
    load_theirs(StableDiffusionXLPipeline, theirs, None, [path])
    lora = read_lora(path)
    assert tuned(theirs) == len(lora.parts["unet"]) == sum(key.endswith(DOWN) for key in state)
    plain = outputs(unet, theirs, draw)[0]
    merge(unet, [(lora, 1.0)], "unet")
    ours, wanted = outputs(unet, theirs, draw)
    assert rel(ours, wanted) <= 1e-5
    assert rel(ours, plain) > 0.1


def test_two_loras_with_weights_and_the_text_tower_equal_diffusers(unet, text_tower, draw, tmp_path):
    ours, text = copy.deepcopy(unet), copy.deepcopy(text_tower)
    theirs, their_text = diffusers_unet(unet), transformers_text(text_tower)
    paths = [
        write(
            tmp_path / f"{seed}.safetensors",
            kohya("lora_unet_", layers(theirs, TRANSFORMER), seed) | kohya("lora_te_", layers(their_text, TEXT), seed),
        )
        for seed in (1, 2)
    ]
    load_theirs(StableDiffusionPipeline, theirs, their_text, paths)
    names, weights = ["lora_0", "lora_1"], [0.7, 0.3]
    theirs.set_adapters(names, weights)
    set_weights_and_activate_adapters(their_text, names, weights)
    loras = [(read_lora(path), weight) for path, weight in zip(paths, weights, strict=True)]
    for lora, _ in loras:
        check(lora, {"unet": unet, "text": text_tower})
    merge(ours, loras, "unet")
    merge(text, loras, "text")
    found, wanted = outputs(ours, theirs, draw)
    assert rel(found, wanted) <= 1e-5
    tokens = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 49407
    with torch.no_grad():
        assert rel(text(tokens), their_text(tokens).last_hidden_state) <= 1e-5
        assert rel(text(tokens), text_tower(tokens)) > 0.1


@torch.no_grad()
def test_a_long_prompt_through_a_tuned_tower_makes_the_picture_of_diffusers(sd1, text_tower, tmp_path):
    """Each chunk goes through the changed tower by itself; diffusers is given their features side by side."""
    pipeline, their_text, latents = copy.copy(sd1.pipeline), transformers_text(text_tower), []
    pipeline.unet = copy.deepcopy(sd1.pipeline.unet)
    state = kohya("lora_unet_", layers(pipeline.unet, ATTENTION)) | kohya("lora_te_", layers(their_text, TEXT))
    path = write(tmp_path / "lora.safetensors", state)
    load_theirs(StableDiffusionPipeline, pipeline.unet, their_text, [path])
    chunks = "a red fox, " * 18, "a red fox in the snow"  # 72 tokens, of which the last is a comma; 75 fill a chunk

    def features(text: str) -> Tensor:
        return their_text(
            pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        ).last_hidden_state

    how = {"height": 64, "width": 64, "generator": torch.Generator().manual_seed(7), "output_type": "latent"}
    long, null = torch.cat([*map(features, chunks)], dim=1), torch.cat([features("blurred")] * 2, dim=1)
    wanted = pipeline(prompt_embeds=long, negative_prompt_embeds=null, num_inference_steps=2, **how).images
    base = open_base(sd1.base.path, loras=[(read_lora(path), 1.0)])
    models = replace(opened(sd1), base=base, held={"vae": sd1.parts[2]})
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        (picture,) = pictures(models, *prompts(models, "".join(chunks), "blurred", long_prompt=True), 7, steps=2)
    assert_same_picture((latents[0], np.asarray(picture)), (wanted, np.asarray(next(decode(models, wanted)))))


TEXT_LAYOUTS = {
    "kohya": lambda tower: kohya("lora_te_", layers(tower, TEXT)),
    "kohya, SDXL": lambda tower: kohya("lora_te1_", layers(tower, TEXT)),
    "diffusers": lambda tower: dotted(
        "text_encoder.", layers(tower, ("_proj",)), ("lora_linear_layer.down", "lora_linear_layer.up")
    ),
    "peft": lambda tower: dotted("text_encoder.", layers(tower, TEXT), PEFT),
    "the names of 2023": lambda tower: {
        key.replace("q_proj.", "to_q_").replace("out_proj.", "to_out_"): w
        for key, w in dotted("text_encoder.", layers(tower, ("q_proj", "out_proj")), ("lora.down", "lora.up")).items()
    },
}


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_text_tower_equals_diffusers(text_tower, layout, tmp_path):
    text, theirs = copy.deepcopy(text_tower), transformers_text(text_tower)
    path = write(tmp_path / "lora.safetensors", TEXT_LAYOUTS[layout](theirs))
    state, alphas = StableDiffusionPipeline.lora_state_dict(path)[:2]
    StableDiffusionPipeline.load_lora_into_text_encoder(state, alphas, theirs, adapter_name="lora")
    lora = read_lora(path)
    assert lora.parts.keys() == {"text"} and len(lora.parts["text"]) == tuned(theirs) > 0
    merge(text, [(lora, 1.0)], "text")
    tokens = torch.arange(77)[None] + 300
    with torch.no_grad():
        assert rel(text(tokens), theirs(tokens).last_hidden_state) <= 1e-5
        assert rel(text(tokens), text_tower(tokens)) > 0.1


def test_the_second_text_tower_is_a_part_of_its_own(text_tower, tmp_path):
    theirs = transformers_text(text_tower)
    first, second = kohya("lora_te1_", layers(theirs, TEXT), 1), kohya("lora_te2_", layers(theirs, TEXT), 2)
    both = read_lora(write(tmp_path / "both.safetensors", first | second))
    alone = read_lora(write(tmp_path / "second.safetensors", second))
    assert {part: len(named) for part, named in both.parts.items()} == {"text": 18, "text_2": 18}
    towers = [copy.deepcopy(text_tower) for _ in range(2)]
    merge(towers[0], [(both, 1.0)], "text_2")
    merge(towers[1], [(alone, 1.0)], "text_2")
    assert same(*towers) and not same(towers[0], text_tower)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(w, b.get_parameter(name)) for name, w in a.named_parameters())


@pytest.fixture(scope="module")
def kohya_file(their_unet, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    return write(path, kohya("lora_unet_", layers(their_unet, TRANSFORMER + CONVOLUTIONS)))


@pytest.mark.parametrize("metadata", [True, False])
def test_alpha_of_what_diffusers_saves(unet, draw, tmp_path, metadata):
    """Trained with peft inside diffusers: alpha stands in the file's metadata; without it diffusers takes the rank."""
    theirs = diffusers_unet(unet)
    theirs.add_adapter(
        LoraConfig(
            r=4, lora_alpha=6, alpha_pattern={"to_k": 3}, rank_pattern={"to_v": 2}, target_modules=["to_k", "to_v"]
        )
    )
    randomise_lora(theirs)
    config = theirs.peft_config["default"].to_dict() if metadata else None
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs)),
        unet_lora_adapter_metadata=config,
    )
    if not metadata:
        for module in theirs.modules():
            if isinstance(module, BaseTunerLayer):
                module.scaling["default"] = 1.0
    lora, ours = read_lora(tmp_path / "pytorch_lora_weights.safetensors"), copy.deepcopy(unet)
    assert len(lora.parts["unet"]) == tuned(theirs) == 64
    merge(ours, [(lora, 1.0)], "unet")
    found, wanted = outputs(ours, theirs, draw)
    assert rel(found, wanted) <= 1e-5


@pytest.mark.parametrize("rank_stabilised", [True, False])
def test_a_folder_of_peft(text_tower, tmp_path, rank_stabilised):
    """There alpha stands in adapter_config.json beside the file."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"], use_rslora=rank_stabilised)
    theirs = get_peft_model(transformers_text(text_tower), config)
    randomise_lora(theirs)
    theirs.save_pretrained(tmp_path)
    text = copy.deepcopy(text_tower)
    merge(text, [(read_lora(tmp_path / "adapter_model.safetensors"), 1.0)], "text")
    tokens = torch.arange(77)[None] + 300
    with torch.no_grad():
        assert rel(text(tokens), theirs(tokens).last_hidden_state) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": "6"},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"(a+)+$": 1}},
    ],
    ids=str,
)
def test_settings_that_peft_would_not_write_are_refused(text_tower, tmp_path, settings):
    """The last would look at the names for longer than anybody waits."""
    theirs = get_peft_model(transformers_text(text_tower), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(WeightsError, match="its LoRA settings say that"):
        read_lora(tmp_path / "adapter_model.safetensors")


def randomise_lora(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.3 / p.shape[1] ** 0.5


def test_the_oldest_names_of_diffusers(unet, their_unet, tmp_path):
    """`unet.save_attn_procs` of early 2023: processors, no prefix, no number behind to_out."""
    state = dotted("unet.", layers(their_unet, ATTENTION), PEFT)
    wanted = copy.deepcopy(unet)
    merge(wanted, [(read_lora(write(tmp_path / "new.safetensors", state)), 1.0)], "unet")
    for new, old in {
        "unet.": "",
        "to_out.0": "to_out",
        ".to_": ".processor.to_",
        ".lora_A": "_lora.down",
        ".lora_B": "_lora.up",
    }.items():
        state = {key.replace(new, old): w for key, w in state.items()}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight" in state
    old = copy.deepcopy(unet)
    torch.save(state, tmp_path / "pytorch_lora_weights.bin")
    merge(old, [(read_lora(tmp_path / "pytorch_lora_weights.bin"), 1.0)], "unet")
    assert same(old, wanted) and not same(old, unet)


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.", "model.diffusion_model.", "base_model.model.", "unet.base_model.model."]
)
def test_other_prefixes(unet, prefix, tmp_path):
    model, wanted = copy.deepcopy(unet), copy.deepcopy(unet)
    state = dotted(prefix, layers(unet, ("to_k",)), PEFT)
    merge(model, [(read_lora(write(tmp_path / "dotted.safetensors", state)), 1.0)], "unet")
    flat = {"lora_unet_" + key.removeprefix(prefix): w for key, w in state.items()}
    merge(wanted, [(read_lora(write(tmp_path / "flat.safetensors", flat)), 1.0)], "unet")
    assert same(model, wanted) and not same(model, unet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_taken_out_leaves_no_trace(unet, kohya_file, dtype):
    model = copy.deepcopy(unet).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    lora = read_lora(kohya_file)
    take_out = merge(model, [(lora, 0.7), (lora, -1.3)], "unet")
    after = dict(model.named_parameters())
    assert sum(not torch.equal(after[name], w) for name, w in before.items()) == len(lora.parts["unet"])
    assert all(p.dtype == dtype for p in after.values())
    take_out()
    assert all(torch.equal(p, before[name]) and p.data_ptr() == places[name] for name, p in model.named_parameters())


def test_half_precision_is_rounded_once(unet, kohya_file):
    lora = read_lora(kohya_file)
    half = copy.deepcopy(unet).half()
    wide = copy.deepcopy(half).float()
    merge(half, [(lora, 0.7), (lora, 0.01)], "unet")
    merge(wide, [(lora, 0.7), (lora, 0.01)], "unet")
    assert same(half, wide.half())


@pytest.fixture(scope="module")
def small() -> UNet:
    """Five transformers: there are many orders."""
    depths = {"down": ((1,), (1,)), "middle": (1, 0), "up": ((1, 0), (0, 1))}
    return randomise(UNet(replace(NARROW_UNET, channels=(32, 64), **depths)), 14)


@pytest.fixture(scope="module")
def three(small, tmp_path_factory) -> list[Callable[..., Callable[[], None]]]:
    """A FaceID adapter and two LoRAs, all of which change the same matrices: each as what merges it into a UNet."""
    shapes = [(layer.to_k.out_features, layer.to_k.in_features) for layer in small.cross_attentions()]
    face, folder = (
        randomise(IPAdapter(FaceProjection(512, 64, 4), shapes, lora_rank=4), 30),
        tmp_path_factory.mktemp("3"),
    )
    state = [kohya("lora_unet_", layers(small, names), i) for i, names in enumerate((ATTENTION, TRANSFORMER))]
    loras = [read_lora(write(folder / f"{i}.safetensors", one)) for i, one in enumerate(state)]
    return [
        face.merge,
        lambda model, keep=True: merge(model, [(loras[0], 0.7)], "unet", keep),
        lambda model, keep=True: merge(model, [(loras[1], -0.4)], "unet", keep),
    ]


ORDERS = list(permutations(range(3)))


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=str)
def sums(request, small, three) -> dict[tuple[int, ...], UNet]:
    """For each selection of the three, in each order: a fresh UNet with these alone, whose sums have been checked."""
    base, made = copy.deepcopy(small).to(request.param), {}
    wide = {(): copy.deepcopy(base).double()}
    for order in [(), *(part for n in (1, 2, 3) for part in permutations(range(3), n))]:
        model = made[order] = copy.deepcopy(base)
        for i in order:
            three[i](model)
        if (key := tuple(sorted(order))) not in wide:
            wide[key] = copy.deepcopy(wide[()])
            for i in key:
                three[i](wide[key])
        precision = 1e-6 if request.param == torch.float32 else 1e-3
        assert all(rel(w.double(), wide[key].get_parameter(name)) < precision for name, w in model.named_parameters())
    return made


@pytest.mark.parametrize("coming", ORDERS, ids=str)
def test_any_order_of_coming_and_going(three, sums, coming):
    """While several are in, the UNet is what a fresh one with these alone would be; without any, it is the base."""
    model = copy.deepcopy(sums[()])
    for going in ORDERS:
        inside, take_out = (), {}
        for i in coming:
            take_out[i], inside = three[i](model), (*inside, i)
            assert same(model, sums[inside])
        for i in going:
            take_out[i]()
            inside = tuple(j for j in inside if j != i)
            assert same(model, sums[inside])
        take_out[coming[0]]()  # a second time changes nothing
        assert same(model, sums[()]) and not any(vars(p) for p in model.parameters())


def test_coming_and_going_between_others(small, three):
    """One goes before the next comes: nothing of it stays behind."""
    model, wanted = copy.deepcopy(small), copy.deepcopy(small)
    face = three[0](model)
    first = three[1](model)
    face()
    three[2](model)
    first()
    face = three[0](model)
    three[2](wanted)
    three[0](wanted)
    assert same(model, wanted) and not same(model, small)


def test_merged_for_good(small, three):
    """No tensor of before is kept, and what comes later comes out as ever."""
    model, wanted = copy.deepcopy(small), copy.deepcopy(small)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="merged for good"):
        three[1](model, keep=False)()
    assert not any(vars(p) for p in model.parameters())
    three[1](wanted)
    assert same(model, wanted)
    take_out = three[0](model)
    three[2](model, keep=False)  # while another is in that will go
    take_out()
    three[2](wanted)
    assert all(rel(p, wanted.get_parameter(name)) < 1e-6 for name, p in model.named_parameters())
    assert all(p.data_ptr() == places[name] for name, p in model.named_parameters())


def test_a_copy_of_a_changed_model_is_a_model_of_its_own(small, three):
    model = copy.deepcopy(small)
    take_out = three[0](model)
    twin = copy.deepcopy(model)
    changed = three[1](twin)
    take_out()
    assert same(model, small) and not same(twin, small)
    changed()
    wanted = copy.deepcopy(small)
    three[0](wanted)
    assert same(twin, wanted)


def test_a_convolution_in_three_steps(draw):
    """LoCon's `lora_mid`: 1x1, 3x3, 1x1, one behind the other."""
    down, mid, up, x = draw(4, 6, 1, 1), draw(4, 4, 3, 3), draw(8, 4, 1, 1), draw(2, 6, 5, 7)
    steps = conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    assert rel(conv2d(x, LowRank(down, up, mid, 0.5).delta(torch.zeros(8, 6, 3, 3)), padding=1), 0.5 * steps) <= 1e-5


def test_a_file_with_a_middle_convolution(unet, tmp_path, draw):
    prefix, weight = "lora_unet_down_blocks_0_resnets_0_conv1.", unet.input_blocks[1][0].in_layers[2].weight
    matrices = {"down": draw(3, 32, 1, 1), "mid": draw(3, 3, 3, 3), "up": draw(32, 3, 1, 1)}
    state = {f"{prefix}lora_{kind}.weight": w for kind, w in matrices.items()} | {f"{prefix}alpha": torch.tensor(6.0)}
    model = copy.deepcopy(unet)
    merge(model, [(read_lora(write(tmp_path / "mid.safetensors", state)), 1.0)], "unet")
    wanted = weight + LowRank(**matrices, scale=2.0).delta(weight)
    assert torch.equal(model.input_blocks[1][0].in_layers[2].weight, wanted)


def test_each_layer_has_its_own_alpha(unet, tmp_path, draw):
    state, names = {}, ("attn1_to_q", "attn2_to_k")
    for name, alpha in zip(names, (1.0, 8.0), strict=True):
        prefix = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{name}"
        width = 64 if "attn2" in name else 32
        state |= {f"{prefix}.lora_down.weight": draw(4, width), f"{prefix}.lora_up.weight": draw(32, 4)}
        state[f"{prefix}.alpha"] = torch.tensor(alpha)
    scales = [c["weight"].scale for c in read_lora(write(tmp_path / "a.safetensors", state)).parts["unet"].values()]
    assert scales == [0.25, 2.0]


@pytest.mark.parametrize("key, kind", [("lora_unet_conv_in.oft_blocks", "OFT"), ("x.glora_a.weight", "GLoRA")])
def test_other_kinds_are_refused_by_name(tmp_path, key, kind):
    path = write(tmp_path / "other.safetensors", {key: torch.ones(2)})
    with pytest.raises(WeightsError, match=rf"other.safetensors: {kind} is not supported \(.*\); LoRA, LoCon, LoHa,"):
        read_lora(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"dora_scale": (4, 1)},  # of no change
        {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2)},
        {"hada_w1_a": (4, 2), "hada_w1_b": (3, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)},
        {"lokr_w1": (2, 2)},
        {"lora_up.weight": (4, 2), "lora_down.weight": (2, 4), "diff": (4, 4)},
        {"lora_up.weight": (4, 2), "lora_down.weight": (2, 4), "hada_w1_a": (4, 2)},
    ],
)
def test_tensors_that_make_no_form_are_refused(tmp_path, draw, tensors):
    state = {f"lora_unet_conv_in.{key}": draw(*shape) for key, shape in tensors.items()}
    with pytest.raises(WeightsError, match=r"1 keys that belong to no pair of LoRA matrices: conv_in"):
        read_lora(write(tmp_path / "hole.safetensors", state))


def test_what_is_no_lora_is_refused_by_name(tmp_path, unet):
    path = write(tmp_path / "unet.safetensors", unet.state_dict())
    with pytest.raises(WeightsError, match="unet.safetensors: a LoRA is wanted here; this is a UNet"):
        read_lora(path)


def test_a_face_adapter_is_refused_by_name(tmp_path):
    state = {"ip_adapter.0.to_q_lora.down.weight": torch.ones(4, 8), "image_proj.norm.weight": torch.ones(8)}
    with pytest.raises(WeightsError, match="face.safetensors: a LoRA is wanted here; this is .*IP-Adapter"):
        read_lora(write(tmp_path / "face.safetensors", state))


@pytest.mark.parametrize("extra", ["lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.strange"])
def test_keys_left_over_are_listed(tmp_path, their_unet, extra):
    state = kohya("lora_unet_", layers(their_unet, ("to_q",))) | {extra: torch.ones(2, 2)}
    with pytest.raises(WeightsError, match="1 keys that belong to no pair of LoRA matrices: .*conv_in"):
        read_lora(write(tmp_path / "extra.safetensors", state))


def test_a_lora_for_another_base_says_for_which(unet, unet_xl, kohya_file, tmp_path):
    """A real one for SDXL, in kohya's names, against an SD 1.x base; nothing is changed."""
    state = {}
    for i in range(2):
        flat = f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn2_to_k"
        state |= {f"{flat}.lora_down.weight": torch.ones(4, 2048), f"{flat}.lora_up.weight": torch.ones(640, 4)}
    flat = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"  # this one fits
    state |= {f"{flat}.lora_down.weight": torch.ones(4, 32), f"{flat}.lora_up.weight": torch.ones(32, 4)}
    lora, model = read_lora(write(tmp_path / "xl.safetensors", state)), copy.deepcopy(unet)
    wanted = (
        r"xl.safetensors: 2 of its 3 layers for the UNet fit none of this base: "
        r"input_blocks_4_1_transformer_blocks_0_attn2_to_k \(640, 2048\) for \(64, 64\), "
        r"input_blocks_4_1_transformer_blocks_1_attn2_to_k \(640, 2048\); "
        r"the LoRA seems made for SDXL \(its UNet reads tokens of 2048\)"
    )
    with pytest.raises(WeightsError, match=wanted):
        merge(model, [(lora, 1.0)], "unet")
    assert same(model, unet)
    with pytest.raises(WeightsError, match="made for another base .its UNet reads tokens of 64"):
        merge(copy.deepcopy(unet_xl), [(read_lora(kohya_file), 1.0)], "unet")


def test_a_part_that_the_base_has_not_is_an_error(unet, text_tower, tmp_path):
    theirs = transformers_text(text_tower)
    lora = read_lora(write(tmp_path / "two.safetensors", kohya("lora_te2_", layers(theirs, TEXT))))
    with pytest.raises(WeightsError, match="two.safetensors: 18 of its layers are for a second text tower, .* SDXL"):
        check(lora, {"unet": unet, "text": text_tower})


def test_a_lora_for_a_transformer_is_told(unet, tmp_path):
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    state = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(8, 4)}
    with pytest.raises(WeightsError, match="made for a transformer"):
        check(read_lora(write(tmp_path / "flux.safetensors", state)), {"unet": unet})


def test_a_base_on_meta_can_be_checked(unet, kohya_file):
    with torch.device("meta"):
        check(read_lora(kohya_file), {"unet": UNet(unet.config), "text": CLIPText(NARROW_TEXT)})


def test_as_many_numbers_in_another_shape_do_not_fit(unet, tmp_path):
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_ff_net_2"  # (32, 128) in this base
    state = {f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.ones(128, 4)}
    with pytest.raises(WeightsError, match=r"ff_net_2 \(128, 32\) for \(32, 128\)"):
        check(read_lora(write(tmp_path / "turned.safetensors", state)), {"unet": unet})


# Other forms than LoRA


class Two(nn.Module):
    """A linear layer and a convolution under names that kohya's files have, too."""

    def __init__(self):
        super().__init__()
        self.lin, self.conv = nn.Linear(12, 8), nn.Conv2d(4, 8, 3)


FORMS = {
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=3, init_weights=False),
    "LoHa, a core": lambda: peft.LoHaConfig(r=2, alpha=3, init_weights=False, use_effective_conv2d=True),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=2, init_weights=False),
    "LoKr, both of low rank": lambda: peft.LoKrConfig(r=1, alpha=3, init_weights=False, decompose_both=True),
    "LoKr, a core": lambda: peft.LoKrConfig(r=1, alpha=3, init_weights=False, use_effective_conv2d=True),
    "DoRA": lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, use_dora=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_equal_peft(form):
    model, config = randomise(Two(), 1), FORMS[form]()
    config.target_modules = {"lin", "conv"}
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    randomise_adapter(theirs)
    layers = {"lin": {}, "conv": {}}
    for key, w in peft.get_peft_model_state_dict(theirs).items():
        name, tensor = re.fullmatch(r"base_model\.model\.(lin|conv)\.(\w+)(?:\.weight)?", key).groups()
        layers[name][{"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "rows"}.get(tensor, tensor)] = w
    alpha = getattr(config, "alpha", None) or config.lora_alpha
    if form == "LoKr":  # of two whole matrices alpha says nothing in shared files; peft multiplies all the same
        assert alpha == config.r
    changes = {
        name: change_of(layer | {"alpha": torch.tensor(float(alpha))})["weight"] for name, layer in layers.items()
    }
    wanted = theirs.merge_and_unload()
    before = copy.deepcopy(model.state_dict())
    undo = low_rank.merge(model, {f"{name}.weight": [(1.0, change)] for name, change in changes.items()})
    for name in layers:
        assert rel(model.get_parameter(f"{name}.weight"), wanted.get_parameter(f"{name}.weight")) <= 1e-5
        assert rel(model.get_parameter(f"{name}.weight"), before[f"{name}.weight"]) > 0.01
    undo()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def randomise_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if re.search("lora|hada|lokr", name):
            p.data = 0.5 * torch.randn(p.shape, generator=generator) + ("magnitude" in name)


def test_lengths_of_columns_are_the_formula(draw):
    """LyCORIS' other kind of DoRA: one length for each column of the changed weight."""
    w, up, down, lengths = draw(6, 5), draw(6, 2), draw(2, 5), draw(1, 5).abs()
    layer = {"up": up, "down": down, "alpha": torch.tensor(1.0), "dora_scale": lengths}
    changed = w + 0.5 * up @ down
    wanted = lengths * changed / changed.square().sum(0, keepdim=True).sqrt()
    assert rel(w + change_of(layer)["weight"].delta(w), wanted) <= 1e-6


def test_norms_whole_differences_and_biases_are_added_to_the_unet(tmp_path, unet, draw):
    name = "lora_unet_down_blocks_0_attentions_0"
    state = {
        f"{name}_norm.w_norm": draw(32),
        f"{name}_norm.b_norm": draw(32),
        f"{name}_transformer_blocks_0_attn1_to_q.diff": draw(32, 32),
        "lora_unet_conv_in.diff": draw(32, 4, 3, 3),
        "lora_unet_conv_in.diff_b": draw(32),
    }
    save_file(state, tmp_path / "x.safetensors")
    ours, before = copy.deepcopy(unet), unet.state_dict()
    undo = merge(ours, [(read_lora(tmp_path / "x.safetensors"), 0.5)], "unet")
    block = "input_blocks.1.1"
    places = {f"{block}.norm.weight": 0, f"{block}.norm.bias": 1, f"{block}.transformer_blocks.0.attn1.to_q.weight": 2}
    places |= {"input_blocks.0.0.weight": 3, "input_blocks.0.0.bias": 4}
    differences = list(state.values())
    for key, value in ours.state_dict().items():
        wanted = before[key] + (0.5 * differences[places[key]] if key in places else 0)
        assert torch.allclose(value, wanted, atol=1e-6), key
    undo()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_lycoris_names_are_those_of_kohya(tmp_path, unet, draw):
    inner = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8), "alpha": torch.tensor(1e9)}
    made = []
    for i, prefix in enumerate(("lycoris_", "lora_unet_")):
        path = tmp_path / f"{i}.safetensors"
        save_file({f"{prefix}{inner}.{key}": w for key, w in tensors.items()}, path)
        ours = copy.deepcopy(unet)
        merge(ours, [(read_lora(path), 1.0)], "unet", keep=False)
        made.append(ours.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight)
    wanted = unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight
    wanted = wanted + torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    assert torch.equal(*made) and rel(made[0], wanted) <= 1e-6


def test_open_clips_names_of_a_text_tower(tmp_path, text_tower, draw):
    """q, k and v lie in one matrix there."""
    up, down, fc = draw(192, 2), draw(2, 64), (draw(256, 2), draw(2, 64))
    state = {
        "lora_te_transformer_resblocks_1_attn_in_proj.lora_up.weight": up,
        "lora_te_transformer_resblocks_1_attn_in_proj.lora_down.weight": down,
        "lora_te_transformer_resblocks_1_mlp_c_fc.lora_up.weight": fc[0],
        "lora_te_transformer_resblocks_1_mlp_c_fc.lora_down.weight": fc[1],
    }
    save_file(state, tmp_path / "x.safetensors")
    ours = copy.deepcopy(text_tower)
    merge(ours, [(read_lora(tmp_path / "x.safetensors"), 1.0)], "text")
    layers = [tower.text_model["encoder"]["layers"][1] for tower in (ours, text_tower)]
    for letter, part in zip("qkv", (up @ down).chunk(3), strict=True):
        found, before = (getattr(layer.self_attn, f"{letter}_proj").weight for layer in layers)
        assert rel(found, before + part) <= 1e-6
    assert rel(layers[0].mlp.fc1.weight, layers[1].mlp.fc1.weight + fc[0] @ fc[1]) <= 1e-6


def test_a_bundled_embedding_is_left_aside_and_told(tmp_path, draw):
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{key}.lora_up.weight": draw(32, 2), f"{key}.lora_down.weight": draw(2, 32)}
    save_file(state | {"bundle_emb.sks.string_to_param.*": draw(2, 64)}, tmp_path / "x.safetensors")
    with pytest.warns(Notice, match=r"textual inversions \(sks\) are left aside"):
        lora = read_lora(tmp_path / "x.safetensors")
    assert list(lora.parts) == ["unet"]
