"""Stable Diffusion's UNet, with decoupled cross-attention built into its transformer blocks.

Attribute names are those of the original checkpoints (`model.diffusion_model.*`; CompVis, openaimodel.py and
attention.py), so a checkpoint loads with `load_state_dict(strict=True)` and no table of names.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import gelu, interpolate, linear, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ipadapter import DecoupledCrossAttention, Prompt, number


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet. All but `heads` and `head_dim` can be read from a checkpoint's tensors."""

    in_channels: int  # latent channels, 4
    out_channels: int
    channels: tuple[int, ...]  # per level, finest first: (320, 640, 1280, 1280) in SD 1.x
    # The number of transformer blocks behind each ResBlock; 0: no transformer, -1: one without blocks, its norm and
    # projections alone (the smaller ControlNets for SDXL):
    down: tuple[tuple[int, ...], ...]  # per level, on the way down
    middle: tuple[int, ...]  # (1, 0) in SD 1.x; distilled models leave a ResBlock out, or all of it
    up: tuple[tuple[int, ...], ...]  # per level, on the way up, coarsest first
    context_dim: int  # width of text and image tokens
    heads: int | None  # attention heads at every width (SD 1.x: 8), or None where head_dim is fixed instead
    head_dim: int | None  # channels per head (SD 2.x and SDXL: 64), or None
    linear_proj: bool  # proj_in and proj_out are Linear (SD 2.x, SDXL) instead of 1x1 convolutions (SD 1.x)
    vector_dim: int | None  # width of `Prompt.vector` (SDXL: 2816), or None
    guidance_dim: int | None = None  # sinusoids of the guidance scale, in models that are told it (LCM: 256)


SD15 = UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(320, 640, 1280, 1280),
    down=((1, 1), (1, 1), (1, 1), (0, 0)),
    middle=(1, 0),
    up=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    context_dim=768,
    heads=8,
    head_dim=None,
    linear_proj=False,
    vector_dim=None,
)
SD21 = replace(SD15, context_dim=1024, heads=None, head_dim=64, linear_proj=True)
SDXL = UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(320, 640, 1280),
    down=((0, 0), (2, 2), (10, 10)),
    middle=(10, 0),
    up=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    context_dim=2048,
    heads=None,
    head_dim=64,
    linear_proj=True,
    vector_dim=2816,
)


@dataclass(frozen=True)
class Added:
    """What structural control adds inside a UNet (`control/`), by the numbers of the input blocks, 0 and on.

    The number behind the last one stands for the middle block.
    """

    skips: Mapping[int, Tensor] = field(default_factory=dict)  # to the skips alone (arXiv 2302.05543)
    features: Mapping[int, Tensor] = field(default_factory=dict)  # also to what goes on downwards (arXiv 2302.08453)


