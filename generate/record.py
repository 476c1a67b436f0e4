"""What a picture tells of how it was made, and the way back: the files of a run found again by their hashes."""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import UnionType

import torch

from files.errors import UserError
from files.hashes import recall, sha256
from files.pictures import read_settings
from generate.models import ROLES, Models
from weights.diffusers import model_sha256
from weights.hub import cached
from weights.presets import PRESETS

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
    **{name: ((str,), str) for name in ("control", "hint", "mask", "control_type")},
    **{name: ((NUMBER,), str) for name in ("scale", "start", "until")},
    **{name: ((bool,), str) for name in ("edges", "guess")},
}
USUAL = {"layers": "all", "start": 0.0, "until": 1.0, "curve": "constant", "framing": "crop", "crop_position": "centre"}
NEARBY = 1000  # files of a folder that are looked through at most


class Hashes:
    """SHA-256 of all files that a run's pictures depend on, computed on a thread of its own while the models work.

    Args:
        brought: pictures and face embeddings.
        known: hashes of what was no file: pictures out of pipes.
    """

    def __init__(self, models: Models, brought: Sequence[str | Path] = (), known: Mapping[str, str] | None = None):
        self.known = dict(known or {})
        files = [
            *models.files.values(),
            *models.controls,
            *models.base.text_files,
            *brought,
            *(lora.path for lora, _ in models.loras),
        ]
        files += [embedding.path for embedding in models.embeddings]
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
    groups: Sequence[Mapping[str, object]] = (),
    controls: Sequence[Mapping[str, object]] = (),
    others: Sequence[str] = (),
    **settings: object,
) -> dict:
    """All that makes a picture again: the settings, what each file was, its hash.

    Args:
        groups: of each image prompt the arguments of `generate.ImageGroup`, the face embeddings as "face_embedding".
        controls: of each of `models.controls` the arguments of `generate.Hint`, the picture as "hint".
        others: files of results beside this one, from a folder.
    """
    told = [recorded(models, group) for group in groups]
    here = {name for group in told for part in ("image", "negative_image") for name in group.get(part, ())}
    left_out = {public(path) for path in others} - here
    first = told[0] if told else {}
    words = " ".join(f"{settings.get('prompt')} {settings.get('negative_prompt')}".replace("\\", "").lower().split())
    inversions = [(one.path, next((n for n in one.names if n.lower() in words), None)) for one in models.embeddings]
    return {
        **{role: public(models.files[role]) if role in models.files else None for role in ROLES},
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
        "embedding": [[public(path), name] for path, name in inversions if name],  # the others change nothing
        "dtype": str(models.dtype).removeprefix("torch."),
        "storage": models.storage,
        "low_memory": models.low_memory,
        "device": str(models.device),
        "torch": torch.__version__,
        "sha256": {name: digest for name, digest in hashes.result().items() if name not in left_out},
    }


def recorded(models: Models, group: Mapping[str, object]) -> dict:
    """An image prompt as `record` tells of it: what is as usual is left out."""
    adapter = models.adapters[group["adapter"]]
    told = {name: value for name, value in group.items() if name in GROUP and value and value != USUAL.get(name)}
    if adapter.faceid_v2 and group.get("structure_scale") is None:
        told["structure_scale"] = 1.0
    told |= {name: [public(path) for path in told.get(name, ())] for name in ("image", "face_embedding")}
    told |= {"negative_image": [public(path) for path in told["negative_image"]]} if "negative_image" in told else {}
    told |= {"mask": public(told["mask"])} if "mask" in told else {}
    encoder = adapter.image_encoder
    return told | {
        "adapter": public(adapter.file),
        "image_encoder": encoder and public(encoder),
        "faceid_v2": adapter.faceid_v2,
        "scale": group["scale"],
    }


def followed(file: Path, net: Mapping[str, object]) -> dict:
    """A net for structure as `record` tells of it: what is as usual is left out."""
    told = {name: value for name, value in net.items() if name in CONTROL and value is not None and value is not False}
    return told | {name: public(told[name]) for name in ("hint", "mask") if name in told} | {"control": public(file)}


