"""What a picture tells of how it was made; `generate.again` is the way back."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import torch

from generate.models import Models
from generate.named import ROLES
from weights.diffusers import model_sha256

NUMBER = float | int
# What an image prompt's settings are, and what stands in their lists
GROUP = {
    "image": ((list,), str),
    "face_embedding": ((list,), str),
    "adapter": ((str,), str),
    "image_encoder": ((str,), str),
    "mask": ((str,), str),
    "framing": ((str,), str),
    "crop_position": ((str,), str),
    "negative_image": ((list,), str),
    "negative_noise": ((NUMBER,), str),
    "less": ((str,), str),
    "scale": ((NUMBER, list), NUMBER),
    "weights": ((list,), NUMBER),
    "layers": ((str,), str),
    "start": ((NUMBER,), str),
    "until": ((NUMBER,), str),
    "curve": ((str, list), NUMBER),
    "structure_scale": ((NUMBER,), str),
    "faceid_v2": ((bool,), str),
}
CONTROL = {  # likewise of a net for structure
    **{name: ((str,), str) for name in ("control", "mask")},
    **{name: ((str, list), str) for name in ("hint", "control_type")},  # several, for a Union
    **{name: ((NUMBER,), str) for name in ("start", "until")},
    "scale": ((NUMBER, list), NUMBER),
    **{name: ((bool,), str) for name in ("edges", "guess")},
}
USUAL = {"layers": "all", "start": 0.0, "until": 1.0, "curve": "constant", "framing": "crop", "crop_position": "centre"}


class Hashes:
    """SHA-256 of all files that a run's pictures depend on, computed on a thread of its own while the models work.

    Args:
        brought: pictures and face embeddings.
        known: hashes of what was no file: pictures out of pipes.
    """

    def __init__(self, models: Models, brought: Sequence[str | Path] = (), known: Mapping[str, str] | None = None):
        self.known = dict(known or {})
        files = [*models.files.values(), *models.controls, *models.base.text_files, *brought]
        files += [one.path for one in (*(lora for lora, _ in models.loras), *models.embeddings)]
        files += [path for adapter in models.adapters for path in (adapter.file, adapter.image_encoder) if path]
        self.found: dict[Path, Future] = {Path(path): Future() for path in files if str(path) not in self.known}
        Thread(target=self.work, daemon=True).start()  # a daemon: nobody waits for it when the run ends early

    def work(self) -> None:
        for path, future in self.found.items():
            try:
                future.set_result(model_sha256(os.path.expanduser(path)))
            except Exception as error:  # noqa: BLE001, raised where the hash is asked for; else that would wait for ever
                future.set_exception(error)

    def result(self) -> dict[str, str]:
        """By the files' names as `public` has them; waits for what is not done yet."""
        return {public(path): future.result() for path, future in self.found.items()} | self.known


def record(
    models: Models,
    hashes: Hashes,
    groups: Sequence[Mapping[str, object]] = (),  # arguments of each `ImageGroup`, `faces` as "face_embedding"
    controls: Sequence[Mapping[str, object]] = (),  # arguments of each `Hint`, its picture as "hint"
    others: Sequence[str] = (),  # files of results beside this one, from a folder
    **settings: object,
) -> dict:
    """All that makes a picture again: the settings, what each file was, its hash."""
    told = [recorded(models, group) for group in groups]
    left_out = other_pictures(told, others) if others else ()
    first = told[0] if told else {}
    return {
        **{role: public(models.files[role]) if role in models.files else None for role in ROLES},
        **{role: public(models.files[role]) for role in ("style_encoder",) if role in models.files},
        **settings,
        **{name: [path for group in told for path in group.get(name, ())] for name in ("image", "face_embedding")},
        **{name: first.get(name) for name in ("scale", "structure_scale")},
        "groups": told,
        "controls": [followed(file, net) for file, net in zip(models.controls, controls, strict=True)],
        **{name: settings[name] and public(settings[name]) for name in ("init", "inpaint") if name in settings},
        "prediction": models.base.schedule.prediction,
        "spacing": models.base.schedule.spacing,
        "text_encoder": [public(path) for path in models.base.text_files],
        "faceid_v2": bool(first.get("faceid_v2")),
        "lora": [[public(lora.path), weight] for lora, weight in models.loras],
        "embedding": called(models, settings) if models.embeddings else [],
        "dtype": str(models.dtype).removeprefix("torch."),
        "storage": models.storage,
        "low_memory": models.low_memory,
        "device": str(models.device),
        "torch": torch.__version__,
        "sha256": {name: digest for name, digest in hashes.result().items() if name not in left_out},
    }


def other_pictures(told: Sequence[Mapping[str, object]], others: Sequence[str]) -> set[str]:
    """Of a folder's pictures those that are in no image prompt of this result."""
    here = {name for group in told for part in ("image", "negative_image") for name in group.get(part, ())}
    return {public(path) for path in others} - here


def called(models: Models, settings: Mapping[str, object]) -> list[list[str]]:
    """The embeddings that the texts call, each with the name; the others change nothing."""
    texts = f"{settings.get('prompt')} {settings.get('negative_prompt')}"
    words = " ".join(texts.replace("\\", "").lower().split())
    found = ((one.path, next((n for n in one.names if n.lower() in words), None)) for one in models.embeddings)
    return [[public(path), name] for path, name in found if name]


def recorded(models: Models, group: Mapping[str, object]) -> dict:
    """An image prompt as `record` tells of it: what is as usual is left out."""
    adapter = models.adapters[group["adapter"]]
    told = {name: value for name, value in group.items() if name in GROUP and value and value != USUAL.get(name)}
    if adapter.faceid_v2 and group.get("structure_scale") is None:
        told["structure_scale"] = 1.0
    told |= {name: [public(path) for path in told.get(name, ())] for name in ("image", "face_embedding")}
    told |= {name: each(public, told[name]) for name in ("negative_image", "mask") if name in told}
    files = {"adapter": public(adapter.file), "image_encoder": adapter.image_encoder and public(adapter.image_encoder)}
    return told | files | {"faceid_v2": adapter.faceid_v2, "scale": group["scale"]}


def followed(file: Path, net: Mapping[str, object]) -> dict:
    """A net for structure as `record` tells of it: what is as usual is left out."""
    told = {name: value for name, value in net.items() if name in CONTROL and value is not None and value is not False}
    shown = {name: each(public, told[name]) for name in ("hint", "mask") if name in told}
    return told | shown | {"control": public(file)}


def each(change: Callable[[str], str], value: str | list[str]) -> str | list[str]:
    """One name changed, or all of a list."""
    return [change(one) for one in value] if isinstance(value, list) else change(value)


def public(path: str | Path) -> str:
    """A file's name as it may be shown to others: the home folder, which bears its owner's name, is `~`."""
    text, home = os.fspath(path), os.path.expanduser("~")
    inside = (
        os.path.isabs(text) and home != os.sep and os.path.realpath(text).startswith(os.path.realpath(home) + os.sep)
    )
    return os.path.join("~", os.path.relpath(os.path.realpath(text), os.path.realpath(home))) if inside else text
