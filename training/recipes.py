"""What is trained, and how: the kinds of adapters as the official ones are, the paper's recipe, and the tiny model's."""

from pathlib import Path

from clip import CLIPImageConfig
from files.errors import UserError
from generate import Models
from ipadapter import ImageProjection, IPAdapter, PatchProjection, Resampler
from unet import UNet
from weights.families import SD1, Family
from weights.families import TINY as TINY_FAMILY
from weights.presets import FACEID, Preset, resolve

KINDS = {PatchProjection: "full-face", Resampler: "plus", ImageProjection: "base"}
FACES = "a FaceID adapter, it reads faces; one that reads pictures is wanted here"
TINY = Path(__file__).parent.parent / "tiny"
# What stands for a setting that is not given: the paper's recipe; and what suits the tiny model and a laptop.
PAPER = {
    "kind": "base",
    "steps": 1_000_000,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "warmup": 0,
    "ema": 0.0,
    "loss": "eps",
    "drop_text": 0.05,
    "resolution": 512,
    "save_every": 1000,
    "validate_every": 1000,
}
TINY_RUN = {
    "data": [str(TINY / "data/train-*.tar.gz")],
    "validation": [str(TINY / "data/unseen-drawings-*.tar.gz")],
    "limit": 2000,  # of 9,142: to encode them all takes as long as to train
    "kind": "full-face",
    "steps": 250,  # less than a quarter of an hour on two cores, features and all
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup": 20,
    "ema": 0.98,
    "loss": "v",
    "drop_text": 0.5,  # a drawing's name tells nearly everything: beside it little is left for the image to tell
    "resolution": 128,
    "save_every": 50,
    "validate_every": 125,
}


def new_adapter(kind: str, unet: UNet, encoder: CLIPImageConfig) -> IPAdapter:
    """An adapter as the official ones are: 4 tokens, a Resampler of depth 4 with 16 tokens, or every patch a token."""
    context = unet.config.context_dim
    if kind == "base":
        projection = ImageProjection(encoder.projection, context, num_tokens=4)
    elif kind == "plus":
        projection = Resampler(encoder.width, context, depth=4, heads=context // 64, num_tokens=16, context_dim=context)
    else:
        projection = PatchProjection(encoder.width, context)
    return IPAdapter.for_unet(unet, projection)


# What cannot be trained, or scored: told by the names alone where these tell it, before anything is fetched


def resolve_pictures(given: dict[str, str | None], new_adapter: bool = False) -> dict[str, Path | Preset | None]:
    """What the arguments of a run stand for (`weights.presets.resolve`), if the adapter reads pictures."""
    found = resolve(given, image=True, new_adapter=new_adapter)
    if isinstance(found["adapter"], Preset) and found["adapter"].repo == FACEID:
        raise UserError(f"`adapter` {found['adapter'].name}: {FACES}")
    return found


def check_reads_pictures(models: Models) -> None:
    if models.adapter_kind and models.adapter_kind.image_proj.faces:
        raise UserError(f"`adapter` {models.files['adapter']}: {FACES}")


def resolve_trainable(given: dict[str, str | None]) -> dict[str, Path | Preset | None]:
    found = resolve_pictures(given, new_adapter=True)
    if isinstance(found["base"], Preset):
        family = found["base"].families[0]
        check_trainable(f"`base` {found['base'].name}", family, family.schedule.prediction)
    return found


def check_trainable(base: str, family: Family, prediction: str) -> None:
    if family not in (SD1, TINY_FAMILY) or prediction != "eps":
        raise UserError(f"{base}: {family.name}, predicting {prediction}; training is for SD 1.x, predicting eps")


def trainable_kind(models: Models, kind: str | None) -> str:
    """The kind of adapter that is trained. Raises UserError for what cannot be."""
    check_trainable(f"`base` {models.base.path}", models.base.family, models.base.schedule.prediction)
    check_reads_pictures(models)
    found = KINDS[type(models.adapter_kind.image_proj)] if models.adapter_kind else kind
    if kind and kind != found:
        raise UserError(f"`kind` {kind}: the adapter given ({models.files['adapter']}) is of the kind {found}")
    return found
