"""The autoencoder, a strip of rows at a time: what it computes at once, in a fraction of the memory.

Tiles decoded on their own do not give the same picture: every GroupNorm takes its mean and variance over a whole
feature map, so each tile gets colours of its own. Here a norm first reads the whole map, strip by strip, and only then
is it applied. A map that is too large to be held is computed anew each time it is read, and a block writes its output
over its input. So at the finest level one map and a half are held, where the usual way has three of twice the
channels. The price is half as much time again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


@dataclass(frozen=True)
class Map:
    """A feature map (batch, C, height, W) whose rows are computed when they are read."""

    height: int
    read: Callable[[int, int], Tensor]  # read(a, b): the rows a to b, (batch, C, b - a, W)
    held: Tensor | None = None  # the whole map, where it lies in memory

    def strips(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        for a in range(0, self.height, rows):
            b = min(a + rows, self.height)
            yield a, b, self.read(a, b)


@torch.no_grad()
def decode(decoder: nn.Module, z: Tensor, rows: int) -> Tensor:
    """`Decoder.forward` in strips of so many rows."""
    x = decoder.conv_in(z)
    for layer in decoder.mid.values():
        x = layer(x)
    x = in_memory(x)
    for level, stage in reversed(list(enumerate(decoder.up))):
        for block in stage["block"]:
            x = hold(resnet(block, x, rows, keep=level > 1), rows, over=x.held)
        if level > 0:
            x = enlarge(stage["upsample"], x)
        if level > 1:  # the last enlargement is the largest map of all: its rows are computed as they are read
            x = hold(x, rows)
    return hold(conv3x3(decoder.conv_out, activate(decoder.norm_out, x, rows)), rows).held


@torch.no_grad()
def encode(encoder: nn.Module, pixels: Tensor, rows: int) -> Tensor:
    """`Encoder.forward` in strips of so many rows."""
    x = hold(conv3x3(encoder.conv_in, in_memory(pixels)), rows)
    for level, stage in enumerate(encoder.down):
        for block in stage["block"]:
            x = hold(resnet(block, x, rows, keep=level > 1), rows, over=x.held)
        if "downsample" in stage:
            x = hold(halve(stage["downsample"], x), rows)
    x = x.held
    for layer in encoder.mid.values():
        x = layer(x)
    return encoder.conv_out(silu(encoder.norm_out(x)))


def in_memory(x: Tensor) -> Map:
    return Map(x.shape[2], lambda a, b: x[:, :, a:b], x)


def hold(source: Map, rows: int, over: Tensor | None = None) -> Map:
    """Compute a map once and hold it, in the place of `over` where that has the same shape.

    A strip is written when the next one has been computed, which still reads two of the rows below it.
    """
    whole, waiting = over, None
    for a, b, strip in source.strips(max(rows, 2)):
        if whole is None or whole.shape[1] != strip.shape[1]:
            whole = strip.new_empty(*strip.shape[:2], source.height, strip.shape[3])
        if waiting:
            whole[:, :, slice(*waiting[:2])] = waiting[2]
        waiting = a, b, strip
    whole[:, :, slice(*waiting[:2])] = waiting[2]
    return in_memory(whole)


def resnet(block: nn.Module, x: Map, rows: int, keep: bool) -> Map:
    """`ResnetBlock.forward`; to keep the map between its convolutions saves computing it twice."""
    x = x if x.held is not None else remember(x)
    h = conv3x3(block.conv1, activate(block.norm1, x, rows))
    h = hold(h, rows) if keep else h
    h = conv3x3(block.conv2, activate(block.norm2, h, rows))
    return Map(x.height, lambda a, b: h.read(a, b).add_(block.nin_shortcut(x.read(a, b))))


def remember(source: Map) -> Map:
    """Keep the rows read last: a block reads them twice, for its convolutions and for its shortcut."""
    last = (0, 0, None)

    def read(a: int, b: int) -> Tensor:
        nonlocal last
        if not last[0] <= a < b <= last[1]:
            last = a, b, source.read(a, b)
        return last[2][:, :, a - last[0] : b - last[0]]

    return Map(source.height, read)


def activate(norm: nn.GroupNorm, source: Map, rows: int) -> Map:
    """silu(norm(x)), its statistics taken over the whole map."""
    mean, variance = statistics(source, norm.num_groups, rows)
    scale = norm.weight / (variance + norm.eps).sqrt()
    shift = norm.bias - mean * scale  # (batch, C), both

    def read(a: int, b: int) -> Tensor:
        x = source.read(a, b)
        return silu((x * scale[:, :, None, None]).add_(shift[:, :, None, None]), inplace=True).to(x.dtype)

    return Map(source.height, read)


def statistics(source: Map, groups: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel's group over the whole map, both (batch, C), fp32.

    Those of a strip's channels are put together: the variance is the mean one, and that of the means.
    """
    weights, means, variances = [], [], []
    for a, b, strip in source.strips(rows):
        mean = strip.float().mean((2, 3), keepdim=True)
        weights.append((b - a) / source.height)
        means.append(mean.flatten(1))
        variances.append((strip - mean).square_().mean((2, 3)))
    per_group = mean.shape[1] // groups
    weight = torch.tensor(weights, device=mean.device)[:, None, None, None] / per_group
    # (strips, batch, groups, C / groups), both:
    m, v = (torch.stack(x).unflatten(2, (groups, -1)) for x in (means, variances))
    mean = (weight * m).sum((0, 3), keepdim=True)
    variance = (weight * (v + (m - mean) ** 2)).sum((0, 3))
    return mean[0, :, :, 0].repeat_interleave(per_group, 1), variance.repeat_interleave(per_group, 1)


def conv3x3(layer: nn.Conv2d, source: Map) -> Map:
    """A row more is read on each side, except at the edges of the picture, where the layer's zeros belong."""

    def read(a: int, b: int) -> Tensor:
        top, bottom = max(a - 1, 0), min(b + 1, source.height)
        return layer(source.read(top, bottom))[:, :, a - top : b - top]

    return Map(source.height, read)


def enlarge(layer: nn.Module, source: Map) -> Map:
    def read(a: int, b: int) -> Tensor:
        top, bottom = max(a - 1, 0) // 2, min(b // 2 + 1, source.height)
        return layer(source.read(top, bottom))[:, :, a - 2 * top : b - 2 * top]

    return Map(2 * source.height, read)


def halve(layer: nn.Module, source: Map) -> Map:
    return Map(source.height // 2, lambda a, b: layer(source.read(2 * a, min(2 * b + 1, source.height))))
