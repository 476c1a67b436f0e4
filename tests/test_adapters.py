"""Every released kind of adapter, on every family of base, equals diffusers with the same file."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from counterparts import (
    Order,
    Twin,
    assert_same_picture,
    diffusers_unet,
    diffusers_unet_with,
    listed_once,
    opened,
    our_picture,
    published,
    randomise,
    rel,
    set_scales,
    their_picture,
)
from diffusers import UNet2DConditionModel
from narrow import NARROW_IMAGE, NARROW_UNET
from PIL import Image
from safetensors.torch import save_file
from test_diffusers_layout import SD15 as THEIR_SD15
from test_diffusers_layout import SDXL as THEIR_SDXL
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip import CLIPImage, CLIPImageConfig
from files.features import Features
from generate import ImageGroup, prompts
from generate.models import Adapter
from ipadapter import (
    FacePlusProjection,
    FaceProjection,
    ImageProjection,
    IPAdapter,
    PatchProjection,
    Prompt,
    Resampler,
)
from sampler import SD
from unet import SD15, SDXL, UNet, UNetConfig
from weights import Base, WeightsError, check_fit, load_adapter, load_image_encoder
from weights.adapter import build_adapter
from weights.families import FAMILIES
from weights.fill import on_meta
from weights.presets import PRESETS

pytestmark = pytest.mark.slow

# At full size, without memory

FULL = {"SD 1.5": (SD15, THEIR_SD15), "SDXL": (SDXL, THEIR_SDXL)}
# Light and plus-face have the tensors of the base and the plus adapter, FaceID-plus version 1 those of version 2.
RELEASED = {  # file: family, image projection, rank of the LoRA, the number of parameters
    "ip-adapter_sd15": ("SD 1.5", lambda: ImageProjection(1024, 768, 4), 0, 22_319_616),
    "ip-adapter_sd15_vit-G": ("SD 1.5", lambda: ImageProjection(1280, 768, 4), 0, 23_106_048),
    "ip-adapter-plus_sd15": ("SD 1.5", lambda: Resampler(1280, 768, 4, 12, 16, 768), 0, 49_087_488),
    "ip-adapter-full-face_sd15": ("SD 1.5", lambda: PatchProjection(1280, 768), 0, 21_794_304),
    "ip-adapter_sdxl": ("SDXL", lambda: ImageProjection(1280, 2048, 4), 0, 351_285_248),
    "ip-adapter_sdxl_vit-h": ("SDXL", lambda: ImageProjection(1024, 2048, 4), 0, 349_188_096),
    "ip-adapter-plus_sdxl_vit-h": ("SDXL", lambda: Resampler(1280, 1280, 4, 20, 16, 2048), 0, 423_748_864),
    "faceid_sd15": ("SD 1.5", lambda: FaceProjection(512, 768, 4), 128, 48_354_816),
    "faceid-plusv2_sd15": ("SD 1.5", lambda: FacePlusProjection(512, 1280, 4, 12, 4, 768), 128, 78_260_736),
    "faceid-portrait_sd15": ("SD 1.5", lambda: FaceProjection(512, 768, 16), 0, 32_291_328),
    "faceid_sdxl": ("SDXL", lambda: FaceProjection(512, 2048, 4), 128, 535_507_968),
    "faceid-plusv2_sdxl": ("SDXL", lambda: FacePlusProjection(512, 1280, 4, 32, 4, 2048), 128, 743_707_648),
    "faceid-portrait_sdxl": ("SDXL", lambda: FaceProjection(512, 2048, 16), 0, 374_903_808),
}


def test_what_an_adapter_reads_is_told_by_its_name():
    """Before it is fetched: as its file's tensors will."""
    alike = {"_light_v11": "", "_light": "", "plus-face": "plus", "faceid-plus_": "faceid-plusv2_", "-v11": ""}
    found = {}
    for preset in PRESETS.values():
        if preset.kind == "adapter" and preset.repo in ("h94/IP-Adapter", "h94/IP-Adapter-FaceID"):
            stem = Path(preset.file).stem
            for this, that in alike.items():
                stem = stem.replace(this, that)
            projection = on_meta(RELEASED[stem.replace("ip-adapter-faceid", "faceid")][1])
            told = [(one.patches, one.faces, one.feature_dim) for one in (preset, projection)]
            assert told[0] == told[1], preset.name
            found[preset.name] = told[0]
    assert len(found) == 19 and len(set(found.values())) == 5


