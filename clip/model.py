"""CLIP's two towers (arXiv 2103.00020), with the attribute names of the transformers layout.

Stable Diffusion 1.x carries its text tower in these names (`cond_stage_model.transformer.text_model.*`), and the
image encoders of IP-Adapter are released in them. OpenCLIP's names are translated when a file is read (`weights/`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation; its weights want it, OpenCLIP's want the exact (erf) GELU."""
    return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class CLIPConfig:
    """Shape of one tower. All but `heads` and `quick_gelu` can be read from the tensors."""

    width: int
    layers: int
    heads: int
    mlp: int  # width inside the feed-forward, usually 4 * width
    quick_gelu: bool
    projection: int | None  # width of the space that both towers share; None: the file has no projection


@dataclass(frozen=True)
class CLIPTextConfig(CLIPConfig):
    vocabulary: int = 49408
    context: int = 77


@dataclass(frozen=True)
class CLIPImageConfig(CLIPConfig):
    image_size: int = 224
    patch_size: int = 14


SD15_TEXT = CLIPTextConfig(width=768, layers=12, heads=12, mlp=3072, quick_gelu=True, projection=None)
VIT_H = CLIPImageConfig(width=1280, layers=32, heads=16, mlp=5120, quick_gelu=False, projection=1024)


class CLIPText(nn.Module):
    """Text tower: a causal transformer over 77 tokens."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        tokens, positions = (nn.Embedding(count, config.width) for count in (config.vocabulary, config.context))
        embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        last = nn.LayerNorm(config.width)
        parts = {"embeddings": embeddings, "encoder": encoder(config), "final_layer_norm": last}
        self.text_model = nn.ModuleDict(parts)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, 77) -> (batch, 77, width): last hidden states, behind the final LayerNorm."""
        return self.last(self.hidden(tokens, 1))

    def hidden(self, tokens: Tensor, skip: int, vectors: Tensor | None = None) -> Tensor:
        """tokens (batch, 77) -> (batch, 77, width): the output of the last layer but `skip`, without a LayerNorm.

        Args:
            vectors: (n, width), what the tokens -1, -2, ..., -n stand for (textual inversion, arXiv 2208.01618).
        """
        table, layers = self.text_model["embeddings"], self.text_model["encoder"]["layers"]
        x = table["token_embedding"](tokens.clamp(min=0) if vectors is not None else tokens)
        if vectors is not None:
            x[tokens < 0] = vectors.to(x)[-1 - tokens[tokens < 0]]
        x = x + table["position_embedding"].weight[: tokens.shape[1]]
        for layer in layers[: len(layers) - skip]:
            x = layer(x, causal=True)
        return x

    def last(self, x: Tensor) -> Tensor:
        """The rest of the way, from the last layer but one to the last hidden states."""
        x = self.text_model["encoder"]["layers"][-1](x, causal=True)
        return self.text_model["final_layer_norm"](x)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (batch, 77) -> (batch, projection), not normalised: read at the end-of-text token, projected."""
        return self.pool(self(tokens), tokens)

    def pool(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Last hidden states (batch, 77, width) -> (batch, projection), as `embed`."""
        end = tokens.argmax(dim=-1)  # end-of-text has the largest number; argmax finds the first of them
        return self.text_projection(hidden[torch.arange(len(tokens), device=tokens.device), end])


class CLIPImage(nn.Module):
    """Image tower: a vision transformer over patches and one class token."""

    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        self.config = config
        self.vision_model = nn.ModuleDict(
            {
                "embeddings": PatchEmbedding(config),
                "pre_layrnorm": nn.LayerNorm(config.width),  # spelled so in every released file
                "encoder": encoder(config),
                "post_layernorm": nn.LayerNorm(config.width),
            }
        )
        if config.projection:
            self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, size, size), preprocessed -> image embedding (batch, projection), not normalised."""
        return self.last(self.penultimate(pixels))

    def penultimate(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, size, size), preprocessed -> (batch, 1 + patches, width).

        The output of the last layer but one, without `post_layernorm`: what plus adapters read.
        """
        x = self.vision_model["pre_layrnorm"](self.vision_model["embeddings"](pixels))
        for layer in self.vision_model["encoder"]["layers"][:-1]:
            x = layer(x)
        return x

    def last(self, x: Tensor) -> Tensor:
        """The rest of the way, from `penultimate` to the image embedding (batch, projection)."""
        return self.visual_projection(self.vision_model["post_layernorm"](self.ultimate(x)[:, 0]))

    def ultimate(self, x: Tensor) -> Tensor:
        """From `penultimate` to the output of the last layer, likewise: what T2I-Adapter's style adapters read."""
        return self.vision_model["encoder"]["layers"][-1](x)


class PatchEmbedding(nn.Module):
    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(config.width)))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(positions, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, size, size) -> (batch, 1 + patches, width)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        return x + self.position_embedding.weight


def encoder(config: CLIPConfig) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.layers))})


class Layer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.self_attn = Attention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x (batch, length, width) -> (batch, length, width)."""
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.activation = quick_gelu if config.quick_gelu else gelu
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
