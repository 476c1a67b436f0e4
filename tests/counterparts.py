"""The same models in somebody else's code, filled with our weights, and weights that give every mistake away."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.utils import logging
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from clip import CLIPImage, CLIPText
from generate import ImageGroup, Models, pictures, prompts
from generate.models import Adapter
from generate.picture import decode
from ipadapter import IPAdapter
from unet import UNet, UNetConfig
from vae import VAE
from weights import Base
from weights.fill import twin

logging.set_verbosity_error()  # diffusers warns of every part that a test leaves out


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
    theirs = twin(blank_unet(unet.config))
    state = convert_ldm_unet_checkpoint(prefixed("model.diffusion_model.", unet), theirs.config)
    theirs.load_state_dict({key: w.clone() for key, w in state.items()}, strict=True, assign=True)
    return theirs.requires_grad_(False).eval()


@cache
def blank_unet(c: UNetConfig) -> UNet2DConditionModel:
    """On `meta`: to make one takes much longer than to fill it."""
    added = {}
    if c.vector_dim:  # a pooled text of 32 numbers and six sizes, each as sinusoids
        sinusoids = (c.vector_dim - 32) // 6
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": sinusoids,
            "projection_class_embeddings_input_dim": c.vector_dim,
        }
    if any(len({*depths}) > 1 for depths in c.up):  # SSD-1B
        added["reverse_transformer_layers_per_block"] = [list(depths) for depths in c.up]
    with torch.device("meta"):
        return UNet2DConditionModel(
            mid_block_type="UNetMidBlock2DCrossAttn" if any(c.middle) else "UNetMidBlock2D",
            block_out_channels=c.channels,
            down_block_types=["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in c.down],
            up_block_types=["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in c.up],
            transformer_layers_per_block=[max(max(depths), 1) for depths in c.down],
            layers_per_block=len(c.down[0]),
            cross_attention_dim=c.context_dim,
            attention_head_dim=c.heads or [width // c.head_dim for width in c.channels],  # it means the number of heads
            use_linear_projection=c.linear_proj,
            sample_size=16,
            in_channels=c.in_channels,
            **added,
        )


def published(adapter: IPAdapter) -> dict[str, dict[str, Tensor]]:
    """The adapter as the released .bin files hold it."""
    state = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, name = key.split(".", 1)
        state[part][name] = value
    return state


def diffusers_unet_with(unet: UNet, *adapters: IPAdapter) -> UNet2DConditionModel:
    """With the LoRAs of FaceID adapters, as a pipeline's `load_ip_adapter` gives them to peft."""
    theirs, states = diffusers_unet(unet), [published(adapter) for adapter in adapters]
    with listed_once(theirs):
        theirs._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
        loras = theirs._load_ip_adapter_loras(states)
    for i, lora in loras.items():
        state, alphas = StableDiffusionPipeline.lora_state_dict(lora)
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs, adapter_name=f"faceid_{i}")
    if loras:
        theirs.set_adapters([f"faceid_{i}" for i in loras])
    return theirs.requires_grad_(False)


@contextmanager
def listed_once(theirs: UNet2DConditionModel) -> Iterator[None]:
    """diffusers' loaders list all attention layers anew for each of them, which takes longer than all the rest."""
    with patch.object(UNet2DConditionModel, "attn_processors", theirs.attn_processors):
        yield


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


# OpenCLIP's text towers (SD 2.x, SDXL), first in their own code


def open_clip_text(width: int, heads: int, layers: int, projection: int, seed: int) -> CLIP:
    """A whole CLIP, of whose image tower nobody asks."""
    image = CLIPVisionCfg(layers=1, width=32, head_width=32, patch_size=16, image_size=32)
    return randomise(CLIP(projection, image, CLIPTextCfg(width=width, heads=heads, layers=layers)), seed)


def open_clip_state(prefix: str, theirs: CLIP) -> dict[str, Tensor]:
    """Its text side, as checkpoints have it."""
    return {key: w for key, w in prefixed(prefix, theirs).items() if not key.startswith(f"{prefix}visual.")}


