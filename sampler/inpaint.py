"""Making a part of a picture anew: with any model, or with one that was trained for it and reads what is to stay."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ipadapter import Prompt
from sampler.guidance import Predict, Steps
from sampler.schedule import Level


def inpainted(run: Callable[..., Steps], x_0: Tensor, noise: Tensor, mask: Tensor) -> Callable[..., Steps]:
    """A sampler that after each step puts back what is to stay (Blended Latent Diffusion, arXiv 2206.02779, algorithm 1).

    Args:
        run: the sampler.
        x_0: the picture's latents (batch, 4, h, w), which come back as they are where the mask is 0.
        noise: like x_0; with it the picture is brought to the noise level that a step ends at, with the same at each.
        mask: (1 or batch, 1, h, w), from 0, which stays, to 1, which is made anew.
    """

    def blended(
        predict: Predict, x: Tensor, levels: Sequence[Level], generators: Sequence[torch.Generator] | None = None
    ) -> Steps:
        steps, x = run(predict, x, levels, generators), None
        for after in (*levels[1:-1], None):
            x = mask * steps.send(x) + (1 - mask) * (after.noised(x_0, noise) if after else x_0)
            yield x

    return blended


def widened(unet: Callable[[Tensor, Tensor, Prompt], Tensor]) -> Callable[[Tensor, Tensor, Prompt], Tensor]:
    """A UNet of more input channels, called like any other: it reads what its prompt has `beside` x."""

    def wide(x: Tensor, t: Tensor, prompt: Prompt, **more: object) -> Tensor:
        return unet(torch.cat([x, prompt.beside.to(x)], dim=1), t, prompt, **more)

    wide.config = getattr(unet, "config", None)  # of which `guided` asks whether it is told the scale
    return wide
