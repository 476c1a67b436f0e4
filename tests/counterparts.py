"""The same models in somebody else's code, filled with our weights, and weights that give every mistake away."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from clip import CLIPImage, CLIPText
from ipadapter import IPAdapter
from unet import UNet
from vae import VAE


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill each tensor with its own noise, biases and norms too: no two layers agree, and no value is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        noise[noise == 0] = 1  # in a million normal numbers a few round to zero
        if p.ndim > 1:
            p.data = noise / p[0].numel() ** 0.5
        else:
            p.data = 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
    return model.requires_grad_(False).eval()


def rel(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    assert ours.shape == theirs.shape and theirs.isfinite().all() and theirs.norm() > 0
    return ((ours - theirs).norm() / theirs.norm()).item()


def prefixed(prefix: str, model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors as they are named in a whole checkpoint."""
    return {prefix + key: value for key, value in model.state_dict().items()}


def diffusers_unet(unet: UNet) -> UNet2DConditionModel:
    c = unet.config
    added = {}
    if c.vector_dim:  # a pooled text of 32 numbers and six sizes, each as sinusoids
        sinusoids = (c.vector_dim - 32) // 6
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": sinusoids,
            "projection_class_embeddings_input_dim": c.vector_dim,
        }
    theirs = UNet2DConditionModel(
        block_out_channels=c.channels,
        down_block_types=["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in c.down],
        up_block_types=["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in c.up],
        transformer_layers_per_block=[max(max(depths), 1) for depths in c.down],
        layers_per_block=len(c.down[0]),
        cross_attention_dim=c.context_dim,
        attention_head_dim=c.heads or [width // c.head_dim for width in c.channels],  # it means the number of heads
        use_linear_projection=c.linear_proj,
        sample_size=16,
        **added,
    )
    state = convert_ldm_unet_checkpoint(prefixed("model.diffusion_model.", unet), theirs.config)
    theirs.load_state_dict(state, strict=True)
    return theirs.requires_grad_(False).eval()


def published(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """The adapter as the released .bin files hold it."""
    state = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, name = key.split(".", 1)
        state[part][name] = value
    return state


def diffusers_unet_with(unet: UNet, *adapters: IPAdapter) -> UNet2DConditionModel:
    theirs = diffusers_unet(unet)
    theirs._load_ip_adapter_weights([published(adapter) for adapter in adapters], low_cpu_mem_usage=False)
    return theirs.requires_grad_(False)


def set_scales(theirs: UNet2DConditionModel, *scales: float | list[float]) -> None:
    """One scale per adapter, each a number or one number per layer, in diffusers' order of the layers."""
    layers = [processor for processor in theirs.attn_processors.values() if hasattr(processor, "to_k_ip")]
    for i, layer in enumerate(layers):
        layer.scale = [scale if isinstance(scale, float) else scale[i] for scale in scales]


def diffusers_vae(vae: VAE) -> AutoencoderKL:
    c = vae.config
    theirs = AutoencoderKL(
        block_out_channels=c.channels,
        down_block_types=["DownEncoderBlock2D"] * len(c.channels),
        up_block_types=["UpDecoderBlock2D"] * len(c.channels),
        layers_per_block=c.res_blocks,
        latent_channels=c.latent_channels,
        scaling_factor=c.latent_scale,
    )
    theirs.load_state_dict(convert_ldm_vae_checkpoint(prefixed("first_stage_model.", vae), theirs.config), strict=True)
    return theirs.requires_grad_(False).eval()


def transformers_text(text: CLIPText, activation: str = "quick_gelu") -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(**transformers_shape(text), hidden_act=activation, eos_token_id=49407)
    return filled(CLIPTextModelWithProjection(config), text)


def transformers_image(image: CLIPImage, activation: str = "gelu") -> CLIPVisionModelWithProjection:
    sizes = {"image_size": image.config.image_size, "patch_size": image.config.patch_size}
    config = CLIPVisionConfig(**transformers_shape(image), **sizes, hidden_act=activation)
    return filled(CLIPVisionModelWithProjection(config), image)


def transformers_shape(tower: CLIPText | CLIPImage) -> dict[str, int]:
    """What their configs of both towers call the same."""
    c = tower.config
    return {
        "hidden_size": c.width,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "projection_dim": c.projection,
    }


def filled(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.requires_grad_(False).eval()
