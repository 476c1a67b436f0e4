"""Who makes which file of a shared folder, where several processes and machines work at once and some of them may die."""

import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

STALE = 120.0  # seconds without a sign of life, and a claim is anybody's


def shared(paths: Sequence[Path], stale: float = STALE) -> Iterator[tuple[int, bool]]:
    """Go through files that are to be made until all are there.

    Yields (i, True) for a file that is claimed for the caller, who makes it before asking for the next; (i, False) for one
    that somebody else has made. What a dead one had claimed is made by another. Where two take over the same claim at
    once both make the file, which is whole or absent, and the same.
    """
    waiting, idle, seen = deque(range(len(paths))), 0, {}
    while waiting:
        i = waiting.popleft()
        claim = paths[i].with_suffix(".claim")
        if paths[i].exists():
            idle = 0
            yield i, False
            continue
        with claimed(claim, stale / 6) as mine:
            if mine:
                idle = 0
                yield i, not paths[i].exists()  # it may have been finished just now
                continue
        if dead(claim, seen, stale):
            claim.unlink(missing_ok=True)
        waiting.append(i)
        idle += 1
        if idle >= len(waiting):  # all that is left is somebody else's
            time.sleep(min(1.0, stale / 6))
            idle = 0


@contextmanager
def claimed(claim: Path, every: float) -> Iterator[bool]:
    """Whether the claim is ours; while it is, it shows signs of life."""
    try:
        with claim.open("x") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}")
    except FileExistsError:
        yield False
        return
    done = Event()

    def live() -> None:
        while not done.wait(every):
            with suppress(OSError):
                os.utime(claim)

    thread = Thread(target=live, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        claim.unlink(missing_ok=True)


def dead(claim: Path, seen: dict[Path, tuple[int, float]], stale: float) -> bool:
    """Whether the one who claims is known to have died: of this machine, or without a sign of life for so long.

    Clocks of several machines differ, so what counts is how long nothing has changed, by our own.
    """
    try:
        mark, owner = claim.stat().st_mtime_ns, claim.read_text().split()
    except OSError:  # given back just now
        return False
    if len(owner) == 2 and owner[0] == socket.gethostname() and owner[1].isdigit():
        try:
            os.kill(int(owner[1]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
    if seen.get(claim, (None, 0.0))[0] != mark:
        seen[claim] = mark, time.monotonic()
    return time.monotonic() - seen[claim][1] > stale
