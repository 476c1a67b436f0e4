"""Stable Diffusion's UNet."""

from unet.unet import SD15, SD21, SDXL, UNet, UNetConfig, size_vector

__all__ = ["SD15", "SD21", "SDXL", "UNet", "UNetConfig", "size_vector"]
