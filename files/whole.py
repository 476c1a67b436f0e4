"""Writes files that are whole or absent, and reads back those that carry a checksum."""

import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from files.tensors import State, WeightsError

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
NAME = 143  # bytes that a file name may have on every file system


def write(path: Path, state: State, notes: dict | None = None) -> None:
    """Write tensors as a safetensors file.

    The notes go into the file's metadata as JSON, with a checksum of the tensors beside them.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = None if notes is None else {"notes": json.dumps(notes), "sha256": checksum(state)}
    try:
        with whole(path) as part:
            save_file(state, part, metadata)
    except SafetensorError as error:  # a full disk, under a name of its own
        raise OSError(errno.ENOSPC, str(error), str(path)) from None


def write_text(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to; then the content is made sure of on disk and gets its own name."""
    part = part_name(path)
    try:
        yield part
        os.chmod(part, 0o666 & ~UMASK)  # safetensors writes files that their owner alone may read
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def part_name(path: Path) -> Path:
    """A name beside that of the file, of this process alone: others may write the same file."""
    ours = f"{socket.gethostname()}.{os.getpid()}.part"
    name = f"{path.name}.{ours}"
    if len(os.fsencode(name)) > NAME:
        name = f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.{ours}"
    return path.with_name(name)


def read_checked(path: Path) -> tuple[State, dict]:
    """What `write` wrote with notes: the tensors and the notes.

    Raises:
        WeightsError: cut short, damaged (the checksum differs), or not written with notes.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged or cut short ({error})") from None
    if "notes" not in metadata:
        raise WeightsError(f"{path}: not a checkpoint of a training run")
    if metadata.get("sha256") != checksum(state):
        raise WeightsError(f"{path}: damaged, its checksum differs from its content")
    return state, json.loads(metadata["notes"])


def checksum(state: State) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {state[key].dtype} {tuple(state[key].shape)}".encode())
        digest.update(as_bytes(state[key]))
    return digest.hexdigest()


def as_bytes(value: Tensor) -> memoryview:
    return memoryview(value.contiguous().flatten().view(torch.uint8).numpy())


def sync_folder(folder: Path) -> None:
    """Make sure of a rename; not every system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
