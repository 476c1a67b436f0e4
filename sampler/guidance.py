"""Classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ipadapter.attention import Prompt
from sampler.schedule import eps_from_v

Eps = Callable[[Tensor, Tensor], Tensor]  # x (batch, 4, h, w) of unit variance, t () -> the noise in x


def guided(
    unet: torch.nn.Module,
    prompt: Prompt,
    null: Prompt,
    guidance_scale: float,
    prediction: str = "eps",
    apart: bool = False,
) -> Eps:
    """The noise prediction that a sampler follows, eps(x, t) in fp32.

    Both prompts go through the UNet as one batch; at a guidance scale of 1 the unconditional one is not needed.
    Where t lies between two timesteps the UNet is told the nearest.

    Args:
        prompt, null: what the picture should be, and what it should not (the unconditional or negative prompt).
        guidance_scale: 1 follows the prompt as trained, larger values exaggerate it.
        prediction: what the UNet was trained to predict, "eps" or "v" (Stable Diffusion 2.x at 768 pixels).
        apart: the two prompts one after the other, in less memory and more time.
    """
    if prediction == "v":  # guidance is linear: to guide v is to guide eps
        v = guided(unet, prompt, null, guidance_scale, apart=apart)
        return lambda x, t: eps_from_v(v(x, t), x, t)
    if prediction != "eps":
        raise ValueError(f"prediction: {prediction!r} given, 'eps' or 'v' allowed")
    dtype = next(unet.parameters()).dtype
    if guidance_scale == 1:
        return lambda x, t: unet(x.to(dtype), t.round(), prompt).float()
    if apart:
        toward, away = guided(unet, prompt, null, 1), guided(unet, null, null, 1)
        return lambda x, t: guidance_scale * toward(x, t) + (1 - guidance_scale) * away(x, t)
    both = Prompt.cat([null, prompt])

    def eps(x: Tensor, t: Tensor) -> Tensor:
        eps_null, eps_prompt = unet(torch.cat([x, x]).to(dtype), t.round(), both).float().chunk(2)
        return eps_null + guidance_scale * (eps_prompt - eps_null)

    return eps
