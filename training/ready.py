"""From models and pairs to what a training step reads: the encoders' work, done at each step or once."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from clip import CLIPImageConfig, tokenize
from generate.models import Models
from generate.prompt import default_scale
from training.buckets import Buckets
from training.cache import Cache
from training.features import Encoders, Features, Prepared
from training.pairs import BadSample, Pair, Pairs
from training.ranks import Ranks
from training.recipes import KINDS
from training.references import References


@dataclass(frozen=True)
class Ready:
    """What is left of data and encoders when the training begins."""

    source: Dataset  # features from the cache, or prepared pairs
    encode: Callable[..., Features]  # nothing more to do, or the encoders
    null: Features  # of the empty prompt and of no image
    encoder: CLIPImageConfig | None  # None: the adapter reads faces alone
    resolution: int
    prompts: list[Image.Image]  # of the validation: these will be drawn, the first of `seen`
    seen: Features  # of the validation's pictures: all but those of a text
    texts: list[tuple[Features, float]]  # that are drawn beside the image prompts, and how strong these are then
    negative: Features  # what they are drawn against
    held_out: bool  # whether these pictures are not trained on: then their loss is measured
    references: References | None = None  # who else may be a pair's image prompt
    buckets: Buckets | None = None  # which size each pair is brought to, if not to a square


def ready(
    models: Models,
    pairs: Pairs,
    # Pictures of the validation, how many of them will be drawn, and whether they are not trained on.
    shown: list[Pair],
    drawn: int,
    held_out: bool,
    # Texts to be drawn beside them.
    texts: list[str],
    ranks: Ranks,
    # Of the adapter: it tells what is read of a picture.
    kind: str,
    # Of the pictures, a square, in pixels.
    resolution: int,
    # Other pictures that may be a pair's image prompt.
    references: References | None = None,
    # Sizes of the pictures, where these are not squares.
    buckets: Buckets | None = None,
    # A folder that keeps what the encoders make; None: they work at each step.
    cache: Path | None = None,
    # What a cache depends on beside the pairs: hashes of the models.
    hashes: dict[str, str] | None = None,
    # Processes that read pairs.
    workers: int = 0,
    # Called for each pair whose features are made, with how many of this process there will be.
    on_pair: Callable[[int], object] = lambda total: None,
) -> Ready:
    """Load the encoders; fill the cache, if there is to be one, and let them go."""
    image, reads = models.image_encoder(), KINDS[kind]
    encoders = Encoders(models.vae(), models.text_encoder(), image, reads.patches, models.dtype, reads.faces)
    null, size = encoders.null(), image.config.image_size if image else None
    count = len(references.begins) if references else len(pairs)
    source = prepared = Prepared(pairs, count, resolution, size, reads.faces, buckets)
    if cache:
        parts = [*["face"] * reads.faces, *(["patches" if reads.patches else "embedding"] if image else [])]
        made_by = {"features": " and ".join(parts), "resolution": resolution}
        made_by |= {"dtype": str(models.dtype).removeprefix("torch.")}
        source = Cache(cache, (hashes or {}) | made_by, prepared.identities(), count, prepared.shapes())
        fill(source, encoders, prepared, null, ranks, workers, on_pair)
    prompts, seen = [], []
    for pair in shown:
        with suppress(BadSample):  # too thin, or without a face
            one = prepared.seen(pair)
            seen.append(encoders.pictures({key: value[None] for key, value in one.items()}))
            prompts.append(pair.image)
    return Ready(
        source,
        resolution=resolution,
        encode=(lambda features, *dropped: features) if cache else encoders,
        null=null,
        encoder=image.config if image else None,
        prompts=prompts[:drawn],
        seen={key: torch.cat([row[key] for row in seen]) for key in (seen[0] if seen else ())},
        texts=[(encoders.texts(tokenize(text)), default_scale(text)) for text in texts],
        negative=encoders.negative(),
        held_out=held_out and len(seen) > 1,
        references=references,
        buckets=buckets,
    )


def fill(
    cache: Cache,
    encoders: Encoders,
    prepared: Prepared,
    null: Features,
    ranks: Ranks,
    workers: int = 0,
    on_pair: Callable[[int], object] = lambda total: None,
) -> None:
    """Make what is missing of a cache, together with all other processes, of this run or of others on other machines."""
    lots = cache.missing()
    ranks.wait()
    if ranks.first and lots:
        cache.begin(prepared, null)
    ranks.wait()
    start = len(lots) * ranks.rank // ranks.size  # not all at the same one
    for _ in cache.fill(lots[start:] + lots[:start], encoders, prepared, workers):
        on_pair(sum(map(len, lots)))
    ranks.wait()
    cache.find()
