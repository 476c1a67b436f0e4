"""What the frozen encoders make of image-caption pairs: at each step, or once for all and kept in a cache.

A trained step sees a pair as a dictionary of its features:
    mean, std   (4, H/8, W/8)   the autoencoder's posterior, in the scale of latents
    text        (77, context_dim)
    image       (width,) or (1 + patches, width)   what the adapter reads of the image tower
"""

import json
import shutil
import signal
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from clip import CLIPImage, CLIPText, preprocess, tokenize
from ipadapter.adapter import image_features, null_features
from ipadapter.pairs import BadSample, DataError, Pairs
from ipadapter.training import Features, pair_at
from vae import VAE
from weights.save import write, write_text

KEYS = ("mean", "std", "text", "image")
SHARD = 256  # pairs to a file of the cache


class Prepared(Dataset):
    """The first pairs as the encoders want them: pixels (3, R, R) in [-1, 1], clip (3, S, S), tokens (77,)."""

    def __init__(self, pairs: Pairs, limit: int, resolution: int, clip_size: int):
        self.pairs, self.length = pairs, min(limit, len(pairs))
        self.resolution, self.clip_size = resolution, clip_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Features:
        pair = self.pairs[i]
        if max(pair.image.size) > 32 * min(pair.image.size):  # brought to size, it would fill the memory
            raise BadSample(
                f"{pair.name}: a picture of {pair.image.width} x {pair.image.height}, too thin to crop a square"
            )
        return {
            "pixels": to_square(pair.image, self.resolution),
            "clip": preprocess(pair.image, self.clip_size)[0],
            "tokens": tokenize(pair.text)[0],
        }


def to_square(image: Image.Image, side: int) -> Tensor:
    """Shortest side to `side` (bilinear), centre crop: (3, side, side) in [-1, 1]."""
    short = min(image.size)
    width, height = (max(side, int(side * length / short)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Encoders:
    """The frozen half of the training: prepared pairs to features.

    Args:
        patches: whether the adapter reads all patches of the image tower (plus, full-face) or the global embedding.
    """

    def __init__(self, vae: VAE, text: CLIPText, image: CLIPImage, patches: bool):
        self.vae, self.text, self.image, self.patches = vae, text, image, patches
        weight = next(image.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @torch.no_grad()
    def __call__(self, batch: Features) -> Features:
        """A batch of `Prepared` -> features, in the dtype of the towers."""
        mean, logvar = self.vae.posterior(batch["pixels"].to(self.device, self.dtype))
        scale = self.vae.config.latent_scale
        return {
            "mean": scale * mean,
            "std": scale * (0.5 * logvar).exp(),
            "text": self.text(batch["tokens"].to(self.device)),
            "image": self.image_features(batch["clip"]),
        }

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Of preprocessed pictures (batch, 3, size, size)."""
        return image_features(self.image, pixels.to(self.device, self.dtype), self.patches)

    @torch.no_grad()
    def null(self) -> Features:
        """The features of a dropped text (the empty prompt) and of a dropped image, without a batch dimension."""
        side = self.image.config.image_size
        nothing = torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype)
        return {
            "text": self.text(tokenize("").to(self.device))[0],
            "image": null_features(self.image, nothing, self.patches)[0],
        }


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


class Places(Dataset):
    """What stands at each place of a run: (place, features or prepared pair, why others could not be used).

    In the stead of a pair that cannot be read stands the next one in the order of its epoch.
    """

    def __init__(self, source: Dataset, seed: int):
        self.source, self.seed = source, seed

    def __getitem__(self, place: int) -> tuple[int, Features, list[str]]:
        reasons = []
        for retry in range(len(self.source)):
            try:
                return place, self.source[pair_at(self.seed, place, len(self.source), retry)], reasons
            except BadSample as error:
                reasons.append(str(error))
        raise DataError(f"none of the {len(self.source)} pairs can be used; the first: {reasons[0]}")


def places(begin: int, batches: int, size: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """This process's places in each batch of `size * ranks`, from place `begin` on."""
    for i in range(batches):
        start = begin + (i * ranks + rank) * size
        yield list(range(start, start + size))


def stack(batch: list[tuple[int, Features, list[str]]]) -> tuple[list[int], Features, list[str]]:
    """A batch of what `Places` gives, the features stacked."""
    numbers, features, reasons = zip(*batch, strict=True)
    return list(numbers), default_collate(features), [reason for some in reasons for reason in some]
