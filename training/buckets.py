"""Pictures as they are: batches of one size each, near the pictures' own proportions, instead of squares.

The size of a pair follows from its picture and the sizes there are; the order of the batches from seed and place alone.
"""

import math
from collections.abc import Sequence

import numpy as np

from files.whole import whole
from training.chance import shuffled_at
from training.columns import BLOCK
from training.pairs import Pairs
from training.ranks import Ranks

Size = tuple[int, int]  # height, width
LONGEST = 2.0  # a side against the other, of the sizes that are made for a resolution


def sizes_for(resolution: int) -> list[Size]:
    """Sizes of at most resolution x resolution pixels, from tall to wide: multiples of 64, or of an eighth below 512."""
    step = min(64, max(8, resolution // 64 * 8))
    area, found = resolution * resolution, {(resolution, resolution)}
    for long in range(-(-resolution // step) * step, int(resolution * math.sqrt(LONGEST)) + step, step):
        short = area // long // step * step
        if short and long <= LONGEST * short:
            found |= {(long, short), (short, long)}
    return sorted(found, key=lambda size: size[1] / size[0])


class Buckets:
    """Which size each pair is brought to, and in which order they come: each batch of one size.

    An epoch has each pair once, shuffled within its size; what a size lacks to its last batch is filled up from its first.
    Where a size has fewer pictures than a batch, these go to the next one in proportions, and are cropped more.

    Args:
        shown: the widths and heights (n, 2) of the pictures; 0 where one cannot be read.
        groups: sizes that they may be brought to, of each resolution. In each the nearest in proportions is looked at, and
            of these the largest is taken that is not larger than the picture, or else the smallest.
        batch: pairs to a step, of all processes.
    """

    def __init__(self, shown: np.ndarray, groups: Sequence[Sequence[Size]], batch: int):
        self.batch, self.moved = batch, []
        self.sizes = sizes = sorted(
            {size for group in groups for size in group}, key=lambda size: (size[1] / size[0], size)
        )
        self.of = np.empty(len(shown), dtype=np.int16)
        for begin in range(0, len(shown), BLOCK):
            some, which = np.unique(shown[begin : begin + BLOCK], axis=0, return_inverse=True)
            numbers = [sizes.index(fitting(int(height), int(width), groups)) for width, height in some]
            self.of[begin : begin + BLOCK] = np.array(numbers, dtype=np.int16)[which.ravel()]
        counts = {i: int(count) for i, count in enumerate(np.bincount(self.of)) if count}
        while len(counts) > 1 and min(counts.values()) < batch:
            few = min(counts, key=lambda i: (counts[i], sizes[i]))
            count, others = counts.pop(few), sorted(counts)
            near = min(
                others, key=lambda i: (apart(sizes[i], *sizes[few]), abs(math.prod(sizes[i]) - math.prod(sizes[few])))
            )
            self.of[self.of == few] = near
            counts[near] += count
            self.moved.append((count, sizes[few], sizes[near]))
        self.counts = {i: counts[i] for i in sorted(counts)}
        self.members = [np.flatnonzero(self.of == i).astype(np.int32) for i in self.counts]  # the pairs of each size
        self.begins = np.cumsum([0, *(-(-len(some) // batch) for some in self.members)])  # of each size's batches
        self.length = int(self.begins[-1]) * batch  # places to an epoch

    def size(self, number: int) -> Size:
        return self.sizes[self.of[number]]

    def whole(self, place: int) -> int:
        """The first place of a batch, from this one on: a run that is gone on with in other batches skips a few."""
        return -(-place // self.batch) * self.batch

    def pair_at(self, seed: int, place: int, retry: int = 0) -> int:
        """The number of the pair at a place of the run, or of the one to take instead when so many could not be read."""
        epoch, i = divmod(place, self.length)
        number, within = divmod(i, self.batch)
        number = shuffled_at(seed, epoch, number, self.length // self.batch, "batches")
        size = int(np.searchsorted(self.begins, number, side="right")) - 1
        members = self.members[size]
        among = ((number - int(self.begins[size])) * self.batch + within + retry) % len(members)
        return int(members[shuffled_at(seed, epoch, among, len(members), f"size {size}")])

    def told(self) -> str:
        """What the screen should say of them."""
        lines = [", ".join(f"{name(self.sizes[i])} ({count:,})" for i, count in self.counts.items())]
        if self.moved:
            moves = ", ".join(f"{count:,} of {name(a)} to {name(b)}" for count, a, b in self.moved)
            lines.append(f"sizes with fewer pictures than a batch of {self.batch} go to the next one: {moves}")
        if min(self.counts.values()) < self.batch:
            lines.append(f"fewer pictures than a batch of {self.batch}: some come in it more than once")
        return "\n".join([f"sizes (width x height) of the pictures: {lines[0]}", *lines[1:]])


def open_buckets(
    pairs: Pairs,
    # Those that are trained on, the first of the pairs.
    count: int,
    # Sides of squares for which sizes are made, and sizes; none: one side, the resolution.
    given: Sequence[int | Size],
    resolution: int,
    # Pairs to a step, of all processes.
    batch: int,
    ranks: Ranks,
) -> Buckets:
    """Look at the first bytes of each picture, each process at its share, for its size; or in the index, where it is kept."""
    kept = pairs.folder / f"{count}.sizes" if pairs.folder else None
    if "" in ranks.gather(["there" if kept and kept.exists() else ""]):
        sizes = [pairs.picture_size(i) for i in range(ranks.rank, count, ranks.size)]
        share = np.array(sizes, dtype=np.int64).reshape(-1, 2).clip(max=1 << 30).astype(np.int32)
        shown = np.empty((count, 2), dtype=np.int32)
        for rank, found in enumerate(ranks.gather([share.tobytes().hex()])):
            shown[rank :: ranks.size] = np.frombuffer(bytes.fromhex(found), dtype=np.int32).reshape(-1, 2)
        if kept and ranks.first:
            with whole(kept) as part:
                shown.tofile(part)
    else:
        shown = np.memmap(kept, dtype=np.int32, mode="r", shape=(count, 2))
    return Buckets(shown, groups_of(given, resolution), batch)


def fitting(height: int, width: int, groups: Sequence[Sequence[Size]]) -> Size:
    """What a picture is brought to."""
    near = [min(group, key=lambda size: apart(size, height, width)) for group in groups]
    smaller = [size for size in near if size[0] <= height and size[1] <= width]
    return max(smaller, key=math.prod) if smaller else min(near, key=math.prod)


def apart(size: Size, height: int, width: int) -> float:
    """How far the proportions of a picture are from those of a size; of one that cannot be read from a square's."""
    return round(abs(math.log(size[1] / size[0]) - (math.log(width / height) if width and height else 0.0)), 6)


def groups_of(given: Sequence[int | Size], resolution: int) -> list[list[Size]]:
    """The sizes that are asked for: those of each resolution, and one group of those that were named; of none: the run's."""
    named = sorted({tuple(size) for size in given if not isinstance(size, int)})
    sides = sorted({side for side in given if isinstance(side, int)}) or ([] if named else [resolution])
    return [sizes_for(side) for side in sides] + ([named] if named else [])


def name(size: Size) -> str:
    return f"{size[1]}x{size[0]}"
