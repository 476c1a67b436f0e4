"""The way back from a picture to the arguments that made it, its files found again by their hashes."""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import UnionType

from files.errors import UserError
from files.hashes import recall, sha256
from files.pictures import read_settings
from generate.named import ROLES
from generate.record import CONTROL, GROUP, NUMBER, each
from weights.diffusers import model_sha256
from weights.hub import cached
from weights.presets import PRESETS

# What settings are, and what stands in their lists; those of an image prompt and of a net are beside `record`
TEXTS = (
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
)
SETTINGS = {
    **dict.fromkeys((*TEXTS, "prompt", "negative_prompt"), ((str,), str)),
    **dict.fromkeys(("seed", "steps", "height", "width", "clip_skip", "only_masked"), ((int,), str)),
    **dict.fromkeys(("guidance_scale", "guidance_rescale", "image_guidance_scale", "strength"), ((NUMBER,), str)),
    **dict.fromkeys(("lora", "embedding"), ((list,), list)),
    **dict.fromkeys(("groups", "controls"), ((list,), dict)),
    "outpaint": ((list,), int),
    "text_encoder": ((list,), str),
    "sha256": ((dict,), str),
}
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
        UserError: no picture of ours, one that does not say what each file was, a setting of another kind, or a file
            that is nowhere. Ranges are not looked at.
    """
    settings = read_settings(picture)
    if not settings:
        raise UserError(f"`again` {picture}: holds no settings that make it again")
    if flaw := unsound(settings):
        raise UserError(f"`again` {picture}: holds no settings that make it again (its {flaw} is none)")
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
        arguments["text_encoder"] = [found(path) for path in settings.get("text_encoder") or ()]
    for name in ("init", "inpaint"):
        arguments |= {name: found(settings[name])} if settings.get(name) and name not in given else {}
    arguments |= {name: settings.get(name) for name in ("strength", "outpaint", "only_masked")}
    if "lora" not in given:
        arguments["lora"] = [(found(path), weight) for path, weight in settings.get("lora") or ()]
    if "embedding" not in given:
        arguments["embedding"] = [(found(path), called) for path, called in settings.get("embedding") or ()]
    alone = [settings] if settings.get("image") or settings.get("face_embedding") else []
    old = alone if settings.get("groups") is None else settings["groups"]
    anew = groups or [given] * len(old)
    arguments["groups"] = [group_again(group, names, found) for group, names in zip(old, anew, strict=False)]
    nets = settings.get("controls") or []
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
    if "adapter" in said and not {*said, *given} & {"image_encoder"}:  # made of embeddings; a picture anew wants it
        said |= {"image_encoder": encoder_of(Path(said["adapter"]))}
    if isinstance(said.get("curve"), list):
        said["curve"] = ",".join(map(str, said["curve"]))
    if "scale" in said:
        said["scale"] = said["scale"] if isinstance(said["scale"], list) else [said["scale"]]
    return said


def encoder_of(adapter: Path) -> str | None:
    """What a published adapter reads, by name; None: another file, or of face embeddings alone."""
    rows = [row for row in PRESETS.values() if row.kind == "adapter" and row.image_encoder]
    return next((row.image_encoder for row in rows if adapter == cached(row) or sha256(adapter) == row.sha256), None)


def unsound(settings: dict) -> str | None:
    """The first setting that is not such as `record` writes, each of its kind: a picture may come from anywhere."""
    groups, nets = settings.get("groups") or [], settings.get("controls") or []
    needed = ("seed", "prompt", "negative_prompt", "sha256")
    if lost := [name for name in needed if settings.get(name) is None] + ["base"] * ("base" not in settings):
        return lost[0]
    if flaw := unlike(settings, SETTINGS | GROUP):
        return flaw
    loras, embeddings = (settings.get(name) or [] for name in ("lora", "embedding"))
    pairs = [("lora", pair, NUMBER) for pair in loras] + [("embedding", pair, str) for pair in embeddings]
    bad = [name for name, pair, kind in pairs if len(pair) != 2 or not are(str, pair[0]) or not are(kind, pair[1])]
    bad += ["sha256"] * (not are(str | None, *settings["sha256"].values()))
    bad += ["controls"] * any("control" not in net for net in nets)
    flaws = [unlike(group, GROUP) for group in groups] + [unlike(net, CONTROL) for net in nets]
    return next((flaw for flaw in (*bad, *flaws) if flaw), None)


def unlike(settings: Mapping[str, object], kinds_of: Mapping[str, tuple]) -> str | None:
    """The first setting of another kind than the table says, or a list in which something of another kind stands."""
    for name, (kinds, within) in kinds_of.items():
        value = settings.get(name)
        if value is not None and not any(are(kind, value) for kind in kinds):
            return name
        if isinstance(value, list) and not are(within, *value):
            return name
    return None


def are(kind: type | UnionType, *values: object) -> bool:
    return all(isinstance(value, kind) for value in values)


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
