"""Pictures with captions, in the forms they are shared in: tar shards, folders, lists. Any pair can be read at any time.

Shards follow https://github.com/webdataset/webdataset, lists the trainers of https://github.com/tencent-ailab/IP-Adapter;
what else captions are written in is told in `captions.py`.
"""

import glob
import gzip
import hashlib
import io
import os
import re
import tarfile
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from files.errors import UserError, printable
from files.pictures import PictureError, read_picture
from training.captions import BESIDE, GUESS, LISTS, DataError, caption, encoding_of, listed
from training.ranks import Ranks

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe", "heic", "heif")
UNREAD = ("jxl", "svg", "dng", "cr2", "cr3", "nef", "arw")  # pictures too: counted, not passed over in silence
SHARDS = (".tar", ".tar.gz", ".tgz")
FORMS = (
    "a folder of pictures with .txt, .json or .caption beside them or metadata.jsonl among them, .tar or .tar.gz shards "
    "or a folder of these, or a .json, .jsonl or .csv list"
)
WHOLE = -1  # as a size: the whole file, not a part of a shard
LISTED = ""  # in the stead of a suffix: the captions are kept here, none of them perhaps
GUESSED = "captions are not UTF-8 and read as Windows-1252"
BARE = "pictures have no caption; their text is empty"
METADATA = ("metadata.jsonl", "metadata.csv")  # in a folder, of its pictures and those of the folders in it


class BadSample(UserError):
    """One sample that cannot be used; the message is one line that names its file, or its shard and key."""


@dataclass(frozen=True)
class Pair:
    name: str  # path in the folder without suffix, or key in the shard, or the picture as the list names it
    image: Image.Image  # RGB, upright
    texts: tuple[str, ...]  # its captions; none, where pictures alone were wanted too

    @property
    def text(self) -> str:
        """The first caption, or ''."""
        return self.texts[0] if self.texts else ""


class Row(NamedTuple):
    """Where a pair lies."""

    path: int  # in `strings`
    offset: int
    size: int
    text_offset: int  # of the caption's file in the shard; of the first caption in `strings`
    text_size: int  # ... how many captions there are
    suffix: int  # in `suffixes`


class Strings:
    """Many strings without an object for each: UTF-8, end to end."""

    def __init__(self):
        self.content, self.ends = bytearray(), array("q", [0])

    def append(self, string: str) -> int:
        """Returns the index at which it can be found again."""
        self.content += string.encode("utf-8", "surrogatepass")  # file names may hold lone surrogates
        self.ends.append(len(self.content))
        return len(self.ends) - 2

    def __getitem__(self, i: int) -> str:
        return self.content[self.ends[i] : self.ends[i + 1]].decode("utf-8", "surrogatepass")


