"""The adapter as an object: an image projection, and one pair (W_k', W_v') per cross-attention layer.

Its `state_dict` has exactly the keys of the released files: `image_proj.*` and
`ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight`; FaceID adapters also have `ip_adapter.{0,1,2,...}.to_{q,k,v,out}_lora.*`.
"""

import torch
from torch import Tensor, nn

from ipadapter.attention import DecoupledCrossAttention, ImageKeyValue
from ipadapter.projection import FacePlusProjection, FaceProjection, ImageProjection, PatchProjection, Resampler

Projection = ImageProjection | PatchProjection | Resampler | FaceProjection | FacePlusProjection


class IPAdapter(nn.Module):
    """Image prompts for a UNet whose cross-attention layers are `DecoupledCrossAttention`.

    Args:
        image_proj: `ImageProjection` (the base and light adapters), `Resampler` (plus), `PatchProjection` (full-face),
            `FaceProjection` (FaceID, portrait) or `FacePlusProjection` (FaceID-plus).
        shapes: (dim, context_dim) of each cross-attention layer, in the order of `UNet.cross_attentions`.
        lora_rank: of the changes to the UNet's own attention that FaceID adapters bring along (128); 0: none.
    """

    def __init__(self, image_proj: Projection, shapes: list[tuple[int, int]], lora_rank: int = 0):
        super().__init__()
        self.image_proj, self.lora_rank = image_proj, lora_rank
        self.ip_adapter = nn.ModuleDict()
        for i, (dim, context_dim) in enumerate(shapes):
            if lora_rank:  # even numbers belong to the self-attentions
                self.ip_adapter[str(2 * i)] = AttentionLoRA(dim, dim, lora_rank)
                self.ip_adapter[str(2 * i + 1)] = FaceKeyValue(dim, context_dim, lora_rank)
            else:
                self.ip_adapter[str(2 * i + 1)] = ImageKeyValue(dim, context_dim)
        self.replaced: list[tuple[nn.Linear, nn.Parameter, nn.Parameter]] = []  # layer, its weight before and after

    @classmethod
    def for_unet(cls, unet: nn.Module, image_proj: Projection) -> "IPAdapter":
        """A new adapter that starts as the paper's does: each W_k' and W_v' a copy of the layer's W_k and W_v."""
        layers: list[DecoupledCrossAttention] = list(unet.cross_attentions())
        adapter = cls(image_proj, [(layer.to_k.out_features, layer.to_k.in_features) for layer in layers])
        for layer, ip in zip(layers, adapter.key_values(), strict=True):
            ip.to_k_ip.weight.data.copy_(layer.to_k.weight.data)
            ip.to_v_ip.weight.data.copy_(layer.to_v.weight.data)
        return adapter

    def key_values(self) -> list["ImageKeyValue | FaceKeyValue"]:
        """One for each cross-attention layer."""
        return [layer for number, layer in self.ip_adapter.items() if int(number) % 2]

    def attach(self, unet: nn.Module, removable: bool = True) -> int:
        """Lend the layers their W_k' and W_v'; returns the number to put into `ImagePrompt.adapter`.

        A FaceID adapter's LoRA is merged into the UNet, at no cost per step. What it replaces is kept, so that `detach`
        can put it back, unless the UNet is not to be had back.
        """
        layers = list(unet.cross_attentions())
        for layer, ip in zip(layers, self.key_values(), strict=True):
            layer.adapters.append(ip)
        if self.lora_rank:
            for layer, lora in zip(unet.attentions(), self.ip_adapter.values(), strict=True):
                replaced = lora.merge(layer)
                self.replaced += replaced if removable else []
        return len(layers[0].adapters) - 1

    def detach(self, unet: nn.Module) -> None:
        """Take them back; the UNet is then what it was. Of two adapters with LoRAs the last one comes off first.

        Raises:
            RuntimeError: another LoRA has been merged since.
        """
        if any(layer.weight is not after for layer, _, after in self.replaced):
            raise RuntimeError("another LoRA was merged after this adapter's; detach that one first")
        for layer, before, _ in self.replaced:
            layer.weight = before
        self.replaced = []
        for layer, ip in zip(unet.cross_attentions(), self.key_values(), strict=True):
            layer.adapters.remove(ip)

    def tokens(self, clip_image: nn.Module | None, pixels: Tensor | None, faces: Tensor | None = None) -> Tensor:
        """Tokens of one image prompt made of one or more pictures, or faces.

        Args:
            clip_image, pixels: the image tower and (pictures, 3, 224, 224), preprocessed; FaceID does without.
            faces: (pictures, 512), the face embeddings that FaceID adapters read; other adapters do without.

        Returns:
            (1, pictures * num_tokens, context_dim)
        """
        features = [faces] if self.image_proj.faces else []
        if self.reads_clip:
            features.append(image_features(clip_image, pixels, self.image_proj.patches))
        return self.project(features)

    def null_tokens(self, clip_image: nn.Module | None, pixels: Tensor | None, faces: Tensor | None = None) -> Tensor:
        """Tokens of the absent image prompt, same shape as `tokens(clip_image, pixels, faces)`."""
        features = [torch.zeros_like(faces)] if self.image_proj.faces else []
        if self.reads_clip:
            features.append(null_features(clip_image, pixels, self.image_proj.patches))
        return self.project(features)

    def project(self, features: list[Tensor]) -> Tensor:
        """What the image projection reads, a row for each picture -> all pictures' tokens side by side."""
        return self.image_proj(*(x.to(self.dtype) for x in features)).flatten(0, 1)[None]

    @property
    def reads_clip(self) -> bool:
        """Whether an image tower is needed: not for FaceID (but for FaceID-plus)."""
        return self.image_proj.patches or not self.image_proj.faces

    @property
    def dtype(self) -> torch.dtype:
        return next(self.image_proj.parameters()).dtype


class LowRank(nn.Module):
    """A change of a matrix, as the product of a tall and a wide one (LoRA, arXiv 2106.09685)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)


class AttentionLoRA(nn.Module):
    """Changes of an attention layer's four matrices (`LoRAAttnProcessor` of the official code, at scale 1)."""

    def __init__(self, dim: int, context_dim: int, rank: int):
        super().__init__()
        self.to_q_lora = LowRank(dim, dim, rank)
        self.to_k_lora = LowRank(context_dim, dim, rank)
        self.to_v_lora = LowRank(context_dim, dim, rank)
        self.to_out_lora = LowRank(dim, dim, rank)

    @torch.no_grad()
    def merge(self, attention: nn.Module) -> list[tuple[nn.Linear, nn.Parameter, nn.Parameter]]:
        """Add the changes to the layer; returns each Linear with its weight before and after."""
        replaced = []
        for linear, lora in (
            (attention.to_q, self.to_q_lora),
            (attention.to_k, self.to_k_lora),
            (attention.to_v, self.to_v_lora),
            (attention.to_out[0], self.to_out_lora),
        ):
            before = linear.weight
            change = lora.up.weight.float() @ lora.down.weight.float()
            linear.weight = nn.Parameter((before.float() + change).to(before.dtype), requires_grad=False)
            replaced.append((linear, before, linear.weight))
        return replaced


class FaceKeyValue(AttentionLoRA):
    """W_k' and W_v' of a cross-attention layer, as `ImageKeyValue`, beside the LoRA."""

    def __init__(self, dim: int, context_dim: int, rank: int):
        super().__init__(dim, context_dim, rank)
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)


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
