"""Classifier-free guidance (arXiv 2207.12598)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ipadapter.attention import Prompt

Eps = Callable[[Tensor, Tensor], Tensor]


def guided(unet: torch.nn.Module, prompt: Prompt, null: Prompt, guidance_scale: float) -> Eps:
    """The noise prediction that a sampler follows, eps(x, t) in fp32.

    Both prompts go through the UNet as one batch; at a guidance scale of 1 the unconditional one is not needed.

    Args:
        prompt, null: what the picture should be, and what it should not (the unconditional or negative prompt).
        guidance_scale: 1 follows the prompt as trained, larger values exaggerate it.
    """
    dtype = next(unet.parameters()).dtype
    if guidance_scale == 1:
        return lambda x, t: unet(x.to(dtype), t, prompt).float()
    both = Prompt.cat([null, prompt])

    def eps(x: Tensor, t: Tensor) -> Tensor:
        eps_null, eps_prompt = unet(torch.cat([x, x]).to(dtype), t, both).float().chunk(2)
        return eps_null + guidance_scale * (eps_prompt - eps_null)

    return eps
