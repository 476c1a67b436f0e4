"""A UNet that follows hints: what the nets make of them is summed and added inside it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from control.controlnet import ControlNet
from control.style import StyleAdapter
from control.t2i import T2IAdapter
from ipadapter import Prompt, number
from ipadapter.scale import within
from unet import Added, UNet


@dataclass(frozen=True)
class Control:
    """One net with its hint: how far, when and where it is followed.

    Args:
        hint: what `net.encode` made of the picture, (1 or batch, ...) each.
        scale: what its outputs are multiplied by; of a style adapter the tokens that it `joined` to the text.
        start, until: the net acts in step i of N where start <= i / N and (i + 1) / N <= until.
        mask: (1, 1, H, W) in [0, 1] at any resolution, where it acts; None: everywhere.
        guess: it acts on the prompt and not on its absence, and more weakly the finer the skip: from 0.1 at the finest
            to 1 in the middle (arXiv 2302.05543, section 3.4; the numbers are diffusers').
        pool: each output is its mean over the picture, on the prompt alone (ControlNets for shuffled pictures).
    """

    net: ControlNet | T2IAdapter | StyleAdapter
    hint: Sequence[Tensor]
    scale: float = 1.0
    start: float = 0.0
    until: float = 1.0
    mask: Tensor | None = None
    guess: bool = False
    pool: bool = False

    def acts(self, step: tuple[int, int]) -> bool:
        return self.scale != 0 and within(step, self.start, self.until)

    @property
    def joins(self) -> bool:
        """Whether it adds tokens to the text."""
        return isinstance(self.net, StyleAdapter) and self.scale != 0


def controlled(unet: UNet, controls: Sequence[Control]) -> Callable[..., Tensor]:
    """A UNet that follows the hints, called like one: `guided(controlled(unet, controls), ...)`.

    The nets hear the text and the vector of a prompt, never its image prompts.
    """
    number(attentions(unet, controls))
    nets = [control for control in controls if not isinstance(control.net, StyleAdapter)]
    styles = [control for control in controls if control.joins]

    def forward(x: Tensor, t: Tensor, prompt: Prompt, guidance_scale: float | None = None) -> Tensor:
        acting = [control for control in nets if control.acts(prompt.step)]
        prompt = prompt if all(style.acts(prompt.step) for style in styles) else left(prompt, styles)
        found = [added(control, x, t, prompt) for control in acting]
        return unet(x, t, prompt, guidance_scale=guidance_scale, added=total(found) if found else None)

    forward.config = unet.config
    return forward


def attentions(unet: UNet, controls: Sequence[Control]) -> Iterator[nn.Module]:
    """The cross-attentions of the UNet, in the order of an adapter's keys, and behind them those of each net.

    In this order a prompt for them all is `prepared`.
    """
    yield from unet.cross_attentions()
    for net in dict.fromkeys(control.net for control in controls if isinstance(control.net, ControlNet)):
        yield from net.cross_attentions()


def joined(prompt: Prompt, null: Prompt, controls: Sequence[Control]) -> tuple[Prompt, Prompt]:
    """A prompt with what style adapters make of their pictures behind its text, and its absence as long.

    There the text's own last tokens stand a second time, as in TencentARC's sampler.
    """
    tokens = [control.scale * control.hint[0] for control in controls if control.joins]
    if not tokens:
        return prompt, null
    more = torch.cat(tokens, dim=1).expand(len(prompt.text), -1, -1).to(prompt.text)
    texts = torch.cat([prompt.text, more], dim=1), torch.cat([null.text, null.text[:, -more.shape[1] :]], dim=1)
    return replace(prompt, text=texts[0]), replace(null, text=texts[1])


def left(prompt: Prompt, styles: Sequence[Control]) -> Prompt:
    """A prompt without the tokens of those that do not act at this step; both halves of the guidance as long."""
    acting = [style.acts(prompt.step) for style in styles for _ in range(style.hint[0].shape[1])]

    def cut(x: Tensor) -> Tensor:
        return x[:, [*range(x.shape[1] - len(acting)), *(i - len(acting) for i, acts in enumerate(acting) if acts)]]

    text = prompt.text
    return replace(prompt, text=cut(text) if isinstance(text, Tensor) else [(cut(k), cut(v)) for k, v in text])


def added(control: Control, x: Tensor, t: Tensor, prompt: Prompt) -> Added:
    """What one control adds at this step, scaled and masked."""
    x, prompt = x[:, :4], replace(prompt, images=())  # an inpainting UNet's further channels are not the net's
    heeding, count = None, len(x)
    if (control.guess or control.pool) and any(prompt.absent):
        heeding = [row for row, absent in enumerate(prompt.absent) if not absent]
        if not heeding:
            return Added()
        x, prompt = x[heeding], of_rows(prompt, heeding)
    found = control.net(x, t, prompt, *control.hint)
    skips = {}
    for i, output in found.skips.items():
        fade = 10 ** (i / (len(found.skips) - 1) - 1) if control.guess and not control.pool else 1
        size, output = output.shape[2:], output * (control.scale * fade)
        output = output.mean(dim=(2, 3), keepdim=True) if control.pool else output
        output = masked(output, control.mask, size)
        if heeding is not None:
            part, output = output, output.new_zeros(count, *output.shape[1:])
            output[heeding] = part
        skips[i] = output
    features = {
        i: masked(control.scale * output, control.mask, output.shape[2:]) for i, output in found.features.items()
    }
    return Added(skips, features)


def masked(output: Tensor, mask: Tensor | None, size: Sequence[int]) -> Tensor:
    return output if mask is None else output * interpolate(mask, size=tuple(size), mode="area").to(output)


def of_rows(prompt: Prompt, rows: list[int]) -> Prompt:
    """Some rows of a prompt without images."""
    text, vector = prompt.text, prompt.vector
    text = text[rows] if isinstance(text, Tensor) else [(k[rows], v[rows]) for k, v in text]
    return replace(prompt, text=text, vector=None if vector is None else vector[rows], absent=())


def total(parts: Sequence[Added]) -> Added:
    def add(maps: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
        return {i: sum(one[i] for one in maps if i in one) for i in dict.fromkeys(i for one in maps for i in one)}

    return Added(add([part.skips for part in parts]), add([part.features for part in parts]))
