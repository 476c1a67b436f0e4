"""Optimisers by name, and their state, out of a checkpoint."""

from collections.abc import Callable

import torch
from torch import Tensor

from files.errors import UserError


def adamw() -> type[torch.optim.Optimizer]:
    return torch.optim.AdamW


def adafactor() -> type[torch.optim.Optimizer]:
    """Of the second moments only those of rows and columns, and no first ones (arXiv 1804.04235): next to no memory.

    Its learning rate is relative to the size of what is learned.
    """
    return torch.optim.Adafactor


def adamw8bit() -> type[torch.optim.Optimizer]:
    """AdamW whose moments lie in 8 bits (arXiv 2110.02861), where bitsandbytes is installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"`optimizer` adamw8bit: not installed ({error}): pip install bitsandbytes") from None
    return AdamW8bit


# By name, what finds the one that is installed, or raises UserError.
OPTIMIZERS: dict[str, Callable[[], type[torch.optim.Optimizer]]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "adamw8bit": adamw8bit,
}
# What they keep of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
FACTORED = ("step", "row_var", "col_var", "variance")
EIGHT_BITS = ("step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")


def restored(name: str, p: Tensor, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """The state of one parameter, called `key`, out of a checkpoint; {} where it has none yet."""
    kept = {"adamw": MOMENTS, "adafactor": FACTORED, "adamw8bit": EIGHT_BITS}[name]
    found = {part: tensors[whole] for part in kept if (whole := f"{part}.{key}") in tensors}
    if name == "adamw8bit":
        return {part: int(value) if part == "step" else value.to(p.device) for part, value in found.items()}
    return {part: value.to(p.device if value.ndim else "cpu") for part, value in found.items()}