@cache
def layers(config: UNetConfig) -> list[tuple[int, int]]:
    """(dim, context_dim) of each cross-attention."""
    unet = on_meta(lambda: UNet(config))
    return [(layer.to_k.out_features, layer.to_k.in_features) for layer in unet.cross_attentions()]


@pytest.fixture(scope="module")
def full() -> dict[str, tuple[list[tuple[int, int]], UNet2DConditionModel]]:
    """Our cross-attentions and diffusers' UNet of each family."""
    return {
        name: (layers(ours), on_meta(lambda theirs=theirs: UNet2DConditionModel(**theirs)))
        for name, (ours, theirs) in FULL.items()
    }


@pytest.mark.parametrize("file", RELEASED)
def test_the_released_file_is_what_diffusers_reads(full, file):
    """Names and shapes: each of our tensors is one that diffusers' own loaders put somewhere, and nothing is left."""
    family, projection, rank, parameters = RELEASED[file]
    shapes, theirs = full[family]
    state = published(on_meta(lambda: IPAdapter(projection(), shapes, rank)))
    assert sum(w.numel() for part in state.values() for w in part.values()) == parameters

    with listed_once(theirs):
        image_proj, attention = on_meta(
            lambda: (
                theirs._convert_ip_adapter_image_proj_to_diffusers(state["image_proj"], low_cpu_mem_usage=False),
                theirs._convert_ip_adapter_attn_to_diffusers([state], low_cpu_mem_usage=False),
            )
        )
        lora = theirs._load_ip_adapter_loras([state]).get(0, {})
    processors = [processor for processor in attention.values() if isinstance(processor, nn.Module)]
    assert len(processors) == len(shapes)
    for key, w in lora.items():  # unet.<attention>.processor.to_k_lora.down.weight
        name, matrix = key.removeprefix("unet.").replace("to_out_lora", "to_out.0_lora").split(".processor.")
        linear = theirs.get_submodule(f"{name}.{matrix.split('_lora')[0]}")
        assert tuple(w.shape) == ((rank, linear.in_features) if ".down." in matrix else (linear.out_features, rank))
    found = [*image_proj.parameters(), *(p for processor in processors for p in processor.parameters()), *lora.values()]
    assert sum(w.numel() for w in found) == parameters
    assert 2 * len(processors) + len(lora) == len(state["ip_adapter"])


@pytest.mark.parametrize("file", RELEASED)
def test_the_kind_is_read_off_the_tensors_alone(full, file):
    family, projection, rank, _ = RELEASED[file]
    made = on_meta(lambda: IPAdapter(projection(), full[family][0], rank))
    state = made.state_dict()
    found = on_meta(lambda: build_adapter(state))
    assert type(found.image_proj) is type(made.image_proj) and found.lora_rank == rank
    assert {k: w.shape for k, w in found.state_dict().items()} == {k: w.shape for k, w in state.items()}
    assert str(found) == str(made)  # every module inside with its sizes
    heads = [[m.heads for m in adapter.modules() if hasattr(m, "heads")] for adapter in (found, made)]
    assert heads[0] == heads[1]
    for fact in ("feature_dim", "context_dim", "patches", "faces"):
        assert getattr(found.image_proj, fact) == getattr(made.image_proj, fact)


# At small width, number by number


@dataclass(frozen=True)
class Kind:
    """An adapter, and what it is shown."""

    make: Callable[[int], nn.Module]  # the image projection, for tokens of a width
    rank: int = 0  # of its LoRA
    pictures: int = 1
    faces: int = 0
    structure_scale: float | None = None
    wide: bool = False  # reads embeddings of another image encoder


