"""From models and pairs to what a training step reads: the encoders' work, done at each step or once."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clip import CLIPImageConfig, preprocess
from generate.models import Models
from training.cache import Cache
from training.features import Encoders, Features, Prepared
from training.pairs import BadSample, Pair, Pairs
from training.ranks import Ranks


@dataclass(frozen=True)
class Ready:
    """What is left of data and encoders when the training begins."""

    source: Dataset  # features from the cache, or prepared pairs
    encode: Callable[[Features], Features]  # nothing more to do, or the encoders
    null: Features  # of the empty prompt and of no image
    encoder: CLIPImageConfig
    resolution: int
    prompts: list[Image.Image]  # of the validation
    prompt_features: Tensor
    held_out: Features  # of pictures that are not trained on: "mean" and "image"; empty, where there are none


def ready(
    models: Models,
    pairs: Pairs,
    # Pictures that will be drawn now and then, and those of which the loss will be measured.
    prompts: list[Image.Image],
    held_out: list[Image.Image],
    ranks: Ranks,
    # Whether the adapter reads all patches of the image tower, or its embedding.
    patches: bool,
    # Of the pictures, a square, in pixels.
    resolution: int,
    # The first so many pairs; None: all.
    limit: int | None = None,
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
    image = models.image_encoder()
    encoders = Encoders(models.vae(), models.base.text(), image, patches)
    null, size = encoders.null(), image.config.image_size
    source = prepared = Prepared(pairs, limit or len(pairs), resolution, size)
    if cache:
        made_by = {"features": "patches" if patches else "embedding", "resolution": resolution}
        made_by |= {"dtype": str(models.dtype).removeprefix("torch.")}
        source = Cache(cache, (hashes or {}) | made_by, prepared.identities())
        fill(source, encoders, prepared, null, ranks, workers, on_pair)
    features = [encoders.image_features(preprocess(prompt, size)) for prompt in prompts]
    measured = []
    for picture in held_out:
        with suppress(BadSample):  # too thin
            seen = prepared.seen(Pair("", picture, ()))
            measured.append(encoders.pictures({key: value[None] for key, value in seen.items()}))
    return Ready(
        source,
        resolution=resolution,
        encode=(lambda features: features) if cache else encoders,
        null=null,
        encoder=image.config,
        prompts=prompts,
        prompt_features=torch.cat(features) if features else torch.empty(0),
        held_out={key: torch.cat([row[key] for row in measured]) for key in ("mean", "image") if measured},
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
    """Make what is missing of a cache, each process its share of the files."""
    mine = cache.missing()[ranks.rank :: ranks.size]  # before any process has begun to fill it
    ranks.wait()
    if ranks.first and mine:
        cache.begin(prepared, null)
    ranks.wait()
    for _ in cache.fill(mine, encoders, prepared, workers):
        on_pair(sum(map(len, mine)))
    ranks.wait()
    cache.find()
