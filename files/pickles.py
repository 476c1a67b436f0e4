"""The tensors of a pickle (.ckpt, .bin, .pt, .pth), or of a TorchScript archive, read as data: nothing in them is run.

A pickle is a program that names functions and has them called. The few names that files of weights have (what
`torch.save` and `torch.jit.save` write) are known here; each becomes a class that does no more than keep what it was
given, and tensors are made of that afterwards. Any other name is refused.
"""

import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, UntypedStorage

from files.errors import UserError, WeightsError, untrusted

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
FLOATS = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}  # as NumPy calls them
ARRAY = ".multiarray._reconstruct"
PARAMETERS = "torch.nn.modules.container.ParameterDict"
SCRIPT = "__torch__."  # where TorchScript has its classes
INERT = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)|"
    r"torch\._tensor\._rebuild_from_type_v2|torch\.(Size|device|Tensor|nn\.parameter\.Parameter)|"
    r"torch\.serialization\._get_layout|__torch__\..+|torch\.jit\._pickle\.\w+|"
    r"torch\.nn\.modules\.container\.ParameterDict|(builtins|__builtin__)\.(set|complex|bytearray)|_codecs\.encode|collections\.Counter|"
    # NumPy's numbers, as trainers note them: the best loss, the learning rate; and its arrays.
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+DType)|"
    # A key in the first Stable Diffusion checkpoints.
    r"pytorch_lightning\.callbacks\.model_checkpoint\.ModelCheckpoint"
)
# Of opcodes that nothing writes which is read here: names by number, numbers as text, old ways to make objects.
FORBIDDEN = {"EXT1", "EXT2", "EXT4", "PERSID", "INST", "OBJ", "NEWOBJ_EX", "INT", "LONG", "BYTEARRAY8", "NEXT_BUFFER"}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # so began files before PyTorch 1.6
STEPS = 1_000_000  # of a pickle, and names in what it makes; a whole SDXL checkpoint takes a tenth
DEPTH, NAME = 64, 1000  # of dictionaries, or modules, in each other; characters of a name
MODEL = ("state_dict", "model_state_dict", "model", "module")  # what trainers call the model beside their notes


class Unfit(UserError):
    """What is wrong with a file; `read_pickle` puts the file's name before it."""


DAMAGED = "damaged or cut short, not a whole PyTorch file"


def damaged(reason: str) -> Unfit:
    return Unfit(f"{DAMAGED} ({reason})")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """All tensors under flat dotted names, memory-mapped unless the file is older than PyTorch 1.6.

    The names of nested dictionaries, and of the modules of a TorchScript archive, are joined by dots; of what a trainer
    saved the model alone is taken.

    Raises:
        WeightsError: cut short, no PyTorch file, or it asks for code to be run.
    """
    limit = 2 * os.path.getsize(path) + (1 << 24)
    try:
        with path.open("rb") as file:
            content, storage = (open_zip if file.peek(2)[:2] == b"PK" else open_old)(path, file)
            state, left = {}, limit
            for name, value in named(model_of(content)):
                state[name] = tensor(value, storage, limit)
                left -= state[name].nbytes
                if left < 0:  # some of them may share what there is of them
                    raise damaged("its tensors claim more bytes than it has")
    except Unfit as error:
        raise WeightsError(f"{path}: {error}") from None
    return state


class Inert:
    """An object that a pickle asks for: what it is called, and what it was given. It does nothing."""

    name = ""
    args: tuple = ()
    state: object = None

    def __new__(cls, *args: object):  # a pickle can make an object without its __init__
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state


@dataclass(frozen=True)
class Stored:
    """Where the numbers of a tensor are, and of what type."""

    dtype: torch.dtype
    key: str


