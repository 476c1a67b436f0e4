"""Shards that lie elsewhere (HTTP, S3, Google's storage): fetched once, through webdataset, and read from the copy.

So what stands at a place of a run follows from seed and place alone, as with local shards, and no server is asked twice.
"""

import os
import re
import select
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from threading import Event
from time import monotonic
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from files.whole import whole
from training.captions import DataError
from training.claims import shared
from training.shards import SHARDS

SCHEMES = ("http", "https", "s3", "gs")
STALL = 60.0  # seconds without a byte, and a transfer is begun anew
WAITS = (1.0, 4.0, 16.0, 64.0)  # seconds before each further try
STREAMS = 4  # shards at once, of each process
CHUNK = 1 << 20  # bytes: what is held of a shard
CURL = {6: "no such host", 7: "no connection", 18: "cut off", 28: "no connection in time", 52: "cut off", 56: "cut off"}


class Broken(Exception):
    """A transfer that another try may bring to its end."""


class Stopped(Exception):
    """Another transfer has failed for good, and that one is told of."""


def is_remote(item: str) -> bool:
    return bool(re.match(r"\w[\w+.-]*://|pipe:", item))


def braces(pattern: str) -> list[str]:
    """What the first {000..012} or {a,b} in a pattern makes of it; [] without any."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return []
    first, last, names = found.groups()
    width = len(first or "")  # {000..012} keeps its zeros
    choices = names.split(",") if names else (f"{i:0{width}}" for i in range(int(first), int(last) + 1))
    return [pattern[: found.start()] + choice + pattern[found.end() :] for choice in choices]


def urls_of(pattern: str) -> Iterator[str]:
    choices = braces(pattern)
    for choice in choices:
        yield from urls_of(choice)
    if not choices:
        yield pattern


def fetched(
    pattern: str,
    # Where shards are kept, under their host and path.
    folder: Path,
    # Seconds without a byte after which a transfer is begun anew, and before each further try.
    stall: float = STALL,
    waits: Sequence[float] = WAITS,
    # Called for each shard that comes, with how many are missing.
    on_shard: Callable[[int], object] = lambda total: None,
) -> list[str]:
    """The local copies of the shards that a URL with braces stands for; those that are not there yet are fetched.

    Several processes and machines may share the folder, each shard is fetched by one of them. In memory is a megabyte of
    each that is on its way; on disk there will be all of them.

    Raises:
        DataError: a URL of another kind, a shard that is not there or does not come, no space, or no webdataset.
    """
    urls = [*urls_of(pattern)]
    paths = [place(url, folder) for url in urls]
    missing = {path: url for path, url in zip(paths, urls, strict=True) if not path.exists()}
    if len({*urls}) > len({*paths}):
        raise DataError(
            f"{pattern}: some shards of it differ by what is behind the `?` alone; their paths are wanted to"
        )
    if missing and not find_spec("webdataset"):
        raise DataError(f"{pattern}: webdataset fetches remote shards: pip install webdataset (our extra: remote)")
    names, stop = [*missing], Event()
    for parent in {path.parent for path in missing}:
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{parent}: shards cannot be kept there ({error.strerror})") from None

    def work() -> None:
        for i, mine in shared(names):
            if stop.is_set():
                return
            if mine:
                try:
                    fetch(missing[names[i]], names[i], stall, waits, stop)
                except Stopped:
                    return
                except BaseException:
                    stop.set()  # before another stream takes this shard over
                    raise
                on_shard(len(names))

    with ThreadPoolExecutor(STREAMS) as pool:
        works = [pool.submit(work) for _ in range(min(STREAMS, len(names)))]
        try:
            for one in works:
                one.result()
        finally:
            stop.set()
    return [*map(str, paths)]


def place(url: str, folder: Path) -> Path:
    """Where the copy of a shard lies. Raises DataError for what is no URL of one."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url}: not a URL ({error})") from None
    if parts.scheme not in SCHEMES:
        raise DataError(f"{url}: cannot be fetched from there; {', '.join(f'{scheme}://' for scheme in SCHEMES)} can")
    names = [
        name
        for name in f"{parts.netloc.rpartition('@')[2]}/{parts.path}".replace(":", "_").split("/")
        if name.strip(".")
    ]
    if not parts.path.lower().endswith(SHARDS):
        raise DataError(f"{url}: not a shard by its name, which ends in {' or '.join(SHARDS)}")
    return folder.joinpath(*names)


def fetch(url: str, path: Path, stall: float, waits: Sequence[float], stop: Event) -> None:
    """Bring one shard, whole or not at all; begun anew where it breaks off. Raises DataError, or Stopped."""
    for wait in (*waits, None):
        try:
            with whole(path) as part:
                transfer(url, part, stall, stop)
            return
        except Broken as error:
            if wait is None:
                raise DataError(
                    f"{url}: does not come ({error}; {len(waits) + 1} tries); whole shards are kept"
                ) from None
            if stop.wait(wait):
                raise Stopped from None
        except OSError as error:
            raise DataError(f"{url}: cannot be kept as {path} ({error.strerror or error})") from None


def transfer(url: str, part: Path, stall: float, stop: Event) -> None:
    """Write what a URL holds to a file.

    Raises:
        Broken: it stalls or breaks off.
        Stopped: `stop` was set meanwhile.
        DataError: there is nothing for us.
    """
    from webdataset.gopen import gopen

    try:
        source = gopen(f"pipe:exec aws s3 cp --only-show-errors {quote(url)} -" if url.startswith("s3:") else url, "rb")
    except (OSError, ValueError) as error:  # curl or gsutil is not there
        raise DataError(f"{url}: cannot be fetched ({error})") from None
    try:
        with part.open("wb") as file:
            while True:
                late = monotonic() + stall
                while not select.select([source.stream], [], [], min(stall, 0.5))[0] and not stop.is_set():
                    if monotonic() >= late:
                        raise Broken(f"no byte within {stall:g} s")
                if stop.is_set():
                    raise Stopped
                chunk = os.read(source.stream.fileno(), CHUNK)
                if not chunk:
                    break
                file.write(chunk)
    except BaseException:
        source.proc.kill()
        with suppress(OSError):
            source.close()
        raise
    try:
        source.close()
    except OSError:
        if source.status == 22:  # curl's word for an answer of 400 or more that is not one to wait for
            raise DataError(f"{url}: {answer(url)}") from None
        raise Broken(CURL.get(source.status, f"exit code {source.status}")) from None


def answer(url: str) -> str:
    """How a server refuses."""
    try:
        with urlopen(url, timeout=STALL):
            return "was refused"
    except HTTPError as error:
        return f"{error.code} {error.reason}"
    except (OSError, ValueError):
        return "refused by the server"
