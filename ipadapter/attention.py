"""Decoupled cross-attention, the idea of IP-Adapter (arXiv 2308.06721, section 3.2, equation 5).

Z = Attention(Q, K, V) + scale * Attention(Q, K', V')

Q = x W_q                           the picture being made
K = text W_k,    V = text W_v       the text prompt, frozen weights of the base model
K' = image W_k', V' = image W_v'    the image prompt, the adapter's own weights
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention


@dataclass(frozen=True)
class ImagePrompt:
    """One image prompt: what it says, how loudly, and where."""

    tokens: Tensor  # (batch, num_tokens, context_dim), out of an image projection
    scale: float | Sequence[float] = (
        1.0  # one number, or one per cross-attention layer in the order of the adapter's keys
    )
    mask: Tensor | None = (
        None  # (1 or batch, 1, H, W) in [0, 1] at any resolution: where the prompt acts; None: everywhere
    )
    adapter: int = 0  # which of the attached adapters reads the tokens, in the order of `IPAdapter.attach`


@dataclass(frozen=True)
class Prompt:
    """All that conditions a denoising step. It passes through the UNet untouched; cross-attention reads it."""

    text: Tensor  # (batch, 77, context_dim), out of the text tower
    images: tuple[ImagePrompt, ...] = ()
    vector: Tensor | None = None  # (batch, vector_dim), for bases with a `label_emb` (SDXL); None for SD 1.x

    @staticmethod
    def cat(prompts: Sequence["Prompt"]) -> "Prompt":
        """Stack prompts of one structure along the batch, for example the unconditional one and the conditional one."""
        first = prompts[0]
        images = tuple(
            ImagePrompt(torch.cat([image.tokens for image in row]), row[-1].scale, _cat_masks(row), row[-1].adapter)
            for row in zip(*(prompt.images for prompt in prompts), strict=True)
        )
        vector = None if first.vector is None else torch.cat([prompt.vector for prompt in prompts])
        return Prompt(torch.cat([prompt.text for prompt in prompts]), images, vector)


def _cat_masks(row: Sequence[ImagePrompt]) -> Tensor | None:
    """One mask serves all rows when it is shared; masks of several rows are stacked."""
    masks = [image.mask for image in row]
    if any(mask is None for mask in masks) or all(mask is masks[0] and len(mask) == 1 for mask in masks):
        return masks[-1]
    return torch.cat([mask.expand(len(image.tokens), -1, -1, -1) for mask, image in zip(masks, row, strict=True)])


class ImageKeyValue(nn.Module):
    """W_k' and W_v' of one cross-attention layer: all that the adapter adds to the UNet."""

    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)


class DecoupledCrossAttention(nn.Module):
    """The cross-attention of a transformer block (`attn2`), with a second pair of keys and values for image prompts.

    Args:
        dim: channels of x; heads * head_dim is the inner width.
        context_dim: channels of text and image tokens (768 in SD 1.x).
    """

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))
        # A plain list, so that these weights stay the adapters' own: the UNet's state_dict is the base model's, always.
        self.adapters: list[ImageKeyValue] = []
        self.layer = 0  # this layer's place in the order of the adapter's keys, set by the UNet

    def forward(self, x: Tensor, prompt: Prompt) -> Tensor:
        """x (batch, H*W, dim) -> (batch, H*W, dim)."""
        q = self.split(self.to_q(x))
        k, v = self.split(self.to_k(prompt.text)), self.split(self.to_v(prompt.text))
        z = scaled_dot_product_attention(q, k, v)
        for image in prompt.images:
            scale = image.scale if isinstance(image.scale, int | float) else image.scale[self.layer]
            if scale == 0:  # the base model, bit for bit
                continue
            ip = self.adapters[image.adapter]
            k, v = self.split(ip.to_k_ip(image.tokens)), self.split(ip.to_v_ip(image.tokens))
            z_image = scaled_dot_product_attention(q, k, v)
            if image.mask is not None:
                z_image = z_image * mask_per_query(image.mask, x.shape[1]).to(x.dtype)
            z = z + scale * z_image
        return self.to_out(z.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def mask_per_query(mask: Tensor, queries: int) -> Tensor:
    """Shrink a mask (batch, 1, H, W) to the grid that has this many positions: (batch, 1, queries, 1)."""
    grids = (rows for rows in range(1, queries + 1) if queries % rows == 0)  # levels of an odd latent round up
    height = min(grids, key=lambda rows: abs(math.log(rows**2 * mask.shape[3] / (queries * mask.shape[2]))))
    small = interpolate(mask.float(), size=(height, queries // height), mode="bicubic")
    return small.flatten(2).unsqueeze(-1)