class Unpickler(pickle.Unpickler):
    """Makes Python's own containers, numbers and strings; for all else `Inert` and `Stored`."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.stored: dict[str, Stored] = {}

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if module.partition(".")[0] == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if full == "collections.OrderedDict":
            return OrderedDict
        if INERT.fullmatch(full):
            return type("Inert", (Inert,), {"name": full})
        if full.startswith("torch._utils._rebuild_"):
            raise Unfit(f"holds tensors that are quantised, sparse or without data ({full}); plain ones are wanted")
        raise Unfit(f"refused, the pickle asks to run code ({full[:120]})")

    def persistent_load(self, pid: object) -> Stored:
        match pid:
            case ("storage", torch.dtype() as dtype, str() as key, _, int(), *view) if view in ([], [None]):
                return self.stored.setdefault(key, Stored(dtype, key))
        raise damaged("a storage of an unknown kind")


def unpickle(file: BinaryIO) -> tuple[object, dict[str, Stored]]:
    """The next object in a file, and the storages that it speaks of."""
    start = file.tell()
    unpickler = Unpickler(file)
    with untrusted(Unfit, DAMAGED):
        for step, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if opcode.name in FORBIDDEN:
                raise damaged(f"{opcode.name} in its pickle")
            # Python's unpickler makes a table as long as the largest number under which it is to remember something.
            if step > STEPS or ("PUT" in opcode.name and arg > STEPS):
                raise damaged("its pickle is too long for one of weights")
        file.seek(start)
        return unpickler.load(), unpickler.stored


Storage = Callable[[Stored], UntypedStorage]


def open_zip(path: Path, file: BinaryIO) -> tuple[object, Storage]:
    """What a file of PyTorch 1.6 and later holds; the numbers of its tensors lie in it as they lie in memory."""
    with untrusted(Unfit, DAMAGED):
        members = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
        mapped = UntypedStorage.from_file(str(path), False, os.path.getsize(path))
    folder = next((name[: -len("data.pkl")] for name in members if re.fullmatch(r"([^/]*/)?data\.pkl", name)), None)
    if folder is None:
        if not members:
            raise damaged("an empty zip archive")
        raise Unfit(f"a zip archive of something else ({', '.join([*members][:3])}), not weights; give what is in it")

    def part(name: str) -> tuple[int, int]:
        """The first byte of a part of the archive, and its length."""
        info = members.get(folder + name)
        if info is None or info.header_offset < 0:
            raise damaged(f"its part {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise damaged(f"its part {name} is compressed")
        file.seek(info.header_offset + 26)
        name_and_extra = file.read(4)  # their lengths; they stand between the header and the content
        start = info.header_offset + 30 + sum(struct.unpack("<HH", name_and_extra.ljust(4, b"\0")))
        if start + info.file_size > len(mapped):
            raise damaged(f"its part {name} is cut short")
        return start, info.file_size

    def content(name: str) -> bytes:
        start, length = part(name)
        file.seek(start)
        return file.read(length)

    def storage(stored: Stored) -> UntypedStorage:
        start, length = part(f"data/{stored.key}")
        return mapped[start : start + length]

    if folder + "byteorder" in members and content("byteorder") == b"big":
        raise Unfit("written on a machine of the other byte order; save it there as safetensors")
    return unpickle(io.BytesIO(content("data.pkl")))[0], storage


def open_old(path: Path, file: BinaryIO) -> tuple[object, Storage]:
    """What a file of PyTorch before 1.6 holds: pickles, and behind them the storages, each behind its length."""
    if unpickle(file)[0] != MAGIC or unpickle(file)[0] != PROTOCOL:
        raise damaged("PyTorch did not write it")
    unpickle(file)  # how long C's integers were
    content, stored = unpickle(file)
    keys, _ = unpickle(file)
    storages, left = {}, os.path.getsize(path) - file.tell()
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in stored:
            raise damaged("numbers that belong to no tensor")
        length = int.from_bytes(file.read(8), "little") * stored[key].dtype.itemsize
        left -= 8 + length
        if left < 0:
            raise damaged("its numbers are cut short")
        numbers = bytearray(file.read(length) or 1)  # no memory can be made of none
        storages[key] = torch.frombuffer(numbers, dtype=torch.uint8).untyped_storage()

    def storage(stored: Stored) -> UntypedStorage:
        if stored.key not in storages:
            raise damaged("numbers that it speaks of are missing")
        return storages[stored.key]

    return content, storage


def model_of(content: object) -> object:
    """What a trainer saved, without its notes (optimizer, step, ...)."""
    if isinstance(content, Mapping):
        return next((content[key] for key in MODEL if isinstance(content.get(key), Mapping)), content)
    return content


def named(content: object) -> Iterator[tuple[str, Inert]]:
    """The tensors in nested dictionaries or TorchScript's modules, each under its dotted name; of a list by their places."""
    todo, count = [("", content, 0)], 0
    while todo:
        name, value, depth = todo.pop()
        count += 1
        if count > STEPS or depth > DEPTH or len(name) > NAME:
            raise damaged("it has no end")
        if isinstance(value, Inert) and value.name.startswith(SCRIPT):
            value = value.state
        if isinstance(value, Inert) and value.name == PARAMETERS and isinstance(value.state, Mapping):
            value = value.state.get("_parameters")
        if isinstance(value, list) and (not name or any(isinstance(item, Mapping) for item in value)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            inner = [(f"{name}.{key}" if name else str(key), item, depth + 1) for key, item in value.items()]
            todo += reversed(inner)
        elif isinstance(value, Inert) and ("._rebuild_" in value.name or value.name.endswith(ARRAY)):
            yield name, value


def tensor(value: object, storage: Storage, limit: int) -> Tensor:
    """Of the arguments of one of torch's functions that rebuild tensors: the tensor, at most `limit` bytes of it."""
    while isinstance(value, Inert):
        match value.name.rpartition("_rebuild_")[2], value.args:
            case "parameter" | "parameter_with_state", (inner, *_):
                value = inner
            case "from_type_v2", (type() as function, _, tuple() as args, *_) if issubclass(function, Inert):
                value = function(*args)
            case "tensor" | "tensor_v2", (Stored() as stored, int() as offset, tuple() as shape, tuple() as stride, *_):
                return view(storage(stored), stored.dtype, offset, shape, stride, limit)
            case "tensor_v3", (
                Stored() as stored, int() as offset, tuple() as shape, tuple() as stride, _, _, torch.dtype() as dtype, *_
            ):  # fmt: skip
                return view(storage(stored), dtype, offset, shape, stride, limit)
            case _:
                return array(value.state)
    raise damaged("a tensor made of other things than numbers")


def array(state: object) -> Tensor:
    """Of what NumPy notes of an array of floating-point numbers; in an old pickle its bytes are text."""
    match state:
        case _, tuple() as shape, Inert(args=(str() as kind, *_), state=(_, "<", *_)), False, content if kind in FLOATS:
            with untrusted(Unfit, DAMAGED):
                content = content if isinstance(content, bytes) else content.args[0].encode("latin1")
                return torch.frombuffer(bytearray(content), dtype=FLOATS[kind]).reshape(shape)
    raise damaged("a tensor made of other things than numbers")


def view(storage: UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple, stride: tuple, limit: int) -> Tensor:
    """Numbers of a storage as a tensor, after a look that all of them are there."""
    if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)):
        raise damaged("a tensor of no shape")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if (0 not in shape and (last + 1) * dtype.itemsize > len(storage)) or prod(shape) * dtype.itemsize > limit:
        raise damaged("a tensor larger than what there is of it")
    with untrusted(Unfit, DAMAGED):
        return torch.empty(0, dtype=dtype).set_(storage).as_strided(shape, stride, offset)
