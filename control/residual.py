"""CLIP's residual block of attention, as the nets for structure have it, under the original files' names."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class ResidualBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(dim, 4 * dim), gelu=QuickGELU(), c_proj=nn.Linear(4 * dim, dim))
        )
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim) -> (batch, tokens, dim)."""
        x = x + self.attend(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class LoneToken(ResidualBlock):
    """With a sequence of one token, whose attention is its value: queries and keys lie idle. x is (batch, dim)."""

    def attend(self, x: Tensor) -> Tensor:
        value = slice(2 * x.shape[-1], None)
        return self.attn.out_proj(linear(x, self.attn.in_proj_weight[value], self.attn.in_proj_bias[value]))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