def transformers_open_clip(theirs: CLIP, layers: int | None = None) -> CLIPTextModel | CLIPTextModelWithProjection:
    """The text tower in transformers' code: whole, or the first so many layers without projection, as SD 2.x has it."""
    side = theirs.transformer
    config = CLIPTextConfig(
        hidden_size=side.width,
        intermediate_size=4 * side.width,
        num_hidden_layers=layers or side.layers,
        num_attention_heads=side.resblocks[0].attn.num_heads,
        projection_dim=theirs.text_projection.shape[1],
        hidden_act="gelu",
        eos_token_id=49407,
    )
    model = (CLIPTextModel if layers else CLIPTextModelWithProjection)(config)
    prefix = "conditioner.embedders.1.model."
    state = convert_open_clip_checkpoint(model, open_clip_state(prefix, theirs), prefix)
    if layers:
        left = (*(f"text_model.encoder.layers.{i}." for i in range(layers, side.layers)), "text_projection")
        state = {key: w for key, w in state.items() if not key.startswith(left)}
    return filled_flat(model, state)


def transformers_text_alone(text: CLIPText) -> CLIPTextModel:
    """Without projection: what Stable Diffusion's pipelines hold."""
    shape = transformers_shape(text) | {"projection_dim": text.config.width}
    config = CLIPTextConfig(**shape, hidden_act="quick_gelu", eos_token_id=49407)
    state = {key: w for key, w in text.state_dict().items() if key.startswith("text_model.")}
    return filled_flat(CLIPTextModel(config), state)


