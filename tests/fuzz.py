"""Files that are damaged, or made to do damage: whatever they hold, a reader returns a result or raises one of our errors.

  python -m tests.fuzz --minutes 10 --seed 0               all kinds in turn, each in a process of its own
  python -m tests.fuzz --kind pictures --seed 0 --only 123     one input again, with its traceback

Inputs are good files, changed: bytes anywhere, and parts of the format (a pickle's opcodes, the header of safetensors,
names and shapes of tensors, chunks of a PNG) so that the rest still fits. Each follows from kind, seed and number alone.
A finding is another exception, one that is more than a line, more than 10 seconds of CPU time or 1 GB, no end within 5
minutes by the clock, a crash, code that is run, or a file that is written elsewhere than in the system's folder for
temporary files.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save, save_file
from torch import Tensor

from cli import flags
from clip import CLIPImage, CLIPImageConfig, CLIPText, CLIPTextConfig
from control import ControlNet, T2IAdapter, T2IConfig
from files.errors import UserError
from files.faces import read_embedding
from files.features import read_features
from files.masks import open_mask
from files.pictures import open_picture, read_settings
from generate.again import again
from generate.syntax import SYNTAXES, told
from generate.text import chunks, pieces
from ipadapter import FaceProjection, ImageProjection, IPAdapter, PatchProjection, Resampler
from sampler import SD
from training.data import open_pairs
from training.pairs import BadSample
from unet import SD15, UNet
from vae import VAE, VAEConfig
from weights import Base, load_adapter, load_image_encoder, load_vae, open_base, read
from weights.clip import load_clip
from weights.control import load_control
from weights.families import SD1
from weights.inversion import Embedding, check_embeddings, read_embeddings
from weights.lora import check, merge, read_lora

SECONDS, BYTES = 10, 1 << 30  # of CPU time, for the machine may be busy
HANGS = 30 * SECONDS  # by the clock
ROOT = Path(__file__).parent.parent
Random = random.Random
State = dict[str, Tensor]

# Changes to bytes

NUMBERS = [
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
]


def changed(rng: Random, content: bytes, other: bytes = b"") -> bytes:
    """The content with one to eight changes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, length = (
            rng.randrange(len(data) + 1),
            rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 64), rng.randrange(1, 4096))),
        )
        match rng.randrange(10):
            case 0 | 1 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 2 if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 3:
                data[at:at] = rng.randbytes(min(length, 64))
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                del data[at:]
            case 7:
                size = rng.choice((1, 2, 4, 8))
                data[at : at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, rng.choice(("little", "big")))
            case 8:
                found = list(re.finditer(rb"\d+", data))
                if found:
                    span = rng.choice(found).span()
                    data[slice(*span)] = str(rng.choice((-1, *NUMBERS))).encode()
            case 9:
                start = rng.randrange(len(other) + 1)
                data[at : at + length] = other[start : start + length]
    return bytes(data)


# Weight files


def some_tensors() -> State:
    g = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(4, 3, generator=g).to(dtype) for i, dtype in enumerate(DTYPES)}
    return state | {
        "part": torch.randn(6, 6, generator=g)[1:3, 2:5],
        "none": torch.zeros(0, 3),
        "one": torch.tensor(2.0),
    }


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)


def as_bytes(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@cache
def good_safetensors() -> bytes:
    return save({key: value.contiguous() for key, value in some_tensors().items()}, {"format": "pt", "notes": "{}"})


@cache
def good_pickles(zipped: bool) -> tuple[bytes, ...]:
    notes = {"epoch": 3, "best": np.float64(0.5), "rates": [1e-4, 2e-4], "name": "x"}
    contents = (
        {"state_dict": some_tensors(), **notes},
        some_tensors(),
        {"a": {"b": some_tensors()}, "c": torch.nn.Parameter(torch.ones(3))},
        [{"a": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(3))})}],
    )
    return tuple(as_bytes(content, _use_new_zipfile_serialization=zipped) for content in contents)


@cache
def good_script() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Conv2d(3, 4, 2))
        torch.jit.save(torch.jit.script(model), buffer)
    return buffer.getvalue()


def safetensors_file(rng: Random, folder: Path) -> Path:
    content = good_safetensors()
    length = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.6:
        header = changed(rng, content[8 : 8 + length])
        content = struct.pack("<Q", len(header)) + header + content[8 + length :]
    else:
        content = changed(rng, content)
    return written(folder / "x.safetensors", content)


GLOBALS = ["os system", "posix system", "builtins eval", "builtins exec", "subprocess Popen", "builtins bytearray"]
GLOBALS += [
    "torch.storage _load_from_bytes",
    "torch UntypedStorage",
    "torch Tensor",
    "collections Counter",
    "builtins getattr",
]
GLOBALS += [
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_sparse_tensor",
    "_codecs encode",
]
GLOBALS += [
    "torch._tensor _rebuild_from_type_v2",
    "torch._utils _rebuild_tensor_v3",
    "numpy.core.multiarray scalar",
    "numpy dtype",
]
GLOBALS += [
    "torch FloatStorage",
    "torch float8_e4m3fn",
    "__torch__.x Y",
    "collections OrderedDict",
    "torch Size",
    "io open",
]


