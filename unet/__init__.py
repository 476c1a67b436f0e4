"""Stable Diffusion's UNet."""

import ipadapter  # noqa: F401, isort: skip, first: it sees to it that what follows are our rooms

from unet.layers import layer_names
from unet.unet import SD15, SD21, SDXL, Added, Encoder, UNet, UNetConfig, size_vector, skip_channels, told_vector

__all__ = [
    "SD15",
    "SD21",
    "SDXL",
    "Added",
    "Encoder",
    "UNet",
    "UNetConfig",
    "layer_names",
    "size_vector",
    "skip_channels",
    "told_vector",
]
