"""The tiny model: the topology of SD 1.5 and CLIP, narrower, for 128x128 drawings. Together under 15 M parameters."""

from dataclasses import replace

from clip import CLIPImageConfig, CLIPTextConfig
from unet import SD15
from vae import SD_VAE

SIZE = 128  # pixels; latents are 16x16

TEXT = CLIPTextConfig(width=64, layers=3, heads=4, mlp=256, quick_gelu=True, projection=128)
IMAGE = CLIPImageConfig(
    width=128, layers=5, heads=2, mlp=512, quick_gelu=False, projection=128, image_size=SIZE, patch_size=16
)
TINY_VAE = replace(SD_VAE, channels=(64, 64, 64, 64))
TINY_UNET = replace(SD15, channels=(64, 96, 96, 96), context_dim=TEXT.width)
NUM_TOKENS = 4  # of the base adapter
PLUS = {"dim": 64, "depth": 2, "heads": 1, "num_tokens": 16}  # Resampler of the plus adapter
