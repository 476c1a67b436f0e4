"""T2I-Adapter's style adapter (arXiv 2302.08453): what a picture looks like, as tokens behind the text.

Attribute names are those of the original file (TencentARC, adapter.py), misspelling included.
"""

import torch
from torch import Tensor, nn

from control.residual import ResidualBlock

HEADS = 8  # of its blocks: no tensor tells


class StyleAdapter(nn.Module):
    """Learned tokens attend to CLIP's features of a picture, and to one another.

    Args:
        width: of the features, of ViT-L/14 1024.
        context_dim: of the text's tokens.
        tokens: how many stand behind the text.
        layers: of attention.
    """

    def __init__(self, width: int = 1024, context_dim: int = 768, tokens: int = 8, layers: int = 3):
        super().__init__()
        self.style_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer_layes = nn.Sequential(*(ResidualBlock(width, HEADS) for _ in range(layers)))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, context_dim))

    def encode(self, features: Tensor) -> tuple[Tensor, ...]:
        """The image tower's last layer (batch, 1 + patches, width) -> (batch, tokens, context_dim)."""
        tokens = self.style_embedding.expand(len(features), -1, -1)
        x = self.transformer_layes(self.ln_pre(torch.cat([features, tokens], dim=1)))
        return (self.ln_post(x[:, -tokens.shape[1] :]) @ self.proj,)
