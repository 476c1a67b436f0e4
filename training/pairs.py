"""Pictures with captions, in the forms they are shared in: tar shards, folders, lists. Any pair can be read at any time.

Shards follow https://github.com/webdataset/webdataset, lists the trainers of https://github.com/tencent-ailab/IP-Adapter.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from files.errors import UserError
from files.pictures import PictureError, read_picture

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
KINDS = ("txt", "json", "listed")  # where a caption stands; a .txt is taken before a .json
FORMS = "a folder of pictures with .txt or .json beside them, .tar or .tar.gz shards, or a .json or .jsonl list"
WHOLE = -1  # as a size: the whole file, not a part of a shard


class DataError(UserError):
    """Data that cannot be used at all; the message is one line that names what was given."""


class BadSample(ValueError):
    """One sample that cannot be used; the message is one line that names its file, or its shard and key."""


@dataclass(frozen=True)
class Pair:
    name: str  # path in the folder without suffix, or key in the shard, or `image_file` of the list
    image: Image.Image  # RGB, upright
    text: str


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
        self.rows = array("q")  # six for each: path (in strings), offset and size of picture, then of caption, kind
        self.packed: dict[str, tuple[int, int]] = {}  # gzip shards: where they lie in `unpacked`
        self.skipped: list[str] = []  # the first thousand that were left out, and why
        self.skipped_count = 0

    def __len__(self) -> int:
        return len(self.rows) // 6

    def __getitem__(self, i: int) -> Pair:
        """Raises BadSample if the picture or its caption cannot be read."""
        i = range(len(self))[i]
        string, offset, size, text_offset, text_size, kind = self.rows[6 * i : 6 * i + 6]
        name, path = self.names[i], self.strings[string]
        label = path if size == WHOLE else f"{path}: {name}"
        try:
            if KINDS[kind] == "listed":
                text = self.strings[string + 1]
            else:
                beside = path if size != WHOLE else f"{os.path.splitext(path)[0]}.{KINDS[kind]}"
                text = caption(self.read(beside, text_offset, text_size), KINDS[kind])
            image = read_picture(io.BytesIO(self.read(path, offset, size)), label)
        except PictureError as error:
            raise BadSample(str(error)) from None
        except OSError as error:
            raise BadSample(f"{label}: cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise BadSample(f"{label}: {error}") from None
        return Pair(name, image, text)

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

    def digest(self) -> str:
        """A hash of names, paths, listed captions, and places in shards; not of what a picture shows."""
        return hashlib.sha256(self.names.content + b"\0" + self.strings.content + self.rows.tobytes()).hexdigest()

    def read(self, path: str, offset: int, size: int) -> bytes:
        if size == WHOLE:
            return Path(path).read_bytes()
        file = self.unpacked if path in self.packed else self.opened(path)
        content = os.pread(file.fileno(), size, offset)  # unlike seek and read, safe where processes share the file
        if len(content) < size:
            raise OSError("the shard is shorter than when it was opened")
        return content

    def add(self, name: str, *row: int) -> None:
        self.names.append(name)
        self.rows.extend(row)

    def skip(self, line: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < 1000:
            self.skipped.append(line)


def open_pairs(data: str | Path | Sequence[str | Path]) -> Pairs:
    """Index pairs of pictures and captions; the order is that of `data`, sorted within a folder or glob.

    Args:
        data: one or several of: a folder, searched through, with `x.txt` or `x.json` beside `x.png`; tar shards, as a
            path, a glob (`a/*.tar`) or braces (`a/{000..012}.tar`), of members `key.png` and `key.txt` or `key.json`; a
            .json list, or .jsonl lines, of {"image_file": ..., "text": ...} with paths from the list's own folder.
            In JSON, "caption" serves as well as "text".

    Raises:
        DataError: something is missing, of another kind, or has no pair in it.
    """
    pairs = Pairs()
    given = [data] if isinstance(data, (str, Path)) else list(data)
    if not given:
        raise DataError(f"no data given; {FORMS} is wanted")
    for item, paths in [(item, list(expand(os.fspath(item)))) for item in given]:
        count, skipped = len(pairs), pairs.skipped_count
        for path in paths:
            try:
                if os.path.isdir(path):
                    add_folder(pairs, path)
                elif path.lower().endswith((".tar", ".tar.gz", ".tgz")):
                    add_shard(pairs, path)
                elif path.lower().endswith((".json", ".jsonl")):
                    add_list(pairs, path)
                else:
                    raise DataError(f"{path}: a file of an unknown kind; {FORMS} is wanted")
            except OSError as error:
                raise DataError(f"{path}: cannot be indexed ({error.strerror or error})") from None
        if len(pairs) == count:
            reasons = pairs.skipped[skipped:] or [f"no pictures ({', '.join(PICTURES)}) in it"]
            more = pairs.skipped_count - skipped - 1
            raise DataError(f"{item}: no pair to use: {reasons[0]}{f', and {more} more' if more > 0 else ''}")
    return pairs


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


def add_folder(pairs: Pairs, root: str) -> None:
    for folder, folders, files in os.walk(root, onerror=lambda error: pairs.skip(str(error))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        there, taken = set(files), {}
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix[1:].lower() not in PICTURES or file.startswith("."):
                continue
            path = os.path.join(folder, file)
            kind = next((kind for kind in KINDS if f"{stem}.{kind}" in there), None)
            if taken.setdefault(stem, file) != file:
                pairs.skip(f"{path}: {taken[stem]} has the same name")
            elif kind is None:
                pairs.skip(f"{path}: no caption")
            else:
                name = os.path.relpath(os.path.join(folder, stem), root)
                pairs.add(name, pairs.strings.append(path), 0, WHOLE, 0, WHOLE, KINDS.index(kind))


def add_list(pairs: Pairs, path: str) -> None:
    wanted, where = '{"image_file": ..., "text": ...}', path
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = path.lower().endswith(".jsonl")
            entries = file if lines else json.load(file)
            if not lines and not isinstance(entries, list):
                raise DataError(f"{path}: not a list of {wanted}; one of these on each line is a .jsonl")
            for number, entry in enumerate(entries, 1):
                where = f"{path}: {'line' if lines else 'entry'} {number}"
                if lines and not entry.strip():
                    continue
                entry = json.loads(entry) if lines else entry
                if not isinstance(entry, dict) or not isinstance(entry.get("image_file"), str):
                    raise DataError(f"{where} is not {wanted}")
                text = text_of(entry)
                if text is None:
                    pairs.skip(f"{where}: no caption")
                else:
                    string = pairs.strings.append(os.path.join(os.path.dirname(path), entry["image_file"]))
                    pairs.strings.append(text)
                    pairs.add(entry["image_file"], string, 0, WHOLE, 0, WHOLE, KINDS.index("listed"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def add_shard(pairs: Pairs, path: str) -> None:
    string, before, last, flaw = pairs.strings.append(path), len(pairs), "", None
    waiting: dict[str, dict[str, tuple[int, int]]] = {}  # members of keys that are not whole yet

    def settle(key: str) -> None:
        group = waiting.get(key, {})
        kind = next((kind for kind in KINDS if kind in group), None)
        if kind and "picture" in group:
            pairs.add(key, string, *group["picture"], *group[kind], KINDS.index(kind))
            del waiting[key]

    with open(path, "rb") as file:
        where = file, 0, os.fstat(file.fileno()).st_size
        if file.read(2) == b"\x1f\x8b":  # gzip, whatever its name
            if path not in pairs.packed:
                pairs.packed[path] = unpack(path, pairs.unpacked)
            where = pairs.unpacked, *pairs.packed[path]
        try:
            for member in members(*where):
                folder, slash, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key, kind = folder + slash + stem, "picture" if kind.lower() in PICTURES else kind.lower()
                if key != last:
                    settle(last)
                    last = key
                if not stem or kind not in ("picture", "txt", "json"):
                    continue
                group, span = waiting.setdefault(key, {}), (member.offset_data, member.size)
                if group.setdefault(kind, span) != span:
                    pairs.skip(f"{path}: {member.name}: the key has such a member already")
        except tarfile.TarError as error:
            flaw = error
    settle(last)
    if flaw:
        waiting.pop(last, None)  # its caption may have been behind the cut
        pairs.skip(f"{path}: {flaw} after {len(pairs) - before} samples")
    for key, group in waiting.items():
        if "picture" in group:
            pairs.skip(f"{path}: {key}: no caption")


def members(file: BinaryIO, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """Whole files of the tar between two places in a file. Raises TarError where it breaks off before its end mark."""
    file.seek(start)
    flaw = "no tar header"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            flaw = "cut short or damaged"
            while member := tar.next():
                if member.isreg() and member.offset_data + member.size > end:
                    raise tarfile.TarError
                if member.isreg() and not member.issparse():
                    yield member
                tar.members.clear()  # it would keep them all
            file.seek(tar.offset)
            if tar.offset + 512 > end or any(file.read(512)):  # next() is silent about a header cut in two
                raise tarfile.TarError
    except tarfile.TarError:
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


def caption(content: bytes, kind: str) -> str:
    """The text in a .txt or .json file. Raises ValueError that says what is wrong with it."""
    try:
        text = content.decode("utf-8-sig")
        text = text_of(json.loads(text)) if kind == "json" else text
    except (ValueError, RecursionError):
        raise ValueError(f"the caption is not {'JSON' if kind == 'json' else 'UTF-8 text'}") from None
    if text is None:
        raise ValueError('the JSON has no "text" or "caption"')
    return text.strip()


def text_of(entry: object) -> str | None:
    found = [entry.get(key) for key in ("text", "caption")] if isinstance(entry, dict) else []
    return next((text for text in found if isinstance(text, str)), None)
