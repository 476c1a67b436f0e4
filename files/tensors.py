"""Opens weight files safely: safetensors, and pickles (.bin, .ckpt, .pt, .pth) that hold nothing but tensors."""

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from files.errors import UserError

State = dict[str, Tensor]


class WeightsError(UserError):
    """A weight file that cannot be used; the message names the file, what was found and what is wanted."""


def read(path: str | Path) -> State:
    """All tensors of a file, memory-mapped where the format allows it, under flat dotted names.

    Nested dictionaries of a pickle are flattened (`{"image_proj": {"proj.weight": ...}}` becomes
    `image_proj.proj.weight`), a surrounding `state_dict` is taken off, and what is no tensor is left out.

    Raises:
        WeightsError: missing, empty, cut short, no weight file, or a pickle that holds code.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, no error for names that no file can have
        raise WeightsError(f"{path}: no such file")
    if path.is_dir():
        raise WeightsError(f"{path}: a folder; give the .safetensors, .ckpt or .bin file itself")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise WeightsError(f"{path}: the file is empty")
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"{path}: a web page (HTML or XML), not weights; the download went wrong")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: a Git LFS pointer, not the weights; run 'git lfs pull' where it came from")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"PK") or head[:1] == b"\x80":
        return _read_pickle(path)
    raise WeightsError(f"{path}: neither safetensors nor a PyTorch file; it is cut short, damaged or something else")


def _read_safetensors(path: Path) -> State:
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: damaged or cut short, not a whole safetensors file ({error})") from None
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return state


def _read_pickle(path: Path) -> State:
    try:
        zipped = zipfile.is_zipfile(path)
        # `weights_only` builds tensors and plain containers; anything else in the pickle is refused, not run.
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", mmap=zipped or None, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        if reason:
            raise WeightsError(f"{path}: refused, the pickle asks to run code ({reason.strip()[:120]})") from None
        raise WeightsError(f"{path}: damaged or cut short, not a whole PyTorch file") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, struct.error) as error:
        raise WeightsError(f"{path}: damaged or cut short, not a whole PyTorch file ({_one_line(error)})") from None
    if isinstance(content, Mapping) and "state_dict" in content:  # the trainer's own notes stand beside it
        content = content["state_dict"]
    state: State = {}
    _flatten(content, "", state)
    if not state:
        raise WeightsError(f"{path}: holds no tensors")
    return state


class _Inert:
    """Stands in for the trainer callbacks that early Stable Diffusion .ckpt files mention; does nothing."""


STAND_INS = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def _flatten(value: object, prefix: str, state: State) -> None:
    if isinstance(value, Tensor):
        state[prefix] = value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            _flatten(inner, name, state)


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
