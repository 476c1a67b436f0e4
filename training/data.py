"""Opening data in the forms they are shared in: tar shards, folders, lists.

Shards follow https://github.com/webdataset/webdataset, lists the trainers of https://github.com/tencent-ailab/IP-Adapter;
what else captions are written in is told in `captions.py`.
"""

import glob
import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

from training.captions import LISTS, DataError, caption
from training.folders import add_folder, add_list
from training.index import kept
from training.pairs import BARE, LISTED, PICTURES, Pairs
from training.ranks import Ranks
from training.references import References
from training.remote import braces, is_remote
from training.shards import SHARDS, add_shard

OTHERS = {  # forms that are not read, by how a name ends
    (
        ".parquet",
        ".arrow",
        ".feather",
    ): "a table of Parquet or Arrow; write it as .jsonl, and its pictures as files or .tar shards",
    (
        ".tar.bz2",
        ".tbz",
        ".tbz2",
        ".tar.xz",
        ".txz",
        ".tar.zst",
        ".tzst",
    ): "a tar packed by bzip2, xz or zstd; gzip or none is read",
    (".zip", ".7z", ".rar"): "an archive; give the folder that was in it, unpacked",
    (
        ".tfrecord",
        ".h5",
        ".hdf5",
        ".mdb",
        ".lmdb",
        ".npz",
        ".npy",
    ): "a form of other programs; give files or .tar shards",
    tuple(f".{suffix}" for suffix in PICTURES): "a picture; give its folder, or a list that names it",
}
FORMS = (
    "a folder of pictures with .txt, .json or .caption beside them or metadata.jsonl among them, .tar or .tar.gz shards "
    "or a folder of these, or a .json, .jsonl or .csv list"
)


def open_pairs(
    data: str | Path | Sequence[str | Path],
    data_root: str | Path | None = None,
    uncaptioned: bool = False,
    once: bool = False,
    fetch: Callable[[str], list[str]] | None = None,
    index: Path | None = None,
) -> Pairs:
    """Index pairs of pictures and captions; the order is that of `data`, sorted within a folder or glob.

    Args:
        data: one or several of: a folder, searched through, with `x.txt`, `x.json` or `x.caption` beside `x.png`, or with
            captions in `metadata.jsonl`, `metadata.csv` or COCO's `annotations`; tar shards, as a path, a glob
            (`a/*.tar`), braces (`a/{000..012}.tar`) or a folder of them, of members `key.png` and `key.txt` or
            `key.json`; a .json list, .jsonl lines or a .csv table of {"image_file": ..., "text": ...} with paths from the
            list's own folder, or COCO's captions. In JSON, "caption" serves as well as "text", and "file_name" or "image"
            as well as "image_file"; a list of texts is several captions.
        data_root: the folder that relative paths in lists start from, instead of the list's own.
        uncaptioned: whether data in which no picture at all has a caption are taken, as pictures alone. Where some have,
            the others are left out.
        once: whether an entry of a list is passed over that names a picture again, with another caption perhaps.
        fetch: brings the shards of a URL here and returns their paths (`remote.fetched`); None: there may be none.
        index: a folder that keeps the index of large shards, which is made once; None: it is made anew.

    Raises:
        DataError: something is missing, of another kind, or has no pair in it.
    """
    given = [data] if isinstance(data, (str, Path)) else list(data)
    if not given:
        raise DataError(f"no data given; {FORMS} is wanted")
    if data_root is not None and not os.path.isdir(data_root):
        raise DataError(f"`data_root` {data_root}: no such folder")

    def paths_of(item: str) -> list[str]:
        return fetch(item) if fetch and is_remote(item) else list(expand(os.path.expanduser(item)))

    items = [(item, paths_of(os.fspath(item))) for item in given]
    paths = [path for _, some in items for path in some]
    make = partial(gathered, items, data_root, uncaptioned, once)
    shards = all(path.lower().endswith(SHARDS) and os.path.isfile(path) for path in paths)
    return kept(make, paths, index, uncaptioned) if index and shards else make()


