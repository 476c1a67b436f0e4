"""The way back from a picture to the arguments that made it, its files found again by their hashes."""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import UnionType

from files.errors import UserError
from files.hashes import recall, sha256
from files.pictures import read_settings
from generate.named import ROLES
from generate.record import CONTROL, GROUP, each
from weights.diffusers import model_sha256
from weights.hub import cached
from weights.presets import PRESETS

NEARBY = 1000  # files of a folder that are looked through at most


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
    for role in ("base", "vae", "style_encoder"):
        arguments |= {role: found(settings[role])} if settings.get(role) and role not in given else {}
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
    arguments["controls"] = [{name: each(found, v) if name in files else v for name, v in net.items()} for net in left]
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
            *of(
                *ROLES,
                "style_encoder",
                "init",
                "inpaint",
                "sampler",
                "prediction",
                "spacing",
                "storage",
                "dtype",
                "prompt_syntax",
            ),
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
