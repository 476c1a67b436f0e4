"""What the model believes of a noisy latent, under classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ipadapter import Prompt
from sampler.schedule import Level, check

# x (batch, 4, h, w) of unit variance, at a noise level -> (eps, x_0), the noise in x and the picture, like x in fp32
Predict = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
# The latents after each step; what is sent in their place is gone on from.
Steps = Generator[Tensor, Tensor | None, None]


def guided(
    unet: Callable[[Tensor, Tensor, Prompt], Tensor],  # unet(x, t, prompt); it computes in the prompt's dtype
    prompt: Prompt,  # what the picture should be
    null: Prompt,  # and what it should not: the unconditional or negative prompt
    guidance_scale: float,  # 1 follows the prompt as trained, larger values exaggerate it
    prediction: str = "eps",  # what the UNet was trained to predict, or "v" (Stable Diffusion 2.x at 768 pixels)
    apart: bool = False,  # the prompts one after the other, in less memory and more time
    rescale: float = 0.0,  # how far the result's spread is brought back to the prompt's own (arXiv 2305.08891, 3.4)
    middle: Prompt | None = None,  # a half of the prompt, such as the image alone, to be followed by itself
    middle_scale: float = 1.0,  # how far
) -> Predict:
    """The prediction that a sampler follows: predict(x, level) -> (eps, x_0).

    All prompts go through the UNet as one batch; at a guidance scale of 1 the unconditional one is not needed. With a
    middle, a third pass, `guidance_scale` is for what the whole prompt has besides (InstructPix2Pix, arXiv 2211.09800,
    equation 3): null + middle_scale (middle - null) + guidance_scale (prompt - middle).
    """
    check("prediction", prediction, ("eps", "v"))
    chain, scales = [null, prompt], [guidance_scale]
    if middle and middle_scale != guidance_scale:  # followed alike they are one
        chain, scales = [null, middle, prompt], [middle_scale, guidance_scale]
    if getattr(getattr(unet, "config", None), "guidance_dim", None):  # it is told the scale, and needs no second pass
        unet, scales = partial(unet, guidance_scale=guidance_scale), []
    if set(scales) <= {1}:
        chain, scales = [prompt], []
    if scales:  # for what acts on the prompt alone
        chain[0] = replace(null, absent=(True,) * null.rows)
    dtype, count = prompt.dtype, len(chain)
    parts = [(one, 1) for one in chain] if apart or count == 1 else [(Prompt.cat(chain), count)]

    def predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        t, rows, outputs = torch.tensor(level.t, device=x.device), x.to(dtype), []
        for part, count in parts:
            outputs += unet(torch.cat([rows] * count), t, replace(part, step=level.step)).float().chunk(count)
        output = outputs[0]
        for scale, away, toward in zip(scales, outputs, outputs[1:], strict=False):
            output = output + scale * (toward - away)
        if rescale and scales:
            output = rescaled(output, outputs[-1], rescale)
        return eps_and_x_0(output, x, level, prediction)

    return predict


def rescaled(output: Tensor, plain: Tensor, share: float) -> Tensor:
    """Guidance makes pictures harsh: the result with, to this share, the spread of what the prompt alone says.

    Args:
        output, plain: what the UNet says with and without guidance, (batch, 4, h, w); each picture has its own spread.
    """
    spread, wanted = (e.std(dim=(1, 2, 3), keepdim=True) for e in (output, plain))
    return share * (output * (wanted / spread)) + (1 - share) * output


def eps_and_x_0(output: Tensor, x: Tensor, level: Level, prediction: str) -> tuple[Tensor, Tensor]:
    """The two parts of x = signal x_0 + noise eps, out of either of them or of v = signal eps - noise x_0."""
    signal, noise = level.alpha**0.5, (1 - level.alpha) ** 0.5
    if prediction == "v":
        return signal * output + noise * x, signal * x - noise * output
    return output, (x - noise * output) / signal
