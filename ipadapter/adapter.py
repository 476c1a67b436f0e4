"""The adapter as an object: an image projection, and one pair (W_k', W_v') per cross-attention layer.

Its `state_dict` has exactly the keys of the released files: `image_proj.*` and
`ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight`.
"""

import torch
from torch import Tensor, nn

from ipadapter.attention import DecoupledCrossAttention, ImageKeyValue
from ipadapter.projection import ImageProjection, PatchProjection, Resampler

Projection = ImageProjection | PatchProjection | Resampler


class IPAdapter(nn.Module):
    """Image prompts for a UNet whose cross-attention layers are `DecoupledCrossAttention`.

    Args:
        image_proj: `ImageProjection` (the base and light adapters), `Resampler` (plus) or `PatchProjection` (full-face).
        shapes: (dim, context_dim) of each cross-attention layer, in the order of `UNet.cross_attentions`.
    """

    def __init__(self, image_proj: Projection, shapes: list[tuple[int, int]]):
        super().__init__()
        self.image_proj = image_proj
        # Even numbers belong to the self-attentions in the published numbering.
        self.ip_adapter = nn.ModuleDict({str(2 * i + 1): ImageKeyValue(*shape) for i, shape in enumerate(shapes)})

    @classmethod
    def for_unet(cls, unet: nn.Module, image_proj: Projection) -> "IPAdapter":
        """A new adapter that starts as the paper's does: each W_k' and W_v' a copy of the layer's W_k and W_v."""
        layers: list[DecoupledCrossAttention] = list(unet.cross_attentions())
        adapter = cls(image_proj, [(layer.to_k.out_features, layer.to_k.in_features) for layer in layers])
        for layer, ip in zip(layers, adapter.ip_adapter.values(), strict=True):
            ip.to_k_ip.weight.data.copy_(layer.to_k.weight.data)
            ip.to_v_ip.weight.data.copy_(layer.to_v.weight.data)
        return adapter

    def attach(self, unet: nn.Module) -> int:
        """Lend the layers their W_k' and W_v'; returns the number to put into `ImagePrompt.adapter`."""
        layers = list(unet.cross_attentions())
        for layer, ip in zip(layers, self.ip_adapter.values(), strict=True):
            layer.adapters.append(ip)
        return len(layers[0].adapters) - 1

    def detach(self, unet: nn.Module) -> None:
        """Take them back; the UNet is then what it was."""
        for layer, ip in zip(unet.cross_attentions(), self.ip_adapter.values(), strict=True):
            layer.adapters.remove(ip)

    def tokens(self, clip_image: nn.Module, pixels: Tensor) -> Tensor:
        """Tokens of one image prompt made of one or more pictures.

        pixels (pictures, 3, 224, 224), preprocessed -> (1, pictures * num_tokens, context_dim)
        """
        return self.image_proj(image_features(clip_image, pixels, self.image_proj.patches).to(self.dtype)).flatten(
            0, 1
        )[None]

    def null_tokens(self, clip_image: nn.Module, pixels: Tensor) -> Tensor:
        """Tokens of the absent image prompt, same shape as `tokens(clip_image, pixels)`."""
        return self.image_proj(null_features(clip_image, pixels, self.image_proj.patches).to(self.dtype)).flatten(0, 1)[
            None
        ]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.image_proj.parameters()).dtype


def image_features(clip_image: nn.Module, pixels: Tensor, patches: bool) -> Tensor:
    """What an adapter reads of the image tower: the global embedding, or all patches of the penultimate layer.

    pixels (pictures, 3, 224, 224), preprocessed -> (pictures, width) or (pictures, 1 + patches, width)
    """
    return clip_image.penultimate(pixels) if patches else clip_image(pixels)


def null_features(clip_image: nn.Module, pixels: Tensor, patches: bool) -> Tensor:
    """The features of "no image", same shape as `image_features(clip_image, pixels, patches)`.

    A global embedding is absent as zeros; patches are those of a picture of zeros behind the normalisation.
    """
    if patches:
        return clip_image.penultimate(torch.zeros_like(pixels))
    return torch.zeros(len(pixels), clip_image.config.projection, dtype=pixels.dtype, device=pixels.device)
