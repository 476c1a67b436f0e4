"""The training objective (arXiv 2308.06721, section 3.2.3): the noise prediction of Stable Diffusion, with drops."""

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ipadapter.attention import ImagePrompt, Prompt


def drops(u: Tensor, text: float = 0.05, image: float = 0.05, both: float = 0.05) -> tuple[Tensor, Tensor]:
    """Which samples lose their text and which their image prompt, from one uniform draw each.

    u (batch,) in [0, 1) -> two (batch,) bools: drop the text, drop the image.
    """
    drop_image = (u < image) | ((u >= image + text) & (u < image + text + both))
    drop_text = (u >= image) & (u < image + text + both)
    return drop_text, drop_image


def adapter_loss(unet: nn.Module, noisy: Tensor, noise: Tensor, t: Tensor, text: Tensor, tokens: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, the one term of the paper's objective (equation 6).

    Args:
        noisy, noise: (batch, 4, H/8, W/8); t: (batch,) in 0..999.
        text: (batch, 77, context_dim); tokens: (batch, num_tokens, context_dim) of the adapter attached to the UNet.
    """
    eps = unet(noisy, t, Prompt(text, (ImagePrompt(tokens),)))
    return mse_loss(eps.float(), noise.float())
