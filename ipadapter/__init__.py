"""IP-Adapter: image prompts through decoupled cross-attention (arXiv 2308.06721)."""

import sys
from pathlib import Path

# The other rooms have names that other packages have too. Whoever comes in by whichever door gets ours, or is told.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for name in ("clip", "control", "files", "generate", "sampler", "training", "unet", "vae", "weights"):
    foreign = getattr(sys.modules.get(name), "__file__", None)
    if foreign and not Path(foreign).resolve().is_relative_to(ROOT):
        raise ImportError(
            f"another package called `{name}` is imported already ({foreign}): import ipadapter before it"
        )

from ipadapter.adapter import IPAdapter
from ipadapter.attention import DecoupledCrossAttention, heard, number, prepared
from ipadapter.projection import FacePlusProjection, FaceProjection, ImageProjection, PatchProjection, Resampler
from ipadapter.prompt import ImagePrompt, Prompt
from ipadapter.scale import Scale
from ipadapter.seen import Seen, watched

__all__ = [
    "DecoupledCrossAttention",
    "FacePlusProjection",
    "FaceProjection",
    "IPAdapter",
    "ImageProjection",
    "ImagePrompt",
    "PatchProjection",
    "Prompt",
    "Resampler",
    "Scale",
    "Seen",
    "heard",
    "number",
    "prepared",
    "watched",
]