def face(context_dim: int) -> FaceProjection:
    return FaceProjection(512, context_dim, 4)


def face_plus(context_dim: int) -> FacePlusProjection:
    return FacePlusProjection(512, 128, 4, 2, 4, context_dim)


KINDS = {
    "base": Kind(lambda c: ImageProjection(96, c, 4)),
    "vit-G": Kind(lambda c: ImageProjection(160, c, 4), wide=True),
    "plus": Kind(lambda c: Resampler(128, 128, 4, 2, 6, c), pictures=2),
    "full-face": Kind(lambda c: PatchProjection(128, c)),
    "faceid": Kind(face, rank=8, pictures=0, faces=1),
    "faceid, two faces": Kind(face, rank=8, pictures=0, faces=2),
    "faceid-plus": Kind(face_plus, rank=8, faces=1),
    "faceid-plusv2": Kind(face_plus, rank=8, faces=1, structure_scale=0.7),
    "faceid-plusv2, two faces": Kind(face_plus, rank=8, pictures=2, faces=2, structure_scale=0.7),
    "portrait": Kind(lambda c: FaceProjection(512, c, 16), pictures=0, faces=5),
}
BASES = {"SD 1.x": "sd1", "SD 2.x": "sd2", "SDXL": "sdxl"}


def adapter_for(unet: UNet, kind: Kind, seed: int = 20) -> IPAdapter:
    shapes = [(layer.to_k.out_features, layer.to_k.in_features) for layer in unet.cross_attentions()]
    return randomise(IPAdapter(kind.make(unet.config.context_dim), shapes, kind.rank), seed)


def shown(kind: Kind, draw, rows: int = 2) -> tuple[Tensor | None, Tensor | None]:
    """For each row of a batch: faces (rows, faces, 512), and what is read of pictures (rows, pictures, ...)."""
    projection = kind.make(64)
    sizes = (17, projection.feature_dim) if projection.patches else (projection.feature_dim,)
    faces = normalize(draw(rows, kind.faces, 512), dim=-1) if kind.faces else None
    return faces, 3 * draw(rows, kind.pictures, *sizes) if kind.pictures else None


def project(adapter: IPAdapter, faces: Tensor | None, features: Tensor | None, structure_scale=None) -> Tensor:
    """Each row's faces and features as one image prompt."""
    rows = len(features if faces is None else faces)
    given = ([None] * rows if x is None else x for x in (faces, features))
    return torch.cat([adapter.project(*row, structure_scale).flatten(0, 1)[None] for row in zip(*given)])


def added(unet: UNet, theirs: UNet2DConditionModel, draw) -> tuple[dict[str, Tensor], Tensor | None]:
    """What SDXL is told besides."""
    if not unet.config.vector_dim:
        return {}, None
    told = {"text_embeds": draw(2, 32), "time_ids": torch.tensor([[1024.0, 768, 0, 64, 1024, 1024]] * 2)}
    sizes = theirs.add_time_proj(told["time_ids"].flatten()).view(2, -1)
    return told, torch.cat([told["text_embeds"], sizes], dim=1)


@pytest.fixture(scope="module")
def attached(request, tmp_path_factory) -> Callable[[str, Kind], tuple[UNet, IPAdapter, UNet2DConditionModel]]:
    """Our UNet with an adapter out of a file, the adapter, and diffusers' UNet with the same; each made once."""
    made, folder = {}, tmp_path_factory.mktemp("adapters")

    def make(base: str, kind: Kind) -> tuple[UNet, IPAdapter, UNet2DConditionModel]:
        if (base, kind.make) not in made:
            unet = copy.deepcopy(request.getfixturevalue(base))
            written = adapter_for(unet, kind)
            save_file(written.state_dict(), folder / f"{len(made)}.safetensors")
            adapter = load_adapter(folder / f"{len(made)}.safetensors")
            theirs = diffusers_unet_with(unet, written)
            adapter.merge(unet)
            made[base, kind.make] = unet, adapter, theirs
        return made[base, kind.make]

    return make


