"""What is random in a run, from the seed and the place alone.

The place of a sample counts all samples of the run, over all processes: so neither the number of data-loading workers,
nor a resumed run, nor, at the same global batch, the number of processes changes what is learned.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

LISTED = 1 << 18  # things whose order is held as a list


def generator_at(seed: int, place: int) -> torch.Generator:
    """The randomness of one place of the run."""
    return torch.Generator().manual_seed(mixed(f"{seed} {place}"))


def shuffled_at(seed: int, epoch: int, i: int, count: int, what: str = "") -> int:
    """Which of `count` things comes as number i of an epoch that has each once; `what`: of which kind they are.

    Of many no list is made: their places are permuted by a Feistel network of four rounds, again where it leads beyond them.
    """
    key = f"{seed} {-1 - epoch} {what}".rstrip()
    if count <= LISTED:
        return int(_shuffled(key, count)[i])
    bits = (count - 1).bit_length() + 1 >> 1
    while True:
        left, right = i >> bits, i & (1 << bits) - 1
        for turn in range(4):
            left, right = right, left ^ mixed(f"{key} {turn} {right}") >> 56 - bits
        i = left << bits | right
        if i < count:
            return i


@lru_cache(maxsize=32)
def _shuffled(key: str, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed(key)))


def caption_at(seed: int, place: int) -> int:
    """Which caption of its pair is taken at a place of the run: of n captions, this number modulo n."""
    return mixed(f"{seed} {place} caption")


def reference_at(seed: int, place: int) -> tuple[float, int]:
    """Whether another picture is the prompt at a place of the run, a number in [0, 1), and which: of n, this modulo n."""
    return mixed(f"{seed} {place} whether") / 2**56, mixed(f"{seed} {place} reference")


def crop_at(seed: int, place: int) -> tuple[float, float, bool]:
    """Where a picture is cropped at a place of the run: how much of what is cut off lies above and left, in [0, 1).

    And whether it is flipped.
    """
    top, left, flipped = (mixed(f"{seed} {place} {what}") for what in ("top", "left", "flip"))
    return top / 2**56, left / 2**56, flipped % 2 == 1


def mixed(text: str) -> int:
    """56 bits that follow from a text, and look random."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def draws(
    seed: int, places: list[int], shape: tuple[int, ...], offset: float = 0.0, least_t: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that is random in a step, from the places of its samples.

    Args:
        offset: how much of the noise that is added is the same over a whole channel.

    Returns u (batch,) in [0, 1) for `drops`, t (batch,) in `least_t`..999, and two noises (batch, *shape): for the
    autoencoder's posterior, and to be added.
    """
    rows = []
    for place in places:
        generator = generator_at(seed, place)
        u, t = torch.rand((), generator=generator), torch.randint(least_t, 1000, (), generator=generator)
        posterior, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        if offset:
            noise = noise + offset * torch.randn(*shape[:1], *[1] * (len(shape) - 1), generator=generator)
        rows.append((u, t, posterior, noise))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