class Pairs(Sequence[Pair]):
    """Pairs by number. An index of about 50 bytes and the name for each; pictures and captions are read when asked for.

    Safe in threads, after a fork, and when pickled for DataLoader workers.
    """

    def __init__(self):
        self.names, self.strings = Strings(), Strings()
        self.rows = array("q")  # a Row for each
        self.suffixes = [LISTED]  # of files with captions, as they are spelt
        self.packed: dict[str, tuple[int, int]] = {}  # gzip shards: where they lie in `unpacked`
        self.skipped: list[str] = []  # the first thousand that were left out, and why
        self.skipped_count = 0
        self.remarks: dict[str, list] = {}  # what is to be told of pairs that are used: of how many, and of which first
        self.hashes = array("q")  # of the first pairs, as far as they were asked for

    def __len__(self) -> int:
        return len(self.rows) // len(Row._fields)

    def __getitem__(self, i: int) -> Pair:
        """Raises BadSample if the picture or its caption cannot be read."""
        texts, row = self.texts(i), self.row(i)
        with telling(self.label(i)):
            picture = io.BytesIO(self.read(self.strings[row.path], row.offset, row.size))
            return Pair(self.names[range(len(self))[i]], read_picture(picture, self.label(i)), texts)

    def texts(self, i: int) -> tuple[str, ...]:
        """The captions of a pair, without its picture. Raises BadSample if they cannot be read."""
        row = self.row(i)
        if self.suffixes[row.suffix] == LISTED:
            return tuple(self.strings[row.text_offset + j] for j in range(row.text_size))
        with telling(self.label(i)):
            found = caption(self.written(row), self.suffixes[row.suffix].lower())
            if not found:
                raise ValueError('the JSON has no "text" or "caption"')
            return found

    def row(self, i: int) -> Row:
        start = range(len(self))[i] * len(Row._fields)
        return Row(*self.rows[start : start + len(Row._fields)])

    def label(self, i: int) -> str:
        """How a pair is called in a message: by its file, or its shard and key."""
        row = self.row(i)
        path = self.strings[row.path]
        return path if row.size == WHOLE else f"{path}: {self.names[range(len(self))[i]]}"

    def written(self, row: Row) -> bytes:
        """The file of a caption."""
        path = self.strings[row.path]
        beside = path if row.size != WHOLE else f"{os.path.splitext(path)[0]}.{self.suffixes[row.suffix]}"
        return self.read(beside, row.text_offset, row.text_size)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("opened", "unpacked")}

    @cached_property
    def opened(self):
        """path -> open file; few at a time, for there may be more shards than a process may have open."""
        return lru_cache(maxsize=32)(partial(open, mode="rb", buffering=0))

    @cached_property
    def unpacked(self) -> BinaryIO:
        """All gzip shards, for these cannot be read from the middle, end to end in one unnamed file."""
        file = tempfile.TemporaryFile()  # noqa: SIM115, it stays open
        for path in self.packed:
            unpack(path, file)
        return file

    def read(self, path: str, offset: int, size: int) -> bytes:
        if size == WHOLE:
            with open(path, "rb") as file:
                return file.read()
        file = self.unpacked if path in self.packed else self.opened(path)
        content = os.pread(file.fileno(), size, offset)  # unlike seek and read, safe where processes share the file
        if len(content) < size:
            raise OSError("the shard is shorter than when it was opened")
        return content

    def digest(self, limit: int | None = None) -> str:
        """SHA-256 of what the first `limit` pairs are, in their order: of their `identities`."""
        return hashlib.sha256(self.identities(limit).tobytes()).hexdigest()

    def identities(self, limit: int | None = None) -> np.ndarray:
        """What each of the first `limit` pairs is, as (n,) int64: a hash of its name, its captions and its picture's size.

        The same wherever the data lie and however their path is spelt. A picture that was replaced by another one of the
        same size to the byte, under the same caption, is not told from it, for pictures are not read; but where two pairs
        of the data would be taken for one, these are.
        """
        limit = len(self) if limit is None else min(limit, len(self))
        for i in range(len(self.hashes), limit):
            self.hashes.append(self.identity(i))
        found = np.array(self.hashes[:limit], dtype=np.int64)
        _, group, counts = np.unique(found, return_inverse=True, return_counts=True)
        twins: dict[int, set[tuple]] = {}
        for i in np.flatnonzero(counts[group] > 1):
            row = self.row(i)
            twins.setdefault(int(group[i]), set()).add((self.strings[row.path], row.offset))
        for i in np.flatnonzero(counts[group] > 1):
            if len(twins[int(group[i])]) > 1:  # else it is one pair, given more than once
                found[i] = self.identity(i, whole=True)
        return found

    def identity(self, i: int, whole: bool = False) -> int:
        """Of one pair; with `whole`, of what its picture holds too. What cannot be read is told when the pair is used."""
        row = self.row(i)
        path, size, content, picture = self.strings[row.path], row.size, b"", b""
        with suppress(OSError, ValueError):
            if self.suffixes[row.suffix] == LISTED:
                content = "\0".join(self.texts(i)).encode()
            else:
                content = self.written(row)
                if not whole and not content.isascii() and encoding_of(io.BytesIO(content)) == GUESS:
                    self.remark(GUESSED, self.label(i))
            if size == WHOLE:
                size = os.stat(path).st_size
            if whole:
                picture = self.read(path, row.offset, row.size)
        name = self.names[i].encode("utf-8", "surrogatepass")
        parts = b"\0".join((name, b"%d" % size, b"%d" % len(content), content, picture))
        return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big", signed=True)

    def add(self, name: str, row: Row) -> None:
        self.names.append(name)
        self.rows.extend(row)

    def suffix(self, spelling: str) -> int:
        if spelling not in self.suffixes:
            self.suffixes.append(spelling)
        return self.suffixes.index(spelling)

    def keep(self, texts: Sequence[str]) -> tuple[int, int]:
        """Captions of a list; returns where they are and how many, for a Row."""
        first = len(self.strings.ends) - 1
        for text in texts:
            self.strings.append(text)
        return first, len(texts)

    def skip(self, line: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < 1000:
            self.skipped.append(printable(line))

    def remark(self, what: str, label: str) -> None:
        self.remarks.setdefault(what, [0, printable(label)])[0] += 1

    def told(self) -> str:
        """What the screen should say of the data: what was left out and what is remarkable, each with the first; or ''."""
        found = [f"{count:,} {what}; the first: {label}" for what, (count, label) in self.remarks.items()]
        if self.skipped:
            found.insert(0, f"{self.skipped_count:,} left out of the data; the first: {self.skipped[0]}")
        return "\n".join(found)


@contextmanager
def telling(label: str) -> Iterator[None]:
    """Whatever hinders the use of a sample becomes a BadSample that names it."""
    try:
        yield
    except PictureError as error:
        raise BadSample(str(error)) from None
    except OSError as error:
        raise BadSample(f"{label}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise BadSample(f"{label}: {error}") from None


def open_pairs(
    data: str | Path | Sequence[str | Path],
    data_root: str | Path | None = None,
    uncaptioned: bool = False,
    once: bool = False,
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

    Raises:
        DataError: something is missing, of another kind, or has no pair in it.
    """
    pairs, seen = Pairs(), set() if once else None
    given = [data] if isinstance(data, (str, Path)) else list(data)
    if not given:
        raise DataError(f"no data given; {FORMS} is wanted")
    if data_root is not None and not os.path.isdir(data_root):
        raise DataError(f"`data_root` {data_root}: no such folder")
    for item, paths in [(item, list(expand(os.path.expanduser(item)))) for item in given]:
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
            raise DataError(f"{path}: a file of an unknown kind; {FORMS} is wanted")
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
        pairs.rows[i * len(row) : (i + 1) * len(row)] = array("q", row)


def expand(pattern: str) -> Iterator[str]:
    """The paths that a path, a glob or braces stand for: {000..012} or {a,b}. Raises DataError for what is not there."""
    if re.match(r"\w+://|pipe:", pattern):
        raise DataError(f"{pattern}: only local shards can be read; download them, or train with webdataset yourself")
    if os.path.exists(pattern):
        yield pattern
    elif braces := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern):
        first, last, names = braces.groups()
        width = len(first or "")  # {000..012} keeps its zeros
        choices = names.split(",") if names else (f"{i:0{width}}" for i in range(int(first), int(last) + 1))
        for choice in choices:
            yield from expand(pattern[: braces.start()] + choice + pattern[braces.end() :])
    elif found := sorted(glob.glob(pattern, recursive=True)):
        yield from found
    else:
        raise DataError(f"{pattern}: {'matches nothing' if glob.has_magic(pattern) else 'no such file or folder'}")


def add_folder(pairs: Pairs, root: str, bare: bool) -> None:
    """Pictures with captions beside them or in lists of the folder's own; or else tar shards."""
    pictures, shards, others, told = 0, [], Counter(), {}
    for path in coco_captions(root):
        told |= captions_in(pairs, path, coco_pictures(path))
    for folder, files in walk(root, onerror=lambda error: pairs.skip(str(error))):
        here, beside, taken, unread = os.path.abspath(folder), {}, {}, []
        for file in set(METADATA) & set(files):
            told |= captions_in(pairs, os.path.join(folder, file), here)
        for stem, suffix in map(os.path.splitext, files):
            beside.setdefault((stem, suffix[1:].lower()), suffix[1:])
        for file in files:
            path, (stem, suffix) = os.path.join(folder, file), os.path.splitext(file)
            texts = told.pop(os.path.join(here, file), None)
            if file.lower().endswith(SHARDS):
                shards.append(path)
            elif suffix[1:].lower() not in PICTURES and not texts:
                others[suffix.lower()] += 1
                unread += [(stem, path)] if suffix[1:].lower() in UNREAD else []
            else:
                pictures += 1
                name = os.path.relpath(os.path.join(folder, stem), root)
                written = next((beside[stem, kind] for kind in BESIDE if (stem, kind) in beside), None)
                if taken.setdefault(stem, file) != file:
                    pairs.skip(f"{path}: {taken[stem]} has the same name")
                else:
                    add_picture(pairs, name, path, path, written, texts, bare)
        for stem, path in unread:
            if stem not in taken:
                pairs.skip(f"{path}: a picture of a kind that cannot be read ({', '.join(PICTURES)} can)")
    for path in told:
        pairs.skip(f"{path}: no such picture, though it has a caption")
    for path in shards:
        if pictures:
            pairs.skip(f"{path}: a shard among pictures; it is read when it is named itself")
        else:
            add_shard(pairs, path, bare)
    if not pictures and not shards and others:
        found = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in others.most_common(3))
        pairs.skip(f"no pictures ({', '.join(PICTURES)}) and no shards ({', '.join(SHARDS)}) in it, but {found}")


def walk(root: str, onerror: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
    """Each folder with the names of its files, sorted; what links lead to, behind all others, and no folder twice."""
    seen, tops = set(), [root]
    for top in tops:  # it grows on the way
        for folder, folders, files in os.walk(top, onerror=onerror):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = sorted(name for name in folders if not name.startswith("."))
            links = [name for name in inside if os.path.islink(os.path.join(folder, name))]
            tops += [os.path.join(folder, name) for name in links]
            folders[:] = [name for name in inside if name not in links]
            yield folder, sorted(name for name in files if not name.startswith("."))


def captions_in(pairs: Pairs, path: str, root: str) -> dict[str, tuple[int, int]]:
    """What a list in a folder tells of the pictures there: by their whole paths, where their captions are kept."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        for _, name, texts in entries(pairs, path):
            if texts:
                picture = os.path.normpath(os.path.join(root, name))
                found[picture] = found.get(picture, ()) + texts
    except DataError as error:  # it may be about something else
        pairs.skip(str(error))
    return {picture: pairs.keep(texts) for picture, texts in found.items()}


def coco_captions(root: str) -> list[str]:
    """COCO's files of captions for the pictures in a folder: in its `annotations`, or in those beside it."""
    folder = os.path.abspath(root)
    parent, split = os.path.split(folder)
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "annotations", "captions_*.json")))
    found += glob.glob(os.path.join(glob.escape(parent), "annotations", f"captions_{glob.escape(split)}.json"))
    return [path for path in found if coco_pictures(path)]


