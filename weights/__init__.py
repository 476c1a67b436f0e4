"""Reads weight files in their original layouts into our models."""

from weights.files import WeightsError, read
from weights.load import Base, check_fit, load_adapter, load_image_encoder, load_vae, open_base

__all__ = ["Base", "WeightsError", "check_fit", "load_adapter", "load_image_encoder", "load_vae", "open_base", "read"]
