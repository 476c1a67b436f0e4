"""What the frozen encoders make of image-caption pairs, once for all, kept on disk."""

import json
import shutil
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from files.whole import write, write_text
from training.features import KEYS, Encoders, Features, Prepared
from training.pairs import BadSample, DataError

SHARD = 256  # pairs to a file of the cache


class Cache(Dataset):
    """Features on disk: `00000.safetensors`, ... of 256 pairs each, and `cache.json`, which says what made them.

    Args:
        fingerprint: all that the features depend on (hashes of the models, settings, the data); a folder that was
            filled with another one is refused.
        pairs: how many pairs are to be in it; those that cannot be read are marked as bad.

    Raises:
        DataError: the folder belongs to other models, settings or data.
    """

    def __init__(self, folder: Path, fingerprint: dict, pairs: int):
        self.folder, self.pairs, self.notes = folder, pairs, fingerprint | {"pairs": pairs}
        note = folder / "cache.json"
        if note.exists():
            try:
                found = dict(json.loads(note.read_text()))
            except (ValueError, TypeError, OSError):
                raise DataError(f"{note}: damaged; delete the folder, and it is made anew") from None
            for key, value in self.notes.items():
                if found.get(key) != value:
                    raise DataError(f"--cache {folder}: made with another {key} ({found.get(key)}; now {value})")

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, i: int) -> Features:
        shard, rows, reasons = _open_shard(str(self.path(i // SHARD)))
        row = int(rows[i % SHARD])
        if row < 0:
            raise BadSample(reasons[str(i)])
        return {key: shard.get_slice(key)[row] for key in KEYS}

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [s for s in range((self.pairs + SHARD - 1) // SHARD) if not self.path(s).exists()]

    def begin(self, null: Features, resolution: int) -> None:
        """Write what is there once, after a look at the space that the rest will need."""
        latents = 2 * 4 * (resolution // 8) ** 2 * null["text"].element_size()
        wanted = len(self.missing()) * SHARD * (latents + null["text"].nbytes + null["image"].nbytes)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--cache {self.folder}: cannot write there ({error.strerror})") from None
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise DataError(
                f"--cache {self.folder}: {wanted / 1e9:.1f} GB are needed for {self.pairs:,} pairs, "
                f"{free / 1e9:.1f} GB are free"
            )
        write_text(self.folder / "cache.json", json.dumps(self.notes, indent=1))

    def fill(self, shards: list[int], encoders: Encoders, prepared: Prepared, workers: int) -> Iterator[list[str]]:
        """Make these shards, yielding after each pair the reasons (one or none) why it cannot be used."""
        for shard in shards:
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, self.pairs))
            rows, parts, reasons = [], [], {}
            loader = DataLoader(
                Readable(prepared), 8, sampler=numbers, num_workers=workers, collate_fn=list, worker_init_fn=deaf
            )
            for batch in loader:
                if good := [pair for pair, bad in batch if not bad]:
                    parts.append(encoders(default_collate(good)))
                for _, bad in batch:
                    if bad:
                        reasons[str(numbers[len(rows)])] = bad[0]
                    rows.append(-1 if bad else len(rows) - len(reasons))
                    yield bad
            features = {key: torch.cat([part[key] for part in parts]) for key in KEYS} if parts else {}
            write(self.path(shard), features | {"row": torch.tensor(rows, dtype=torch.int32)}, reasons)


class Readable(Dataset):
    """Pairs, or the reason why there is none: ({}, [reason])."""

    def __init__(self, source: Dataset):
        self.source = source

    def __getitem__(self, i: int) -> tuple[Features, list[str]]:
        try:
            return self.source[i], []
        except BadSample as error:
            return {}, [str(error)]


@lru_cache(maxsize=32)
def _open_shard(path: str) -> tuple[safe_open, Tensor, dict[str, str]]:
    """A shard, mapped; the row of each of its pairs; by their numbers, why others have none."""
    try:
        shard = safe_open(path, "pt")
        return shard, shard.get_tensor("row"), json.loads(shard.metadata()["notes"])
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); delete it, and it is made anew") from None


def deaf(worker: int) -> None:
    """For workers: a signal to the whole group is for the process that reads them to obey; it ends them in time."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
