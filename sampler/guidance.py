"""What the model believes of a noisy latent, under classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ipadapter.attention import Prompt
from sampler.schedule import Level, check

# x (batch, 4, h, w) of unit variance, at a noise level -> (eps, x_0), the noise in x and the picture, like x in fp32
Predict = Callable[[Tensor, Level], tuple[Tensor, Tensor]]


def guided(
    unet: Callable[[Tensor, Tensor, Prompt], Tensor],
    prompt: Prompt,
    null: Prompt,
    guidance_scale: float,
    prediction: str = "eps",
    apart: bool = False,
) -> Predict:
    """The prediction that a sampler follows: predict(x, level) -> (eps, x_0).

    Both prompts go through the UNet as one batch; at a guidance scale of 1 the unconditional one is not needed.

    Args:
        unet: a `UNet`, or whatever is called like one: unet(x, t, prompt); it computes in the prompt's dtype.
        prompt, null: what the picture should be, and what it should not (the unconditional or negative prompt).
        guidance_scale: 1 follows the prompt as trained, larger values exaggerate it.
        prediction: what the UNet was trained to predict, "eps" or "v" (Stable Diffusion 2.x at 768 pixels).
        apart: the two prompts one after the other, in less memory and more time.
    """
    check("prediction", prediction, ("eps", "v"))
    if getattr(getattr(unet, "config", None), "guidance_dim", None):  # it is told the scale, and needs no second pass
        unet, guidance_scale = partial(unet, guidance_scale=guidance_scale), 1
    dtype = prompt.dtype
    both = None if apart or guidance_scale == 1 else Prompt.cat([null, prompt])

    def predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        t, rows = torch.tensor(level.t, device=x.device), x.to(dtype)
        wanted, unwanted, stacked = (one and replace(one, step=level.step) for one in (prompt, null, both))
        if guidance_scale == 1:
            output = unet(rows, t, wanted).float()
        else:
            if stacked is None:
                away, toward = unet(rows, t, unwanted).float(), unet(rows, t, wanted).float()
            else:
                away, toward = unet(torch.cat([rows, rows]), t, stacked).float().chunk(2)
            output = away + guidance_scale * (toward - away)
        return eps_and_x_0(output, x, level, prediction)

    return predict


def eps_and_x_0(output: Tensor, x: Tensor, level: Level, prediction: str) -> tuple[Tensor, Tensor]:
    """The two parts of x = signal x_0 + noise eps, out of either of them or of v = signal eps - noise x_0."""
    signal, noise = level.alpha**0.5, (1 - level.alpha) ** 0.5
    if prediction == "v":
        return signal * output + noise * x, signal * x - noise * output
    return output, (x - noise * output) / signal
