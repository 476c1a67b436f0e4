"""From text to what each family of Stable Diffusion reads of it."""

import torch
from torch import Tensor, nn

from clip.model import CLIPText
from clip.tokenizer import END, tokenize


class TextEncoder(nn.Module):
    """SD 1.x and 2.x: one tower.

    Args:
        pad: the token that fills a text up to 77: end-of-text in SD 1.x, 0 in SD 2.x.
    """

    def __init__(self, tower: CLIPText, pad: int = END):
        super().__init__()
        self.tower, self.pad = tower, pad

    def forward(self, text: str) -> tuple[Tensor, Tensor | None]:
        """A text -> its features (1, 77, context_dim), and a pooled embedding (1, width) or None."""
        return self.tower(tokens(text, self.pad, self.tower)), None

    def null(self, text: str) -> tuple[Tensor, Tensor | None]:
        """The same for the negative prompt, or for no text."""
        return self(text)


class TwoTowerEncoder(nn.Module):
    """SDXL (arXiv 2307.01952, section 2.1): two towers side by side, each without its last layer.

    The pooled embedding is the whole second tower's.
    """

    def __init__(self, first: CLIPText, second: CLIPText):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, text: str) -> tuple[Tensor, Tensor]:
        """A text -> its features (1, 77, context_dim), and a pooled embedding (1, width)."""
        first, second = tokens(text, END, self.first), tokens(text, 0, self.second)
        x = self.second.penultimate(second)
        features = torch.cat([self.first.penultimate(first), x], dim=-1)
        return features, self.second.pool(self.second.last(x), second)

    def null(self, text: str) -> tuple[Tensor, Tensor]:
        """The same for the negative prompt; zeros where there is none, as the model was trained."""
        features, pooled = self(text)
        return (features, pooled) if text else (torch.zeros_like(features), torch.zeros_like(pooled))


def tokens(text: str, pad: int, tower: CLIPText) -> Tensor:
    return tokenize(text, pad).to(next(tower.parameters()).device)
