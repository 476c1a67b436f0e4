"""Image prompts and nets for structure out of flags, each with all that belongs to it; no file is opened yet."""

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from cli.flags import called
from cli.terminal import warn
from files.errors import UserError
from files.features import SUFFIXES
from generate.layers import read_curve

# What belongs to an image prompt, and what it is where nothing is said
OF_IMAGE = {
    "adapter": None,
    "scale": None,
    "weights": (),
    "layers": "all",
    "start": 0.0,
    "until": 1.0,
    "curve": "constant",
    "mask": None,
    "framing": "crop",
    "crop_position": "centre",
    "negative_image": [],
    "negative_noise": 0.0,
    "less": None,
    "save_embedding": None,
    "each": False,
    "face_embedding": [],
    "structure_scale": None,
    "faceid_v2": False,
}
# Likewise to a ControlNet or T2I-Adapter
OF_CONTROL = {
    "hint": None,
    "edges": False,
    "scale": 1.0,
    "start": 0.0,
    "until": 1.0,
    "mask": None,
    "guess": False,
    "control_type": None,
}
OF_BOTH = ("scale", "start", "until", "mask")
Group = argparse.Namespace  # with the names of one of these
Told = Mapping[str, object]  # flags by their names


def image_groups(opened: Iterable[Group], common: Told, before: Sequence[Told] = ()) -> list[Group]:
    """Every image prompt with all that belongs to it.

    Args:
        opened: the groups of the command line.
        common: what stands before the first, by name; None is not given.
        before: the groups of a picture that is made again: what is not said anew for each in turn is as it was. Where none
            is opened, all of them.

    Raises:
        UserError: what belongs to an image prompt, and there is none; several scales for more than one; a curve
            that says nothing.
    """
    given = [vars(group) for group in opened if hasattr(group, "image")]
    common = {name: common[name] for name in OF_IMAGE if common.get(name) is not None}
    if not given and not before and "face_embedding" in common:
        given = [{"image": []}]
    given = given or [{} for _ in before]
    old = [*before, *({} for _ in given)]
    groups = [Group(**{"image": []} | OF_IMAGE | old[i] | common | group) for i, group in enumerate(given)]
    shared = {"adapter", *OF_BOTH} if any(hasattr(group, "control") for group in opened) else {"adapter"}
    if lone := next((name for name in common if name not in shared and not groups), None):
        raise UserError(f"`{lone}` belongs to an image prompt: it goes with `image`")
    if sum(len(group.scale or ()) > 1 for group in groups) > 1:
        raise UserError("`scale`: several of them are for one image prompt, not for more")
    if sum(group.each for group in groups) > 1:
        raise UserError("`each`: for one image prompt, not for more")
    for group in groups:
        complete(group)
    return groups


def complete(group: Group) -> None:
    """Read what is written in one word: weights behind pictures, a curve, a folder. Raises UserError."""
    if any(":" in name for name in group.image):
        group.image, group.weights = weights_of(group.image, group.weights)
    if isinstance(group.curve, str) and group.curve != OF_IMAGE["curve"]:
        group.curve = read_curve(group.curve)
    if group.each:
        group.image = spread(group)
    if not group.image and not group.face_embedding:
        raise UserError("`image`: a group without a picture; a file, or `face_embedding` behind it, is wanted")


def weights_of(images: Sequence[str], weights: Sequence[float]) -> tuple[list[str], Sequence[float]]:
    """Pictures and their weights, which may also stand behind each: FILE:W. Raises UserError: both, or no number."""
    read = [called(name) for name in images]
    if not any(weight for _, weight in read):
        return list(images), weights
    if weights:
        raise UserError("`weights`: given behind the pictures too")
    for name, (_, weight) in zip(images, read, strict=True):
        if weight and not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", weight):
            raise UserError(f"`image` {name}: its weight is {weight}, a number is wanted")
    return [file for file, _ in read], [float(weight) if weight else 1.0 for _, weight in read]


