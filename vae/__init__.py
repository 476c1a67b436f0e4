"""Stable Diffusion's KL autoencoder."""

from vae.vae import SD_VAE, VAE, VAEConfig

__all__ = ["SD_VAE", "VAE", "VAEConfig"]
