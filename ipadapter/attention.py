"""Decoupled cross-attention, the idea of IP-Adapter (arXiv 2308.06721, section 3.2, equation 5).

Z = Attention(Q, K, V) + scale * Attention(Q, K', V')

Q = x W_q                           the picture being made
K = text W_k,    V = text W_v       the text prompt, frozen weights of the base model
K' = image W_k', V' = image W_v'    the image prompt, the adapter's own weights
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from ipadapter.prompt import Prompt
from ipadapter.scale import Weight, at


class DecoupledCrossAttention(nn.Module):
    """The cross-attention of a transformer block (`attn2`), which hears image prompts beside the text.

    Args:
        dim: channels of x; heads * head_dim is the inner width.
        context_dim: channels of text and image tokens (768 in SD 1.x).
    """

    layer: int | None = None  # its place in the order of an adapter's keys, told by `number`

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))

    def forward(self, x: Tensor, prompt: Prompt, grid: tuple[int, int] | None = None) -> Tensor:
        """x (batch, H*W, dim), grid (H, W), which masks need -> (batch, H*W, dim)."""
        q, text = self.split(self.to_q(x)), prompt.text
        k, v = (self.to_k(text), self.to_v(text)) if isinstance(text, Tensor) else text[self.layer]
        z = scaled_dot_product_attention(q, self.split(k), self.split(v))
        for k, v, gain in heard(prompt, self.layer, grid):
            z = z + gain * scaled_dot_product_attention(q, self.split(k), self.split(v))
        return self.to_out(z.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def heard(
    prompt: Prompt, layer: int | None, grid: tuple[int, int] | None = None
) -> Iterator[tuple[Tensor, Tensor, float | Tensor]]:
    """What one cross-attention layer hears of a prompt's image prompts; silent ones (scale 0) are left out.

    Args:
        layer: the number of the layer.
        grid: (rows, columns) of the feature map, whose positions ask row by row; only masks need it.

    Yields:
        K' and V', (batch, num_tokens, heads * head_dim), and what their attention is multiplied by: the scale in this
        layer and this step, or scale times mask as (1 or batch, 1, 1 or positions, 1).

    Raises:
        ValueError: a layer without a number, or of a backbone with more layers than the prompt has; a mask and no grid.
    """
    for image in prompt.images:
        if layer is None or layer >= len(image.key_values):
            raise ValueError(
                f"an image prompt for {len(image.key_values)} layers meets layer {layer}: "
                "`number` the backbone's cross-attentions, as many as the adapter has"
            )
        gain = image.scale if isinstance(image.scale, Weight) else at(image.scale, layer, prompt.step)
        if isinstance(gain, Tensor):  # one for each row
            gain = gain.to(image.key_values[layer][0]).view(-1, 1, 1, 1)
        elif gain == 0:  # the base model, bit for bit
            continue
        if image.mask is not None:
            gain = gain * mask_per_query(image.mask, grid).to(image.key_values[layer][0])
        yield *image.key_values[layer], gain


def mask_per_query(mask: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Shrink a mask (batch, 1, H, W) to the positions of a feature map: (batch, 1, rows * columns, 1)."""
    if grid is None:
        raise ValueError("an image prompt with a mask: the attention must be told the `grid` of its feature map")
    return interpolate(mask.float(), size=grid, mode="bicubic").flatten(2).unsqueeze(-1)


def prepared(prompt: Prompt, layers: Iterable[nn.Module]) -> Prompt:
    """The prompt with K and V of its text in place of the text: computed once for all steps, as K' and V' are.

    Args:
        layers: the cross-attentions of a backbone in the order of their numbers, with `to_k` and `to_v`.
    """
    return replace(prompt, text=[(layer.to_k(prompt.text), layer.to_v(prompt.text)) for layer in layers])


def number(layers: Iterable[nn.Module]) -> None:
    """Tell the cross-attention layers of a backbone their places, 0, 1, ..., in the order of an adapter's keys."""
    for i, layer in enumerate(layers):
        layer.layer = i