def public(path: str | Path) -> str:
    """A file's name as it may be shown to others: the home folder, which bears its owner's name, is `~`."""
    text, home = os.fspath(path), os.path.expanduser("~")
    inside = (
        os.path.isabs(text) and home != os.sep and os.path.realpath(text).startswith(os.path.realpath(home) + os.sep)
    )
    return os.path.join("~", os.path.relpath(os.path.realpath(text), os.path.realpath(home))) if inside else text


def again(
    picture: Path,
    given: Container[str] = (),
    groups: Sequence[Container[str]] = (),
    controls: Sequence[Container[str]] = (),
) -> dict:
    """The arguments that made a picture, its files found again; "groups" holds those of each image prompt.

    "controls" those of each net for structure.

    Args:
        given: arguments that are given anew: their files are not looked for.
        groups: those of each image prompt that is given anew; there are as many then. (): all are as they were, but for
            `given`.
        controls: likewise of each net for structure.

    Raises:
        UserError: no picture of ours, one that does not say what each file was, or a file that is nowhere.
    """
    settings = read_settings(picture)
    if not settings or not sound(settings):
        raise UserError(f"`again` {picture}: holds no settings that make it again")
    hashes, beside = settings["sha256"], picture.parent

    def found(name: str) -> str:
        return str(find_again(name, hashes.get(name), beside))

    arguments = {
        name: settings.get(name) for name in ("prompt", "negative_prompt", "sampler", "steps", "guidance_scale")
    }
    arguments |= {name: settings.get(name) for name in ("height", "width", "prediction", "spacing", "storage")}
    arguments["low_memory"] = bool(settings.get("low_memory"))
    arguments |= {
        "image_guidance_scale": settings.get("image_guidance_scale"),
        "guidance_rescale": settings.get("guidance_rescale") or 0.0,
        "prompt_syntax": settings.get("prompt_syntax") or "plain",
        "long_prompt": bool(settings.get("long_prompt")),
        "clip_skip": settings.get("clip_skip") or 0,
    }
    arguments |= {"seed": settings["seed"], "dtype_name": settings.get("dtype")}
    arguments |= {role: found(settings[role]) for role in ("base", "vae") if settings.get(role) and role not in given}
    if "text_encoder" not in given:
        arguments["text_encoder"] = [found(path) for path in settings.get("text_encoder", ())]
    for name in ("init", "inpaint"):
        arguments |= {name: found(settings[name])} if settings.get(name) and name not in given else {}
    arguments |= {name: settings.get(name) for name in ("strength", "outpaint", "only_masked")}
    if "lora" not in given:
        arguments["lora"] = [(found(path), weight) for path, weight in settings.get("lora", ())]
    if "embedding" not in given:
        arguments["embedding"] = [(found(path), called) for path, called in settings.get("embedding", ())]
    old = settings.get("groups", [settings] if settings.get("image") or settings.get("face_embedding") else [])
    anew = groups or [given] * len(old)
    arguments["groups"] = [group_again(group, names, found) for group, names in zip(old, anew, strict=False)]
    nets = settings.get("controls", [])
    anew = zip(nets, controls or [()] * len(nets), strict=False)
    left = [{name: net[name] for name in net if name in CONTROL and name not in names} for net, names in anew]
    files = ("control", "hint", "mask")
    arguments["controls"] = [{name: found(v) if name in files else v for name, v in net.items()} for net in left]
    return arguments


def group_again(group: Mapping[str, object], given: Container[str], found: Callable[[str], str]) -> dict:
    """The arguments of an image prompt; what is given anew is not looked for."""
    said = {name: value for name in GROUP if (value := group.get(name)) is not None and name not in given}
    if "adapter" in given or "image_encoder" in given:  # another adapter brings its own
        said.pop("image_encoder", None)
    for name in ("image", "face_embedding", "negative_image"):
        said |= {name: [found(path) for path in said[name]]} if name in said else {}
    for name in ("adapter", "image_encoder", "mask"):
        said |= {name: found(said[name])} if name in said else {}
    if "scale" in said:
        said["scale"] = said["scale"] if isinstance(said["scale"], list) else [said["scale"]]
    return said