NUMBERS = [
    *(("unet", kind) for kind in KINDS),
    *(("unet_xl", kind) for kind in ("plus", "faceid-plus", "faceid-plusv2", "faceid-plusv2, two faces")),
]


@torch.no_grad()
@pytest.mark.parametrize("base, kind", NUMBERS, ids=[f"{base} {kind}" for base, kind in NUMBERS])
def test_unet_with_the_adapter_equals_diffusers(request, attached, base, kind, draw):
    bare, kind = request.getfixturevalue(base), KINDS[kind]
    ours, adapter, theirs = attached(base, kind)
    faces, features = shown(kind, draw)
    x, t, text = draw(2, 4, 8, 12), torch.tensor([981, 1]), draw(2, 77, ours.config.context_dim)
    told, vector = added(ours, theirs, draw)
    if isinstance(adapter.image_proj, FacePlusProjection):
        layer = theirs.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds, layer.shortcut = features, kind.structure_scale is not None
        layer.shortcut_scale = kind.structure_scale
    tokens, embeds = project(adapter, faces, features, kind.structure_scale), features if faces is None else faces
    assert rel(tokens, theirs.encoder_hid_proj([embeds])[0].flatten(1, 2)) <= 1e-5
    set_scales(theirs, 0.7)
    wanted = theirs(x, t, text, added_cond_kwargs=told | {"image_embeds": [embeds]}).sample
    found = ours(x, t, Prompt(text, (adapter.prompt(tokens, 0.7),), vector))
    assert rel(found, wanted) <= 1e-5
    # What was compared is the image prompt and, where there is one, the LoRA:
    silent, plain = ours(x, t, Prompt(text, vector=vector)), bare(x, t, Prompt(text, vector=vector))
    assert rel(found, silent) > 0.01
    assert rel(silent, plain) > 0.01 if kind.rank else torch.equal(silent, plain)


@torch.no_grad()
def test_several_faceid_adapters_at_once_equal_diffusers(sd1, draw, tmp_path):
    """Each image prompt is read by its own adapter; what all of them change in the UNet's own attention is added."""
    kinds = [KINDS[name] for name in ("faceid, two faces", "faceid-plusv2", "base")]
    written = [adapter_for(sd1.parts[1], kind, 30 + i) for i, kind in enumerate(kinds)]
    for name, w in (pair for adapter in written for pair in adapter.named_parameters()):
        w.data *= 0.3 if "lora.up" in name else 1  # two as large as the weights themselves would blow up each rounding
    given, adapters, groups = [shown(kind, draw, rows=1) for kind in kinds], [], []
    for i, (kind, adapter, (faces, features)) in enumerate(zip(kinds, written, given)):
        file = tmp_path / f"{i}.safetensors"
        save_file(adapter.state_dict(), file)
        adapters.append(Adapter(file, load_adapter(file, device="meta"), None, kind.structure_scale is not None))
        seen = [] if features is None else [Features(features[0], torch.zeros_like(features[0]))]
        how = {"structure_scale": kind.structure_scale, "scale": 0.4 + 0.2 * i}
        groups.append(ImageGroup(seen, i, faces=[] if faces is None else [faces[0]], **how))
    models = replace(opened(sd1), adapters=tuple(adapters), held={"text encoder": sd1.parts[0]})
    x, t, text = draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 77, 64)
    prompt = replace(prompts(models, "", images=groups)[0], text=text)
    found = models.unet(face=True)(x, t, prompt)

    theirs = diffusers_unet_with(sd1.parts[1], *written)
    set_scales(theirs, 0.4, 0.6, 0.8)
    layer = theirs.encoder_hid_proj.image_projection_layers[1]
    layer.clip_embeds, layer.shortcut, layer.shortcut_scale = given[1][1], True, kinds[1].structure_scale
    embeds = [features if faces is None else faces for faces, features in given]
    assert rel(found, theirs(x, t, text, added_cond_kwargs={"image_embeds": embeds}).sample) <= 1e-5
    for one in range(len(groups)):  # each of them is heard, and each LoRA counts
        less = replace(prompt, images=prompt.images[:one] + prompt.images[one + 1 :])
        assert rel(models.unet(face=True)(x, t, less), found) > 1e-3
    first = replace(models, adapters=models.adapters[:1], held={})
    assert rel(first.unet(face=True)(x, t, prompt), found) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("base", ["unet", "unet_xl"])