def changed_pickle(rng: Random, content: bytes) -> bytes:
    """Its opcodes left out, doubled, exchanged, or given other arguments."""
    try:
        starts = [start for _, _, start in pickletools.genops(content)]
    except Exception:  # noqa: BLE001, it was changed before
        return changed(rng, content)
    end = starts[-1] + 1
    steps = [content[a:b] for a, b in itertools.pairwise([*starts, end])]
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
        match rng.randrange(7):
            case 0:
                steps[i] = b""
            case 1:
                steps.insert(i, steps[j])
            case 2:
                steps[i], steps[j] = steps[j], steps[i]
            case 3:
                module, name = rng.choice(GLOBALS).split()
                steps[i] = f"c{module}\n{name}\n".encode()
            case 4:
                steps[i] = rng.choice(
                    (
                        b"K\x00",
                        b"J\xff\xff\xff\x7f",
                        b"J\xff\xff\xff\xff",
                        b"M\xff\xff",
                        b"N",
                        b")",
                        b"]",
                        b"}",
                        b"\x88",
                    )
                )
            case 5:
                steps[i] = rng.choice(
                    (b"R", b"\x81", b"b", b"Q", b"s", b"u", b"t", b"\x85", b"\x86", b"(", b"0", b"2", b"a", b"e")
                )
            case 6:
                steps[i : i + 1] = steps[i : j + 1] if i < j else [steps[i]]
    return b"".join(steps) + content[end:]


