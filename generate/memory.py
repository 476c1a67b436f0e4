"""Whether what is to be held fits into the memory, told before it is read."""

import os
from collections.abc import Iterable

import torch
from torch import nn

from files.errors import UserError


def check_adapters(adapters: Iterable[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse more adapters than the memory holds.

    Args:
        adapters: without their weights, each once.
        dtype: what they are held in.

    Raises:
        UserError: says what they want and what is there.
    """
    sizes = [sum(p.numel() for p in adapter.parameters()) * dtype.itemsize for adapter in adapters]
    there = memory(device)
    if there is not None and len(sizes) > 1 and sum(sizes) > there:
        raise UserError(
            f"`adapter`: {len(sizes)} adapters want {sum(sizes) / 1e9:.1f} GB, {device} has {there / 1e9:.1f} GB: open "
            "fewer, or do not `keep` them"
        )


def memory(device: torch.device) -> int | None:
    """Bytes: of a CPU all, of a GPU those that are free; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
