"""Stable Diffusion's KL autoencoder (`first_stage_model.*`; CompVis, diffusionmodules/model.py), both ways.

Eight pixels become one latent position. Attribute names are the original checkpoint's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

from vae import strips


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an autoencoder; all but `latent_scale` can be read from a checkpoint's tensors."""

    channels: tuple[int, ...]  # per level, finest first: (128, 256, 512, 512) in Stable Diffusion
    res_blocks: int  # ResBlocks per level of the encoder; the decoder has one more
    latent_channels: int  # 4
    latent_scale: float = 0.18215  # brings latents to unit variance; SDXL has another (weights/families.py)


SD_VAE = VAEConfig(channels=(128, 256, 512, 512), res_blocks=2, latent_channels=4)
SCORES = 2**27  # of the attention, held at once at most; reached beyond 850x850 pixels


class VAE(nn.Module):
    """Pictures to latents and back. The latent scale is applied here (InstructPix2Pix's bases have it taken off again)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None, rows: int | None = None) -> Tensor:
        """pixels (batch, 3, H, W) in [-1, 1] -> scaled latents (batch, 4, H/8, W/8).

        With a generator the latent is drawn from the posterior; without one it is the posterior's mean. `rows`: as in
        `decode`.
        """
        mean, std = self.posterior(pixels, rows)
        if generator is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)

    def decode(self, latents: Tensor, rows: int | None = None) -> Tensor:
        """scaled latents (batch, 4, H/8, W/8) -> pixels (batch, 3, H, W), nominally in [-1, 1], not clamped.

        With `rows` in strips of so many rows, in a fraction of the memory; the result is the same (vae/strips.py).
        """
        z = self.post_quant_conv(latents / self.config.latent_scale)
        return self.decoder(z) if rows is None else strips.decode(self.decoder, z, rows)

    def posterior(self, pixels: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """pixels (batch, 3, H, W) in [-1, 1] -> mean and standard deviation of the scaled latents."""
        mean, logvar = self.moments(pixels, rows)
        scale = self.config.latent_scale
        return scale * mean, scale * (0.5 * logvar).exp()

    def moments(self, pixels: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """pixels (batch, 3, H, W) in [-1, 1] -> mean and log variance before the scale, as the loss is written in them."""
        x = self.encoder(pixels) if rows is None else strips.encode(self.encoder, pixels, rows)
        mean, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        ch = config.channels[0]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, out in enumerate(config.channels):
            blocks = [ResnetBlock(ch if i == 0 else out, out) for i in range(config.res_blocks)]
            stage = nn.ModuleDict({"block": nn.ModuleList(blocks)})
            if level < len(config.channels) - 1:
                stage["downsample"] = Downsample(out)
            self.down.append(stage)
            ch = out
        self.mid = middle(ch)
        self.norm_out = norm(ch)
        self.conv_out = nn.Conv2d(ch, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, 3, H, W) -> (batch, 8, H/8, W/8): mean and log variance, before `quant_conv`."""
        x = self.conv_in(x)
        for stage in self.down:
            for block in stage["block"]:
                x = block(x)
            if "downsample" in stage:
                x = stage["downsample"](x)
        for layer in self.mid.values():
            x = layer(x)
        return self.conv_out(silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        ch = config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, ch, 3, padding=1)
        self.mid = middle(ch)
        stages = []
        for level, out in reversed(list(enumerate(config.channels))):
            blocks = [ResnetBlock(ch if i == 0 else out, out) for i in range(config.res_blocks + 1)]
            stage = nn.ModuleDict({"block": nn.ModuleList(blocks)})
            if level > 0:
                stage["upsample"] = Upsample(out)
            stages.append(stage)
            ch = out
        self.up = nn.ModuleList(reversed(stages))  # the original counts from the finest level
        self.norm_out = norm(ch)
        self.conv_out = nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (batch, 4, H/8, W/8), unscaled, behind `post_quant_conv` -> (batch, 3, H, W)."""
        x = self.conv_in(z)
        for layer in self.mid.values():
            x = layer(x)
        for stage in reversed(self.up):
            for block in stage["block"]:
                x = block(x)
            if "upsample" in stage:
                x = stage["upsample"](x)
        return self.conv_out(silu(self.norm_out(x)))


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def middle(channels: int) -> nn.ModuleDict:
    block_1, block_2 = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
    return nn.ModuleDict({"block_1": block_1, "attn_1": Attention(channels), "block_2": block_2})


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(silu(self.norm2(h)))


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (to(h).flatten(2).transpose(1, 2) for to in (self.q, self.k, self.v))  # (batch, H*W, C)
        slices = q[:, None].split(max(1, SCORES // (q.shape[0] * q.shape[1])), dim=2)  # no kernel fills the memory
        h = torch.cat([scaled_dot_product_attention(part, k[:, None], v[:, None]) for part in slices], dim=2)[:, 0]
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))  # right and bottom only, as in the original


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
