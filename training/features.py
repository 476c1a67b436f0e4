"""What the frozen encoders make of image-caption pairs: at each step, or once for all and kept in a cache.

A trained step sees a pair as a dictionary of its features, with one of its captions:
    mean, std   (4, H/8, W/8)   the autoencoder's posterior, in the scale of latents
    text        (77, context_dim)
    image       (width,) or (1 + patches, width)   what the adapter reads of the image tower
"""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clip import CLIPImage, CLIPText, preprocess, tokenize
from files.pictures import from_pil
from ipadapter.adapter import image_features, null_features
from training.pairs import BadSample, Pair, Pairs
from vae import VAE

Features = dict[str, Tensor]  # of one pair, or of a batch
KEYS = ("mean", "std", "text", "image")


class Prepared(Dataset):
    """The first pairs as the encoders want them: pixels (3, R, R) in [-1, 1], clip (3, S, S), tokens (captions, 77)."""

    def __init__(self, pairs: Pairs, limit: int, resolution: int, clip_size: int):
        self.pairs, self.length = pairs, min(limit, len(pairs))
        self.resolution, self.clip_size = resolution, clip_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Features:
        """With all captions of the pair; without any it has the empty one."""
        pair = self.pairs[i]
        return self.seen(pair) | {"tokens": tokenize([*pair.texts] or [""])}

    def take(self, i: int, caption: int) -> Features:
        """With one caption, tokens (77,): this one, modulo how many there are."""
        pair = self.pairs[i]
        texts = pair.texts or ("",)
        return self.seen(pair) | {"tokens": tokenize(texts[caption % len(texts)])[0]}

    def seen(self, pair: Pair) -> Features:
        if max(pair.image.size) > 32 * min(pair.image.size):  # brought to size, it would fill the memory
            raise BadSample(
                f"{pair.name}: a picture of {pair.image.width} x {pair.image.height}, too thin to crop a square"
            )
        return {"pixels": to_square(pair.image, self.resolution), "clip": preprocess(pair.image, self.clip_size)[0]}

    def identities(self) -> np.ndarray:
        """What each pair is, as (pairs,) int64: `Pairs.identities`."""
        return self.pairs.identities(self.length)

    def captions(self, numbers: Sequence[int]) -> float:
        """How many captions a pair has on average, equal ones once, as far as these can be read."""
        texts, read = set(), 0
        for i in numbers:
            with suppress(BadSample):
                texts.update(self.pairs.texts(i) or ("",))
                read += 1
        return len(texts) / read if read else 1.0


def to_square(image: Image.Image, side: int) -> Tensor:
    """Shortest side to `side` (bilinear), centre crop: (3, side, side) in [-1, 1]."""
    short = min(image.size)
    width, height = (max(side, int(side * length / short)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    return from_pil(image)[0]


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
        """A batch of what `Prepared.take` gives -> features, in the dtype of the towers."""
        return self.pictures(batch) | {"text": self.text(batch["tokens"].to(self.device))}

    @torch.no_grad()
    def pictures(self, batch: Features) -> Features:
        """All features but the text."""
        mean, std = self.vae.posterior(batch["pixels"].to(self.device, self.dtype))
        return {
            "mean": mean,
            "std": std,
            "image": self.image_features(batch["clip"]),
        }

    @torch.no_grad()
    def texts(self, tokens: list[Tensor]) -> list[Tensor]:
        """Features (77, context_dim) of tokens (77,), some at a time."""
        return [
            row for i in range(0, len(tokens), 64) for row in self.text(torch.stack(tokens[i : i + 64]).to(self.device))
        ]

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
