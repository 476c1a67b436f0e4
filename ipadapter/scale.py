"""How loudly an image prompt is heard: one value that comes to a number for each layer and each step of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weight = float | Tensor  # one number, or one for each row of the batch: (batch,)


def within(step: tuple[int, int], start: float, until: float) -> bool:
    """Whether step (i, N) of a run lies between these shares of it, whole."""
    i, steps = step
    return start <= i / steps and (i + 1) / steps <= until


@dataclass(frozen=True)
class Scale:
    """The weight of an image prompt, by layer and by step.

    Step i of N acts iff start <= i/N and (i + 1)/N <= until; N are the steps that run. Constant over all of them and for
    all layers it is the same as its weight, bit for bit; where it comes to 0 nothing is computed.

    Args:
        weight: what all the rest is multiplied by.
        layers: a factor for each cross-attention layer, in the order of their numbers; None: 1 for all.
        start, until: the window, shares of the run.
        curve: factors over the steps. "constant"; "fade-in" and "fade-out" go evenly from 0 to 1 and from 1 to 0 over
            the window; numbers are spread over the run, an equal share of its steps for each.

    Raises:
        ValueError: a window that is none, a curve that is none.
    """

    weight: Weight = 1.0
    layers: Sequence[float] | None = None
    start: float = 0.0
    until: float = 1.0
    curve: str | Sequence[float] = "constant"

    def __post_init__(self):
        if not 0 <= self.start <= self.until <= 1:
            raise ValueError(f"`start` {self.start:g} to `until` {self.until:g}: 0 to 1 is wanted, and no way back")
        if self.curve not in ("constant", "fade-in", "fade-out") and (isinstance(self.curve, str) or not self.curve):
            raise ValueError(f"`curve`: {self.curve!r} given; constant, fade-in, fade-out or numbers are wanted")
        for name in ("layers", "curve"):
            if isinstance(value := getattr(self, name), Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # equal ones are equal

    def at(self, layer: int, step: tuple[int, int]) -> Weight:
        """What it comes to for a layer in step (i, N) of a run."""
        factor = self.over(*step) * (1.0 if self.layers is None else self.layers[layer])
        return self.weight * factor if factor else 0.0

    def over(self, i: int, steps: int) -> float:
        """The factor of a step: its window and its curve."""
        if not within((i, steps), self.start, self.until):
            return 0.0
        if not isinstance(self.curve, str):
            return self.curve[i * len(self.curve) // steps]
        # Of the window, in the middle of the step:
        passed = ((i + 0.5) / steps - self.start) / (self.until - self.start)
        return {"constant": 1.0, "fade-in": passed, "fade-out": 1 - passed}[self.curve]


@dataclass(frozen=True)
class Rows:
    """The scales of prompts that were stacked along the batch, each with its number of rows.

    What they come to is known in the step alone: some may be silent in it, or all.
    """

    scales: tuple["Weight | Sequence[Weight] | Scale | Rows", ...]
    counts: tuple[int, ...]

    def at(self, layer: int, step: tuple[int, int]) -> Weight:
        """As `Scale.at`: a number where the rows agree, else one for each."""
        return of_rows([at(scale, layer, step) for scale in self.scales], self.counts)


def at(scale: "Weight | Sequence[Weight] | Scale | Rows", layer: int, step: tuple[int, int]) -> Weight:
    """What any kind of scale comes to."""
    if isinstance(scale, Scale | Rows):
        return scale.at(layer, step)
    return scale[layer] if isinstance(scale, Sequence) else scale


def of_rows(weights: Sequence[Weight], counts: Sequence[int]) -> Weight:
    """Numbers that agree stay a number: where all rows are silent, so is the batch."""
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    if not tensors and len(set(weights)) == 1:
        return weights[0]
    device = tensors[0].device if tensors else "cpu"
    numbers = (torch.as_tensor(weight, dtype=torch.float32, device=device) for weight in weights)
    return torch.cat([weight.expand(count) for weight, count in zip(numbers, counts, strict=True)])