def test_the_lora_alone_is_what_the_official_code_computes(request, base, draw):
    """`LoRAAttnProcessor`: q = to_q(x) + up(down(x)), the same for k, v and to_out; in order of diffusers' layers."""
    unet = copy.deepcopy(request.getfixturevalue(base))
    adapter, theirs = adapter_for(unet, KINDS["faceid"]), diffusers_unet(unet)
    for i, name in enumerate(theirs.attn_processors):
        attention, lora = theirs.get_submodule(name.removesuffix(".processor")), adapter.ip_adapter[str(i)]
        for linear, change in (
            (attention.to_q, lora.to_q_lora),
            (attention.to_k, lora.to_k_lora),
            (attention.to_v, lora.to_v_lora),
            (attention.to_out[0], lora.to_out_lora),
        ):
            linear.register_forward_hook(lambda _, args, out, change=change: out + change.up(change.down(args[0])))
    x, t, text = draw(2, 4, 8, 12), torch.tensor([981, 1]), draw(2, 77, unet.config.context_dim)
    told, vector = added(unet, theirs, draw)
    prompt = Prompt(text, vector=vector)
    plain, wanted = unet(x, t, prompt), theirs(x, t, text, added_cond_kwargs=told).sample
    adapter.merge(unet)
    assert rel(unet(x, t, prompt), wanted) <= 1e-5
    assert rel(wanted, plain) > 0.01
    # A scale of 0 silences the image prompt; the LoRA, part of the UNet by now, stays.
    tokens = adapter.project(normalize(draw(1, 512)), None).expand(2, -1, -1)
    silent = unet(x, t, replace(prompt, images=(adapter.prompt(tokens, 0.0),)))
    assert torch.equal(silent, unet(x, t, prompt))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["faceid", "faceid-plus", "portrait"])
def test_a_merged_adapter_comes_out_bit_for_bit(unet, draw, kind):
    worn, adapter, matrices = copy.deepcopy(unet), adapter_for(unet, KINDS[kind]), ("_q.", "_k.", "_v.", "_out.0.")
    for _ in range(2):
        take_out = adapter.merge(worn)
        changed = {f"{matrix}weight" for matrix in matrices} if adapter.lora_rank else set()
        assert {key[key.rindex("to") + 2 :] for key in different(worn, unet)} == changed
        take_out()
        assert not different(worn, unet)
    x, t, prompt = draw(1, 4, 8, 8), torch.tensor([500]), Prompt(draw(1, 77, 64))
    assert torch.equal(worn(x, t, prompt), unet(x, t, prompt))