class Encoder(nn.Module):
    """A UNet's way down and its middle. A ControlNet is a second one of these.

    Every layer inside a block takes (x, emb, prompt) and uses what it needs.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width, emb_dim = config.channels[0], 4 * config.channels[0]
        self.time_embed = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if config.guidance_dim:
            self.cond_proj = nn.Linear(config.guidance_dim, width, bias=False)
        if config.vector_dim:
            vector_embed = nn.Sequential(nn.Linear(config.vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
            self.label_emb = nn.Sequential(vector_embed)

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        ch = width
        for level, out in enumerate(config.channels):
            for depth in config.down[level]:
                self.input_blocks.append(self.layers(ch, out, depth))
                ch = out
            if level < len(config.channels) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(ch)]))
        self.middle_block = nn.ModuleList(layer for depth in config.middle for layer in self.layers(ch, ch, depth))
        self.output_blocks = nn.ModuleList()

    def layers(self, in_channels: int, out_channels: int, depth: int) -> nn.ModuleList:
        block = nn.ModuleList([ResBlock(in_channels, out_channels, 4 * self.config.channels[0])])
        if depth:
            block.append(SpatialTransformer(out_channels, depth, self.config))
        return block

    def embed(self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: float | None = None) -> Tensor:
        """What every ResBlock is told beside x, (batch, 4 * width)."""
        emb = timestep_embedding(t.expand(len(x)), self.config.channels[0]).to(x.dtype)
        if guidance_scale is not None:
            emb = emb + self.cond_proj(guidance_embedding(guidance_scale, self.config.guidance_dim).to(x))
        emb = self.time_embed(emb)
        return emb if prompt.vector is None else emb + self.label_emb(prompt.vector)

    def recompute(self) -> None:
        """For training in less memory: each layer keeps its inputs only, and computes the rest anew on the way back."""
        for module in self.modules():
            if isinstance(module, ResBlock | SpatialTransformer):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    def cross_attentions(self) -> Iterator[DecoupledCrossAttention]:
        """The cross-attention layers in the order of an adapter's keys 1, 3, 5, ...: down, up, and the middle last."""
        yield from (layer for layer in self.attentions() if isinstance(layer, DecoupledCrossAttention))

    def attentions(self) -> Iterator[nn.Module]:
        """All attention layers in the order of an adapter's keys 0, 1, 2, ...; the even ones attend to the picture."""
        for part in (self.input_blocks, self.output_blocks, self.middle_block):
            yield from (m for m in part.modules() if isinstance(m, SelfAttention | DecoupledCrossAttention))