def filled_flat(theirs: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    if not hasattr(theirs, "text_model"):  # transformers 5.6 has one level less
        state = {key.removeprefix("text_model."): w for key, w in state.items()}
    theirs.load_state_dict(state, strict=True)
    return theirs.requires_grad_(False).eval()


# Whole pictures


@cache
def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """transformers' tokenizer from the vocabulary that open_clip brings, which renames the two special words."""
    words = SimpleTokenizer()
    vocabulary = [*list(words.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbers, merges=list(words.bpe_ranks), model_max_length=77, pad_token=pad)


def diffusers_pipeline(
    unet: UNet, vae: VAE, texts: Sequence[nn.Module], image: CLIPImage, pads: Sequence[str], prediction: str = "epsilon"
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' pipeline of our models, and of text towers in transformers' code: one, or SDXL's two."""
    size = image.config.image_size
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type=prediction,
    )
    shared = {
        "unet": diffusers_unet(unet),
        "vae": diffusers_vae(vae),
        "scheduler": scheduler,
        "image_encoder": transformers_image(image),
        "feature_extractor": CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size),
    }
    towers = {f"text_encoder{end}": text for end, text in zip(("", "_2"), texts, strict=False)}
    tokenizers = {f"tokenizer{end}": clip_tokenizer(pad) for end, pad in zip(("", "_2"), pads, strict=False)}
    if len(texts) == 2:
        pipeline = StableDiffusionXLPipeline(**shared, **towers, **tokenizers, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **shared, **towers, **tokenizers, safety_checker=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Twin:
    """One base model twice: ours, out of a file in the original layout, and diffusers', of the same tensors."""

    base: Base
    pipeline: DiffusionPipeline

    @cached_property
    def parts(self) -> tuple[nn.Module, UNet, VAE]:
        return self.base.text_encoder(), self.base.unet(), self.base.vae()


@dataclass(frozen=True)
class Order:
    """What picture is to be made, and what prompts it."""

    prompt: str = "a red fox in the snow, 35mm"
    negative_prompt: str = ""
    pictures: tuple[Image.Image, ...] = ()  # that CLIP sees
    negatives: tuple[Image.Image, ...] = ()  # that stand for their absence, one for each
    faces: Tensor | None = None  # (faces, 512)
    scale: float = 0.7
    structure_scale: float | None = None  # of FaceID-plus, version 2
    steps: int = 2
    guidance_scale: float = 7.5
    seed: int = 7
    height: int = 64
    width: int = 96


@torch.no_grad()
def our_picture(
    twin: Twin, order: Order, adapter: IPAdapter | None = None, encoder: CLIPImage | None = None
) -> tuple[Tensor, np.ndarray]:
    """Latents, and pixels 0..255, by the line that everybody calls."""
    models, unet = opened(twin, adapter, encoder, order.height, order.structure_scale is not None), twin.parts[1]
    faces, scale = ([order.faces] if order.faces is not None else []), order.scale if adapter else None
    images = [ImageGroup(order.pictures, negative_image=order.negatives)] if order.negatives else order.pictures
    pair = prompts(models, order.prompt, order.negative_prompt, images, scale, faces, order.structure_scale)
    take_out, latents = adapter.merge(unet) if adapter else lambda: None, []
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        size = {"height": order.height, "width": order.width, "guidance_scale": order.guidance_scale}
        (picture,) = pictures(models, *pair, order.seed, steps=order.steps, **size)
    take_out()
    return latents[0], np.asarray(picture)


def opened(
    twin: Twin,
    adapter: IPAdapter | None = None,
    encoder: CLIPImage | None = None,
    side: int = 64,
    faceid_v2: bool = False,
) -> Models:
    """A base of a twin and an adapter, as `open_models` gives them."""
    encode, unet, vae = twin.parts
    held = {"adapter": adapter, "image encoder encoder": encoder, "text encoder": encode, "vae": vae}
    return Models(
        files={"adapter": Path("adapter"), "image_encoder": Path("encoder")}
        if encoder
        else {"adapter": Path("adapter")},
        base=twin.base,
        loras=(),
        adapters=(Adapter(Path("adapter"), adapter, Path("encoder") if encoder else None, faceid_v2),)
        if adapter
        else (),
        bundled=False,
        side=side,
        dtype=torch.float32,
        storage=None,
        low_memory=False,
        device=torch.device("cpu"),
        keep=True,
        held=held | {"unet": unet, "unet for a face": unet},
    )


@torch.no_grad()
def their_picture(
    twin: Twin, order: Order, adapter: Path | None = None, encoder: CLIPImage | None = None
) -> tuple[Tensor, np.ndarray]:
    """The same by diffusers' pipeline, which reads the adapter's file by itself."""
    pipeline, latents, image = twin.pipeline, [], {}
    before = pipeline.unet, pipeline.image_encoder
    try:
        if encoder:
            pipeline.image_encoder = transformers_image(encoder)
        if adapter:
            pipeline.unet = copy.deepcopy(pipeline.unet)
            file = {"subfolder": "", "weight_name": adapter.name, "image_encoder_folder": None}
            with listed_once(pipeline.unet):
                pipeline.load_ip_adapter(str(adapter.parent), **file)
            pipeline.set_ip_adapter_scale(order.scale)
        if order.faces is not None:
            image["ip_adapter_image_embeds"] = [torch.stack([torch.zeros_like(order.faces), order.faces])]
        if order.faces is not None and order.pictures:
            projection = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
            embeds = pipeline.prepare_ip_adapter_image_embeds([list(order.pictures)], None, "cpu", 1, True)
            projection.clip_embeds, projection.shortcut = embeds[0], order.structure_scale is not None
            projection.shortcut_scale = order.structure_scale
        elif order.negatives:
            each = [
                pipeline.prepare_ip_adapter_image_embeds([list(some)], None, "cpu", 1, True)[0].chunk(2)[1]
                for some in (order.negatives, order.pictures)
            ]
            image["ip_adapter_image_embeds"] = [torch.cat(each)]
        elif order.pictures:
            image["ip_adapter_image"] = [list(order.pictures)]
        picture = pipeline(
            order.prompt,
            negative_prompt=order.negative_prompt or None,
            num_inference_steps=order.steps,
            guidance_scale=order.guidance_scale,
            height=order.height,
            width=order.width,
            generator=torch.Generator().manual_seed(order.seed),
            callback_on_step_end=lambda pipeline, i, t, tensors: latents.append(tensors["latents"]) or {},
            **image,
        ).images[0]
    finally:
        pipeline.unet, pipeline.image_encoder = before
    return latents[-1], np.asarray(picture)


def assert_same_picture(ours: tuple[Tensor, np.ndarray], theirs: tuple[Tensor, np.ndarray]) -> None:
    """The same latents but for rounding, and no pixel more than 1/255 apart; and it is a picture, not an even area."""
    assert rel(ours[0], theirs[0]) <= 1e-4
    assert np.abs(ours[1].astype(int) - theirs[1].astype(int)).max() <= 1
    assert ours[1].std() > 10 and ((ours[1] > 0) & (ours[1] < 255)).mean() > 0.5