def different(one: nn.Module, other: nn.Module) -> set[str]:
    """The tensors that are not equal bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return {key for key, w in one.items() if not torch.equal(w, other[key])}


def test_a_lora_in_half_precision_is_added_in_single(unet):
    half = copy.deepcopy(unet).half()
    adapter = adapter_for(unet, KINDS["faceid"]).half()
    layer, lora = next(half.attentions()), adapter.ip_adapter["0"].to_q_lora
    wanted = (layer.to_q.weight.float() + lora.up.weight.float() @ lora.down.weight.float()).half()
    adapter.merge(half)
    assert torch.equal(layer.to_q.weight, wanted) and layer.to_q.weight.dtype == torch.float16


def test_structure_scale_is_what_tells_version_2(draw):
    projection = randomise(face_plus(64), 23)
    faces, features = normalize(draw(2, 512)), draw(2, 17, 128)
    one = projection(faces, features)
    own = projection(faces, features, 0.0)
    assert rel(projection(faces, features, 0.7), own + 0.7 * one) <= 1e-6
    assert rel(own, one) > 0.1


def test_a_structure_scale_for_another_kind_is_refused(unet, draw):
    adapter = adapter_for(unet, KINDS["faceid"])
    with pytest.raises(ValueError, match="`structure_scale` is for FaceID-plus"):
        adapter.tokens(None, None, normalize(draw(1, 512)), 1.0)


def test_which_adapters_read_clip_and_which_faces(unet):
    reads = {name: adapter_for(unet, kind) for name, kind in KINDS.items()}
    assert {name for name, adapter in reads.items() if not adapter.reads_clip} == {
        "faceid",
        "faceid, two faces",
        "portrait",
    }
    assert {name for name, a in reads.items() if a.image_proj.faces} == {n for n, k in KINDS.items() if k.faces}


# Whole pictures


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, image_tower) -> dict[bool, CLIPImage]:
    """Read from files: as the bases' pipelines have it, and one with wider embeddings."""
    wide = randomise(CLIPImage(replace(NARROW_IMAGE, projection=160)), 24)
    folder, found = tmp_path_factory.mktemp("encoders"), {}
    for is_wide, tower in ((False, image_tower), (True, wide)):
        save_file(tower.state_dict(), folder / f"{is_wide}.safetensors")
        found[is_wide] = load_image_encoder(folder / f"{is_wide}.safetensors")
    return found


@pytest.fixture(scope="module")
def photos() -> tuple[Image.Image, ...]:
    """Not square, and of many colours."""
    generator = np.random.default_rng(0)
    small = [Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(2)]
    return tuple(image.resize((100, 75), Image.Resampling.BICUBIC) for image in small)


PICTURES = [
    *(("SD 1.x", kind) for kind in ("vit-G", "full-face", "faceid", "faceid-plus", "faceid-plusv2", "portrait")),
    ("SD 2.x", "base"),
    *(("SDXL", kind) for kind in ("base", "plus", "faceid-plusv2, two faces")),
]


@pytest.fixture(scope="module")
def by_text_alone(request) -> Callable[[str], np.ndarray]:
    """The pixels that a base makes of the same order without an adapter."""
    made: dict[str, np.ndarray] = {}

    def pixels(base: str) -> np.ndarray:
        if base not in made:
            made[base] = our_picture(request.getfixturevalue(BASES[base]), Order())[1]
        return made[base]

    return pixels


@pytest.mark.slow
@pytest.mark.parametrize("base, kind", PICTURES, ids=[f"{base} {kind}" for base, kind in PICTURES])
def test_picture_equals_diffusers(request, base, kind, encoders, photos, by_text_alone, draw, tmp_path):
    twin: Twin = request.getfixturevalue(BASES[base])
    kind, path = KINDS[kind], tmp_path / "adapter.safetensors"
    save_file(adapter_for(twin.parts[1], kind).state_dict(), path)
    adapter = load_adapter(path)
    encoder = encoders[kind.wide] if adapter.reads_clip else None
    check_fit(adapter, path, twin.base, encoder, "encoder")
    order = Order(
        pictures=photos[: kind.pictures],
        faces=normalize(draw(kind.faces, 512)) if kind.faces else None,
        structure_scale=kind.structure_scale,
    )
    ours = our_picture(twin, order, adapter, encoder)
    assert_same_picture(ours, their_picture(twin, order, path, encoder))
    assert np.abs(ours[1].astype(int) - by_text_alone(base)).mean() > 5  # the adapter shows


# What does not fit together


def base_of(family, config: UNetConfig) -> Base:
    return Base("b", family, SD, layers(config), torch.float32, "cpu", config=config)


