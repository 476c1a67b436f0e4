"""The adapter as an object: an image projection, and one pair (W_k', W_v') per cross-attention layer.

Its `state_dict` has exactly the keys of the released files: `image_proj.*` and
`ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight`; FaceID adapters also have `ip_adapter.{0,1,2,...}.to_{q,k,v,out}_lora.*`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ipadapter.attention import DecoupledCrossAttention
from ipadapter.low_rank import LowRank, merge
from ipadapter.projection import FacePlusProjection, FaceProjection, ImageProjection, PatchProjection, Resampler
from ipadapter.prompt import ImagePrompt
from ipadapter.scale import Scale, Weight

Projection = ImageProjection | PatchProjection | Resampler | FaceProjection | FacePlusProjection


class IPAdapter(nn.Module):
    """Image prompts for a backbone whose cross-attention layers hear them (`attention.heard`).

    Args:
        image_proj: `ImageProjection` (the base and light adapters), `Resampler` (plus), `PatchProjection` (full-face),
            `FaceProjection` (FaceID, portrait) or `FacePlusProjection` (FaceID-plus).
        shapes: (dim, context_dim) of each cross-attention layer, in the order in which they were numbered.
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

    @classmethod
    def for_unet(cls, unet: nn.Module, image_proj: Projection, lora_rank: int = 0) -> "IPAdapter":
        """A new adapter that starts as the paper's does: each W_k' and W_v' a copy of the layer's W_k and W_v.

        unet: a `UNet`, or any model whose `cross_attentions()` lists layers with `to_k` and `to_v`.
        lora_rank: of the changes to the UNet's own attention, which start as none; 0: without.
        """
        layers: list[DecoupledCrossAttention] = list(unet.cross_attentions())
        adapter = cls(image_proj, [(layer.to_k.out_features, layer.to_k.in_features) for layer in layers], lora_rank)
        for layer, ip in zip(layers, adapter.key_values(), strict=True):
            ip.to_k_ip.weight.data.copy_(layer.to_k.weight.data)
            ip.to_v_ip.weight.data.copy_(layer.to_v.weight.data)
        return adapter

    def key_values(self) -> list["ImageKeyValue | FaceKeyValue"]:
        """One for each cross-attention layer."""
        return [layer for number, layer in self.ip_adapter.items() if int(number) % 2]

    def tokens(
        self,
        clip_image: nn.Module | None,
        pixels: Tensor | None,
        faces: Tensor | None = None,
        structure_scale: float | None = None,
    ) -> Tensor:
        """Tokens of one image prompt made of one or more pictures, or faces.

        Args:
            clip_image, pixels: the image tower and (pictures, 3, 224, 224), preprocessed; FaceID does without.
            faces: (pictures, 512), the face embeddings that FaceID adapters read; other adapters do without.
            structure_scale: asks for version 2 of FaceID-plus, as in `FacePlusProjection`.

        Returns:
            (1, pictures * num_tokens, context_dim)
        """
        image = image_features(clip_image, pixels, self.image_proj.patches) if self.reads_clip else None
        return self.project(faces, image, structure_scale).flatten(0, 1)[None]

    def null_tokens(
        self,
        clip_image: nn.Module | None,
        pixels: Tensor | None,
        faces: Tensor | None = None,
        structure_scale: float | None = None,
    ) -> Tensor:
        """Tokens of the absent image prompt, same arguments and shape as `tokens`."""
        image = null_features(clip_image, pixels, self.image_proj.patches) if self.reads_clip else None
        nobody = None if faces is None else torch.zeros_like(faces)
        return self.project(nobody, image, structure_scale).flatten(0, 1)[None]

    def project(self, faces: Tensor | None, image: Tensor | None, structure_scale: float | None = None) -> Tensor:
        """What the image projection reads, a row for each picture -> its tokens (pictures, num_tokens, context_dim).

        Args:
            faces, image: face embeddings (pictures, 512), and what `image_features` gives; None: it does without.
        """
        if structure_scale is not None and not isinstance(self.image_proj, FacePlusProjection):
            raise ValueError("`structure_scale` is for FaceID-plus adapters; this adapter is another kind")
        read = [faces if self.image_proj.faces else None, image]
        version_2 = {} if structure_scale is None else {"structure_scale": structure_scale}
        return self.image_proj(*(x.to(self.dtype) for x in read if x is not None), **version_2)

    def prompt(
        self, tokens: Tensor, scale: Weight | Sequence[Weight] | Scale = 1.0, mask: Tensor | None = None
    ) -> ImagePrompt:
        """What every cross-attention layer is told of tokens (batch, num_tokens, context_dim): once, for all steps.

        Args:
            scale, mask: as in `ImagePrompt`.
        """
        return ImagePrompt([(ip.to_k_ip(tokens), ip.to_v_ip(tokens)) for ip in self.key_values()], scale, mask)

    def merge(self, unet: nn.Module, keep: bool = True) -> Callable[[], None]:
        """Add to a UNet what a FaceID adapter changes in its attention; other adapters change nothing.

        Args:
            keep: as in `low_rank.merge`: False merges for good.

        Returns:
            A function that takes the changes out again.
        """
        changes, names = {}, {module: name for name, module in unet.named_modules()}
        if self.lora_rank:
            for attention, lora in zip(unet.attentions(), self.ip_adapter.values(), strict=True):
                changes |= {f"{names[attention]}.{key}.weight": [(1.0, w)] for key, w in lora.changes().items()}
        return merge(unet, changes, keep)

    def attach(self, unet: nn.Module) -> Callable[[], None]:
        """As `merge`, for training: the changes are computed beside the layers, so that gradients reach them.

        Returns:
            A function that takes them away.
        """
        handles = []
        if self.lora_rank:
            for attention, lora in zip(unet.attentions(), self.ip_adapter.values(), strict=True):
                for key, change in lora.loras().items():
                    handles.append(attention.get_submodule(key).register_forward_hook(beside(change)))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    @property
    def reads_clip(self) -> bool:
        """Whether an image tower is needed: not for FaceID (but for FaceID-plus)."""
        return self.image_proj.patches or not self.image_proj.faces

    @property
    def dtype(self) -> torch.dtype:
        return next(self.image_proj.parameters()).dtype


class ImageKeyValue(nn.Module):
    """W_k' and W_v' of one cross-attention layer: all that the adapter adds to the UNet."""

    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, dim, bias=False)


class LoRALinear(nn.Module):
    """The two factors of the change of a matrix, under their published names."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)  # it begins as no change

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output for its input x."""
        return self.up(self.down(x))


def beside(change: LoRALinear) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that adds a change to what a layer gives."""
    return lambda layer, given, out: out + change(given[0])


class AttentionLoRA(nn.Module):
    """Changes of an attention layer's four matrices (`LoRAAttnProcessor` of the official code, at scale 1)."""

    def __init__(self, dim: int, context_dim: int, rank: int):
        super().__init__()
        self.to_q_lora = LoRALinear(dim, dim, rank)
        self.to_k_lora = LoRALinear(context_dim, dim, rank)
        self.to_v_lora = LoRALinear(context_dim, dim, rank)
        self.to_out_lora = LoRALinear(dim, dim, rank)

    def loras(self) -> dict[str, LoRALinear]:
        """By the layer that is changed."""
        return {"to_q": self.to_q_lora, "to_k": self.to_k_lora, "to_v": self.to_v_lora, "to_out.0": self.to_out_lora}

    def changes(self) -> dict[str, LowRank]:
        """The same as changes of weights."""
        return {key: LowRank(lora.down.weight.detach(), lora.up.weight.detach()) for key, lora in self.loras().items()}


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
