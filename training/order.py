"""The order of a run: which pair stands at a place of it, from the seed and the place alone (see `chance.py`)."""

from collections.abc import Iterator

from torch.utils.data import Dataset, default_collate

from training.buckets import Buckets
from training.captions import DataError
from training.chance import caption_at, crop_at, reference_at, shuffled_at
from training.features import Crop, Features
from training.pairs import BadSample
from training.references import References


def pair_at(seed: int, place: int, pairs: int, retry: int = 0) -> int:
    """The number of the pair at a place of the run: each pair once an epoch, shuffled anew in each.

    With `retry`, the pair to take instead when so many before it could not be read.
    """
    epoch, i = divmod(place, pairs)
    return shuffled_at(seed, epoch, (i + retry) % pairs, pairs)


class Places(Dataset):
    """What stands at each place of a run: (place, features or prepared pair, why others could not be used).

    In the stead of a pair that cannot be read stands the next one in the order of its epoch. Of several captions of a
    picture one is drawn, and of other pictures of its subject, where there are `references`, one as its prompt; one that
    cannot be read leaves the target its own.
    """

    def __init__(
        self,
        source: Dataset,
        seed: int,
        references: References | None = None,
        buckets: Buckets | None = None,
        random_crop: bool = False,
        flip: bool = False,
    ):
        self.source, self.seed, self.references, self.buckets = source, seed, references, buckets
        self.random_crop, self.flip = random_crop, flip

    def __getitem__(self, place: int) -> tuple[int, Features, list[str]]:
        reasons = []
        for retry in range(len(self.source)):
            number = self.pair_at(place, retry)
            for drawn in self.drawn(place, number):
                try:
                    return place, self.source.take(number, caption_at(self.seed, place), **drawn), reasons
                except BadSample as error:
                    reasons.append(str(error))
        raise DataError(f"none of the {len(self.source)} pairs can be used; the first: {reasons[0]}")

    def drawn(self, place: int, number: int) -> Iterator[dict]:
        """What else is drawn for a pair at a place, and what is taken if that cannot be read."""
        drawn = {}
        if self.random_crop or self.flip:
            top, left, flipped = crop_at(self.seed, place)
            drawn["crop"] = Crop(*((top, left) if self.random_crop else ()), flipped=self.flip and flipped)
        if self.references:
            reference = self.references.drawn(number, *reference_at(self.seed, place))
            if reference is not None:
                yield drawn | {"reference": reference}
        yield drawn

    def pair_at(self, place: int, retry: int) -> int:
        if self.buckets:
            return self.buckets.pair_at(self.seed, place, retry)
        return pair_at(self.seed, place, len(self.source), retry)


def places(begin: int, batches: int, size: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """This process's places in each batch of `size * ranks`, from place `begin` on."""
    for i in range(batches):
        start = begin + (i * ranks + rank) * size
        yield list(range(start, start + size))


def stack(batch: list[tuple[int, Features, list[str]]]) -> tuple[list[int], Features, list[str]]:
    """A batch of what `Places` gives, the features stacked."""
    numbers, features, reasons = zip(*batch, strict=True)
    return list(numbers), default_collate(features), [reason for some in reasons for reason in some]