def spread(group: Group) -> list[str]:
    """With --each: the pictures of the group's folder, in order of name.

    Raises:
        UserError: no folder of pictures; what says something of one picture beside others.
    """
    if group.weights:
        raise UserError(
            "`each`: every picture prompts alone, so that there is nothing for `weights` to weigh; `scale` is"
        )
    if group.face_embedding:
        raise UserError("`each`: a `face_embedding` is of one picture; without it the faces are read off each of them")
    if len(group.image) != 1 or not os.path.isdir(os.path.expanduser(group.image[0])):
        return group.image
    folder = Path(os.path.expanduser(group.image[0]))
    known = Image.registered_extensions().keys() | set(SUFFIXES)
    found = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in known and path.is_file())
    if not found:
        raise UserError(f"`image` {folder}: no pictures in this folder")
    return found


def control_groups(
    opened: Iterable[Group], common: Told, before: Sequence[Told] = (), init: str | None = None
) -> list[Group]:
    """Every net with all that belongs to it; the arguments are as in `image_groups`.

    Args:
        init: the picture to begin with, which a net for inpainting follows where it has no other.

    Raises:
        UserError: what belongs to a net, and there is none; a net without a hint, or with several scales.
    """
    given = [vars(group) for group in opened if hasattr(group, "control")] or [{} for _ in before]
    common = {name: common[name] for name in (*OF_CONTROL, "hint_from") if common.get(name) is not None}
    common.pop("scale", None)
    if (lone := common.keys() - set(OF_BOTH)) and not given:
        raise UserError(f"`{min(lone)}` belongs to a net for structure: it goes with `control`")
    old = [*before, *({} for _ in given)]
    return [control_group(group, common, old[i], init) for i, group in enumerate(given)]


def control_group(given: Told, common: Told, old: Told, init: str | None) -> Group:
    """One net with all that belongs to it. Raises UserError, as above."""
    if {"hint", "hint_from"} & (given.keys() | common.keys()):
        old = {name: value for name, value in old.items() if name not in ("hint", "edges")}
    group = OF_CONTROL | {"hint_from": None} | old | common | given
    hints = group["hint"] if isinstance(group["hint"], list) else [group["hint"]]
    for name in ("hint", "scale", "control_type"):
        if isinstance(group[name], list) and len(group[name]) == 1:
            (group[name],) = group[name]
    if isinstance(group["scale"], list) and len(group["scale"]) != len(hints):
        raise UserError("`scale`: one is wanted for each `control`, or for each `hint` of it")
    source = group.pop("hint_from")
    if source and group["hint"]:
        raise UserError("`hint_from` and `hint` of one `control`: one of them is wanted")
    if bool(source) != group["edges"] and not ("edges" in old and not source):
        raise UserError("`hint_from` and `edges` go together: the edges of that picture are the hint")
    group["hint"] = source or group["hint"]
    if not group["hint"] and not init:
        raise UserError(f"`control` {group['control']}: a `hint` is wanted, the picture that it is to follow")
    return Group(**group)


def brought(images: Iterable[Group], nets: Iterable[Group], *others: str | None) -> list[str]:
    """All files that are drawn by: of image prompts, of nets, and others where there are any."""
    files = [[*one.image, *one.negative_image, *one.face_embedding, one.mask] for one in images]
    files += [[*hints_of(net), net.mask] for net in nets]
    return [name for some in (*files, others) for name in some if name]


def hints_of(net: Group) -> list[str | None]:
    return net.hint if isinstance(net.hint, list) else [net.hint]


def given_anew(opened: Iterable[Group], common: Mapping[str, object]) -> tuple[list[set[str]], list[set[str]]]:
    """Of a picture that is made again the names of what is said of each image prompt and of each net, for `again`."""
    said = {name for name in (*OF_IMAGE, "image_encoder") if common.get(name) is not None}
    images = [vars(group).keys() | said for group in opened if hasattr(group, "image")]
    return images, [set(vars(group)) for group in opened if hasattr(group, "control")]


def tell_unguided(guidance: float, asked: Mapping[str, object]) -> None:
    """Say what has no effect where guidance is off."""
    if asked["guidance_scale"] is not None:
        warn(f"guidance is off at --guidance-scale {guidance:g}: 1 and less follow the prompt as trained")
    idle = {
        "--guidance-rescale has": asked["guidance_rescale"],
        "--negative-image and --negative-noise have": any(
            g.negative_image or g.negative_noise for g in asked["images"]
        ),
        "--negative-prompt has": asked["negative_prompt"],
    }
    for names in (names for names, given in idle.items() if given):
        warn(f"{names} no effect at --guidance-scale {guidance:g}")