def adapter_on_meta(config: UNetConfig, make: Callable[[], nn.Module]) -> IPAdapter:
    return on_meta(lambda: IPAdapter(make(), layers(config)))


def encoder_of(width: int, projection: int) -> CLIPImage:
    return on_meta(lambda: CLIPImage(CLIPImageConfig(width, 1, 1, 8, False, projection, image_size=16, patch_size=16)))


SD1, XL = FAMILIES["SD 1.x"], FAMILIES["SDXL"]
VIT_H, VIT_G, VIT_L = (1280, 1024), (1664, 1280), (1024, 768)
SSD = replace(SDXL, down=((0, 0), (2, 2), (4, 4)), middle=(0,), up=((4, 4, 10), (2, 1, 1), (0, 0, 0)))
FITS_NOT = (
    "this adapter is for {} (tokens of {}); the base b is {} and has tokens of {}: give a base that fits (`base` {})"
)
YIELDS = "this adapter wants {} of {}, the image encoder given (e) yields {}; `image_encoder` {}"
UNFIT = {  # adapter, base, encoder, message
    "SDXL adapter, SD 1.x base": (
        *(SDXL, lambda: ImageProjection(1024, 2048, 4), SD1, SD15, VIT_H),
        FITS_NOT.format("SDXL", 2048, "SD 1.x", 768, "sdxl") + ", or an adapter for SD 1.x",
    ),
    "SD 1.x adapter, SDXL base": (
        *(SD15, lambda: Resampler(1280, 768, 4, 12, 16, 768), XL, SDXL, VIT_H),
        FITS_NOT.format("SD 1.x", 768, "SDXL", 2048, "sd15") + ", or an adapter for SDXL",
    ),
    "vit-G adapter, ViT-H": (
        *(SD15, lambda: ImageProjection(1280, 768, 4), SD1, SD15, VIT_H),
        YIELDS.format("ViT-bigG/14 image embeddings", 1280, 1024, "vit-bigg"),
    ),
    "base adapter, ViT-bigG": (
        *(SD15, lambda: ImageProjection(1024, 768, 4), SD1, SD15, VIT_G),
        YIELDS.format("ViT-H/14 image embeddings", 1024, 1280, "vit-h"),
    ),
    "plus adapter, ViT-L": (
        *(SD15, lambda: Resampler(1280, 768, 4, 12, 16, 768), SD1, SD15, VIT_L),
        YIELDS.format("ViT-H/14 patch features", 1280, 1024, "vit-h"),
    ),
    "FaceID-plus, ViT-bigG": (
        *(SD15, lambda: FacePlusProjection(512, 1280, 4, 12, 4, 768), SD1, SD15, VIT_G),
        YIELDS.format("ViT-H/14 patch features", 1280, 1664, "vit-h"),
    ),
    "SDXL adapter, SSD-1B": (
        *(SDXL, lambda: ImageProjection(1024, 2048, 4), XL, SSD, VIT_H),
        "this adapter is for 70 cross-attention layers (640 to 1280 wide), the base b has 34 (640 to 1280 wide)"
        + ", in another order or number",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_and_told_what_would(case):
    of, make, family, config, encoder, message = UNFIT[case]
    adapter = adapter_on_meta(of, make)
    with pytest.raises(WeightsError) as error:
        check_fit(adapter, "a", base_of(family, config), encoder_of(*encoder), "e")
    assert str(error.value) == f"a: {message}"
    # On its own base and with its own encoder it passes:
    own = next(e for e in (VIT_H, VIT_G) if adapter.image_proj.feature_dim == e[not adapter.image_proj.patches])
    check_fit(adapter, "a", base_of(XL if of is SDXL else SD1, of), encoder_of(*own), "e")


def test_faces_alone_need_no_encoder():
    adapter = adapter_on_meta(NARROW_UNET, lambda: FaceProjection(512, 64, 4))
    check_fit(adapter, "a", base_of(SD1, NARROW_UNET), None, None)