def coco_pictures(path: str) -> str | None:
    """Where the pictures of COCO's captions_val2017.json lie: in val2017 or images/val2017, beside its own folder."""
    folder, name = os.path.split(os.path.abspath(path))
    split = re.fullmatch(r"captions_(.+)\.json", name)
    places = [os.path.join(folder, "..", *parts, split[1]) for parts in ((), ("images",))] if split else []
    return next((os.path.normpath(place) for place in places if os.path.isdir(place)), None)


def entries(pairs: Pairs, path: str) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What `listed` gives of a list, in the encoding that it is found to be in."""
    with open(path, "rb") as file:
        encoding = encoding_of(file)
    if encoding == GUESS:
        pairs.remark(GUESSED, path)
    return listed(path, encoding)


def add_list(pairs: Pairs, path: str, data_root: str | Path | None, seen: set[str] | None, bare: bool) -> None:
    root = data_root or coco_pictures(path) or os.path.dirname(path)
    for where, name, texts in entries(pairs, path):
        if "\\" in name and not os.path.exists(os.path.join(root, name)):  # the list was made on Windows
            name = name.replace("\\", "/")
        picture = os.path.join(root, name)
        if seen is not None and (texts or bare):
            if picture in seen:
                continue
            seen.add(picture)
        add_picture(pairs, name, picture, where, None, pairs.keep(texts), bare)


def add_picture(
    pairs: Pairs, name: str, path: str, label: str, written: str | None, texts: tuple[int, int] | None, bare: bool
) -> None:
    """A picture file with its captions: in a file beside it, by its suffix; or kept here; or, with `bare`, none."""
    place, count = texts or (0, 0)
    if written:
        place, count = 0, WHOLE
    elif not count and not bare:
        pairs.skip(f"{label}: no caption")
        return
    elif not count:
        pairs.remark(BARE, label)
    string = pairs.strings.append(path)
    pairs.add(name, Row(string, 0, WHOLE, place, count, pairs.suffix(written or LISTED)))


def add_shard(pairs: Pairs, path: str, bare: bool) -> None:
    """Pictures and captions whose names are alike up to the first dot, as webdataset has it.

    Files with more dots are further fields of such a sample; of no sample, as 22.05.png and 22.05.txt, they are pairs by
    all but their last suffix, behind the others.
    """
    string, before, last, flaw = pairs.strings.append(path), len(pairs), "", None
    waiting: dict[str, dict[str, tuple[int, int]]] = {}  # members of keys that are not whole yet
    dotted: dict[str, dict[str, tuple[int, int]]] = {}

    def settle(keys: dict[str, dict[str, tuple[int, int]]], key: str) -> None:
        group = keys.get(key, {})
        kind = next((kind for kind in BESIDE if kind in group), None)
        if kind and "picture" in group:
            pairs.add(key, Row(string, *group["picture"], *group[kind], pairs.suffix(kind)))
            del keys[key]

    with open(path, "rb") as file:
        where = file, 0, os.fstat(file.fileno()).st_size
        if file.read(2) == b"\x1f\x8b":  # gzip, whatever its name
            if path not in pairs.packed:
                pairs.packed[path] = unpack(path, pairs.unpacked)
            where = pairs.unpacked, *pairs.packed[path]
        try:
            for member in members(*where):
                folder, slash, base = member.name.rpartition("/")
                key, kind = folder + slash + base.partition(".")[0], role(base.partition(".")[2])
                if key != last:
                    settle(waiting, last)
                    last = key
                keys = waiting
                if not kind:
                    keys, key, kind = dotted, folder + slash + base.rpartition(".")[0], role(base.rpartition(".")[2])
                if not kind or base.startswith("."):
                    continue
                group, span = keys.setdefault(key, {}), (member.offset_data, member.size)
                if group.setdefault(kind, span) != span:
                    pairs.skip(f"{path}: {member.name}: the key has such a member already")
        except tarfile.TarError as error:
            flaw = error
    settle(waiting, last)
    if flaw:
        waiting.pop(last, None)  # its caption may have been behind the cut
    samples = {pairs.names[i] for i in range(before, len(pairs))} if dotted else set()
    for key in list(dotted):
        folder, slash, base = key.rpartition("/")
        sample = folder + slash + base.partition(".")[0]
        if sample in samples or "picture" in waiting.get(sample, {}) or (flaw and sample == last):
            del dotted[key]
        settle(dotted, key)
    if flaw:
        pairs.skip(f"{path}: {flaw} after {len(pairs) - before} samples")
    for key, group in [*waiting.items(), *dotted.items()]:
        if "picture" in group and bare:
            pairs.add(key, Row(string, *group["picture"], 0, 0, pairs.suffix(LISTED)))
            pairs.remark(BARE, f"{path}: {key}")
        elif "picture" in group:
            pairs.skip(f"{path}: {key}: no caption")
        elif "unread" in group:
            pairs.skip(f"{path}: {key}: a picture of a kind that cannot be read ({', '.join(PICTURES)} can)")


def role(suffix: str) -> str | None:
    """What a file is in a sample: "picture", "unread", or by its own suffix, a caption."""
    suffix = suffix.lower()
    if suffix in PICTURES:
        return "picture"
    return "unread" if suffix in UNREAD else suffix if suffix in BESIDE else None


def members(file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """Whole files of the tar between two places in a file. Raises TarError where it breaks off before its end mark."""
    file.seek(start)
    flaw = "no tar header"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            flaw = "cut short or damaged"
            while member := tar.next():
                if tar.offset <= member.offset or (member.isreg() and member.offset_data + member.size > end):
                    raise tarfile.TarError  # the first of them would go on for ever
                if member.isreg() and not member.issparse():
                    yield member
                tar.members.clear()  # it would keep them all
            file.seek(tar.offset)
            if tar.offset + 512 > end or any(file.read(512)):  # next() is silent about a header cut in two
                raise tarfile.TarError
    except (tarfile.TarError, ValueError, ArithmeticError):  # the others from sizes that no file has
        raise tarfile.TarError(flaw) from None


def unpack(path: str, file: BinaryIO) -> tuple[int, int]:
    """Append what a gzip file holds, as far as it is whole. Returns where it lies."""
    start = file.seek(0, os.SEEK_END)
    with gzip.open(path) as packed:
        try:
            while chunk := packed.read1(1 << 16):
                file.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile):  # the tar in it then has no end mark
            pass
    file.flush()
    return start, file.tell()


def identity(pairs: Pairs, limit: int | None, ranks: Ranks) -> dict:
    """What the data of a run are, wherever they lie. Raises DataError where its processes see different data."""
    found = {"data (pairs)": min(len(pairs), limit or len(pairs)), "data (sha256)": pairs.digest(limit)}
    if len(set(ranks.gather([found["data (sha256)"]]))) > 1:
        raise DataError("`data`: not the same on all processes; do they share the disk?")
    return found