def zipped(rng: Random, content: bytes) -> bytes:
    """A zip archive with one of its parts changed, and whole again; or with bytes changed anywhere."""
    if rng.random() < 0.3:
        return changed(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickle = next(name for name in parts if name.endswith("data.pkl"))
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice((pickle, pickle, pickle, *parts))
        match rng.randrange(6):
            case 0 | 1 | 2 if name == pickle:
                parts[name] = changed_pickle(rng, parts[name])
            case 3:
                parts[changed(rng, name.encode()).decode("utf-8", "replace")] = parts.pop(name, b"")
            case 4:
                parts.pop(name, None)
            case _:
                parts[name] = changed(rng, parts.get(name, b""))
        if pickle not in parts:
            break
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, part in parts.items():
            with contextlib.suppress(ValueError, IndexError):
                archive.writestr(name, part)
    return buffer.getvalue()


def pickle_file(rng: Random, folder: Path) -> Path:
    return written(folder / "x.pt", zipped(rng, rng.choice(good_pickles(True))))


def old_pickle_file(rng: Random, folder: Path) -> Path:
    content = rng.choice(good_pickles(False))
    if rng.random() < 0.6:  # the fourth pickle is the content
        starts, file = [], io.BytesIO(content)
        for _ in range(4):
            starts.append(file.tell())
            for _ in pickletools.genops(file):
                pass
        content = content[: starts[3]] + changed_pickle(rng, content[starts[3] :])
    else:
        content = changed(rng, content)
    return written(folder / "x.ckpt", content)


def script_file(rng: Random, folder: Path) -> Path:
    return written(folder / "x.pt", zipped(rng, good_script()))


# Names and shapes of tensors

IMAGE = CLIPImageConfig(64, 2, 1, 64, quick_gelu=False, projection=32, image_size=32, patch_size=16)
TEXT = CLIPTextConfig(32, 2, 1, 32, quick_gelu=True, projection=32, vocabulary=100, context=77)
PIXELS = VAEConfig(channels=(32, 32), res_blocks=1, latent_channels=4, latent_scale=0.18215)
NARROW = replace(SD15, channels=(32, 32, 32, 32), context_dim=32)


def changed_state(rng: Random, state: State, others: State) -> State:
    """Tensors left out, named or shaped otherwise, or brought from elsewhere."""
    state = dict(state)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        key = rng.choice(list(state)) if state else "x"
        value = state.get(key, torch.ones(1))
        match rng.randrange(9):
            case 0:
                state.pop(key, None)
            case 1:
                state[changed_name(rng, key)] = state.pop(key, value)
            case 2:
                state[changed_name(rng, key)] = value
            case 3 | 4:
                shape = [rng.choice((0, 1, 2, 3, 7, 64, 77, 320)) for _ in range(rng.randrange(6))]
                state[key] = torch.zeros(shape if math.prod(shape) < 100_000 else shape[:2])
            case 5:
                state[key] = value.flatten() if rng.random() < 0.5 else value[..., None]
            case 6:
                state[key] = value.to(rng.choice(DTYPES)) if value.numel() < 10_000 else value.half()
            case 7:
                state[key] = (
                    value.T.contiguous() if value.ndim == 2 else value[: len(value) // 2] if value.ndim else value
                )
            case 8:
                name = rng.choice(list(others))
                state[name] = others[name]
    if rng.random() < 0.05:
        prefix = rng.choice(
            ("module.", "model.", "_orig_mod.", "visual.", "first_stage_model.", "model.diffusion_model.")
        )
        state = {prefix + key: value for key, value in state.items()}
    return state or {"x": torch.ones(1)}


def changed_name(rng: Random, key: str) -> str:
    if rng.random() < 0.5:
        parts = key.split(".")
        i = rng.randrange(len(parts))
        parts[i] = rng.choice(
            (str(rng.choice(NUMBERS)), "", "weight", "x", parts[rng.randrange(len(parts))], "0", "-1")
        )
        return ".".join(parts)
    return changed(rng, key.encode()).decode("utf-8", "replace")


def filled(model: torch.nn.Module, prefix: str = "") -> State:
    return {prefix + key: value.detach().clone() for key, value in model.state_dict().items()}


@cache
def good_states() -> dict[str, tuple[State, ...]]:
    torch.manual_seed(0)
    unet, image, text, vae = UNet(NARROW), CLIPImage(IMAGE), CLIPText(TEXT), VAE(PIXELS)
    projections = (
        ImageProjection(32, 32, 4),
        PatchProjection(64, 32),
        Resampler(64, 32, 1, 1, 4, 32),
        FaceProjection(512, 32, 4),
    )
    adapters = [filled(IPAdapter.for_unet(unet, projection)) for projection in projections]
    trained = {}
    for key, value in adapters[0].items():
        _, number, rest = key.split(".", 2) if key.startswith("ip_adapter.") else ("", "", "")
        place = f"unet.down_blocks.0.attentions.{number}.transformer_blocks.0.attn2.processor.{rest}"
        trained[place if number else key.replace("image_proj.", "image_proj_model.")] = value
    base = filled(unet, "model.diffusion_model.") | filled(vae, "first_stage_model.")
    base |= filled(CLIPText(replace(TEXT, projection=None)), "cond_stage_model.transformer.")
    r = torch.randn
    openclip = {
        "visual.class_embedding": r(64),
        "visual.positional_embedding": r(5, 64),
        "visual.conv1.weight": r(64, 3, 16, 16),
        "visual.proj": r(64, 32),
        "positional_embedding": r(77, 32),
        "token_embedding.weight": r(100, 32),
        "text_projection": r(32, 32),
        "logit_scale": r(()),
        "input_resolution": torch.tensor(32),
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        openclip |= {f"{name}.{kind}": r(64 if "visual" in name else 32) for kind in ("weight", "bias")}
    for side, w in (("visual.transformer", 64), ("transformer", 32)):
        for i in range(2):
            block = f"{side}.resblocks.{i}."
            shapes = {"ln_1.weight": (w,), "ln_1.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,)}
            shapes |= {"attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,), "attn.out_proj.weight": (w, w)}
            shapes |= {"attn.out_proj.bias": (w,), "mlp.c_fc.weight": (w, w), "mlp.c_fc.bias": (w,)}
            shapes |= {"mlp.c_proj.weight": (w, w), "mlp.c_proj.bias": (w,)}
            openclip |= {block + name: r(shape) for name, shape in shapes.items()}
    loras = {}
    for name, p in itertools.islice(((n, p) for n, p in unet.named_parameters() if p.ndim > 1), 0, None, 9):
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down = r(p.shape[0], 2), r(2, *p.shape[1:])
        loras |= {
            f"{flat}.lora_up.weight": up if p.ndim == 2 else up[..., None, None],
            f"{flat}.lora_down.weight": down,
        }
        loras[f"{flat}.alpha"] = torch.tensor(1.0)
    others = {"bundle_emb.fox.emb_params": r(2, 32)}
    for i, (name, p) in enumerate((n, p) for n, p in unet.named_parameters() if p.ndim == 2 and n.endswith("weight")):
        flat, (rows, columns) = "lora_unet_" + name.removesuffix(".weight").replace(".", "_"), p.shape
        match i % 20:
            case 0:
                loha = {"w1_a": (rows, 2), "w1_b": (2, columns), "w2_a": (rows, 2), "w2_b": (2, columns)}
                others |= {f"{flat}.hada_{key}": r(shape) for key, shape in loha.items()}
            case 1:
                others |= {
                    f"{flat}.lokr_w1": r(4, 4),
                    f"{flat}.lokr_w2_a": r(rows // 4, 2),
                    f"{flat}.lokr_w2_b": r(2, columns // 4),
                }
            case 2:
                others |= {f"{flat}.lora_up.weight": r(rows, 2), f"{flat}.lora_down.weight": r(2, columns)}
                others[f"{flat}.dora_scale"] = r(1, columns).abs()
            case 3:
                others |= {f"{flat}.diff": r(rows, columns)}
    peft = {f"unet.{k}.lora_{ab}.weight": r(4, 4) for k in ("a.to_q", "b.to_k") for ab in "AB"}
    named = {"image encoder": (filled(image), filled(image) | filled(text), openclip), "adapter": (*adapters, trained)}
    inversions = ({"emb_params": r(2, 8)}, {"<sks>": r(8), "<fox>": r(3, 8)}, {"clip_l": r(2, 8), "clip_g": r(2, 8)})
    inversions += ({"bundle_emb.fox.string_to_param.*": r(2, 8), "lora_unet_x.alpha": r(())}, {"0.<sks>": r(2, 8)})
    net = filled(ControlNet(replace(NARROW, up=(), out_channels=0), (3, 4, 4, 4, 4)))
    sketch = filled(T2IAdapter(T2IConfig(1, NARROW.channels)))
    thin = {key: w for key, w in net.items() if w.ndim != 2 or "attn2" in key} | {"lora_controlnet": torch.zeros(1)}
    for name, w in net.items():
        if w.ndim == 2 and "attn2" not in name:
            thin |= {name.replace(".weight", ".up"): r(len(w), 2), name.replace(".weight", ".down"): r(2, w.shape[1])}
    return named | {
        "control": (net, {f"control_model.{key}": w for key, w in net.items()}, sketch, thin),
        "inversion": inversions,
        "vae": (filled(vae),),
        "base": (base,),
        "lora": (loras, peft, others, others),
    }


@cache
def all_names() -> State:
    small = torch.ones(2, 2)
    return {key: small for states in good_states().values() for state in states for key in state}


CONFIGS = {
    "image encoder": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "num_attention_heads": 1,
        "hidden_act": "gelu",
    },
    "lora": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"a.to_q": 2, ".*to_k": 3.5}, "use_rslora": True, "unet.r": 4},
    "vae": {"scaling_factor": 0.18215},
}


def tensors_file(kind: str) -> Callable[[Random, Path], Path]:
    """A file whose tensors are changed; sometimes with a config, changed too, beside or in it."""

    def make(rng: Random, folder: Path) -> Path:
        state, metadata = changed_state(rng, rng.choice(good_states()[kind]), all_names()), None
        if kind in CONFIGS and rng.random() < 0.2:
            state = rng.choice((state, *good_states()[kind]))
            config = json.dumps(CONFIGS[kind])
            if rng.random() < 0.5:
                key = rng.choice(list(CONFIGS[kind]))
                config = json.dumps(
                    CONFIGS[kind] | {key: rng.choice((None, [], {}, "x", -1, 0, 1e300, [[1]], {"x": []}, True))}
                )
            else:
                config = changed(rng, config.encode()).decode("utf-8", "surrogateescape")
            if rng.random() < 0.5:
                metadata = {"lora_adapter_metadata": config.encode(errors="replace").decode()}
            else:
                name = "adapter_config.json" if kind == "lora" else "config.json"
                written(folder / name, config.encode(errors="surrogateescape"))
        with contextlib.suppress(Exception):
            save_file({key: value.contiguous() for key, value in state.items()}, folder / "x.safetensors", metadata)
        return folder / "x.safetensors"

    return make


def index_file(rng: Random, folder: Path) -> Path:
    written(folder / "model-00001-of-00001.safetensors", good_safetensors())
    index = {
        "metadata": {"total_size": 3},
        "weight_map": dict.fromkeys(some_tensors(), "model-00001-of-00001.safetensors"),
    }
    return written(folder / "model.safetensors.index.json", changed(rng, json.dumps(index).encode()))


@cache
def narrow_unet() -> UNet:
    return UNet(NARROW).requires_grad_(False)


def merge_lora(path: Path) -> None:
    lora = read_lora(path)
    check(lora, {"unet": narrow_unet()})
    try:
        merge(narrow_unet(), [(lora, 1.0)], "unet")()
    except BaseException:
        narrow_unet.cache_clear()  # what was merged by half is in there
        raise


@cache
def narrow_base() -> Base:
    path = Path(tempfile.mkdtemp()) / "base.safetensors"
    save_file(good_states()["base"][0], path)
    return Base(path, SD1, SD, [], torch.float32, "cpu", NARROW)


def read_control(path: Path) -> None:
    load_control(path, narrow_base())


def read_inversion(path: Path) -> None:
    if path.exists():
        check_embeddings(read_embeddings(path), [8])


PROMPTS = (
    "a (red:1.4) apple, ((very) [sweet]:0.7) BREAK embedding:sks \\(x\\) <sks-2>, café 😀 (16:9)",
    "((((a)))) [[b] c (d:1,2) e:-.5) (: :) (embedding:sks:1.2)",
    "word, " * 60 + "(x:1e3)",
)


def prompt_file(rng: Random, folder: Path) -> Path:
    return written(folder / "x.txt", changed(rng, *(text.encode() for text in rng.sample(PROMPTS, 2))))


def read_prompts(path: Path) -> None:
    """In every syntax; each that can be read makes chunks of at most 75 tokens."""
    text = flags.text(os.fsdecode(path.read_bytes()))
    opened = [Embedding(path, (name,), (torch.ones(2, 8),)) for name in ("sks", "<sks-2>")]
    refused = None
    for syntax in SYNTAXES:
        told("prompt", text, syntax)
        try:
            found = pieces(text, syntax, "prompt", opened)
        except UserError as error:
            refused = error
        else:
            assert all(len(chunk) <= 75 for chunk in chunks(found, syntax, long=True))
    if refused:
        raise refused


# Pictures, faces, pairs


@cache
def good_pictures() -> tuple[bytes, ...]:
    rng, found = np.random.default_rng(0), []
    colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (12, 16), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, options in (
        ("PNG", {}),
        ("JPEG", {"exif": exif}),
        ("WEBP", {"exif": exif}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
    ):
        found.append((colours, kind, options))
    found += [(colours.convert("RGBA"), "PNG", {}), (colours.convert("RGBA"), "WEBP", {"lossless": True})]
    found += [(colours.convert("P"), "PNG", {"transparency": 3}), (deep, "PNG", {}), (deep, "TIFF", {})]
    found += [(colours.convert("CMYK"), "JPEG", {}), (colours.convert("CMYK"), "TIFF", {"compression": "tiff_lzw"})]
    found += [(colours.convert("F"), "TIFF", {}), (colours.convert("1"), "TIFF", {"compression": "group4"})]
    found += [
        (colours, "JPEG", {"progressive": True}),
        (colours, "AVIF", {}),
        (colours, "JPEG2000", {}),
        (colours, "ICO", {}),
    ]
    pictures = []
    for image, kind, options in found:
        buffer = io.BytesIO()
        with contextlib.suppress(Exception):  # not every Pillow writes every format
            image.save(buffer, format=kind, **options)
            pictures.append(buffer.getvalue())
    return tuple(pictures)


def changed_png(rng: Random, content: bytes) -> bytes:
    """With a chunk changed, doubled, moved or left out, and its checksum right."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        length = struct.unpack(">I", content[at : at + 4])[0]
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    i = rng.randrange(len(chunks))
    kind, data = chunks[i]
    match rng.randrange(5):
        case 0:
            del chunks[i]
        case 1:
            chunks.insert(rng.randrange(len(chunks)), chunks[i])
        case 2:
            kinds = (
                b"iCCP",
                b"tRNS",
                b"PLTE",
                b"gAMA",
                b"eXIf",
                b"acTL",
                b"fdAT",
                b"zTXt",
                b"iTXt",
                b"IDAT",
                b"IHDR",
                b"IEND",
            )
            chunks.insert(i, (rng.choice(kinds), rng.choice((data, rng.randbytes(20), zlib.compress(bytes(10**6))))))
        case _:
            chunks[i] = kind, changed(rng, data)
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return content[:8] + b"".join(packed)


def picture(rng: Random) -> bytes:
    content = rng.choice(good_pictures())
    if content.startswith(b"\x89PNG") and rng.random() < 0.7:
        return changed_png(rng, content)
    return changed(rng, content, rng.choice(good_pictures()))


def picture_file(rng: Random, folder: Path) -> Path:
    return written(folder / "x.png", picture(rng))


def read_a_picture(path: Path) -> None:
    read_settings_of(path)
    open_picture(path)


def read_settings_of(path: Path) -> None:
    with contextlib.suppress(UserError):
        read_settings(path)


SETTINGS = {
    "base": "tiny/weights/sd-tiny.safetensors",
    "adapter": None,
    "prompt": "a fox",
    "negative_prompt": "",
    "scale": [0.5, 1.0],
    "seed": 3,
    "init": "tiny/example.png",
    "inpaint": None,
    "strength": 0.5,
    "outpaint": [8, 0, 8, 0],
    "only_masked": 4,
    "steps": 20,
    "height": 512,
    "image": ["tiny/example.png"],
    "lora": [["tiny/weights/clip-tiny.safetensors", 0.5]],
    "embedding": [["tiny/weights/clip-tiny.safetensors", "sks"]],
    "prompt_syntax": "a1111",
    "clip_skip": 1,
    "faceid_v2": False,
    "groups": [
        {
            "image": ["tiny/example.png"],
            "scale": 0.5,
            "weights": [1],
            "curve": [1, 0.5],
            "layers": "style",
            "framing": "pad",
            "crop_position": "top",
            "negative_image": ["tiny/example.png"],
            "negative_noise": 0.5,
            "less": "a:1",
        }
    ],
    "sha256": {"x.safetensors": "1" * 64},
}


def settings_file(rng: Random, folder: Path) -> Path:
    """A picture of ours whose settings are changed, as text or one by one."""
    settings = dict(SETTINGS)
    for key in rng.sample(list(settings), rng.randrange(3)):
        settings[key] = rng.choice(
            (
                None,
                [],
                {},
                "x",
                3,
                -1,
                1e300,
                [[]],
                [[1, 2, 3]],
                {"a": {}},
                True,
                "../../x",
                "\0",
                "x" * 300,
                ["x" * 300],
            )
        )
    if isinstance(settings["groups"], list) and settings["groups"] and rng.random() < 0.5:
        group = dict(SETTINGS["groups"][0])
        group[rng.choice(list(group))] = rng.choice((None, [], {}, "x", 1e300, [[]], [None], {"a": 1}, True, "\0"))
        settings["groups"] = [group, *settings["groups"]]
    text = json.dumps(settings)
    if rng.random() < 0.5:
        text = changed(rng, text.encode()).decode("utf-8", "replace")
    info = PngInfo()
    info.add_itxt("ipadapter", text)
    Image.new("RGB", (8, 8)).save(folder / "x.png", pnginfo=info)
    return folder / "x.png"


TEXTS = (
    "0.5",
    "0,0.5,1",
    "512",
    "cuda:1",
    "cpu",
    "x.safetensors:0.5",
    "-1",
    "1e300",
    "ddim",
    "0.3:0.7",
    "nan",
    "a fox",
    "~/x",
)


def text_file(rng: Random, folder: Path) -> Path:
    return written(folder / "x.txt", changed(rng, rng.choice(TEXTS).encode(), rng.choice(TEXTS).encode()))


@cache
def parsers() -> tuple[flags.Parser, ...]:
    """One with a flag of each kind; to make a parser takes longer than to parse."""
    kinds = (
        flags.whole(0),
        flags.whole(1, 9),
        flags.number(),
        flags.share,
        flags.seed(9),
        flags.text,
        flags.weighted,
        flags.called,
    )
    made = []
    for kind in (*kinds, flags.side, flags.device, flags.path):
        made.append(flags.Parser(exit_on_error=True))
        made[-1].add_argument("--x", type=kind)
    return tuple(made)


def read_texts(path: Path) -> None:
    """As every kind of flag, by the parser that the scripts have."""
    text = os.fsdecode(path.read_bytes()).replace("\0", "")  # no argument of a process can have one
    for parser in parsers():
        with contextlib.suppress(SystemExit):
            parser.parse_args([f"--x={text}"])


def face_file(rng: Random, folder: Path) -> Path:
    face = np.random.default_rng(0).standard_normal((2, 512)).astype(rng.choice(("float32", "float16", "float64")))
    if rng.random() < 0.3:
        return written(folder / "x.safetensors", changed(rng, save({"face": torch.from_numpy(face)})))
    buffer = io.BytesIO()
    if rng.random() < 0.4:
        torch.save(rng.choice((face, torch.from_numpy(face))), buffer)
        return written(folder / "x.bin", zipped(rng, buffer.getvalue()))
    np.save(buffer, face)
    content = buffer.getvalue()
    header = changed(rng, content[10:128]) if rng.random() < 0.6 else content[10:128]
    content = content[:8] + struct.pack("<H", len(header)) + header + content[128:]
    return written(folder / "x.npy", changed(rng, content) if rng.random() < 0.5 else content)


@cache
def good_embeddings() -> tuple[bytes, ...]:
    """What diffusers and ComfyUI_IPAdapter_plus save."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    return tuple(map(as_bytes, ([x], x[0], [x[:, :, None].half()], x.half(), [x, x])))


def embedding_file(rng: Random, folder: Path) -> Path:
    """Of pictures: .ipadpt of both kinds, and ours with its notes."""
    if rng.random() < 0.5:
        return written(folder / "x.ipadpt", zipped(rng, rng.choice(good_embeddings())))
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    state = {"image": x, "negative": x, "faces": x.half(), "masks": x[:, None, None]}
    if rng.random() < 0.6:
        state = changed_state(rng, state, all_names())
    notes = json.dumps({"adapter": "a" * 64, "image_encoder": "b" * 64})
    notes = rng.choice(("[]", "3", '{"adapter": [{}]}', changed(rng, notes.encode()).decode("utf-8", "replace"), notes))
    with contextlib.suppress(Exception):
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "x.safetensors", {"notes": notes})
    if rng.random() < 0.3 and (folder / "x.safetensors").exists():
        written(folder / "x.safetensors", changed(rng, (folder / "x.safetensors").read_bytes()))
    return folder / "x.safetensors"


CAPTIONS = {
    "txt": b"a red fox\nin the snow\n",
    "caption": "ein Fuchs, grün".encode("cp1252"),
    "json": json.dumps({"text": "a fox", "caption": ["a", "b"], "width": 3}).encode(),
}
LISTS = {
    "x.json": json.dumps(
        [{"image_file": "p0.png", "text": "a fox"}, {"image_file": "p1.png", "text": ["a", "b"]}]
    ).encode(),
    "x.jsonl": b'{"image_file": "p0.png", "text": "a"}\n{"file_name": "p1.png", "text": "b"}\n',
    "metadata.jsonl": b'{"file_name": "p0.png", "text": "a"}\n{"file_name": "p1.png", "text": "b"}\n',
    "metadata.csv": b'file_name,text\np0.png,"a, b"\np1.png,c\n',
    "annotations/captions_p.json": json.dumps(
        {"images": [{"id": 1, "file_name": "p0.png"}], "annotations": [{"image_id": 1, "id": 4, "caption": "a fox"}]}
    ).encode(),
}


def tar_file(rng: Random, folder: Path) -> Path:
    buffer = io.BytesIO()
    kinds = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice(kinds)) as tar:
        for i in range(2):
            for suffix, content in ("png", good_pictures()[i]), rng.choice(list(CAPTIONS.items())):
                info = tarfile.TarInfo(f"{rng.choice(('folder', 'long/' * 30))}/{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    content = bytearray(buffer.getvalue())
    if rng.random() < 0.5:  # a header, with its checksum made right
        start = 512 * rng.randrange(len(content) // 512)
        header = bytearray(changed(rng, bytes(content[start : start + 512]))[:512].ljust(512, b"\0"))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[start : start + 512] = header
    else:
        content = changed(rng, bytes(content))
    if rng.random() < 0.2:
        content = (
            changed(rng, zlib.compress(bytes(content), wbits=31))
            if rng.random() < 0.7
            else zlib.compress(content, wbits=31)
        )
    return written(folder / rng.choice(("x.tar", "x.tar.gz")), bytes(content))


def captions_folder(rng: Random, folder: Path) -> Path:
    for i in range(2):
        written(folder / f"p{i}.png", good_pictures()[0] if rng.random() < 0.9 else picture(rng))
    if rng.random() < 0.5:
        suffix, content = rng.choice(list(CAPTIONS.items()))
        written(folder / f"p0.{suffix}", changed(rng, content))
        return folder
    name, content = rng.choice(list(LISTS.items()))
    path = written(folder / name, changed(rng, content))
    return folder if name not in ("x.json", "x.jsonl") else path


def read_pairs(path: Path) -> None:
    pairs = open_pairs(path)
    for i in range(min(len(pairs), 20)):
        with contextlib.suppress(BadSample):
            pairs[i]


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@dataclass(frozen=True)
class Kind:
    make: Callable[[Random, Path], Path]
    read: Callable[[Path], object]


KINDS = {
    "safetensors": Kind(safetensors_file, read),
    "pickles": Kind(pickle_file, read),
    "old pickles": Kind(old_pickle_file, read),
    "TorchScript": Kind(script_file, read),
    "indices": Kind(index_file, read),
    "image encoders": Kind(tensors_file("image encoder"), load_image_encoder),
    "CLIPs": Kind(tensors_file("image encoder"), load_clip),
    "adapters": Kind(tensors_file("adapter"), load_adapter),
    "autoencoders": Kind(tensors_file("vae"), load_vae),
    "bases": Kind(tensors_file("base"), open_base),
    "inversions": Kind(tensors_file("inversion"), read_inversion),
    "prompts": Kind(prompt_file, read_prompts),
    "LoRAs": Kind(tensors_file("lora"), merge_lora),
    "controls": Kind(tensors_file("control"), read_control),
    "pictures": Kind(picture_file, read_a_picture),
    "masks": Kind(picture_file, open_mask),
    "settings": Kind(settings_file, again),
    "texts": Kind(text_file, read_texts),
    "faces": Kind(face_file, read_embedding),
    "embeddings": Kind(embedding_file, read_features),
    "tars": Kind(tar_file, read_pairs),
    "captions": Kind(captions_folder, read_pairs),
}

# Trying them


class Finding(BaseException):
    """What no reader may do; not an Exception, so that no reader catches it."""


WATCHED = False  # only while a reader is at work


def watch(event: str, args: tuple) -> None:
    """An audit hook: code that runs, and files that are written elsewhere."""
    if not WATCHED:
        return
    if event in (
        "os.system",
        "os.exec",
        "os.fork",
        "os.posix_spawn",
        "subprocess.Popen",
        "socket.connect",
        "pickle.find_class",
    ):
        raise Finding(f"{event} {args}"[:200])
    path = args[0] if args else None
    writes = event == "open" and isinstance(args[1], str) and not set("wax+").isdisjoint(args[1])
    writes |= event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
    if (
        writes
        and isinstance(path, str | bytes)
        and not os.path.abspath(os.fsdecode(path)).startswith(tempfile.gettempdir())
    ):
        raise Finding(f"{event} {path}"[:200])


def too_long(*_: object) -> None:
    raise Finding(f"more than {SECONDS} seconds of CPU time")


def attempt(kind: Kind, name: str, seed: int, number: int, folder: Path) -> str:
    """One input: "read", "refused", or what was found."""
    for entry in folder.iterdir():  # to remove the folder itself is slow on some systems
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    path = kind.make(Random(f"{seed} {name} {number}"), folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    global WATCHED
    WATCHED = True
    try:
        kind.read(path)
        verdict = "read"
    except UserError as error:
        said = str(error)
        plain = len(said) < 3000 and not re.search(r"[\x00-\x1f\x7f]", said)
        verdict = "refused" if plain else f"not one line: {said[:200]!r}"
    except Exception as error:  # noqa: BLE001, that is what is looked for
        where = traceback.extract_tb(error.__traceback__)
        ours = next((f for f in reversed(where) if str(ROOT) in f.filename and "fuzz" not in f.filename), where[-1])
        what = re.sub(r"\d+", "N", (str(error).splitlines() or [""])[0])[:120]
        verdict = f"{type(error).__name__} at {Path(ours.filename).name}:{ours.lineno}: {what}"
    except Finding as finding:
        verdict = str(finding)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        WATCHED = False
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return f"more than {grown >> 20} MB" if grown > BYTES else verdict


class Tally:
    """What came of the inputs of one kind."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.found: dict[str, list[int]] = {}  # what was found -> the numbers of its inputs


def work(name: str, seed: int, first: int, seconds: float, inputs: float, now: object, verdicts: object) -> None:
    """Tries inputs one after the other; runs in a process of its own, for it may crash."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, too_long)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there what it thinks of a file
    folder = Path(tempfile.mkdtemp())
    attempt(KINDS[name], name, -1, 0, folder)  # what is imported late is imported now
    sys.addaudithook(watch)
    counts, until = Counter(), time.monotonic() + seconds
    for number in itertools.count(first):
        if time.monotonic() > until or number >= inputs:
            break
        now.value = number
        verdict = attempt(KINDS[name], name, seed, number, folder)
        counts[verdict] += 1
        if verdict not in ("read", "refused"):
            verdicts.put((verdict, number))
    shutil.rmtree(folder)
    verdicts.put(counts)


def run(name: str, seed: int, seconds: float, inputs: float = math.inf) -> Tally:
    """Inputs of one kind, as many or as long as is said."""
    context, tally, first = multiprocessing.get_context("fork"), Tally(), 0

    def collect(verdicts: object) -> None:
        while not verdicts.empty():
            match verdicts.get():
                case Counter() as counts:
                    tally.counts += counts
                case verdict, number:
                    tally.found.setdefault(verdict, []).append(number)

    until = time.monotonic() + seconds
    while first == 0 or (time.monotonic() < until and first < inputs):
        now, verdicts = context.Value("q", first), context.SimpleQueue()
        left = max(0.0, until - time.monotonic())
        process = context.Process(target=work, args=(name, seed, first, left, inputs, now, verdicts), daemon=True)
        process.start()
        before, seen = first, time.monotonic()
        while process.is_alive() and time.monotonic() - seen < HANGS:
            process.join(0.05)
            collect(verdicts)
            if now.value != before:
                before, seen = now.value, time.monotonic()
        process.kill()
        process.join()
        collect(verdicts)
        if process.exitcode == 0:
            break
        flaw = (
            f"hangs: no end within {HANGS} seconds"
            if process.exitcode == -signal.SIGKILL
            else f"crashes ({process.exitcode})"
        )
        tally.found.setdefault(flaw, []).append(now.value)
        tally.counts["crashed"] += now.value - first + 1
        first = now.value + 1
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all kinds together (default: %(default)s)")
    parser.add_argument("--inputs", type=float, default=math.inf, help="of each kind at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--only", type=int, metavar="N", help="of --kind the input number N alone, with its traceback")
    args = parser.parse_args()
    kinds = args.kind or list(KINDS)
    if args.only is not None:
        path = KINDS[kinds[0]].make(Random(f"{args.seed} {kinds[0]} {args.only}"), Path(tempfile.mkdtemp()))
        print(path, KINDS[kinds[0]].read(path), sep="\n")
        return 0
    tallies = {}
    print(f"{'':<16}{'tried':>10}{'read':>10}{'refused':>10}{'found':>8}", flush=True)
    for name in kinds:
        tally = tallies[name] = run(name, args.seed, 60 * args.minutes / len(kinds), args.inputs)
        counts, found = tally.counts, sum(map(len, tally.found.values()))
        print(f"{name:<16}{counts.total():>10}{counts['read']:>10}{counts['refused']:>10}{found:>8}", flush=True)
    for name, tally in tallies.items():
        for verdict, numbers in tally.found.items():
            print(f"{name}: {len(numbers)} times {verdict}")
            print(f"  python -m tests.fuzz --kind {name!r} --seed {args.seed} --only {numbers[0]}")
    return int(any(tally.found for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
