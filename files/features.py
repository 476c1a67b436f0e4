"""Files of image embeddings: what an adapter reads of pictures and of their absence, instead of the pictures.

x.safetensors   ours: `image`, `negative`, `faces`, `masks`, and in the notes what encoder and adapter they are of
x.ipadpt        diffusers': a list, for each adapter [negative; positive]
x.ipadpt        ComfyUI_IPAdapter_plus': one tensor, the positive alone
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from files.errors import UserError, untrusted
from files.tensors import State, read
from files.whole import write

SUFFIXES = (".safetensors", ".ipadpt")
PARTS = {"image": (2, 3), "negative": (2, 3), "faces": (2,), "masks": (4,)}  # and how many axes each may have
ROLES = ("adapter", "image_encoder")


@dataclass(frozen=True)
class Features:
    """What an adapter reads, a row for each picture."""

    image: Tensor | None = None  # CLIP's embeddings (n, width), or its patches (n, 1 + patches, width)
    negative: Tensor | None = None  # likewise, of their absence; None: what the adapter knows as "no image"
    faces: Tensor | None = None  # (n, 512), which FaceID adapters read
    masks: Tensor | None = None  # (n, 1, height, width) in [0, 1]: tiles, each an image prompt of its own
    # Of the adapter and the image encoder that it was made with.
    sha256: Mapping[str, str] = field(default_factory=dict)
    name: str = "the embedding"  # for messages

    def __len__(self) -> int:
        return len(self.faces if self.image is None else self.image)


def is_features(name: object) -> bool:
    """Whether a file is no picture but an embedding, by its name."""
    return str(name).lower().endswith(SUFFIXES)


def read_features(path: str | Path) -> Features:
    """Of a file that `write_features`, diffusers or ComfyUI_IPAdapter_plus has written. Nothing in it is run.

    Raises:
        UserError: missing, damaged, or another kind of file; embeddings of several adapters.
    """
    path = Path(path).expanduser()
    state = read(path)
    pickled = path.suffix.lower() == ".ipadpt"
    found = Features(**shared(path, state), name=str(path)) if pickled else ours(path, state)
    parts = {name: x for name in PARTS if (x := getattr(found, name)) is not None}
    wrong = next((name for name, x in parts.items() if not sound(x, PARTS[name])), None)
    if wrong:
        raise UserError(
            f"{path}: its {wrong} are {shape(parts[wrong])}; finite numbers, a row for each picture, are wanted"
        )
    if len({len(x) for x in parts.values()}) > 1 or (found.negative is not None and alike(found)):
        told = ", ".join(f"{name} {tuple(x.shape)}" for name, x in parts.items())
        raise UserError(f"{path}: parts that do not go together: {told}")
    return found


def alike(found: Features) -> bool:
    return found.image is None or found.image.shape != found.negative.shape


def sound(x: Tensor, axes: tuple[int, ...]) -> bool:
    return x.is_floating_point() and x.ndim in axes and x.numel() > 0 and bool(x.float().isfinite().all())


def shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def ours(path: Path, state: State) -> Features:
    if strangers := [key for key in state if key not in PARTS]:
        raise UserError(
            f"{path}: an embedding of pictures is wanted here, of {', '.join(PARTS)}; it has {strangers[0]}"
        )
    if not {"image", "faces"} & state.keys():
        raise UserError(f"{path}: an embedding without `image` or `faces`; it has {', '.join(state)}")
    with untrusted(UserError, f"{path}: damaged, its notes cannot be read"):
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {}).get("notes", "{}"))
        sha256 = {role: str(notes[role]) for role in ROLES if notes.get(role)}
    return Features(**state, sha256=sha256, name=str(path))


def shared(path: Path, state: State) -> State:
    """The two forms of .ipadpt: a bare tensor has no name, those of a list have numbers."""
    if list(state) == [""]:
        return {"image": state[""]}
    if not all(key.isdecimal() for key in state):
        raise UserError(
            f"{path}: an embedding of pictures is wanted here: a tensor, or a list of them; it has {next(iter(state))}"
        )
    if len(state) > 1:
        raise UserError(f"{path}: holds embeddings for {len(state)} adapters; those of one are wanted here")
    (both,) = state.values()
    if both.ndim not in (3, 4) or both.shape[0] not in (1, 2):
        raise UserError(
            f"{path}: of shape {tuple(both.shape)}; diffusers' are (2, pictures, ...), negative and positive"
        )
    return {"image": both[-1]} | ({"negative": both[0]} if len(both) == 2 else {})


def write_features(path: Path, features: Features) -> None:
    """As a .safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: x for name in PARTS if (x := getattr(features, name)) is not None}
    write(path, state, dict(features.sha256))
