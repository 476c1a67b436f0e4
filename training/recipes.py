"""What is trained, and how: the kinds of adapters as the official ones are, the paper's recipe, and the tiny model's."""

from pathlib import Path

from clip import CLIPImageConfig
from ipadapter import ImageProjection, IPAdapter, PatchProjection, Resampler
from unet import UNet

KINDS = {PatchProjection: "full-face", Resampler: "plus", ImageProjection: "base"}
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