def sound(settings: dict) -> bool:
    """Whether settings are such as `record` writes, each of its kind: a picture may come from anywhere."""

    def are(kinds: type | UnionType, *values: object) -> bool:
        return all(isinstance(value, kinds) for value in values)

    def of(*names: str) -> list[object]:
        return [settings.get(name) for name in names]

    hashes, groups = settings.get("sha256"), settings.get("groups", [])
    controls = settings.get("controls", [])
    if not are(list, groups, controls) or not are(dict, *groups, *controls):
        return False
    if not all(sound_group(group) for group in (settings, *groups)):
        return False
    if not all(sound_group(net, CONTROL) and "control" in net for net in controls):
        return False
    lists = {name: settings.get(name, []) for name in ("text_encoder", "lora", "embedding")}
    if not (are(dict, hashes) and are(list, *lists.values()) and {"base", "seed"} <= settings.keys()):
        return False
    loras, embeddings = lists.pop("lora"), lists.pop("embedding")
    names = [name for paths in lists.values() for name in paths]
    return (
        are(
            str | None,
            *hashes.values(),
            *of(*ROLES, "init", "inpaint", "sampler", "prediction", "spacing", "storage", "dtype", "prompt_syntax"),
        )
        and are(str, *names, *of("prompt", "negative_prompt"))
        and are(int | None, *of("seed", "steps", "height", "width", "clip_skip", "only_masked"))
        and are(list | None, settings.get("outpaint"))
        and are(int, *(settings.get("outpaint") or ()))
        and are(
            float | int | None,
            *of("guidance_scale", "guidance_rescale", "image_guidance_scale", "strength"),
        )
        and all(
            are(list, pair) and len(pair) == 2 and are(str, pair[0]) and are(float | int, pair[1]) for pair in loras
        )
        and all(are(list, pair) and len(pair) == 2 and are(str, *pair) for pair in embeddings)
    )


def sound_group(group: dict, kinds_of: Mapping[str, tuple] = GROUP) -> bool:
    """Likewise of one image prompt, or of one net for structure."""
    return all(
        any(isinstance(value, kind) for kind in kinds)
        and all(isinstance(one, within) for one in (value if isinstance(value, list) else ()))
        for name, (kinds, within) in kinds_of.items()
        if (value := group.get(name)) is not None
    )


def find_again(name: str, wanted: str | None, beside: Path) -> Path:
    """The file that a picture was made with: under its old name, or wherever its content is.

    Looked for are the old place, the published file of that hash, large files hashed before (`files.hashes`), and the
    folder of the picture and the current one.

    Args:
        name, wanted: as `record` wrote them: the file's name and its SHA-256; None where none was written.
        beside: the folder of the picture.

    Raises:
        UserError: nothing with that content is there.
    """
    old = Path(os.path.expanduser(name))
    there = os.path.exists(old)  # unlike Path.exists, no error for names that no file can have
    if there and (wanted is None or model_sha256(old) == wanted):
        return old
    published = (preset for preset in PRESETS.values() if preset.sha256 == wanted and wanted)
    places = [path for preset in published if (path := cached(preset))]
    places += [Path(path) for path, entry in recall().items() if entry[-1] == wanted]
    for folder in dict.fromkeys((beside, Path())):
        near = sorted(path for path in folder.iterdir() if path.suffix == old.suffix) if folder.is_dir() else []
        places += near[:NEARBY]
    for path in places:
        if path.is_file() and sha256(path) == wanted:
            return path
    found = "has another content now" if there else "is not there"
    raise UserError(f"{name}: {found}, and no file with its SHA-256 ({(wanted or 'unknown')[:10]}...) was found")
