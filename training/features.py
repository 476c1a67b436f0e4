"""What the frozen encoders make of image-caption pairs: at each step, or once for all and kept in a cache.

A trained step sees a pair as a dictionary of its features, with one of its captions:
    mean, std   (4, H/8, W/8)   the autoencoder's posterior, in the scale of latents
    text        (77, context_dim)
    image       (width,) or (1 + patches, width)   what the adapter reads of the image tower, if it reads any
    face        (512,)          the face embedding, if it reads that
    pooled      (width,)        of the text, and
    sizes       (6,)            of the picture as it was, its crop's corner and its own, in pixels: SDXL is told of both
"""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clip import CLIPImage, TextEncoder, TwoTowerEncoder, preprocess, tokenize
from files.faces import FACE_DIM, FaceError, find_faces, read_embedding
from files.pictures import from_pil
from ipadapter.adapter import image_features, null_features
from training.pairs import BadSample, Pair, Pairs
from vae import VAE

Features = dict[str, Tensor]  # of one pair, or of a batch
TEXTS = ("text", "pooled")  # what is made of a caption; all else is of a picture:
PROMPTS = ("image", "face")  # of the image prompt


class Prepared(Dataset):
    """Pairs as the encoders want them.

    pixels (3, R, R) in [-1, 1], sizes (6,), clip (3, S, S) and face (512,) where these are wanted, tokens (captions, 77).
    The first `length` are trained on; those behind are pictures that are prompts alone.

    Args:
        clip_size: S; None: no image tower reads them.
        faces: whether the adapter reads a face embedding: the one that a list names, or what insightface finds.
    """

    def __init__(self, pairs: Pairs, length: int, resolution: int, clip_size: int | None, faces: bool = False):
        self.pairs, self.length = pairs, length
        self.resolution, self.clip_size, self.faces = resolution, clip_size, faces

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Features:
        """With all captions of the pair; without any it has the empty one."""
        pair = self.pairs[i]
        return self.seen(pair) | {"tokens": tokenize([*pair.texts] or [""])}

    def take(self, i: int, caption: int = 0, reference: int | None = None) -> Features:
        """With one caption, tokens (77,): this one, modulo how many there are.

        `reference`: the pair whose picture is the prompt; None: its own.
        """
        pair = self.pairs[i]
        texts = pair.texts or ("",)
        found = self.seen(pair) | {"tokens": tokenize(texts[caption % len(texts)])[0]}
        return found if reference is None else found | self.prompt(self.pairs[reference])

    def seen(self, pair: Pair) -> Features:
        """All but the captions."""
        prompt = self.prompt(pair)  # first, for it refuses pictures
        pixels, corner = to_square(pair.image, self.resolution)
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
        """What each pair is, as (pairs,) int64: `Pairs.identities`."""
        return self.pairs.identities()

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


def to_square(image: Image.Image, side: int) -> tuple[Tensor, tuple[int, int]]:
    """Shortest side to `side` (bilinear), centre crop: (3, side, side) in [-1, 1], and the crop's corner (top, left)."""
    short = min(image.size)
    width, height = (max(side, int(side * length / short)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
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
        self.sized = isinstance(text, TwoTowerEncoder)  # SDXL is told sizes beside the text

    @torch.no_grad()
    def __call__(self, batch: Features) -> Features:
        """A batch of what `Prepared.take` gives -> features, in `dtype`."""
        return self.pictures(batch) | self.texts(batch["tokens"])

    @torch.no_grad()
    def pictures(self, batch: Features) -> Features:
        """All features but those of the text."""
        mean, std = self.vae.posterior(batch["pixels"].to(self.device, next(self.vae.parameters()).dtype))
        found = {"mean": mean.to(self.dtype), "std": std.to(self.dtype)}
        if self.image:
            found["image"] = self.image_features(batch["clip"])
        if self.faces:
            found["face"] = batch["face"].to(self.device, self.dtype)
        return found | ({"sizes": batch["sizes"].to(self.device)} if self.sized else {})

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Features:
        """Of captions as tokens (batch, 77), some at a time."""
        parts = [self.text.read(part) for part in tokens.split(64)]
        found = {"text": torch.cat([text for text, _ in parts])}
        return found | ({"pooled": torch.cat([pooled for _, pooled in parts])} if self.sized else {})

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
