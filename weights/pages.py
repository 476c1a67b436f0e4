"""Gives memory back to the system that is not wanted twice: pages of mapped files, and what freed models left behind.

A tensor of a mapped file comes into memory page by page as it is used, and stays until the file is closed. Once it has
been copied, to another dtype or device, its pages can go: should they be wanted again, they are read again. All this on
Linux; elsewhere nothing happens.
"""

import ctypes
import mmap
from array import array
from contextlib import suppress

import torch
from torch import Tensor

PAGEMAP = "/proc/self/pagemap"  # 64 bits for each page of this process; the first three tell what it is:
IN_MEMORY, SWAPPED_OUT, OF_A_FILE, ABSENT = 0b100, 0b010, 0b001, 0

SMALL = 1 << 16  # bytes of a tensor that come back when its neighbour is read


def give_back(tensor: Tensor) -> None:
    """Let the pages go that lie within a tensor, if a file holds all that is in them; else nothing happens."""
    if tensor.nbytes < SMALL or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = whole_pages(tensor)
    if set(kinds(first, last)) <= {ABSENT, IN_MEMORY | OF_A_FILE}:
        address, size = first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def whole_pages(tensor: Tensor) -> tuple[int, int]:
    """The numbers of the first page that lies within a tensor, and of the one behind the last."""
    length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return -(-start // mmap.PAGESIZE), (start + length * tensor.itemsize) // mmap.PAGESIZE


def kinds(first: int, last: int) -> list[int]:
    """Of each page from one number to another; a page of a file that was written to is of no file."""
    try:
        with open(PAGEMAP, "rb") as file:
            file.seek(8 * first)
            entries = array("Q", file.read(8 * (last - first)))
    except OSError:
        return [IN_MEMORY]
    return [entry >> 61 for entry in entries]


def give_back_freed() -> None:
    """Let the pages go that glibc keeps for itself when tensors of less than 32 MB are freed."""
    with suppress(AttributeError, TypeError):  # another C library; Windows
        ctypes.CDLL(None).malloc_trim(0)
