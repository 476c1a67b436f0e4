"""Flags: a parser that says mistakes in one line, groups of flags, what flags take, and those that several scripts have."""

import argparse
import difflib
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from files.errors import UserError
from generate.models import DTYPES, default_device

MAX_SIDE = 16384  # pixels


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose paths may begin with `~`."""

    def error(self, message: str) -> NoReturn:
        if re.search("expected|unrecognized", message) and (
            dashed := [word for word in sys.argv[1:] if re.match(r"-[^-\d]", word)]
        ):
            message += f"; a value that begins with - is given as --flag={dashed[0]}, a file as ./{dashed[0]}"
        elif strangers := re.match("unrecognized arguments: (.+)", message):
            message += self.meant(strangers[1].split())
        self.exit(2, f"{self.prog}: {message} (see --help)\n")

    def meant(self, words: Sequence[str]) -> str:
        """What unknown words may stand for."""
        if not words[0].startswith("--"):
            return "; a text of several words stands in quotation marks"
        near = difflib.get_close_matches(words[0].replace("_", "-"), self._option_string_actions, n=2)
        return f"; near it {' and '.join(near)}" if near else ""

    def given(self, opener: str) -> set[str]:
        """The names of the flags that stand before the first group, or in one that this flag began."""
        unset = object()
        named = argparse.Namespace(**{action.dest: unset for action in self._actions})
        found = {name: value for name, value in vars(self.parse_args(namespace=named)).items() if value is not unset}
        return found.keys() - {"groups"} | {
            name for group in found.get("groups", ()) if hasattr(group, opener) for name in vars(group)
        }

    def typed(self, settings: dict[str, object], anew: Container[str], source: str) -> dict[str, object]:
        """Settings that somebody else wrote, as if each had been typed behind its flag; groups' and nets' too.

        Args:
            anew: the names of those that are typed, and hold instead.

        Raises:
            UserError: what no one may type; it names the source and the flag.
        """
        left = {name: value for name, value in settings.items() if name not in anew}
        for action in self._actions:
            for given in (left, *settings["groups"], *settings["controls"]):
                value = given.get(action.dest)
                if value is not None and action.nargs != 0:
                    try:
                        given[action.dest] = self.typed_one(action, value)
                    except argparse.ArgumentError as error:
                        raise UserError(f"{source}: its {action.option_strings[-1]}: {error.message}") from None
        return left

    def typed_one(self, action: argparse.Action, value: object) -> object:
        """One of them, or a list. Raises ArgumentError."""
        if isinstance(value, list):
            if isinstance(action.nargs, int) and len(value) != action.nargs:
                raise argparse.ArgumentError(action, f"{len(value)} given, {action.nargs} are wanted")
            return [self.typed_one(action, one) for one in value]
        if isinstance(value, tuple):  # a file and its weight, or its name
            if isinstance(value[1], float | int) and not math.isfinite(value[1]):
                raise argparse.ArgumentError(action, f"the weight of {value[0]} is {value[1]}, a number is wanted")
            return value
        found = self._get_value(action, str(value))
        self._check_value(action, found)
        return found


class Opens(argparse.Action):
    """A flag that begins a group, such as --image: `args.groups` has one more, a namespace with the flag's own value.

    What `Belongs` to such groups goes to the last one that was begun.
    """

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        args.groups = [*getattr(args, "groups", ()), argparse.Namespace(**{self.dest: values})]


class Belongs(argparse.Action):
    """A flag of the last group before it; before the first group it holds for all.

    Args:
        groups: the names of the flags that begin the groups it may belong to.
    """

    def __init__(self, *args: object, groups: Sequence[str], **settings: object):
        super().__init__(*args, **settings)
        self.groups = groups

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        groups = getattr(args, "groups", ())
        group = groups[-1] if groups else args
        if groups and not any(hasattr(group, name) for name in self.groups):
            allowed = " or ".join(f"--{name.replace('_', '-')}" for name in self.groups)
            raise argparse.ArgumentError(self, f"stands behind --{next(iter(vars(group)))}; it belongs to {allowed}")
        if groups and hasattr(group, self.dest):
            raise argparse.ArgumentError(self, f"given twice for one --{next(iter(vars(group)))}")
        setattr(group, self.dest, self.const if self.nargs == 0 else values)


# Flags that several scripts have


def models(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """--base, --adapter, --image-encoder, --vae.

    Args:
        several: an adapter belongs to the --image before it, and an image encoder may be given for each.
    """
    add = parser.add_argument
    add("--base", metavar="FILE", help="SD 1.x, SD 2.x or SDXL: a checkpoint or a folder (default: the tiny model)")
    group, each = ({"action": Belongs, "groups": ("image",)}, {"nargs": "+"}) if several else ({}, {})
    add("--adapter", metavar="FILE", help="IP-Adapter of any kind, .safetensors or .bin", **group)
    turn = "; several: one for each adapter in turn" * several
    add("--image-encoder", metavar="FILE", help=f"CLIP image encoder: a file or a folder{turn}", **each)
    add("--vae", metavar="FILE", help="another autoencoder")


def machine(parser: argparse.ArgumentParser, dtype: str | None = None, what: str = "to compute in") -> None:
    """--device, --dtype (`dtype_name`)."""
    add = parser.add_argument
    add("--device", type=device, default=default_device(), help="cpu, cuda, cuda:1, mps (default: the fastest here)")
    usual = "%(default)s" if dtype else "float16 on cuda, else float32"
    add("--dtype", choices=DTYPES, default=dtype, dest="dtype_name", help=f"{what} (default: {usual})")


# What flags take


def path(text: str) -> Path:
    """A path; `~` is the home folder, also where no shell has put it there."""
    return Path(os.path.expanduser(text))


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            allowed = f"{low} to {high}" if high is not None else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text!r} given, a whole number, {allowed}, is wanted")
        return value

    return parse


def number(low: float = -math.inf) -> Callable[[str], float]:
    """A finite number, low or more."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low:
            allowed = "a number" if low == -math.inf else f"a number, {low:g} or more,"
            raise argparse.ArgumentTypeError(f"{text!r} given, {allowed} is wanted")
        return value

    return parse


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, a number from 0 to 1 is wanted")
    return value


