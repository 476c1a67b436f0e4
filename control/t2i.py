"""T2I-Adapter (arXiv 2302.08453): a small network of its own reads a hint and adds to the UNet's way down.

Attribute names are those of the original files (TencentARC, adapter.py).
"""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from ipadapter import Prompt
from unet import Added


@dataclass(frozen=True)
class T2IConfig:
    """Shape of a T2I-Adapter; all of it can be read from a file's tensors."""

    hint_channels: int  # 3, or 1 for sketches and edges
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of its four features
    light: bool = False  # narrower blocks, and none before the first
    shrink: int = 8  # of the hint by PixelUnshuffle; SDXL's: 16
    pooled: tuple[int, ...] = (1, 2, 3)  # the levels that begin by halving; SDXL's: (2,)
    # The input blocks of the UNet behind which the features are added; SDXL's: (3, 5, 8, 9), 9 being the middle.
    blocks: tuple[int, ...] = (2, 5, 8, 11)
    kernel: int = 1  # of the second convolution of a block
    strided: bool = False  # halved by a convolution, as in the first releases, not by a mean

    @property
    def multiple(self) -> int:
        """Of this many pixels the sides of a picture must be."""
        return self.shrink * 2 ** len(self.pooled)


class T2IAdapter(nn.Module):
    def __init__(self, config: T2IConfig):
        super().__init__()
        self.config = config
        before, ch = config.hint_channels * config.shrink**2, config.channels[0]
        self.body = nn.ModuleList()
        if not config.light:
            self.conv_in = nn.Conv2d(before, ch, 3, padding=1)
            before = ch
        for level, ch in enumerate(config.channels):
            if config.light:
                self.body.append(LightBlock(before, ch))
            else:
                halves = config.strided and level in config.pooled
                self.body += [Block(before, ch, config.kernel, halves), Block(ch, ch, config.kernel)]
            before = ch

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """A hint (batch, 1 or 3, H, W) in [0, 1], sides multiples of `config.multiple` -> four features, finest first."""
        x = nn.functional.pixel_unshuffle(pixels, self.config.shrink)
        x = x if self.config.light else self.conv_in(x)
        per_level, found = len(self.body) // len(self.config.channels), []
        for i, block in enumerate(self.body):
            level, first = divmod(i, per_level)
            if level in self.config.pooled and not first and not self.config.strided:
                x = avg_pool2d(x, 2)
            x = block(x)
            found.append(x)
        return tuple(found[per_level - 1 :: per_level])

    def forward(self, x: Tensor, t: Tensor, prompt: Prompt, *features: Tensor) -> Added:
        """Called as a ControlNet; what it adds is the same at every step."""
        return Added(features=dict(zip(self.config.blocks, features, strict=True)))


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, halves: bool = False):
        super().__init__()
        self.down_opt = nn.Sequential()
        if halves:
            self.down_opt = nn.Sequential(OrderedDict(op=nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1)))
        same = in_channels == out_channels
        self.in_conv = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.block1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.block2 = nn.Conv2d(out_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_conv(self.down_opt(x))
        return x + self.block2(relu(self.block1(x)))


class LightBlock(nn.Module):
    """Four blocks at a quarter of the width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_conv = nn.Conv2d(in_channels, out_channels // 4, 1)
        self.body = nn.Sequential(*(Block(out_channels // 4, out_channels // 4, 3) for _ in range(4)))
        self.out_conv = nn.Conv2d(out_channels // 4, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.body(self.in_conv(x)))
