"""ControlNet (arXiv 2302.05543): a second encoder of the UNet reads a hint and adds to the UNet's skips.

Attribute names are those of the original files (cldm.py; the Union's are xinsir's, misspelling included), so a file
loads with `load_state_dict(strict=True)`.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from control.residual import LoneToken
from ipadapter import Prompt, number
from unet import Added, Encoder, UNetConfig, skip_channels
from unet.unet import timestep_embedding

HINT = (3, 16, 32, 96, 256)  # channels of the hint encoder: of the picture, then at 1, 1/2, 1/4 and 1/8 of its size


class ControlNet(Encoder):
    """An encoder with a hint encoder before it, and a convolution behind each of its outputs that starts at zero.

    Args:
        config: of the encoder; `up` and `out_channels` count for nothing.
        hint: channels of the hint encoder.
    """

    def __init__(self, config: UNetConfig, hint: tuple[int, ...] = HINT):
        super().__init__(config)
        self.input_hint_block = hint_encoder(hint, config.channels[0])
        self.zero_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(ch, ch, 1)) for ch in skip_channels(config))
        self.middle_block_out = nn.Sequential(nn.Conv2d(config.channels[-1], config.channels[-1], 1))
        number(self.cross_attentions())

    def encode(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """A hint (batch, 3, H, W) in [0, 1] -> (batch, width, H/8, W/8), the same at every step."""
        return (self.input_hint_block(pixels),)

    def forward(self, x: Tensor, t: Tensor, prompt: Prompt, hint: Tensor, told: Tensor | float = 0) -> Added:
        """x, t and prompt as for the `UNet`; what follows is as `encode` gives it, each (1 or batch, ...)."""
        emb = self.embed(x, t, prompt) + told
        x = self.input_blocks[0][0](x) + hint
        found = [x]
        for block in self.input_blocks[1:]:
            for layer in block:
                x = layer(x, emb, prompt)
            found.append(x)
        for layer in self.middle_block:
            x = layer(x, emb, prompt)
        outputs = [conv(skip) for conv, skip in zip(self.zero_convs, found, strict=True)]
        return Added(skips=dict(enumerate([*outputs, self.middle_block_out(x)])))


class ControlNetUnion(ControlNet):
    """One ControlNet for hints of several types (xinsir's "Union", of 6 types, and "ProMax", of 8).

    It is told the type in two ways: beside the timestep, and by what it adds to the hint's channels. For that one block
    attends from the mean of the hint's features to themselves: a sequence of one token, of which attention gives the
    value. (The published code has tokens and batch the wrong way round; so it was trained, and this is what it does.)

    Args:
        tasks: how many types; `TASKS` has their names.
        sinusoids: that stand for each type's flag.
    """

    def __init__(self, config: UNetConfig, tasks: int, hint: tuple[int, ...] = HINT, sinusoids: int = 256):
        super().__init__(config, hint)
        width, self.sinusoids = config.channels[0], sinusoids
        self.task_embedding = nn.Parameter(torch.zeros(tasks, width))
        self.transformer_layes = nn.Sequential(LoneToken(width, 1))
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(tasks * sinusoids, 4 * width), "linear_2": nn.Linear(4 * width, 4 * width)}
        )

    def encode(self, pixels: Tensor, *tasks: int, scales: Sequence[float] = (1.0,)) -> tuple[Tensor, ...]:
        """Of a hint, or of several that are followed together, each (1 or batch, 3, H, W), behind one another in `pixels`.

        Args:
            tasks: the type of each, 0, 1, ...
            scales: how far to follow each.

        Returns:
            As a ControlNet's, and what is added to the timestep's embedding, (1, 4 * width).
        """
        features = sum(
            self.typed(one, task, scale)
            for one, task, scale in zip(pixels.chunk(len(tasks)), tasks, scales, strict=True)
        )
        flags = torch.zeros(len(self.task_embedding), device=pixels.device)
        flags[list(tasks)] = 1
        told = timestep_embedding(flags, self.sinusoids).flatten()[None].to(features)
        told = self.control_add_embedding["linear_2"](silu(self.control_add_embedding["linear_1"](told)))
        return features, told

    def typed(self, pixels: Tensor, task: int, scale: float) -> Tensor:
        """Features of a hint of this type, (batch, width, H/8, W/8)."""
        features = self.input_hint_block(pixels)
        token = self.transformer_layes(scale * (features.mean(dim=(2, 3)) + self.task_embedding[task]))
        return scale * (features + self.spatial_ch_projs(token)[:, :, None, None])


def hint_encoder(widths: tuple[int, ...], out: int) -> nn.Sequential:
    """From a picture to features at 1/8 of its size: pairs of convolutions, the second of each pair halves."""
    layers = [nn.Conv2d(widths[0], widths[1], 3, padding=1)]
    for narrow, wide in pairwise(widths[1:]):
        layers += [nn.SiLU(), nn.Conv2d(narrow, narrow, 3, padding=1)]
        layers += [nn.SiLU(), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(widths[-1], out, 3, padding=1))
