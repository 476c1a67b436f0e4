"""Tar files, damaged ones too: where their members lie; and what a packed one holds."""

import gzip
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from training.captions import DataError

# What a packed shard may hold: so many times its size, and some more, for a small one may be drawings of one colour.
# JPEGs do not pack at all, WebP drawings with captions to a half; gzip can a thousand to one, which would fill a disk.
TIMES, MORE = 100, 16 << 20


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
    """Append what a gzip file holds, as far as it is whole, to a temporary file. Returns where it lies.

    Raises:
        DataError: that is more than a shard of its size holds, or than there is room for; then nothing was appended.
    """
    start, size = file.seek(0, os.SEEK_END), os.path.getsize(path)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    most = min(TIMES * size + MORE, free * 9 // 10)
    with gzip.open(path) as packed:
        try:
            while chunk := packed.read1(1 << 16):
                if file.tell() - start + len(chunk) > most:
                    file.truncate(start)
                    raise DataError(
                        f"{path}: its {size:,} bytes unpack to more than {most:,}; allowed are {TIMES} times its size and "
                        f"{MORE:,}, and nine tenths of what is free in {tempfile.gettempdir()} ({free:,} bytes)"
                    )
                file.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile):  # the tar in it then has no end mark
            pass
    file.flush()
    return start, file.tell()
