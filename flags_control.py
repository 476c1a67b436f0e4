"""Flags of sample.py for ControlNets and T2I-Adapters."""

import argparse
from collections.abc import Iterable, Mapping, Sequence

import cli
from files.errors import UserError
from files.masks import open_mask
from flags import OF_BOTH
from generate import Hint
from weights.control import SAME, SHUFFLE, TASKS

# What belongs to a ControlNet or T2I-Adapter, and what it is where nothing is said
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


def structure(parser: argparse.ArgumentParser) -> None:
    """--control, and what belongs to the last one before it: --hint, --hint-from, --edges, --guess, --control-type.

    --scale (1), --from, --until and --mask, too.
    """
    told = "what stands behind a --control belongs to it; --scale, --from, --until and --mask may, too"
    add = parser.add_argument_group("structure", told).add_argument
    of_control = {"action": cli.Belongs, "groups": ("control",)}
    several = "a ControlNet or T2I-Adapter, a file or a name; given again: another beside it"
    add("--control", action=cli.Opens, metavar="FILE", help=several)
    add("--hint", metavar="PICTURE", help="what it is to follow: edges, depth, a skeleton, ...", **of_control)
    add("--hint-from", metavar="PICTURE", help="a picture in which --edges finds the hint", **of_control)
    add("--edges", nargs=0, const=True, help="of --hint-from: white on black, Canny's", **of_control)
    weakly = "follow it with the prompt alone, and more weakly the finer: for prompts that say little"
    add("--guess", nargs=0, const=True, help=weakly, **of_control)
    kinds = "for a Union: which type its hint is; shuffle, inpaint: a ControlNet for that (default: by the file's name)"
    add("--control-type", choices=(*TASKS, *SAME, SHUFFLE), metavar="TYPE", help=kinds, **of_control)


def control_groups(
    opened: Iterable[argparse.Namespace],
    common: Mapping[str, object],
    before: Sequence[Mapping[str, object]] = (),
    init: str | None = None,
) -> list[argparse.Namespace]:
    """Every net with all that belongs to it; the arguments are as in `flags.image_groups`.

    Args:
        init: the picture to begin with, which a net for inpainting follows where it has no other.

    Raises:
        UserError: what belongs to a net, and there is none; a net without a hint, or with several scales.
    """
    given = [vars(group) for group in opened if hasattr(group, "control")]
    common = {name: common[name] for name in (*OF_CONTROL, "hint_from") if common.get(name) is not None}
    common.pop("scale", None)
    given, groups = given or [{} for _ in before], []
    lone = common.keys() - set(OF_BOTH)
    if lone and not given:
        raise UserError(f"`{min(lone)}` belongs to a net for structure: it goes with `control`")
    for i, group in enumerate(given):
        old = dict(before[i]) if i < len(before) else {}
        if {"hint", "hint_from"} & (group.keys() | common.keys()):
            old = {name: value for name, value in old.items() if name not in ("hint", "edges")}
        group = OF_CONTROL | {"hint_from": None} | old | common | group
        if isinstance(group["scale"], list):
            if len(group["scale"]) > 1:
                raise UserError("`scale`: one is wanted for each `control`; several are for an image prompt")
            group["scale"] = group["scale"][0]
        source = group.pop("hint_from")
        if source and group["hint"]:
            raise UserError("`hint_from` and `hint` of one `control`: one of them is wanted")
        if bool(source) != group["edges"] and not ("edges" in old and not source):
            raise UserError("`hint_from` and `edges` go together: the edges of that picture are the hint")
        group["hint"] = source or group["hint"]
        if not group["hint"] and not init:
            raise UserError(f"`control` {group['control']}: a `hint` is wanted, the picture that it is to follow")
        groups.append(argparse.Namespace(**group))
    return groups


def hint(group: argparse.Namespace, net: int) -> Hint:
    """As `pictures` takes it, its files opened; `net` is its place among those that are. Raises UserError."""
    mask = group.mask and cli.picture(group.mask, open_mask)
    how = {name: vars(group)[name] for name in ("scale", "start", "until", "guess", "edges", "control_type")}
    return Hint(group.hint and cli.picture(group.hint), net, mask=mask, **how)
