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
    unet: nn.Module, noisy: Tensor, target: Tensor, t: Tensor, prompt: Prompt, weight: Tensor | float = 1.0
) -> Tensor:
    """Mean squared error of what the model predicts, the one term of the paper's objective (equation 6).

    Args:
        noisy, target: (batch, 4, H/8, W/8), the latents and what is to be predicted of them: their noise, or v; t:
            (batch,) in 0..999.
        prompt: the samples' texts and image prompts, those as `IPAdapter.prompt` makes them.
        weight: of each sample, (batch,); in the paper they are all 1.
    """
    return noise_loss(unet(noisy, t, prompt), target, weight)


def noise_loss(found: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean squared error of predicted noise, or v, (batch, 4, H/8, W/8), each sample with its weight (batch,)."""
    errors = mse_loss(found.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    return (weight * errors).mean()


class Objective(nn.Module):
    """The loss of a batch as a module, of which only the adapter is a part: nothing else has gradients to exchange.

    Args:
        dtype: in which the UNet computes, by autocast. The image projection computes in fp32 (in fp16 a Resampler
            overflows).
        structure_scale: asks for version 2 of FaceID-plus, as in `FacePlusProjection`.
    """

    def __init__(self, adapter: IPAdapter, unet: nn.Module, dtype: torch.dtype, structure_scale: float | None = None):
        super().__init__()
        self.adapter = adapter
        self.frozen = [unet]  # in a list: not a submodule
        self.dtype = dtype
        self.structure_scale = structure_scale

    def forward(
        self,
        noisy: Tensor,
        target: Tensor,
        t: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        face: Tensor | None = None,
        vector: Tensor | None = None,
        weight: Tensor | float = 1.0,
    ) -> Tensor:
        """As `adapter_loss`, of what `prompt` takes."""
        with self.autocast(noisy.device):
            return adapter_loss(self.frozen[0], noisy, target, t, self.prompt(text, image, face, vector), weight)

    def prompt(
        self,
        text: Tensor,
        image: Tensor | None = None,
        face: Tensor | None = None,
        vector: Tensor | None = None,
        scale: float = 1.0,
    ) -> Prompt:
        """Of a batch: each row with an image prompt of its own.

        Args:
            text: (batch, 77, context_dim).
            image: features of the image tower, (batch, width) or (batch, 1 + patches, width), where the adapter reads them.
            face: (batch, 512), of length 1, where it reads faces.
            vector: as in `Prompt`.
        """
        with torch.autocast(text.device.type, enabled=False):
            tokens = self.adapter.project(face, image, self.structure_scale)
        with self.autocast(text.device):
            return Prompt(text, (self.adapter.prompt(tokens, scale),), vector)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Keys and values are computed as the UNet is."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
