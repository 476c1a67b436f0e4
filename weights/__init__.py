"""Reads weight files in their original layouts into our models."""

from files.tensors import WeightsError, read
from weights.adapter import check_fit, load_adapter
from weights.base import Base, open_base
from weights.load import load_image_encoder, load_vae

__all__ = ["Base", "WeightsError", "check_fit", "load_adapter", "load_image_encoder", "load_vae", "open_base", "read"]
