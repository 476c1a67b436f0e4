"""The order of a run, and what is random in it, from the seed and the place alone.

Which pair stands at a place of the run, and the randomness it meets there, follow from the seed and the place alone.
The place of a sample counts all samples of the run, over all processes: so neither the number of data-loading workers,
nor a resumed run, nor, at the same global batch, the number of processes changes what is learned.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from training.captions import DataError
from training.features import Features
from training.pairs import BadSample
from training.references import References


def pair_at(seed: int, place: int, pairs: int, retry: int = 0) -> int:
    """The number of the pair at a place of the run: each pair once an epoch, shuffled anew in each.

    With `retry`, the pair to take instead when so many before it could not be read.
    """
    epoch, i = divmod(place, pairs)
    return int(_shuffled(seed, epoch, pairs)[(i + retry) % pairs])


@lru_cache(maxsize=2)  # two: a batch may lie across the border of two epochs
def _shuffled(seed: int, epoch: int, pairs: int) -> Tensor:
    return torch.randperm(pairs, generator=generator_at(seed, -1 - epoch))


def generator_at(seed: int, place: int) -> torch.Generator:
    """The randomness of one place of the run (negative places: of an epoch's shuffle)."""
    return torch.Generator().manual_seed(mixed(f"{seed} {place}"))


def caption_at(seed: int, place: int) -> int:
    """Which caption of its pair is taken at a place of the run: of n captions, this number modulo n."""
    return mixed(f"{seed} {place} caption")


def reference_at(seed: int, place: int) -> tuple[float, int]:
    """Whether another picture is the prompt at a place of the run, a number in [0, 1), and which: of n, this modulo n."""
    return mixed(f"{seed} {place} whether") / 2**56, mixed(f"{seed} {place} reference")


def mixed(text: str) -> int:
    """56 bits that follow from a text, and look random."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def draws(
    seed: int, places: list[int], shape: tuple[int, ...], offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that is random in a step, from the places of its samples.

    Args:
        offset: how much of the noise that is added is the same over a whole channel.

    Returns u (batch,) in [0, 1) for `drops`, t (batch,) in 0..999, and two noises (batch, *shape): for the
    autoencoder's posterior, and to be added.
    """
    rows = []
    for place in places:
        generator = generator_at(seed, place)
        u, t = torch.rand((), generator=generator), torch.randint(1000, (), generator=generator)
        posterior, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        if offset:
            noise = noise + offset * torch.randn(*shape[:1], *[1] * (len(shape) - 1), generator=generator)
        rows.append((u, t, posterior, noise))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


class Places(Dataset):
    """What stands at each place of a run: (place, features or prepared pair, why others could not be used).

    In the stead of a pair that cannot be read stands the next one in the order of its epoch. Of several captions of a
    picture one is drawn, and of other pictures of its subject, where there are `references`, one as its prompt; one that
    cannot be read leaves the target its own.
    """

    def __init__(self, source: Dataset, seed: int, references: References | None = None):
        self.source, self.seed, self.references = source, seed, references

    def __getitem__(self, place: int) -> tuple[int, Features, list[str]]:
        reasons = []
        for retry in range(len(self.source)):
            number = pair_at(self.seed, place, len(self.source), retry)
            for drawn in self.drawn(place, number):
                try:
                    return place, self.source.take(number, caption_at(self.seed, place), **drawn), reasons
                except BadSample as error:
                    reasons.append(str(error))
        raise DataError(f"none of the {len(self.source)} pairs can be used; the first: {reasons[0]}")

    def drawn(self, place: int, number: int) -> Iterator[dict]:
        """What else is drawn for a pair at a place, and what is taken if that cannot be read."""
        if self.references:
            reference = self.references.drawn(number, *reference_at(self.seed, place))
            if reference is not None:
                yield {"reference": reference}
        yield {}


def places(begin: int, batches: int, size: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """This process's places in each batch of `size * ranks`, from place `begin` on."""
    for i in range(batches):
        start = begin + (i * ranks + rank) * size
        yield list(range(start, start + size))


def stack(batch: list[tuple[int, Features, list[str]]]) -> tuple[list[int], Features, list[str]]:
    """A batch of what `Places` gives, the features stacked."""
    numbers, features, reasons = zip(*batch, strict=True)
    return list(numbers), default_collate(features), [reason for some in reasons for reason in some]