class UNet(Encoder):
    """Predicts the noise (or v) in a latent, conditioned on a `Prompt`."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        ch, skips = config.channels[-1], skip_channels(config)
        for level, out in reversed(list(enumerate(config.channels))):
            for depth in config.up[-1 - level]:
                self.output_blocks.append(self.layers(ch + skips.pop(), out, depth))
                ch = out
            if level > 0:
                self.output_blocks[-1].append(Upsample(ch))

        self.out = nn.Sequential(nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, config.out_channels, 3, padding=1))
        number(self.cross_attentions())

    def forward(
        self, x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: float | None = None, added: Added | None = None
    ) -> Tensor:
        """x (batch, 4, H/8, W/8), t (batch,) or () in 0..999 -> (batch, 4, H/8, W/8).

        guidance_scale: only for a model that is told it (`UNetConfig.guidance_dim`).
        """
        emb = self.embed(x, t, prompt, guidance_scale)  # (batch, 1280) in SD 1.x, as all that follows
        x = self.input_blocks[0][0](x)  # (batch, 320, H/8, W/8)
        skips = [x]  # twelve, down to (batch, 1280, H/64, W/64)
        for i, block in enumerate(self.input_blocks[1:], 1):
            for layer in block:
                x = layer(x, emb, prompt)
            if added and i in added.features:
                x = x + added.features[i]
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb, prompt)
        if added:
            x = x + added.features.get(len(skips), 0) + added.skips.get(len(skips), 0)
            skips = [skip + added.skips.get(i, 0) for i, skip in enumerate(skips)]
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)  # (batch, 2560, H/64, W/64) at first, (batch, 640, H/8, W/8) at last
            for layer in block:
                if isinstance(layer, Upsample):  # to the size of the skip that comes next: it may be odd
                    x = interpolate(x, size=skips[-1].shape[2:], mode="nearest")
                x = layer(x, emb, prompt)
        return self.out(x)


def skip_channels(config: UNetConfig) -> list[int]:
    """Of what each input block gives, and an output block takes: the finest first."""
    found, last = [config.channels[0]], len(config.channels) - 1
    for level, out in enumerate(config.channels):
        found += [out] * (len(config.down[level]) + (level < last))
    return found


def size_vector(pooled: Tensor, height: int, width: int, sinusoids: int = 256) -> Tensor:
    """What SDXL is told beside the text (arXiv 2307.01952, section 2.2): `Prompt.vector`.

    The size of the original picture, the corner it is cut from (0, 0) and the size wanted, in pixels; the first and the
    last are the same here.

    pooled (batch, width) of the second text tower -> (batch, width + 6 * sinusoids): 2816 for SDXL
    """
    sizes = torch.tensor([height, width, 0, 0, height, width], device=pooled.device)
    return told_vector(pooled, sizes.expand(len(pooled), -1), sinusoids)


def told_vector(pooled: Tensor, sizes: Tensor, sinusoids: int) -> Tensor:
    """The same, each row with six sizes of its own: sizes (batch, 6)."""
    return torch.cat([pooled, timestep_embedding(sizes.flatten(), sinusoids).view(len(sizes), -1).to(pooled)], dim=1)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep, t (batch,) -> (batch, dim), fp32 (cosines first; CompVis, util.py)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scale: float, dim: int) -> Tensor:
    """Sinusoids of the guidance scale, (dim,), fp32 (arXiv 2310.04378, appendix C; 1 is off: sines of 0)."""
    angles = 1000 * (scale - 1) * torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2 - 1))
    return torch.cat([angles.sin(), angles.cos()])


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padding 1.

    On a CPU oneDNN lays the weights out anew at every call. For a map of few positions that takes longer than the
    convolution itself, so there it is done as one matrix product; unless weights are few and there is a way back.
    """

    def forward(self, x: Tensor) -> Tensor:
        few = x.requires_grad and self.in_channels * self.out_channels < 2**16
        if x.device.type != "cpu" or x.shape[2] * x.shape[3] > 64 or few:
            return super().forward(x)
        windows = pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (batch, C, H, W, 3, 3)
        rows = windows.permute(0, 2, 3, 4, 5, 1).flatten(3)  # (batch, H, W, 9 * C)
        return linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, emb_dim: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_channels), nn.SiLU(), Conv3x3(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout in the original; keeps the convolution at index 3
            Conv3x3(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, prompt: Prompt) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor, prompt: Prompt) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, prompt: Prompt) -> Tensor:
        return self.conv(x)  # already enlarged


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map."""

    def __init__(self, channels: int, depth: int, config: UNetConfig):
        super().__init__()
        heads = config.heads or channels // config.head_dim
        inner = heads * (config.head_dim or channels // config.heads)
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if config.linear_proj else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(inner, heads, config.context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, channels) if config.linear_proj else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, emb: Tensor, prompt: Prompt) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (batch, C, H, W) -> (batch, H*W, C)
        h = linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)  # a 1x1 convolution is a matrix too
        for block in self.transformer_blocks:
            h = block(h, prompt, tuple(x.shape[2:]))
        h = linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # (batch, H*W, C) -> (batch, C, H, W)


class TransformerBlock(nn.Module):
    """Attention to itself, to the prompt, and a feed-forward; each behind a LayerNorm, each added to x."""

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.attn1 = SelfAttention(dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = DecoupledCrossAttention(dim, context_dim, heads, dim // heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, prompt: Prompt, grid: tuple[int, int]) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), prompt, grid)
        return x + self.ff(self.norm3(x))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, H*W, dim) -> (batch, H*W, dim)."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))


def attention(q: Tensor, k: Tensor, v: Tensor, scores: int = 2**27) -> Tensor:
    """Scaled dot-product attention, in slices of the queries where all scores at once would fill the memory.

    Fused kernels hold no scores. Where none will run (MPS, a GPU too old for the dtype) 2048x2048 pixels would ask for
    the scores of 65,536 queries by as many keys, for each head.

    Args:
        q, k, v: (batch, heads, length, head_dim).
        scores: how many of them may be in memory.
    """
    rows = max(1, scores // (q.shape[0] * q.shape[1] * k.shape[2]))
    if rows >= q.shape[2] or fused(q, k, v):
        return scaled_dot_product_attention(q, k, v)
    return torch.cat([scaled_dot_product_attention(part, k, v) for part in q.split(rows, dim=2)], dim=2)


def fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch has a kernel for this device, dtype and head_dim that holds no scores."""
    try:
        return torch._fused_sdp_choice(q, k, v) != SDPBackend.MATH.value
    except (NotImplementedError, RuntimeError):  # a device that cannot be asked has none (MPS)
        return False


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """A GELU-gated linear unit (arXiv 2002.05202)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * gelu(gate)
