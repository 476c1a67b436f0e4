"""Columns of numbers and strings of any length: what was added last is in memory, all before it in a file."""

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

LOT = 1 << 16  # numbers in memory
BLOCK = 1 << 20  # numbers that are looked at together


class Column:
    """Whole numbers one behind the other, of 8 bytes ("q") or of one ("B").

    Safe in threads, after a fork, and when pickled: what lies in the unnamed file then goes along.

    Args:
        path: a file that holds them already and is not written to; None: an unnamed one, as soon as it is wanted.
    """

    def __init__(self, kind: str = "q", path: Path | None = None):
        self.tail, self.path = array(kind), path
        self.stored = os.path.getsize(path) // self.tail.itemsize if path else 0

    def __len__(self) -> int:
        return self.stored + len(self.tail)

    def __getstate__(self) -> dict:
        if self.path:
            return {"tail": self.tail, "path": self.path, "stored": self.stored}
        return {"tail": self.read(0, len(self)), "path": None, "stored": 0}

    @cached_property
    def file(self) -> BinaryIO:
        return open(self.path, "rb") if self.path else tempfile.TemporaryFile()

    def extend(self, numbers: Iterable[int]) -> None:
        if isinstance(numbers, bytes):
            self.tail.frombytes(numbers)
        else:
            self.tail.extend(numbers)
        if len(self.tail) >= LOT and not self.path:
            self.replace(self.stored, self.tail)
            self.stored += len(self.tail)
            del self.tail[:]

    def read(self, begin: int, end: int) -> array:
        """Those from one place to another."""
        found = self.tail[max(begin - self.stored, 0) : max(end - self.stored, 0)]
        if begin < self.stored:
            size = found.itemsize  # unlike seek and read, pread is safe where processes share the file
            content = os.pread(self.file.fileno(), (min(end, self.stored) - begin) * size, begin * size)
            found = array(found.typecode, content) + found
        return found

    def replace(self, begin: int, numbers: array) -> None:
        """Put others in the stead of as many, which were added together."""
        if len(self) > begin >= self.stored and numbers is not self.tail:
            self.tail[begin - self.stored : begin - self.stored + len(numbers)] = numbers
        else:
            self.file.seek(begin * numbers.itemsize)
            self.file.write(numbers)
            self.file.flush()

    def cut(self, count: int) -> None:
        """Keep the first so many."""
        del self.tail[max(count - self.stored, 0) :]
        self.stored = min(self.stored, count)

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        """The first so many, some at a time; each block may be written to."""
        for begin in range(0, count, BLOCK):
            numbers = self.read(begin, min(begin + BLOCK, count))
            yield np.frombuffer(numbers, dtype=numbers.typecode)


class Strings:
    """Many strings without an object for each: UTF-8, end to end."""

    def __init__(self, content: Column | None = None, ends: Column | None = None):
        self.content, self.ends = content, ends
        if ends is None:
            self.content, self.ends = Column("B"), Column()
            self.ends.extend([0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def append(self, string: str) -> int:
        """Returns the index at which it can be found again."""
        self.content.extend(string.encode("utf-8", "surrogatepass"))  # file names may hold lone surrogates
        self.ends.extend([len(self.content)])
        return len(self) - 1

    def cut(self, count: int) -> None:
        """Keep the first so many."""
        self.ends.cut(count + 1)
        self.content.cut(self.ends.read(count, count + 1)[0])

    def __getitem__(self, i: int) -> str:
        begin, end = self.ends.read(i, i + 2)
        return self.content.read(begin, end).tobytes().decode("utf-8", "surrogatepass")
