"""Opens weight files safely: safetensors, and pickles (.bin, .ckpt, .pt, .pth) that hold nothing but tensors."""

import json
import os
import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from files.errors import WeightsError, reason, untrusted
from files.pickles import read_pickle

State = dict[str, Tensor]

KINDS = {  # of files that are brought for weights, by their first bytes
    b"version https://git-lfs": "a Git LFS pointer, not the weights; run 'git lfs pull' where it came from",
    b"GGUF": "a GGUF file, weights quantised for other programs; the safetensors file of the same model is wanted",
    b"\x89HDF": "an HDF5 file (Keras), not PyTorch's; a safetensors file is wanted",
    b"\x93NUMPY": "an array of NumPy's, not weights",
    **dict.fromkeys(
        (bytes([8, version, 18]) for version in range(3, 20)),
        "an ONNX model, not PyTorch's; a safetensors file is wanted",
    ),
    b"%PDF": "a PDF, not weights",
    **dict.fromkeys(
        (b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"),
        "an archive (gzip, 7z, RAR, bzip2, xz or zstd), not weights; give what is in it, unpacked",
    ),
    b"\x89PNG": "a picture (PNG), not weights",
    b"\xff\xd8\xff": "a picture (JPEG), not weights",
    b"RIFF": "a picture (WebP) or a sound, not weights",
}
QUANTISED = {  # by names that only such files have; without their scales the weights say nothing
    r"(^|\.)(scaled_fp8|comfy_quant|scale_weight|weight_scale)$": "fp8 weights with scales beside them (scaled fp8)",
    r"\.(absmax|quant_map|SCB)$|\.quant_state\.": "weights quantised by bitsandbytes",
    r"\.(qweight|qzeros)$": "weights quantised in 4 bits (GPTQ, AWQ or SVDQuant)",
    r"\.weight\.?_(data|scale)$": "weights quantised by quanto",
}
ANY_QUANTISED = re.compile("|".join(QUANTISED), re.MULTILINE)
TEXT = re.compile(rb"[\t\n\r\x20-\x7e]{4,}")
# What wrappers for several GPUs, for compiling and for saving memory put into names.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module)\."
)


def read(path: str | Path) -> State:
    """All tensors of a file, memory-mapped where the format allows it, under flat dotted names.

    Nested dictionaries of a pickle are flattened (`{"image_proj": {"proj.weight": ...}}` becomes
    `image_proj.proj.weight`), of a trainer's checkpoint the model alone is taken, and what is no tensor is left out.
    An index (`model.safetensors.index.json`) stands for the files that it lists. What wrappers such as
    DistributedDataParallel (`module.`), FSDP or `torch.compile` put into names is taken off.

    Raises:
        WeightsError: missing, empty, cut short, no weight file, or a pickle that holds code.
    """
    path = Path(path)
    try:
        state = load_file(path)
    except Exception as error:  # noqa: BLE001, another kind of file, or a damaged one, on which it raises nearly anything
        state = read_other(path, error)
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    if ANY_QUANTISED.search("\n".join(state)):  # as one: key by key takes as long as opening
        raise quantised(path, state)
    return unwrapped(state)


def quantised(path: Path, state: State) -> WeightsError:
    """Which of the names tells it, and whose it is."""
    found = ((kind, key) for key in state for sign, kind in QUANTISED.items() if re.search(sign, key, re.MULTILINE))
    kind, mark = next(found)
    told = f"{kind} are not read (it has {mark}); plain fp16, bf16, fp32 or fp8 ones are wanted"
    return WeightsError(f"{path}: {told}")


def read_other(path: Path, error: Exception) -> State:
    """As `read`, where safetensors could not read it for this reason: an index, a pickle, or what is no weight file."""
    if not os.path.exists(path):  # unlike Path.exists, no error for names that no file can have
        raise WeightsError(f"{path}: no such file")
    if path.is_dir():
        raise WeightsError(f"{path}: a folder; give the .safetensors, .ckpt or .bin file itself")
    if path.name.endswith(".index.json"):
        return {key: value for shard in shards(path) for key, value in read(shard).items()}
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as unread:
        raise WeightsError(f"{path}: cannot be read ({unread.strerror})") from None
    if not head:
        raise WeightsError(f"{path}: the file is empty")
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"{path}: a web page (HTML or XML), not weights; the download went wrong")
    if kind := next((kind for start, kind in KINDS.items() if head.startswith(start)), None):
        raise WeightsError(f"{path}: {kind}")
    if head[257:262] == b"ustar":
        raise WeightsError(f"{path}: a tar archive, not weights; give what is in it")
    if not head.strip(b"\0") and len(head) == 512:
        raise WeightsError(f"{path}: begins with zeros; the download is not finished, or the disk lost it")
    if TEXT.fullmatch(text := head.rstrip(b"\0")):
        raise WeightsError(f"{path}: a text, not weights; it says {text[:80].decode()!r}")
    if head[8:9] == b"{":
        raise WeightsError(f"{path}: damaged or cut short, not a whole safetensors file ({reason(error)})")
    if head.startswith(b"PK") or head[:1] == b"\x80":
        return read_pickle(path)
    raise WeightsError(f"{path}: neither safetensors nor a PyTorch file; it is cut short, damaged or something else")


def shards(index: Path) -> list[Path]:
    """The files that a `*.index.json` lists: a model in several parts, all in one folder.

    Raises:
        WeightsError: not readable, or files are missing.
    """
    with untrusted(WeightsError, f"{index}: not readable as JSON"):
        content = json.loads(index.read_text(encoding="utf-8"))
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names:
        raise WeightsError(f"{index}: lists no files of weights")
    if strangers := [name for name in names if Path(name).name != name]:
        raise WeightsError(f"{index}: lists files elsewhere than beside it ({strangers[0]})")
    if missing := [name for name in names if not os.path.isfile(index.with_name(name))]:
        raise WeightsError(f"{index}: of its {len(names)} files {len(missing)} are missing: {', '.join(missing[:4])}")
    return [index.with_name(name) for name in names]


def unwrapped(state: State) -> State:
    """Without what wrappers put into the names."""
    return {WRAPPERS.sub("", key): value for key, value in state.items()}
