"""The training objective (arXiv 2308.06721, section 3.2.3): the noise prediction of Stable Diffusion, with drops."""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ipadapter.adapter import IPAdapter
from ipadapter.prompt import Prompt


def drops(u: Tensor, text: float = 0.05, image: float = 0.05, both: float = 0.05) -> tuple[Tensor, Tensor]:
    """Which samples lose their text and which their image prompt, from one uniform draw each.

    u (batch,) in [0, 1) -> two (batch,) bools: drop the text, drop the image.
    """
    drop_image = (u < image) | ((u >= image + text) & (u < image + text + both))
    drop_text = (u >= image) & (u < image + text + both)
    return drop_text, drop_image


def adapter_loss(
    unet: nn.Module, noisy: Tensor, noise: Tensor, t: Tensor, prompt: Prompt, weight: Tensor | float = 1.0
) -> Tensor:
    """Mean squared error of the predicted noise, the one term of the paper's objective (equation 6).

    Args:
        noisy, noise: (batch, 4, H/8, W/8); t: (batch,) in 0..999.
        prompt: the samples' texts and image prompts, those as `IPAdapter.prompt` makes them.
        weight: of each sample, (batch,); in the paper they are all 1.
    """
    return noise_loss(unet(noisy, t, prompt), noise, weight)


def noise_loss(eps: Tensor, noise: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean squared error of predicted noise (batch, 4, H/8, W/8), each sample with its weight (batch,)."""
    errors = mse_loss(eps.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    return (weight * errors).mean()


class Objective(nn.Module):
    """The loss of a batch as a module, of which only the adapter is a part: nothing else has gradients to exchange.

    Args:
        dtype: in which the UNet computes, by autocast. The image projection computes in fp32 (in fp16 a Resampler
            overflows).
    """

    def __init__(self, adapter: IPAdapter, unet: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.adapter = adapter
        self.frozen = [unet]  # in a list: not a submodule
        self.dtype = dtype

    def forward(
        self, noisy: Tensor, noise: Tensor, t: Tensor, text: Tensor, image: Tensor, weight: Tensor | float = 1.0
    ) -> Tensor:
        """As `adapter_loss`; text (batch, 77, context_dim), image: CLIP features of the image prompts (batch, ...)."""
        tokens = self.adapter.image_proj(image.float())
        with torch.autocast(noisy.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return adapter_loss(self.frozen[0], noisy, noise, t, Prompt(text, (self.adapter.prompt(tokens),)), weight)
