"""What the frozen encoders make of image-caption pairs, once for all, kept on disk."""

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, default_collate

from files.whole import write, write_text
from training.captions import DataError
from training.claims import shared
from training.features import PROMPTS, TEXTS, Encoders, Features, Prepared
from training.pairs import BadSample

SHARD = 256  # pairs to a file of the cache, or fewer
FORMAT = 2  # of the files
NOTED = ("pairs", "rows", "captions", "begins")  # what a file holds beside the features


class Cache(Dataset):
    """Features on disk: files of up to 256 pairs, named by a hash of which they are, and `cache.json`: what made them.

    A pair is found by what it is (`Pairs.identities`), wherever it stands: the data may grow, lose pairs, be moved or come
    in another order, and no more than what is new is made. What the data no longer hold stays in the folder, unused.

    Args:
        fingerprint: all that the features depend on beside the pairs (hashes of the models, settings); a folder that was
            filled with another one is refused.
        pairs: the identities (n,) of the pairs that are to be in it; those that cannot be read are marked as bad.
        length: how many of them are trained on; those behind are prompts alone. None: all.
        sizes: numbers (n,), the same for pairs whose features have the same shapes, as those of one file must. None: all.

    Raises:
        DataError: the folder belongs to other models or settings, or a file in it is damaged.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict,
        pairs: np.ndarray,
        length: int | None = None,
        sizes: np.ndarray | None = None,
    ):
        self.folder, self.pairs, self.notes = folder, pairs, {"format": FORMAT} | fingerprint
        self.length = len(pairs) if length is None else length
        self.sizes = np.zeros(len(pairs), dtype=np.int64) if sizes is None else sizes
        note = folder / "cache.json"
        if note.exists():
            try:
                found = dict(json.loads(note.read_text()))
            except (ValueError, TypeError, OSError):
                raise DataError(f"{note}: damaged; delete the folder, and it is made anew") from None
            for key, value in self.notes.items():
                if found.get(key) != value:
                    raise DataError(f"`cache` {folder}: made with another {key} ({found.get(key)}; now {value})")
        self.find()

    def find(self) -> None:
        """Look where each pair lies; to be done again when files have been made, here or by other processes."""
        self.files = sorted(map(str, self.folder.glob("?" * 16 + ".safetensors")))
        held = [_open_shard(path).pairs for path in self.files]
        places = [number * SHARD + np.arange(len(pairs)) for number, pairs in enumerate(held)]
        nothing = np.empty(0, dtype=np.int64)
        known, first = np.unique(np.concatenate([nothing, *held]), return_index=True)
        here = np.isin(self.pairs, known)
        self.places = np.full(len(self.pairs), -1)  # the number of the file * SHARD + the place in it
        self.places[here] = np.concatenate([nothing, *places])[first[np.searchsorted(known, self.pairs[here])]]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Features:
        """With all captions of the pair: text (captions, 77, context_dim). Raises BadSample if it could not be read."""
        shard, place = self.shard(i)
        rows = shard.captions[shard.begins[place] : shard.begins[place + 1]]
        return shard.pictures(place) | default_collate([shard.text(row) for row in rows])

    def take(self, i: int, caption: int = 0, reference: int | None = None) -> Features:
        """With one caption, text (77, context_dim): this one, modulo how many there are. Raises BadSample.

        `reference`: the pair whose picture is the prompt; None: its own.
        """
        shard, place = self.shard(i)
        begin, end = shard.begins[place], shard.begins[place + 1]
        found = shard.pictures(place) | shard.text(shard.captions[begin + caption % (end - begin)])
        if reference is None:
            return found
        shard, place = self.shard(reference)
        return found | shard.pictures(place, PROMPTS)

    def shard(self, i: int) -> tuple["Shard", int]:
        """The file that holds a pair, and its place there."""
        number, place = divmod(int(self.places[i]), SHARD)
        shard = _open_shard(self.files[number])
        if shard.rows[place] < 0:
            raise BadSample(shard.reasons[str(place)])
        return shard, place

    def missing(self) -> list[list[int]]:
        """Numbers of the pairs that are still to be made, in lots of one file each.

        The same lots on all machines, though some may have seen files that others had not yet.
        """
        _, first = np.unique(self.pairs, return_index=True)  # a pair that was given twice is made once
        numbers = np.sort(first)
        groups = [numbers[self.sizes[numbers] == size] for size in np.unique(self.sizes)]
        lots = [group[i : i + SHARD] for group in groups for i in range(0, len(group), SHARD)]
        left = [lot[self.places[lot] < 0].tolist() for lot in lots]
        return [lot for lot in left if lot]

    def file(self, lot: list[int]) -> Path:
        """The file of a lot."""
        name = hashlib.sha256(self.pairs[lot].tobytes()).hexdigest()[:16]
        return self.folder / f"{name}.safetensors"

    def begin(self, prepared: Prepared, null: Features) -> None:
        """Write what is there once, after a look at the space that the missing pairs will need."""
        missing = [i for lot in self.missing() for i in lot]
        latents = 2 * 4 * (prepared.resolution // 8) ** 2 * null["text"].element_size()
        text = sum(null[key].nbytes for key in TEXTS if key in null) * prepared.captions(missing[:SHARD])
        wanted = len(missing) * (latents + text + sum(null[key].nbytes for key in null.keys() - TEXTS))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"`cache` {self.folder}: cannot write there ({error.strerror})") from None
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise DataError(
                f"`cache` {self.folder}: {wanted / 1e9:.1f} GB are needed for {len(missing):,} pairs, "
                f"{free / 1e9:.1f} GB are free"
            )
        write_text(self.folder / "cache.json", json.dumps(self.notes, indent=1))

    def fill(self, lots: list[list[int]], encoders: Encoders, prepared: Prepared, workers: int) -> Iterator[list[str]]:
        """See to it that these lots are made, yielding after each pair the reasons (one or none) why it cannot be used.

        Others may be at it, too: each makes what nobody else does; of what they made no reasons are told.
        """
        for i, mine in shared([self.file(lot) for lot in lots]):
            lot = lots[i]
            if not mine:
                yield from ([] for _ in lot)
                continue
            rows, begins, captions, reasons = [], [0], [], {}
            pictures, texts, known = [], [], {}  # known: a caption's tokens -> its row, for equal ones are kept once
            loader = DataLoader(
                Readable(prepared), 8, sampler=lot, num_workers=workers, collate_fn=list, worker_init_fn=deaf
            )
            for batch in loader:
                good, new, done = [], [], len(known)
                for pair, bad in batch:
                    if bad:
                        reasons[str(len(rows))] = bad[0]
                    for tokens in () if bad else pair.pop("tokens"):
                        row = known.setdefault(tokens.numpy().tobytes(), len(known))
                        new += [tokens] if row == done + len(new) else []
                        captions.append(row)
                    rows.append(-1 if bad else len(rows) - len(reasons))
                    begins.append(len(captions))
                    good += [] if bad else [pair]
                if new:
                    texts.append(encoders.texts(torch.stack(new)))
                if good:
                    pictures.append(encoders.pictures(default_collate(good)))
                yield from (bad for _, bad in batch)
            state = {
                key: torch.cat([part[key] for part in made]) for made in (pictures, texts) if made for key in made[0]
            }
            identities = self.pairs[lot]
            for key, numbers in {"rows": rows, "begins": begins, "captions": captions}.items():
                state[key] = torch.tensor(numbers, dtype=torch.int32)
            write(self.file(lot), state | {"pairs": torch.from_numpy(identities)}, reasons)


class Readable(Dataset):
    """Pairs, or the reason why there is none: ({}, [reason])."""

    def __init__(self, source: Dataset):
        self.source = source

    def __getitem__(self, i: int) -> tuple[Features, list[str]]:
        try:
            return self.source[i], []
        except BadSample as error:
            return {}, [str(error)]


class Shard(NamedTuple):
    """A file of the cache, mapped: n pairs, each with a row of features of its picture, and rows of its captions'."""

    file: safe_open
    pairs: np.ndarray  # (n,): what they are
    rows: list[int]  # (n): in the features of pictures; -1: the pair cannot be used
    captions: list[int]  # rows in the features of texts, of all pairs
    begins: list[int]  # (n + 1): where each pair's captions begin among these
    reasons: dict[str, str]  # place of a pair -> why it cannot be used

    def pictures(self, place: int, only: Sequence[str] = ()) -> Features:
        row, keys = self.rows[place], {*self.file.keys()} - {*TEXTS, *NOTED}
        return {key: self.file.get_slice(key)[row] for key in (keys & {*only} if only else keys)}

    def text(self, row: int) -> Features:
        return {key: self.file.get_slice(key)[row] for key in {*self.file.keys()} & {*TEXTS}}


@lru_cache(maxsize=32)
def _open_shard(path: str) -> Shard:
    try:
        file = safe_open(path, "pt")
        numbers = [file.get_tensor(key).tolist() for key in ("rows", "captions", "begins")]
        return Shard(file, file.get_tensor("pairs").numpy(), *numbers, json.loads(file.metadata()["notes"]))
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); delete it, and it is made anew") from None


def deaf(worker: int) -> None:
    """For workers: a signal to the whole group is for the process that reads them to obey; it ends them in time."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