def gathered(
    items: Sequence[tuple[str, Sequence[str]]], data_root: str | Path | None, uncaptioned: bool, once: bool
) -> Pairs:
    """The pairs of what was given, each with the paths that it stands for."""
    pairs, seen = Pairs(), set() if once else None
    for item, paths in items:
        count, before = len(pairs), (pairs.skipped, pairs.skipped_count, pairs.remarks)
        for bare in (False, True) if uncaptioned else (False,):
            if len(pairs) == count:
                pairs.skipped, pairs.skipped_count, pairs.remarks = deepcopy(before)
                for path in paths:
                    add(pairs, path, data_root, seen, bare)
        if uncaptioned:
            forgo_captions(pairs, count)
        if len(pairs) == count:
            reasons = pairs.skipped[len(before[0]) :] or [f"no pictures ({', '.join(PICTURES)}) in it"]
            more = pairs.skipped_count - before[1] - 1
            raise DataError(f"{item}: no pair to use: {reasons[0]}{f', and {more} more' if more > 0 else ''}")
    return pairs


def add(pairs: Pairs, path: str, data_root: str | Path | None, seen: set[str] | None, bare: bool) -> None:
    """Index what lies at a path; with `bare`, pictures without captions too."""
    try:
        if os.path.isdir(path):
            add_folder(pairs, path, bare)
        elif path.lower().endswith(SHARDS):
            add_shard(pairs, path, bare)
        elif path.lower().endswith(LISTS):
            add_list(pairs, path, data_root, seen, bare)
        else:
            unknown = f"a file of an unknown kind; {FORMS} is wanted"
            raise DataError(
                f"{path}: {next((kind for ends, kind in OTHERS.items() if path.lower().endswith(ends)), unknown)}"
            )
    except OSError as error:
        raise DataError(f"{path}: cannot be indexed ({error.strerror or error})") from None


def forgo_captions(pairs: Pairs, start: int) -> None:
    """Where the .json beside pictures hold no captions, as img2dataset writes them without these: pictures alone.

    Told from 16 of the pairs from number `start` on.
    """
    numbers = range(start, len(pairs))
    for i in numbers[:: len(numbers) // 16 + 1]:
        row = pairs.row(i)
        try:
            mute = pairs.suffixes[row.suffix].lower() == "json" and not caption(pairs.written(row), "json")
        except (OSError, ValueError):
            mute = False
        if not mute:
            return
    for i in numbers:
        row = pairs.row(i)
        pairs.remark(BARE, pairs.label(i))
        row = row._replace(text_offset=0, text_size=0, suffix=pairs.suffix(LISTED))
        pairs.rows.replace(i * len(row), array("q", row))


def expand(pattern: str) -> Iterator[str]:
    """The paths that a path, a glob or braces stand for: {000..012} or {a,b}. Raises DataError for what is not there."""
    if os.path.exists(pattern):
        yield pattern
    elif is_remote(pattern):
        raise DataError(f"{pattern}: only local shards can be read here; train.py fetches remote ones")
    elif choices := braces(pattern):
        for choice in choices:
            yield from expand(choice)
    elif found := sorted(glob.glob(pattern, recursive=True)):
        yield from found
    else:
        raise DataError(f"{pattern}: {'matches nothing' if glob.has_magic(pattern) else 'no such file or folder'}")


def identity(pairs: Pairs, ranks: Ranks, references: References | None = None) -> dict:
    """What the data of a run are, wherever they lie. Raises DataError where its processes see different data."""
    found = {"data (pairs)": len(pairs), "data (sha256)": pairs.digest()}
    if references:
        found["data (pairs)"] = len(references.begins)
        found["data (sha256)"] = hashlib.sha256((pairs.digest() + references.digest()).encode()).hexdigest()
        found["references"] = f"{references.rule}, {references.share:g}"
    if len(set(ranks.gather([found["data (sha256)"]]))) > 1:
        raise DataError("`data`: not the same on all processes; do they share the disk?")
    return found
