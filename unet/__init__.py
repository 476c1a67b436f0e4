"""Stable Diffusion's UNet."""

from unet.unet import SD15, UNet, UNetConfig

__all__ = ["SD15", "UNet", "UNetConfig"]
