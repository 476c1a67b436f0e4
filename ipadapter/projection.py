"""Image projections: CLIP image features to tokens that cross-attention can read (arXiv 2308.06721, section 3.2.1)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class ImageProjection(nn.Module):
    """The base adapter: one global image embedding becomes `num_tokens` tokens (`ImageProjModel` of the official code).

    Args:
        embed_dim: width of the CLIP image embedding (1024 for ViT-H/14).
        context_dim: width of the tokens (768 in SD 1.x).
    """

    patches, faces = False, False  # reads the global embedding

    def __init__(self, embed_dim: int, context_dim: int, num_tokens: int):
        super().__init__()
        self.feature_dim, self.context_dim = embed_dim, context_dim
        self.proj = nn.Linear(embed_dim, num_tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, embeds: Tensor) -> Tensor:
        """embeds (batch, embed_dim), not normalised -> (batch, num_tokens, context_dim)."""
        return self.norm(self.proj(embeds).unflatten(1, (-1, self.context_dim)))


class PerceiverAttention(nn.Module):
    """Latent queries read the image features and themselves (Flamingo, arXiv 2204.14198, section 3.1.1)."""

    def __init__(self, dim: int, heads: int, head_dim: int = 64):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (batch, patches, dim), latents (batch, queries, dim) -> (batch, queries, dim)."""
        x, latents = self.norm1(x), self.norm2(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Perceiver(nn.Module):
    """Latent queries that read image features in several layers; `FacePerceiverResampler` of the official code.

    Args:
        feature_dim: width of the image tower's penultimate hidden states (1280 for ViT-H/14).
        dim, depth, heads: width, layers and attention heads (of 64) inside.
        context_dim: width of the tokens (768 in SD 1.x).
    """

    def __init__(self, feature_dim: int, dim: int, depth: int, heads: int, context_dim: int):
        super().__init__()
        self.proj_in = nn.Linear(feature_dim, dim)
        self.proj_out = nn.Linear(dim, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, heads), feed_forward(dim)]) for _ in range(depth)
        )

    def read(self, latents: Tensor, features: Tensor) -> Tensor:
        """latents (batch, queries, dim), features (batch, 1 + patches, feature_dim) -> (batch, queries, context_dim)."""
        x = self.proj_in(features)
        for attention, ff in self.layers:
            latents = attention(x, latents) + latents
            latents = ff(latents) + latents
        return self.norm_out(self.proj_out(latents))


class Resampler(Perceiver):
    """The plus adapter: learned queries gather `num_tokens` tokens from all patches of the image."""

    patches, faces = True, False  # reads the penultimate hidden states of all patches

    def __init__(self, feature_dim: int, dim: int, depth: int, heads: int, num_tokens: int, context_dim: int):
        super().__init__(feature_dim, dim, depth, heads, context_dim)
        self.feature_dim, self.context_dim = feature_dim, context_dim
        self.latents = nn.Parameter(nn.init.normal_(torch.empty(1, num_tokens, dim), std=dim**-0.5))

    def forward(self, features: Tensor) -> Tensor:
        """features (batch, 1 + patches, feature_dim), penultimate layer -> (batch, num_tokens, context_dim)."""
        return self.read(self.latents.expand(len(features), -1, -1), features)


class PatchProjection(nn.Module):
    """The full-face adapter: every patch becomes a token by itself (`MLPProjModel` of the official code).

    Args:
        feature_dim: width of the image tower's penultimate hidden states (1280 for ViT-H/14).
        context_dim: width of the tokens (768 in SD 1.x).
    """

    patches, faces = True, False

    def __init__(self, feature_dim: int, context_dim: int):
        super().__init__()
        self.feature_dim, self.context_dim = feature_dim, context_dim
        self.proj = nn.Sequential(
            nn.Linear(feature_dim, feature_dim),
            nn.GELU(),
            nn.Linear(feature_dim, context_dim),
            nn.LayerNorm(context_dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (batch, 1 + patches, feature_dim), penultimate layer -> (batch, 1 + patches, context_dim)."""
        return self.proj(features)


class FaceProjection(nn.Module):
    """The FaceID adapters: what a face recogniser says of a face (ArcFace's normed embedding) becomes tokens.

    `MLPProjModel` of the official ip_adapter_faceid.py.

    Args:
        face_dim: width of the face embedding (512).
        context_dim: width of the tokens (768 in SD 1.x).
    """

    patches, faces = False, True
    feature_dim = 0  # of CLIP it reads nothing

    def __init__(self, face_dim: int, context_dim: int, num_tokens: int):
        super().__init__()
        self.face_dim, self.context_dim = face_dim, context_dim
        self.proj = nn.Sequential(
            nn.Linear(face_dim, 2 * face_dim), nn.GELU(), nn.Linear(2 * face_dim, num_tokens * context_dim)
        )
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, faces: Tensor) -> Tensor:
        """faces (batch, face_dim), of length 1 -> (batch, num_tokens, context_dim)."""
        return self.norm(self.proj(faces).unflatten(1, (-1, self.context_dim)))


class FacePlusProjection(FaceProjection):
    """FaceID-plus: the tokens of the face embedding go on to read the patches of a picture of the face.

    `ProjPlusModel` of the official ip_adapter_faceid.py. Versions 1 and 2 have the same tensors; no file tells which it is.
    """

    patches, faces = True, True

    def __init__(self, face_dim: int, feature_dim: int, depth: int, heads: int, num_tokens: int, context_dim: int):
        super().__init__(face_dim, context_dim, num_tokens)
        self.feature_dim = feature_dim
        self.perceiver_resampler = Perceiver(feature_dim, context_dim, depth, heads, context_dim)

    def forward(self, faces: Tensor, features: Tensor, structure_scale: float | None = None) -> Tensor:
        """faces (batch, face_dim), features (batch, 1 + patches, feature_dim) -> (batch, num_tokens, context_dim).

        structure_scale: None is version 1; in version 2 what the patches say is added to the face's own tokens, with
        this weight.
        """
        tokens = super().forward(faces)
        out = self.perceiver_resampler.read(tokens, features)
        return out if structure_scale is None else tokens + structure_scale * out


def feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
    )
