"""Changes of a model's weights that can be taken out again, above all LoRAs (arXiv 2106.09685): W + scale * up @ down.

A change is a small value with `delta(weight)`: what is to be added to a weight, of its shape, on its device, in fp32.
`merge` adds changes to the weights themselves, so they cost nothing per step. The forms beside LoRA are those of LyCORIS
(arXiv 2309.14859) and DoRA (arXiv 2402.09353).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor, nn


class Change(Protocol):
    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it fits; of a convolution the last sizes may be one product."""

    def delta(self, weight: Tensor) -> Tensor:
        """What is to be added to a weight, given in fp32: of its shape, on its device."""


Weighted = Sequence[tuple[float, Change]]  # each change with its weight


@dataclass(frozen=True)
class LowRank:
    """LoRA: a change of a matrix as the product of a tall and a wide one; of a convolution, one behind the other."""

    down: Tensor  # (rank, in), or (rank, in, height, width) of a convolution
    up: Tensor  # (out, rank), or (out, rank, 1, 1)
    mid: Tensor | None = None  # (rank, rank, height, width): a convolution between two of 1x1
    scale: float = 1.0  # alpha / rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it fits."""
        kernel = (self.down if self.mid is None else self.mid).shape[2:]
        return self.up.shape[0], self.down.shape[1], *kernel

    def delta(self, weight: Tensor) -> Tensor:
        down, up = self.down.to(weight).flatten(1), self.up.to(weight).flatten(1)
        if self.mid is None:
            return self.scale * (up @ down).view_as(weight)
        return self.scale * torch.einsum("or, rshw, si -> oihw", up, self.mid.to(weight), down).view_as(weight)


@dataclass(frozen=True)
class Factors:
    """A matrix as the product of two; with a core, of a convolution: (rank, rank, height, width) between (rank, out or in)."""

    a: Tensor  # (rows, rank)
    b: Tensor  # (rank, columns)
    core: Tensor | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        """On the device and in the dtype of a weight."""
        a, b = self.a.to(weight), self.b.to(weight)
        return a @ b if self.core is None else torch.einsum("ij..., ip, jr -> pr...", self.core.to(weight), a, b)


@dataclass(frozen=True)
class Whole:
    """A matrix that is there as it is; as a change, a whole difference of weights, or of a norm."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def matrix(self, weight: Tensor) -> Tensor:
        return self.tensor.to(weight)

    def delta(self, weight: Tensor) -> Tensor:
        return self.tensor.to(weight).view_as(weight)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: two matrices of low rank, multiplied number by number."""

    first: Factors
    second: Factors
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.first.matrix(torch.empty(0, device="meta")).shape)

    def delta(self, weight: Tensor) -> Tensor:
        return (self.scale * self.first.matrix(weight) * self.second.matrix(weight)).view_as(weight)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: each number of the first matrix stands before a copy of the second; either may be of low rank."""

    first: Factors | Whole
    second: Factors | Whole
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.product(torch.empty(0, device="meta")).shape)

    def product(self, weight: Tensor) -> Tensor:
        first, second = self.first.matrix(weight), self.second.matrix(weight)
        return torch.kron(first.view(*first.shape, *[1] * (second.ndim - first.ndim)), second)

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * self.product(weight).view_as(weight)


@dataclass(frozen=True)
class Decomposed:
    """DoRA: the changed weight, its rows, or its columns, brought to lengths of their own."""

    change: Change
    lengths: Tensor  # (out,) or (out, 1, ...), or (1, in, ...)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.change.shape
        if self.lengths.numel() != shape[self.axis(shape)]:
            raise ValueError(f"lengths of {tuple(self.lengths.shape)} for {shape}")
        return shape

    def axis(self, shape: tuple[int, ...]) -> int:
        """Along which the lengths lie, of a weight of this shape."""
        return int(self.lengths.ndim > 1 and self.lengths.shape[0] == 1 != shape[0])

    def delta(self, weight: Tensor) -> Tensor:
        changed = weight + self.change.delta(weight)
        axis = self.axis(weight.shape)
        others = [i for i in range(weight.ndim) if i != axis]
        sizes = [-1 if i == axis else 1 for i in range(weight.ndim)]
        norms = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
        return self.lengths.to(weight).reshape(sizes) * changed / norms - weight


@dataclass
class Merged:
    """What a parameter was, and the changes that are in it now, by the call of `merge` that brought them."""

    base: Tensor
    changes: dict[object, Weighted] = field(default_factory=dict)


@torch.no_grad()
def merge(model: nn.Module, changes: Mapping[str, Weighted], keep: bool = True) -> Callable[[], None]:
    """Add changes, each times its weight, to a model's parameters, in place; summed in fp32 and rounded once.

    What a parameter was is kept beside it (as its attribute `merged`), and with each change that comes or goes the sum is
    made anew from that. So changes come and go in any order, and without them the parameter is what it was, bit for bit.

    Args:
        changes: by the names of the parameters.
        keep: False merges for good, and keeps nothing in memory.

    Returns:
        A function that takes these changes out again. It raises RuntimeError if they were merged for good.

    Raises:
        RuntimeError: a weight reads as a copy, for it is stored in fewer bits; then nothing was changed.
    """
    if copies := [name for name in changes if not isinstance(attrgetter(name)(model), nn.Parameter)]:
        raise RuntimeError(
            f"{len(copies)} weights ({copies[0]}, ...) are stored in fewer bits: merge first, then store"
        )
    call, parameters = object(), {name: model.get_parameter(name) for name in changes}
    for name, p in parameters.items():
        merged = vars(p).get("merged")
        if keep:
            p.merged = merged or Merged(p.detach().clone())
            p.merged.changes[call] = changes[name]
        else:
            base = merged.base if merged else p
            base.copy_(total(base, changes[name]))
        write(p)

    @torch.no_grad()
    def undo() -> None:
        if not keep:
            raise RuntimeError("these changes were merged for good (keep=False)")
        for p in parameters.values():
            if merged := vars(p).get("merged"):
                merged.changes.pop(call, None)
                write(p)

    return undo


def write(p: nn.Parameter) -> None:
    """Give a parameter the sum of what it was and the changes that are in it."""
    if merged := vars(p).get("merged"):
        p.copy_(total(merged.base, [pair for pairs in merged.changes.values() for pair in pairs]))
        if not merged.changes:
            del p.merged


def total(base: Tensor, changes: Weighted) -> Tensor:
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    return sum((weight * change.delta(wide) for weight, change in changes), start=wide)
