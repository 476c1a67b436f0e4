"""Time and memory of opening shards of many pairs: the first time, again, to the first batch, and in the middle of a run.

python -m benchmarks.index --pairs 1000000 --folder made     # makes 2 GB of shards there, and keeps them

Each pair is a picture of 8 x 8 and a caption. Each line is a process of its own; its memory is what it takes beyond the imports.
"""

import argparse
import io
import multiprocessing
import re
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.buckets import open_buckets
from training.data import open_pairs
from training.features import Prepared
from training.index import kept
from training.order import Places
from training.pairs import Pairs, Row
from training.ranks import Ranks

SHARD, DIGITS, BATCH = 10_000, 9, 32


def make(folder: Path, count: int) -> None:
    """Shards whose bytes are tarfile's, but for the digits of names and captions and their checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer, picture = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "png")
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind, content in (("png", picture.getvalue()), ("txt", b"0" * DIGITS)):
            member = tarfile.TarInfo(f"{'0' * DIGITS}.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    pair = np.frombuffer(buffer.getvalue()[:2048], dtype=np.uint8)
    for first in range(0, count, SHARD):
        path = folder / f"{first // SHARD:05d}.tar"
        numbers = np.arange(first, min(first + SHARD, count))
        if path.exists():
            continue
        digits = (numbers[:, None] // 10 ** np.arange(DIGITS)[::-1] % 10).astype(np.uint8)
        content = np.tile(pair, (len(numbers), 1))
        for start in (0, 1024, 1536):
            content[:, start : start + DIGITS] += digits
        for start in (0, 1024):
            told = bytes(pair[start + 148 : start + 154])
            sums = int(told, 8) + digits.sum(1)
            content[:, start + 148 : start + 154] = sums[:, None] // 8 ** np.arange(6)[::-1] % 8 + ord("0")
        path.write_bytes(content.tobytes() + bytes(1024))


def known(folder: Path, count: int) -> Pairs:
    """What reading the shards would give."""
    pairs, picture = Pairs(), io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "png")
    for i in range(count):
        if i % SHARD == 0:
            path = pairs.strings.append(str(folder / f"{i // SHARD:05d}.tar"))
        start = i % SHARD * 2048
        row = Row(path, start + 512, picture.tell(), start + 1536, DIGITS, pairs.suffix("txt"))
        pairs.add(f"{i:0{DIGITS}d}", row)
    return pairs


def unread(folder: Path, count: int) -> None:
    kept(partial(known, folder, count), [*map(str, sorted(folder.glob("*.tar")))], folder / "index", False)
    opened(folder)


def opened(folder: Path) -> Pairs:
    pairs = open_pairs(folder / "*.tar", index=folder / "index")
    pairs.digest()
    return pairs


def batch(folder: Path, place: int) -> None:
    pairs = opened(folder)
    places = Places(Prepared(pairs, len(pairs), 64, 32), seed=0)
    assert len({places[place + i][0] for i in range(BATCH)}) == BATCH


def sizes(folder: Path) -> None:
    pairs = opened(folder)
    buckets = open_buckets(pairs, len(pairs), [], 64, BATCH, Ranks(torch.device("cpu")))
    assert len({buckets.pair_at(0, place) for place in range(BATCH)}) == BATCH


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the peak in MiB beyond what there was before."""
    before, began = peak(), time.monotonic()
    work()
    return time.monotonic() - began, (peak() - before) / 1024


def peak() -> int:
    """KiB that this process had at most (getrusage would count those of the one that started it, too)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("made"))
    parser.add_argument(
        "--unread", action="store_true", help="do not read the shards for the index: how they lie is known"
    )
    parser.add_argument("--buckets", action="store_true", help="read the sizes of all pictures, too")
    args = parser.parse_args()
    make(args.folder, args.pairs)
    first = partial(unread, args.folder, args.pairs) if args.unread else partial(opened, args.folder)
    works = {
        f"the first start: {'hashes' if args.unread else 'index'} and digest": first,
        "the next start: index and digest": partial(opened, args.folder),
        "to the first batch": partial(batch, args.folder, 0),
        "to a batch in the seventh epoch": partial(batch, args.folder, 6 * args.pairs + args.pairs // 3),
    }
    if args.buckets:
        works |= {f"to the first batch in buckets, {when}": partial(sizes, args.folder) for when in ("once", "again")}
    for what, work in works.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(measured, [work])
        print(f"{args.pairs:,} pairs, {what}: {seconds:.1f} s, peak {peak:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
