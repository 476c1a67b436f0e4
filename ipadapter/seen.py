"""Where a prompt acts in a picture: the attention of a run, looked at from outside while it is made.

The layers are watched by hooks, which compute their attention a second time and hold its sums. Where nobody watches
there are none, and nothing is computed.
"""

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ipadapter.attention import DecoupledCrossAttention, heard
from ipadapter.prompt import Prompt


@dataclass(frozen=True)
class Seen:
    """Where the parts of a prompt acted in one picture, (H, W) being the finest grid of positions that asked.

    Args:
        text: (length, H, W), softmax(Q K^T / sqrt(d)), the attention to each token of the text: at each place they sum
            to 1. The mean over heads, layers and steps.
        images: of each image prompt (num_tokens, H, W), the same with its K', over those layers and steps that heard
            it. It has a softmax of its own: this tells which of its tokens was read, not whether it was heard.
        shares: (1 + image prompts, H, W): how large the terms of equation 5 are beside each other, the text's first.
            The norm of gain * Attention(Q, K', V') at a place over the sum of all terms' norms, the mean over layers and
            steps: where an image prompt is silent its share is 0.
        groups: which of the image prompts that were asked for each of them is of (`ImagePrompt.group`).
        box: the part of the picture that all this speaks of, (left, upper, right, lower) in pixels; None: the whole.
    """

    text: Tensor
    images: tuple[Tensor, ...]
    shares: Tensor
    groups: tuple[int, ...] = ()
    box: tuple[int, int, int, int] | None = None


@dataclass
class Watch:
    """The sums of a run so far. `seen` tells, of each picture, what they come to."""

    prompt: Prompt  # of the pictures that are made: their conditional half
    sums: dict[tuple[Hashable, tuple[int, int]], tuple[Tensor, int]] = field(default_factory=dict)

    @torch.no_grad()
    def look(
        self, layer: DecoupledCrossAttention, given: tuple[Tensor, Prompt, tuple[int, int]], output: Tensor
    ) -> None:
        """A layer has computed: add what it attended to, unless it was asked for the absence of the prompt alone."""
        x, asked, grid = given
        text, count = self.prompt.text, self.prompt.rows
        if len(x) == count and asked.text is not text:
            return
        q = layer.split(layer.to_q(x[-count:]))  # of prompts that are stacked the whole one is the last
        keys = (layer.to_k(text), layer.to_v(text)) if isinstance(text, Tensor) else text[layer.layer]
        weights, norm = attended(layer, q, *keys)
        self.add("text", grid, weights)
        norms = [norm]
        for i, image in enumerate(self.prompt.images):
            norms.append(torch.zeros_like(norm))
            for key_values in heard(replace(asked, images=(image,)), layer.layer, grid):  # none where it is silent
                weights, norms[-1] = attended(layer, q, *key_values)
                self.add(i, grid, weights)
        norms = torch.stack(norms, dim=-1)
        self.add("shares", grid, norms / norms.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny))

    def add(self, what: Hashable, grid: tuple[int, int], maps: Tensor) -> None:
        """maps (batch, positions, maps)."""
        total, count = self.sums.get((what, grid), (0, 0))
        self.sums[what, grid] = total + maps, count + 1

    def seen(self) -> list[Seen]:
        """Of each picture, in the order of the prompt's rows.

        Raises:
            ValueError: no layer was asked yet.
        """
        if not self.sums:
            raise ValueError("nothing was watched: no cross-attention was asked for this prompt")
        size = max((grid for _, grid in self.sums), key=lambda grid: grid[0] * grid[1])
        text, shares = self.mean("text", size), self.mean("shares", size)
        lengths = [image.key_values[0][0].shape[1] for image in self.prompt.images]
        spoke = {name for name, _ in self.sums}
        images = [
            self.mean(i, size) if i in spoke else text.new_zeros(len(text), length, *size)
            for i, length in enumerate(lengths)
        ]
        groups = tuple(image.group for image in self.prompt.images)
        return [Seen(text[j], tuple(image[j] for image in images), shares[j], groups) for j in range(len(text))]

    def mean(self, what: Hashable, size: tuple[int, int]) -> Tensor:
        """Over layers and steps, each layer's maps brought to one size: (batch, maps, *size)."""
        found = {grid: kept for (name, grid), kept in self.sums.items() if name == what}
        total = sum(
            interpolate(maps.transpose(1, 2).unflatten(2, grid), size=size, mode="bilinear")
            for grid, (maps, _) in found.items()
        )
        return total / sum(count for _, count in found.values())


@contextmanager
def watched(layers: Iterable[DecoupledCrossAttention], prompt: Prompt) -> Iterator[Watch]:
    """Look on while pictures are made:

        with watched(unet.cross_attentions(), prompt) as watch:
            ...  # run the sampler with guided(unet, prompt, null, ...)
        seen = watch.seen()

    Args:
        layers: the cross-attentions of a backbone.
        prompt: the very one that `guided` is given (not its absence, which is not watched).
    """
    watch = Watch(prompt)
    hooks = [layer.register_forward_hook(watch.look) for layer in layers]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def attended(
    layer: DecoupledCrossAttention, q: Tensor, k: Tensor, v: Tensor, gain: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """The attention to each key, mean over the heads, (batch, positions, length), and how large its term of Z is.

    The norm over heads and their channels: (batch, positions).
    """
    q, k, v = q.float(), layer.split(k).float(), layer.split(v).float()
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return weights.mean(dim=1), (gain * (weights @ v)).norm(dim=(1, 3))