def seed(high: int) -> Callable[[str], int]:
    """A seed from 0 to high; -1 stands for a random one."""

    def parse(text: str) -> int:
        value = whole(-1, high)(text)
        return secrets.randbelow(2**32) if value == -1 else value

    return parse


def text(given: str) -> str:
    """A text; what is not UTF-8 is read as the Latin alphabet of old terminals."""
    try:
        given.encode()
    except UnicodeEncodeError:
        return os.fsencode(given).decode("cp1252", errors="replace")
    return given


def weighted(given: str) -> tuple[str, float]:
    """`FILE` or `NAME`, or one of them with its weight behind a colon."""
    name, _, weight = given.rpartition(":")
    try:
        found = (name, float(weight)) if name and not os.path.exists(given) else (given, 1.0)
    except ValueError:  # the colon is part of a path
        found = given, 1.0
    if not math.isfinite(found[1]):
        raise argparse.ArgumentTypeError(f"{given}: the weight is {weight}, a finite number is wanted")
    return found


def called(given: str) -> tuple[str, str | None]:
    """`FILE`, or one with a name behind a colon."""
    file, colon, name = given.rpartition(":")
    alone = not colon or os.path.exists(os.path.expanduser(given)) or not os.path.exists(os.path.expanduser(file))
    return (os.path.expanduser(given), None) if alone else (os.path.expanduser(file), name)


def side(text: str) -> int:
    """A height or width: a multiple of 8."""
    value = whole(8, MAX_SIDE)(text)
    if value % 8:
        near = max(8, round(value / 8) * 8)
        raise argparse.ArgumentTypeError(f"{value} given, a multiple of 8 is wanted (the nearest is {near})")
    return value


def size(text: str) -> int | tuple[int, int]:
    """A side, or WIDTHxHEIGHT, as height and width: multiples of 8."""
    sides = [side(part) for part in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} given, a side or WIDTHxHEIGHT is wanted")
    return sides[0] if len(sides) == 1 else (sides[1], sides[0])


def check_writable(flag: str, path: Path, folder: Path) -> None:
    """Refuse a path if its folder, or the nearest one above it that exists, cannot be written to."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{flag} {path}: cannot write there")


def device(text: str) -> torch.device:
    """cpu, cuda, cuda:1, mps: one that is there."""
    try:
        value = torch.device(text)
        if value.type == "cuda" and value.index is None and "LOCAL_RANK" in os.environ:  # started by torchrun
            value = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=value)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(".")[0].splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason[:100]}); cpu always can") from None
    return value
