"""Pictures with captions, by number: an index of where they lie, in files or in shards. Any pair can be read at any time."""

import hashlib
import io
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from files.errors import UserError, printable
from files.pictures import PictureError, picture_size, read_picture
from training.captions import GUESS, caption, encoding_of
from training.columns import BLOCK, Column, Strings
from training.tars import unpack

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe", "heic", "heif")
UNREAD = ("jxl", "svg", "dng", "cr2", "cr3", "nef", "arw")  # pictures too: counted, not passed over in silence
WHOLE = -1  # as a size: the whole file, not a part of a shard
LISTED = ""  # in the stead of a suffix: the captions are kept here, none of them perhaps
GUESSED = "captions are not UTF-8 and read as Windows-1252"
BARE = "pictures have no caption; their text is empty"


class BadSample(UserError):
    """One sample that cannot be used; the message is one line that names its file, or its shard and key."""


@dataclass(frozen=True)
class Pair:
    name: str  # path in the folder without suffix, or key in the shard, or the picture as the list names it
    image: Image.Image  # RGB, upright
    texts: tuple[str, ...]  # its captions; none, where pictures alone were wanted too
    face: str | None = None  # the file of its face embedding, where a list names one

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


class Pairs(Sequence[Pair]):
    """Pairs by number. Their index, some 60 bytes and the name for each, lies on disk; they are read when asked for.

    Safe in threads, after a fork, and when pickled for DataLoader workers.
    """

    def __init__(self):
        self.names, self.strings = Strings(), Strings()
        self.rows = Column()  # a Row for each
        self.references = array("q")  # of lists: a pair, the first of its references in `strings`, how many
        self.suffixes = [LISTED]  # of files with captions, as they are spelt
        self.packed: dict[str, tuple[int, int]] = {}  # gzip shards: where they lie in `unpacked`
        self.skipped: list[str] = []  # the first thousand that were left out, and why
        self.skipped_count = 0
        self.remarks: dict[str, list] = {}  # what is to be told of pairs that are used: of how many, and of which first
        self.faces: dict[int, int] = {}  # of some pairs: their face embedding's file, in `strings`
        self.hashes = Column()  # of the first pairs, as far as they were asked for
        self.folder: Path | None = None  # where the index is kept, if it is

    def __len__(self) -> int:
        return len(self.rows) // len(Row._fields)

    def __getitem__(self, i: int) -> Pair:
        """Raises BadSample if the picture or its caption cannot be read."""
        texts, row = self.texts(i), self.row(i)
        with telling(self.label(i)):
            picture = io.BytesIO(self.read(self.strings[row.path], row.offset, row.size))
            return Pair(self.names[range(len(self))[i]], read_picture(picture, self.label(i)), texts, self.face(i))

    def picture_size(self, i: int) -> tuple[int, int]:
        """Width and height of a picture, from its first bytes if they tell; (0, 0) where they cannot be read."""
        row, found = self.row(i), (0, 0)
        path = self.strings[row.path]
        with suppress(OSError, ValueError):
            if row.size == WHOLE:
                with open(path, "rb") as file:
                    return picture_size(file)
            for size in {min(row.size, 1 << 16): None, row.size: None}:
                if found == (0, 0):
                    found = picture_size(io.BytesIO(self.read(path, row.offset, size)))
        return found

    def face(self, i: int) -> str | None:
        """The file of a pair's face embedding, where a list names one."""
        place = self.faces.get(range(len(self))[i])
        return None if place is None else self.strings[place]

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
        return Row(*self.rows.read(start, start + len(Row._fields)))

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
        digest = hashlib.sha256()
        for block in self.blocks(limit):
            digest.update(block)
        return digest.hexdigest()

    def identities(self, limit: int | None = None) -> np.ndarray:
        """What each of the first `limit` pairs is, as (n,) int64: a hash of its name, captions, face and picture's size.

        The same wherever the data lie and however their path is spelt. A picture that was replaced by another one of the
        same size to the byte, under the same caption, is not told from it, for pictures are not read; but where two pairs
        of the data would be taken for one, these are.
        """
        return np.concatenate([np.empty(0, dtype=np.int64), *self.blocks(limit)])

    def blocks(self, limit: int | None = None) -> Iterator[np.ndarray]:
        """`identities`, some at a time."""
        limit = len(self) if limit is None else min(limit, len(self))
        self.hash(limit)
        doubled = []
        for part in range(-8, 8):  # by their first four bits: so a sixteenth is in memory at once
            some = np.sort(np.concatenate([block[block >> 60 == part] for block in self.hashes.blocks(limit)]))
            doubled.append(np.unique(some[1:][some[1:] == some[:-1]]))
        doubled = np.concatenate(doubled)
        twins: dict[int, set[tuple]] = {}  # under the hash of several pairs: where their pictures lie
        for number, block in enumerate(self.hashes.blocks(limit)):
            for i in np.flatnonzero(np.isin(block, doubled)):
                row = self.row(number * BLOCK + int(i))
                twins.setdefault(int(block[i]), set()).add((self.strings[row.path], row.offset))
        # Under one with a single place it is one pair, given more than once.
        several = np.array([found for found, places in twins.items() if len(places) > 1], dtype=np.int64)
        for number, block in enumerate(self.hashes.blocks(limit)):
            for i in np.flatnonzero(np.isin(block, several)):
                block[i] = self.identity(number * BLOCK + int(i), whole=True)
            yield block

    def hash(self, count: int) -> None:
        """Find out what the first so many pairs are."""
        for i in range(len(self.hashes), count):
            self.hashes.extend([self.identity(i)])

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
        face = []
        if named := self.face(i):
            face = [os.path.basename(named).encode("utf-8", "surrogatepass")]
            with suppress(OSError, ValueError):
                face.append(self.read(named, 0, WHOLE))
        parts = b"\0".join((name, b"%d" % size, b"%d" % len(content), content, picture, *face))
        return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big", signed=True)

    def add(self, name: str, row: Row) -> None:
        self.names.append(name)
        self.rows.extend(row)

    def suffix(self, spelling: str) -> int:
        if spelling not in self.suffixes:
            self.suffixes.append(spelling)
        return self.suffixes.index(spelling)

    def cut(self, count: int) -> None:
        """Keep the first so many."""
        self.names.cut(count)
        self.rows.cut(count * len(Row._fields))
        self.hashes.cut(count)
        self.faces = {i: face for i, face in self.faces.items() if i < count}

    def keep(self, texts: Sequence[str]) -> tuple[int, int]:
        """Captions or references of a list; returns where they are and how many."""
        first = len(self.strings)
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
