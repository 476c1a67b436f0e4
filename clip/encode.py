"""From text to what each family of Stable Diffusion reads of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from clip.model import CLIPText
from clip.tokenizer import CHUNK, END, START, encode

# Features (chunks, 77, width), the weight of each token (chunks, 77), and what gives the features of no text
# (1, 77, width) -> the features, weighted.
Weigh = Callable[[Tensor, Tensor, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class Text:
    """A text as tokens: chunks of at most 75, which the tower reads one by one; their features stand side by side."""

    chunks: Sequence[Sequence[tuple[int, float]]]  # tokens, each with its weight
    weigh: Weigh | None = None  # how a weight acts; None: not at all
    vectors: Sequence[Tensor] = ()  # (n, width) for each tower: what the tokens -1, -2, ... stand for

    @staticmethod
    def plain(text: str) -> "Text":
        """One chunk; what does not fit is cut off."""
        return Text([[(token, 1.0) for token in encode(text)[:CHUNK]]])

    def __bool__(self) -> bool:
        return any(map(len, self.chunks))

    def rows(self, pad: int) -> list[list[int]]:
        """The tokens of each chunk, 77: start, words, end, padding."""
        return [[START, *(token for token, _ in chunk), END] + [pad] * (CHUNK - len(chunk)) for chunk in self.chunks]

    def tokens(self, pad: int, device: torch.device) -> Tensor:
        """(chunks, 77)."""
        return torch.tensor(self.rows(pad), device=device)

    def weights(self) -> Tensor:
        """(chunks, 77): of the tokens."""
        rows = [[1.0, *(weight for _, weight in chunk), 1.0] + [1.0] * (CHUNK - len(chunk)) for chunk in self.chunks]
        return torch.tensor(rows)


class TextEncoder(nn.Module):
    """SD 1.x and 2.x: one tower.

    Args:
        pad: the token that fills a text up to 77: end-of-text in SD 1.x, 0 in SD 2.x.
    """

    def __init__(self, tower: CLIPText, pad: int = END):
        super().__init__()
        self.tower, self.pad = tower, pad

    def forward(self, text: str | Text, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """A text -> its features (1, 77 * chunks, context_dim), and a pooled embedding (1, width) or None.

        Args:
            skip: how many of the last layers are left out; the final LayerNorm is not.
        """
        text = Text.plain(text) if isinstance(text, str) else text

        def features(text: Text) -> Tensor:
            return self.tower.text_model["final_layer_norm"](hidden(self.tower, self.pad, 0, skip, text))

        return weighted(features(text), text, features), None

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features of plain texts as tokens (batch, 77), filled up with end-of-text (`tokenize`)."""
        return self.tower(padded(tokens, self.pad, self.tower)), None

    def null(self, text: str | Text) -> tuple[Tensor, Tensor | None]:
        """The same for the negative prompt, or for no text."""
        return self(text)


class TwoTowerEncoder(nn.Module):
    """SDXL (arXiv 2307.01952, section 2.1): two towers side by side, each without its last layer.

    The pooled embedding is the whole second tower's, of the first chunk.
    """

    def __init__(self, first: CLIPText, second: CLIPText):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, text: str | Text, skip: int = 0) -> tuple[Tensor, Tensor]:
        """A text -> its features (1, 77 * chunks, context_dim), and a pooled embedding (1, width).

        Args:
            skip: how many layers are left out besides the last one; the pooled embedding leaves out none.
        """
        text = Text.plain(text) if isinstance(text, str) else text
        first, second = partial(hidden, self.first, END, 0), partial(hidden, self.second, 0, 1)
        x = second(skip + 1, text)
        features = [weighted(first(skip + 1, text), text, partial(first, skip + 1))]
        features += [weighted(x, text, partial(second, skip + 1))]
        whole = self.second.last(second(1, text) if skip else x)
        return torch.cat(features, dim=-1), self.second.pool(whole[:1], text.tokens(0, x.device)[:1])

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The features of plain texts as tokens (batch, 77), filled up with end-of-text (`tokenize`)."""
        first, second = padded(tokens, END, self.first), padded(tokens, 0, self.second)
        x = self.second.hidden(second, 1)
        features = torch.cat([self.first.hidden(first, 1), x], dim=-1)
        return features, self.second.pool(self.second.last(x), second)

    def null(self, text: str | Text) -> tuple[Tensor, Tensor]:
        """The same for the negative prompt; zeros where there is none, as the model was trained."""
        features, pooled = self(text)
        return (features, pooled) if text else (torch.zeros_like(features), torch.zeros_like(pooled))


def hidden(tower: CLIPText, pad: int, number: int, skip: int, text: Text) -> Tensor:
    """What the tower of this number says of a text, (chunks, 77, width), without a LayerNorm."""
    vectors = text.vectors[number] if text.vectors else None
    return tower.hidden(text.tokens(pad, next(tower.parameters()).device), skip, vectors)


def padded(tokens: Tensor, pad: int, tower: CLIPText) -> Tensor:
    """Filled up with the token that a tower was trained with, on its device."""
    tokens = tokens.to(next(tower.parameters()).device)
    behind = (tokens == END).flip(1).cumprod(1).flip(1).bool()  # the end, and what fills up behind it
    return tokens.masked_fill(behind & behind.roll(1, 1), pad)


def weighted(x: Tensor, text: Text, features: Callable[[Text], Tensor]) -> Tensor:
    """Features (chunks, 77, width) of a text -> (1, 77 * chunks, width), with the weights of its tokens."""
    if text.weigh and not (weights := text.weights().to(x)).eq(1).all():
        x = text.weigh(x, weights[..., None], lambda: features(Text([[]])))
    return x.flatten(0, 1)[None]


def times_weight(x: Tensor, weights: Tensor, empty: Callable[[], Tensor]) -> Tensor:
    """As A1111 weighs: features times weights, and each chunk brought back to the mean that it had."""
    y = x * weights
    return y * (x.mean(dim=(1, 2), keepdim=True) / y.mean(dim=(1, 2), keepdim=True))


def from_empty(x: Tensor, weights: Tensor, empty: Callable[[], Tensor]) -> Tensor:
    """As ComfyUI weighs: so much further from what the empty text says at the same place."""
    none = empty()
    return none + weights * (x - none)
