"""The index of large shards, kept on disk: made once by one process, read by all, as long as the shards stay as they are."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from files.whole import whole, write_text
from training.captions import DataError
from training.claims import shared
from training.columns import Column, Strings
from training.pairs import Pairs, Row

FORMAT = 1
SMALL = 1 << 28  # bytes of shards: these are indexed in a moment
NOTED = ("suffixes", "packed", "skipped", "skipped_count", "remarks")


def kept(make: Callable[[], Pairs], shards: Sequence[str], folder: Path, uncaptioned: bool) -> Pairs:
    """What `make` makes of shards, or made of them before: known by their names, sizes and times.

    Raises:
        DataError: the folder cannot be written to, or what is in it is damaged; or what `make` raises.
    """
    seen = [[path, os.path.abspath(path), *stamp(path)] for path in shards]
    if sum(size for _, _, size, _ in seen) <= SMALL:
        return make()
    key = hashlib.sha256(json.dumps([FORMAT, uncaptioned, seen]).encode()).hexdigest()[:16]
    notes = folder / key / "notes.json"  # the last that is written
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        for _, mine in shared([notes]):
            if mine:
                save(make(), notes)
    except OSError as error:
        raise DataError(f"{notes.parent}: the index of the data cannot be kept there ({error.strerror})") from None
    try:
        return load(notes)
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(f"{notes.parent}: damaged; delete it, and it is made anew") from None


def stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be indexed ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns


def columns(pairs: Pairs) -> dict[str, Column]:
    return {"rows": pairs.rows, "names": pairs.names.content, "ends": pairs.names.ends, "hashes": pairs.hashes}


def save(pairs: Pairs, notes: Path) -> None:
    pairs.hash(len(pairs))
    for name, column in columns(pairs).items():
        with whole(notes.with_name(name)) as part, part.open("wb") as file:
            file.writelines(column.blocks(len(column)))
    strings = [pairs.strings[i] for i in range(len(pairs.strings))]  # the shards' names
    noted = {"pairs": len(pairs), "strings": strings} | {name: vars(pairs)[name] for name in NOTED}
    write_text(notes, json.dumps(noted))


def load(notes: Path) -> Pairs:
    noted, pairs = json.loads(notes.read_text()), Pairs()
    pairs.rows, pairs.hashes = (Column("q", notes.with_name(name)) for name in ("rows", "hashes"))
    pairs.names = Strings(Column("B", notes.with_name("names")), Column("q", notes.with_name("ends")))
    for string in noted["strings"]:
        pairs.strings.append(string)
    vars(pairs).update({name: noted[name] for name in NOTED}, folder=notes.parent)
    count, size = noted["pairs"], len(pairs.names.content)
    if not (len(pairs.rows) == count * len(Row._fields) and len(pairs.hashes) == len(pairs.names) == count):
        raise ValueError
    if pairs.names.ends.read(count, count + 1)[0] != size:
        raise ValueError
    return pairs
