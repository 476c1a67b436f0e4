"""Textual inversion (arXiv 2208.01618): files of vectors that stand in a prompt like words, in all forms that are shared.

    A1111               string_to_param.*, with notes; also as text in a PNG
    diffusers           one key, the word that calls it
    kohya-ss            emb_params
    SDXL, two towers    clip_l and clip_g, or text_encoders_0 and text_encoders_1
    inside a LoRA       bundle_emb.NAME. before any of these

Each is (n, width) or, one vector, (width,). A list of dictionaries is read as all of them together.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clip.tokenizer import CHUNK
from files.errors import WeightsError, untrusted
from files.pictures import text_in
from files.tensors import State, read
from weights.kinds import INVERSION, UNKNOWN, what_is

BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(.+)", re.DOTALL)
TOWERS = {"clip_l": 0, "text_encoders_0": 0, "clip_g": 1, "text_encoders_1": 1}
NAMELESS = re.compile(r"string_to_param\..*|emb_params|" + "|".join(TOWERS), re.DOTALL)
MADE_FOR = {(768,): "SD 1.x", (1024,): "SD 2.x", (768, 1280): "SDXL", (1280,): "SDXL's second text tower alone"}
PNG_TEXT = "sd-ti-embedding"


@dataclass(frozen=True)
class Embedding:
    """One that was read."""

    path: Path
    names: tuple[str, ...]  # that call it
    vectors: tuple[Tensor, ...]  # (n, width), for each text tower


def read_embeddings(path: str | Path, called: str | None = None) -> list[Embedding]:
    """All textual inversions of a file, most often one.

    Args:
        called: what is to call it, instead of its own name or the file's; of several in a file, the one of that name.

    Raises:
        WeightsError: unreadable, another kind of file, vectors that do not go together, or a name that is none.
    """
    path = Path(path)
    if called is not None and not called.split():
        raise WeightsError(f"{path}: FILE:NAME wants a name behind the colon")
    groups = grouped(path, in_png(path) or read(path))
    if len(groups) > 1 and called is not None:
        if called not in groups:
            raise WeightsError(f"{path}: holds {', '.join(groups)}, and no {called}")
        groups = {called: groups[called]}
    file = (path.stem, path.name) if len(groups) == 1 else ()
    found = []
    for word, group in groups.items():
        names = (called,) if called else dict.fromkeys(name for name in (word, *file) if name.split())
        found.append(Embedding(path, tuple(names), vectors_of(path, group)))
    return found


def grouped(path: Path, state: State) -> dict[str, State]:
    """The tensors of each embedding, by the word that the file has for it; '' where it has none."""
    bundled = {key: match for key in state if (match := BUNDLED.fullmatch(key))}
    if bundled:  # beside them there are a LoRA's
        groups: dict[str, State] = {}
        for key, match in bundled.items():
            groups.setdefault(match[1], {})[match[2]] = state[key]
        return groups
    if not (kind := what_is(state)).startswith((UNKNOWN, INVERSION)):
        raise WeightsError(f"{path}: a textual-inversion embedding is wanted here; this is {kind}")
    state = {re.sub(r"^\d+\.(?=.)", "", key): w for key, w in state.items()}  # their places in a list
    nameless = {key: w for key, w in state.items() if NAMELESS.fullmatch(key)}
    others = {key: {key: w} for key, w in state.items() if key not in nameless}
    return ({"": nameless} if nameless else {}) | others


def vectors_of(path: Path, group: State) -> tuple[Tensor, ...]:
    """(n, width) for each text tower."""
    towers = {TOWERS.get(key, 0): w.reshape(1, -1) if w.ndim == 1 else w for key, w in group.items()}
    whole = len(towers) == len(group) and sorted(towers) in ([0], [0, 1])
    vectors = tuple(w.float() for _, w in sorted(towers.items()) if w.is_floating_point())
    rows = {w.shape[0] for w in vectors if w.ndim == 2 and w.shape[1]}
    if not whole or len(vectors) != len(group) or len(rows) != 1 or any(w.ndim != 2 for w in vectors):
        raise WeightsError(
            f"{path}: no vectors of an embedding ({told(group)}); (n, width) is wanted, for each tower alike"
        )
    if not 1 <= min(rows) <= CHUNK:
        raise WeightsError(f"{path}: {min(rows)} vectors; 1 to {CHUNK} fit into a prompt")
    if not all(w.isfinite().all() for w in vectors):
        raise WeightsError(f"{path}: its vectors are not finite")
    return vectors


def told(group: State) -> str:
    return ", ".join(f"{key} {tuple(w.shape)}" for key, w in list(group.items())[:4])


def in_png(path: Path) -> State | None:
    """What A1111 writes into the pictures that it makes while it trains: JSON in base64."""
    if path.suffix.lower() != ".png":
        return None
    text = text_in(path, PNG_TEXT)
    if text is None:
        raise WeightsError(f"{path}: a picture without an embedding in it")
    wrong = f"{path}: its embedding cannot be read"
    with untrusted(WeightsError, wrong):
        content = json.loads(base64.b64decode(text))
        found = {f"string_to_param.{key}": w["TORCHTENSOR"] for key, w in content["string_to_param"].items()}
        return {key: torch.tensor(w, dtype=torch.float32) for key, w in found.items()}


def check_embeddings(embeddings: Sequence[Embedding], widths: Sequence[int]) -> None:
    """Refuse what does not fit a base, and two of one name.

    Args:
        widths: of the base's text towers.
    """
    owners: dict[str, Path] = {}
    for embedding in embeddings:
        found = tuple(w.shape[1] for w in embedding.vectors)
        if found != tuple(widths):
            fits = f"an embedding for {MADE_FOR.get(found, 'another base')}"
            wide, wanted = (" and ".join(map(str, some)) for some in (found, widths))
            raise WeightsError(f"{embedding.path}: {fits}, its vectors are {wide} wide; this base reads {wanted}")
        for name in embedding.names:
            if (other := owners.setdefault(name.lower(), embedding.path)) is not embedding.path:
                raise WeightsError(
                    f"{other} and {embedding.path}: both are called {name}; FILE:NAME calls one otherwise"
                )
