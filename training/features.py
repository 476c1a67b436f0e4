"""What the frozen encoders make of image-caption pairs: at each step, or once for all and kept in a cache.

A trained step sees a pair as a dictionary of its features, with one of its captions:
    mean, std   (4, H/8, W/8)   the autoencoder's posterior, in the scale of latents
    text        (77, context_dim)
    image       (width,) or (1 + patches, width)   what the adapter reads of the image tower, if it reads any
    face        (512,)          the face embedding, if it reads that
    pooled      (width,)        of the text, and
    sizes       (6,)            of the picture as it was, its crop's corner and its own, in pixels: SDXL is told of both
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clip import CLIPImage, TextEncoder, TwoTowerEncoder, preprocess, tokenize
from files.faces import FACE_DIM, FaceError, find_faces, read_embedding
from files.pictures import from_pil
from ipadapter.adapter import image_features, null_features
from training.buckets import Buckets, Size
from training.pairs import BadSample, Pair, Pairs
from vae import VAE
from vae.winograd import hasten

Features = dict[str, Tensor]  # of one pair, or of a batch
TEXTS = ("text", "pooled")  # what is made of a caption; all else is of a picture:
PROMPTS = ("image", "face")  # of the image prompt
REMEMBERED = 256  # captions, the latest


class Crop(NamedTuple):
    """What of a picture is taken where it is longer than it is to be; without more, its middle."""

    top: float = 0.5  # share of what is cut off that lies above
    left: float = 0.5
    flipped: bool = False  # the whole picture, before that


MIDDLE = Crop()


class Prepared(Dataset):
    """Pairs as the encoders want them.

    pixels (3, R, R), or of the pair's size, in [-1, 1], sizes (6,), clip (3, S, S) and face (512,) where these are wanted, tokens (captions, 77).
    The first `length` are trained on; those behind are pictures that are prompts alone.

    Args:
        clip_size: S; None: no image tower reads them.
        faces: whether the adapter reads a face embedding: the one that a list names, or what insightface finds.
        buckets: the size of each pair, where these are not squares.
    """

    def __init__(
        self,
        pairs: Pairs,
        length: int,
        resolution: int,
        clip_size: int | None,
        faces: bool = False,
        buckets: Buckets | None = None,
    ):
        self.pairs, self.length, self.buckets = pairs, length, buckets
        self.resolution, self.clip_size, self.faces = resolution, clip_size, faces

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Features:
        """With all captions of the pair; without any it has the empty one."""
        pair = self.pairs[i]
        return self.seen(pair, self.size(i)) | {"tokens": tokenize([*pair.texts] or [""])}

    def take(self, i: int, caption: int = 0, reference: int | None = None, crop: Crop = MIDDLE) -> Features:
        """With one caption, tokens (77,): this one, modulo how many there are.

        `reference`: the pair whose picture is the prompt; None: its own.
        """
        pair = self.pairs[i]
        texts = pair.texts or ("",)
        found = self.seen(pair, self.size(i), crop) | {"tokens": tokenize(texts[caption % len(texts)])[0]}
        return found if reference is None else found | self.prompt(self.pairs[reference])

    def size(self, i: int) -> Size:
        """Height and width that a pair is brought to."""
        return self.buckets.size(i) if self.buckets and i < self.length else (self.resolution, self.resolution)

    def seen(self, pair: Pair, size: Size | None = None, crop: Crop = MIDDLE) -> Features:
        """All but the captions. `size`: None, a square."""
        if crop.flipped:  # with what is read of it
            pair = replace(pair, image=pair.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        prompt = self.prompt(pair)  # first, for it refuses pictures
        pixels, corner = to_size(pair.image, size or (self.resolution, self.resolution), crop)
        sizes = [pair.image.height, pair.image.width, *corner, *pixels.shape[1:]]
        return {"pixels": pixels, "sizes": torch.tensor(sizes)} | prompt

    def prompt(self, pair: Pair) -> Features:
        """What the adapter will read of a picture."""
        if max(pair.image.size) > 32 * min(pair.image.size):  # brought to size, it would fill the memory
            raise BadSample(
                f"{pair.name}: a picture of {pair.image.width} x {pair.image.height}, too thin to crop a square"
            )
        found, shown = {}, pair.image
        if self.faces:
            found["face"], shown = face_of(pair)
        return found | ({"clip": preprocess(shown, self.clip_size)[0]} if self.clip_size else {})

    def identities(self) -> np.ndarray:
        """What each pair is, as (pairs,) int64: `Pairs.identities`; and which size it is brought to."""
        found = self.pairs.identities()
        if self.buckets:  # of another size it is something else, to a cache
            sizes = np.array([height << 16 | width for height, width in self.buckets.sizes], dtype=np.int64)
            found[: self.length] ^= 1_000_003_999 * sizes[self.buckets.of]
        return found

    def shapes(self) -> np.ndarray:
        """A number (pairs,) for each, the same for pairs that are brought to the same size."""
        squares = np.full(len(self.pairs), -1)
        return squares if not self.buckets else np.concatenate([self.buckets.of, squares[self.length :]])

    def captions(self, numbers: Sequence[int]) -> float:
        """How many captions a pair has on average, equal ones once, as far as these can be read."""
        texts, read = set(), 0
        for i in numbers:
            with suppress(BadSample):
                texts.update(self.pairs.texts(i) or ("",))
                read += 1
        return len(texts) / read if read else 1.0


def face_of(pair: Pair) -> tuple[Tensor, Image.Image]:
    """The embedding (512,) of the face in a picture, and what CLIP is to see of it. Raises BadSample."""
    try:
        if not pair.face:
            faces, (shown,) = find_faces([pair.image], [pair.name])
            return faces[0], shown
        faces = read_embedding(pair.face)
    except FaceError as error:
        raise BadSample(str(error)) from None
    if len(faces) > 1:
        raise BadSample(f"{pair.face}: holds {len(faces)} faces; one is wanted for a picture")
    return faces[0], pair.image


def to_size(image: Image.Image, size: Size, crop: Crop = MIDDLE) -> tuple[Tensor, tuple[int, int]]:
    """A picture brought to cover a size (bilinear), and cropped to it: the paper's is a square, of the middle.

    Returns pixels (3, height, width) in [-1, 1], and the crop's corner (top, left).
    """
    height, width = size
    if width * image.height >= height * image.width:
        whole = width, max(height, int(width * image.height / image.width))
    else:
        whole = max(width, int(height * image.width / image.height)), height
    left, top = (
        round(share * (length - side)) if crop[:2] == MIDDLE[:2] else int(share * (length - side + 1))
        for share, length, side in zip((crop.left, crop.top), whole, (width, height), strict=True)
    )
    image = image.resize(whole, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return from_pil(image)[0], (top, left)


class Encoders:
    """The frozen half of the training: prepared pairs to features.

    Args:
        image: None where the adapter reads faces alone.
        patches: whether the adapter reads all patches of the image tower (plus, full-face) or the global embedding.
        dtype: of the features.
        faces: whether it reads face embeddings.
    """

    def __init__(
        self,
        vae: VAE,
        text: TextEncoder | TwoTowerEncoder,
        image: CLIPImage | None,
        patches: bool,
        dtype: torch.dtype = torch.float32,
        faces: bool = False,
    ):
        self.vae, self.text, self.image, self.patches, self.faces = vae, text, image, patches, faces
        self.device, self.dtype = next(vae.parameters()).device, dtype
        hasten(vae.encoder)
        self.sized = isinstance(text, TwoTowerEncoder)  # SDXL is told sizes beside the text
        self.caption = lru_cache(REMEMBERED)(lambda *tokens: self.texts(torch.tensor([tokens])))

    @torch.no_grad()
    def __call__(self, batch: Features, no_text: Tensor | None = None, no_image: Tensor | None = None) -> Features:
        """A batch of what `Prepared.take` gives -> features, in `dtype`.

        Args:
            no_text, no_image: (batch,) bools, which samples will lose these: there they are not computed.
        """
        texts = self.captions if self.device.type == "cpu" else self.texts
        return self.pictures(batch, no_image) | of_kept(texts, batch["tokens"], no_text)

    @torch.no_grad()
    def pictures(self, batch: Features, no_image: Tensor | None = None) -> Features:
        """All features but those of the text."""
        mean, std = self.vae.posterior(batch["pixels"].to(self.device, next(self.vae.parameters()).dtype))
        found = {"mean": mean.to(self.dtype), "std": std.to(self.dtype)}
        if self.image:
            found |= of_kept(lambda pixels: {"image": self.image_features(pixels)}, batch["clip"], no_image)
        if self.faces:
            found["face"] = batch["face"].to(self.device, self.dtype)
        return found | ({"sizes": batch["sizes"].to(self.device)} if self.sized else {})

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Features:
        """Of captions as tokens (batch, 77), some at a time."""
        parts = [self.text.read(part) for part in tokens.split(64)]
        found = {"text": torch.cat([text for text, _ in parts])}
        return found | ({"pooled": torch.cat([pooled for _, pooled in parts])} if self.sized else {})

    def captions(self, tokens: Tensor) -> Features:
        """The same, one by one, so that a resumed run, which remembers none, computes the same bits."""
        rows = [self.caption(*row) for row in tokens.tolist()]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    @torch.no_grad()
    def negative(self) -> Features:
        """What a picture is made against, where there is no negative prompt."""
        text, pooled = self.text.null("")
        return {"text": text} | ({"pooled": pooled} if self.sized else {})

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Of preprocessed pictures (batch, 3, size, size)."""
        return image_features(self.image, pixels.to(self.device, self.dtype), self.patches)

    @torch.no_grad()
    def null(self) -> Features:
        """The features of a dropped text (the empty prompt) and of a dropped image, without a batch dimension."""
        found = self.texts(tokenize(""))
        if self.image:
            side = self.image.config.image_size
            nothing = torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype)
            found["image"] = null_features(self.image, nothing, self.patches)
        if self.faces:
            found["face"] = torch.zeros(1, FACE_DIM, device=self.device, dtype=self.dtype)
        return {key: value[0] for key, value in found.items()}


def of_kept(encode: Callable[[Tensor], Features], batch: Tensor, dropped: Tensor | None) -> Features:
    """What is encoded of a batch without some rows, whose features are zeros; of none no features at all."""
    if dropped is None or not dropped.any():
        return encode(batch)
    if dropped.all():
        return {}
    found = encode(batch[~dropped])
    kept = (~dropped).nonzero().flatten().to(next(iter(found.values())).device)
    return {
        key: value.new_zeros(len(batch), *value.shape[1:]).index_copy(0, kept, value) for key, value in found.items()
    }
