"""IP-Adapter: image prompts through decoupled cross-attention (arXiv 2308.06721)."""

from ipadapter.adapter import IPAdapter
from ipadapter.attention import DecoupledCrossAttention, heard, number, prepared
from ipadapter.projection import FacePlusProjection, FaceProjection, ImageProjection, PatchProjection, Resampler
from ipadapter.prompt import ImagePrompt, Prompt

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
    "heard",
    "number",
    "prepared",
]
