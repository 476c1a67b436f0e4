"""Reads weight files in their original layouts into our models."""

import ipadapter  # noqa: F401, isort: skip, first: it sees to it that what follows are our rooms

from files.tensors import WeightsError, read
from weights.adapter import check_fit, load_adapter
from weights.base import Base, open_base
from weights.clip import load_image_encoder
from weights.vae import load_vae

__all__ = ["Base", "WeightsError", "check_fit", "load_adapter", "load_image_encoder", "load_vae", "open_base", "read"]
