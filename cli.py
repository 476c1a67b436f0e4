"""What the scripts share at the command line: checked flags, and a user's mistake as one line and exit code 2."""

import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from files.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SIDE = 16384  # pixels


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's main; a mistake of the user's, a full disk or Ctrl-C ends it with one line and no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are bytes, and need not be UTF-8
    try:
        main()
    except UserError as error:
        message = str(error)
        if message.startswith("Caught "):  # out of a DataLoader worker, its traceback before it
            message = message.strip().splitlines()[-1].partition(": ")[2]
        fail(message)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            if error.filename is None or not error.strerror:
                raise
            fail(f"{error.filename}: {error.strerror}")
        fail(f"{error.filename or 'output'}: cannot write ({error.strerror})")
    except torch.OutOfMemoryError:
        fail("out of GPU memory: try smaller pictures, fewer at a time, or another --dtype")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        fail("out of memory: try smaller pictures, or fewer at a time")
    except KeyboardInterrupt:
        print("\nstopped; no half-written file is left", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def fail(message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(2)


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


def number(low: float) -> Callable[[str], float]:
    """A finite number, low or more."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low:
            raise argparse.ArgumentTypeError(f"{text!r} given, a number, {low:g} or more, is wanted")
        return value

    return parse


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(0)(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, a number from 0 to 1 is wanted")
    return value


def side(text: str) -> int:
    """A height or width: a multiple of 8."""
    value = whole(8, MAX_SIDE)(text)
    if value % 8:
        near = max(8, round(value / 8) * 8)
        raise argparse.ArgumentTypeError(f"{value} given, a multiple of 8 is wanted (the nearest is {near})")
    return value


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


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
