"""A script in its terminal: mistakes as one line and exit code 2, warnings, bars, Ctrl-C, pictures that come in by a pipe."""

import errno
import gc
import hashlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import BinaryIO, NoReturn

import torch
from PIL import Image
from tqdm import tqdm

from cli import start
from files.errors import Notice, UserError
from files.pictures import open_picture


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's main; a mistake of the user's, a full disk or Ctrl-C ends it with one line and no traceback."""
    if signal.getsignal(signal.SIGINT) is start.stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names are bytes, and a terminal need not know UTF-8
            utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 and stream is sys.stdout else "backslashreplace")
    if sys.stderr is None:  # as under pythonw, or closed by who called
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for the rest of the run
    warnings.showwarning = tell
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the names is gone; the pictures are there
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except UserError as error:
        message = str(error)
        if message.startswith("Caught "):  # out of a DataLoader worker, its traceback before it
            message = error.args[0].strip().splitlines()[-1].partition(": ")[2]
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
    print(" ".join(flagged(message).split()), file=sys.stderr)
    sys.exit(2)


def tell(message: Warning, category: type[Warning], *where: object) -> None:
    """What a user should know, in a line; what packages say to programmers stays unsaid."""
    if issubclass(category, Notice):
        tqdm.write(f"warning: {' '.join(flagged(str(message)).split())}", file=sys.stderr)


def flagged(message: str) -> str:
    """`image_encoder`, an argument's name in Python, as the flag that gives it."""
    named = {"start": "from"}  # a word of Python's
    return re.sub(
        r"`([a-z][a-z0-9]*(?:_[a-z0-9]+)*)`",
        lambda match: f"--{named.get(match[1], match[1]).replace('_', '-')}",
        message,
    )


def counter(what: str, unit: str, shown: bool = True) -> Callable[[int], None]:
    """A bar that appears when something is counted: count(total)."""
    bars: list[tqdm] = []

    def count(total: int) -> None:
        bars[:] = bars or [tqdm(total=total, desc=what, unit=unit, disable=not shown)]
        bars[0].update()
        if bars[0].n == total:
            bars[0].close()

    return count


def say(line: str) -> None:
    print(line, file=sys.stderr)


def warn(line: str) -> None:
    say(f"warning: {line}")


@contextmanager
def steps(total: int, what: str) -> Iterator[Callable[[], None]]:
    """A bar for the loop of a run; yields what counts a step. Ctrl-C ends the run at the next one, a second at once.

    So what was finished before it can be saved.
    """
    bar, asked, before = tqdm(total=total, desc=what, unit="step"), False, signal.getsignal(signal.SIGINT)
    obeyed = before is signal.default_int_handler and current_thread() is main_thread()

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def step() -> None:
        if asked:
            raise KeyboardInterrupt
        bar.update()

    if obeyed:
        signal.signal(signal.SIGINT, ask)
    try:
        yield step
    finally:
        bar.close()
        if obeyed:
            signal.signal(signal.SIGINT, before)


PIPED: dict[str, str] = {}  # of pictures that came out of a pipe: their names here, their SHA-256


def picture(name: str, read: Callable[[str | Path | BinaryIO], Image.Image] = open_picture) -> Image.Image:
    """A picture that was brought: a file, `-` or another pipe; `read` may be `open_mask`. Raises PictureError."""
    source = Path(os.path.expanduser(name))
    pipe = name == "-" or (source.exists() and not source.is_file() and not source.is_dir())
    found = read(piped(name, source) if pipe else name if "://" in name else source)
    found.filename = name
    return found


def piped(name: str, source: Path) -> BinaryIO:
    """All that comes out of a pipe."""
    content = (sys.stdin.buffer.read() if sys.stdin else b"") if name == "-" else source.read_bytes()
    PIPED[name] = hashlib.sha256(content).hexdigest()
    found = io.BytesIO(content)
    found.name = "standard input" if name == "-" else name
    return found


gc.freeze()  # all that is slow to import is there (see `cli.start`)
gc.enable()
