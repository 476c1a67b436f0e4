"""What the other benchmarks share: random weights in the released layouts, and diffusers' pipeline on the same files.

Needs diffusers, transformers, accelerate and open_clip_torch. Nothing is downloaded: the pipeline's config folder,
its tokenizer too, is written here. Every weight is random, norms and biases too, so that two swapped ones show.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from clip import SD15_TEXT, VIT_H, CLIPImage, CLIPImageConfig, CLIPText, CLIPTextConfig
from control import ControlNet
from ipadapter import ImageProjection, IPAdapter, Resampler
from unet import SD15, UNet, UNetConfig
from vae import SD_VAE, VAE, VAEConfig


@dataclass(frozen=True)
class Sizes:
    """The shapes of all models of one pipeline."""

    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig
    image: CLIPImageConfig
    resampler: dict[str, int]
    num_tokens: int = 4
    side: int = 256  # of whole runs' pictures


FULL = Sizes(SD15, SD_VAE, SD15_TEXT, VIT_H, {"dim": 768, "depth": 4, "heads": 12, "num_tokens": 16})
NARROW = Sizes(
    unet=replace(SD15, channels=(32, 64, 96, 96), context_dim=64),
    vae=replace(SD_VAE, channels=(32, 32, 64, 64)),
    text=replace(SD15_TEXT, width=64, layers=2, heads=4, mlp=256),
    image=replace(VIT_H, width=128, layers=3, heads=2, mlp=512, projection=96),
    resampler={"dim": 128, "depth": 4, "heads": 2, "num_tokens": 8},  # diffusers knows no other depth
    side=128,
)


@dataclass(frozen=True)
class Files:
    """Where `write` puts things inside one folder, and how large the pictures are that they make."""

    folder: Path
    side: int = FULL.side

    @property
    def base(self) -> Path:  # a whole SD 1.x checkpoint, original layout
        return self.folder / "base.safetensors"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def plus(self) -> Path:
        return self.folder / "adapter-plus.safetensors"

    @property
    def config(self) -> Path:  # diffusers' configs for the base, without weights
        return self.folder / "config"

    @property
    def image_encoder(self) -> Path:  # a transformers folder: config.json, model.safetensors
        return self.folder / "image_encoder"

    @property
    def picture(self) -> Path:  # an image prompt that is not square
        return self.folder / "picture.png"


def randomize(shapes: Mapping[str, Tensor], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random values for a state dict, such that activations keep a variance near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, like in shapes.items():
        value = torch.randn(like.shape, generator=generator)
        if like.ndim > 1:
            value *= like[0].numel() ** -0.5
        else:
            value = 0.1 * value + key.endswith("weight")  # a norm's weight is around 1
        state[key] = value.to(dtype)
    return state


def write(folder: Path, sizes: Sizes, dtype: torch.dtype = torch.float16) -> Files:
    """Write all files of one pipeline (4 GB at full size in fp16); those that are there already are kept."""
    files = Files(folder, sizes.side)
    context_dim = sizes.unet.context_dim
    with torch.device("meta"):
        unet = UNet(sizes.unet)
        plain = ImageProjection(sizes.image.projection, context_dim, sizes.num_tokens)
        plus = Resampler(feature_dim=sizes.image.width, context_dim=context_dim, **sizes.resampler)
        base = {
            **UNet.state_dict(unet, prefix="model.diffusion_model."),
            **VAE(sizes.vae).state_dict(prefix="first_stage_model."),
            **CLIPText(sizes.text).state_dict(prefix="cond_stage_model.transformer."),
        }
        contents = {
            files.base: base,
            files.adapter: IPAdapter.for_unet(unet, plain).state_dict(),
            files.plus: IPAdapter.for_unet(unet, plus).state_dict(),
            files.image_encoder / "model.safetensors": CLIPImage(sizes.image).state_dict(),
        }
    for seed, (path, shapes) in enumerate(contents.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            save_file(randomize(shapes, seed, dtype), path, metadata={"format": "pt"})
    write_configs(files, sizes)
    colours = torch.randint(0, 256, (6, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(colours.numpy()).resize((400, 300), Image.Resampling.BICUBIC).save(files.picture)
    return files


def write_configs(files: Files, sizes: Sizes) -> None:
    """The folder for `from_single_file(config=...)`: Stable Diffusion 1.5's own, except for the widths."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    with torch.device("meta"):
        UNet2DConditionModel(
            sample_size=64,
            block_out_channels=sizes.unet.channels,
            cross_attention_dim=sizes.unet.context_dim,
            attention_head_dim=sizes.unet.heads,
        ).save_config(files.config / "unet")
        AutoencoderKL(
            block_out_channels=sizes.vae.channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=sizes.vae.res_blocks,
            sample_size=512,
        ).save_config(files.config / "vae")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    ).save_pretrained(files.config / "scheduler")

    def shape(config: CLIPTextConfig | CLIPImageConfig) -> dict:
        return {
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp,
            "projection_dim": config.projection or config.width,
            "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        }

    CLIPTextConfig(**shape(sizes.text)).save_pretrained(files.config / "text_encoder")
    CLIPVisionConfig(patch_size=sizes.image.patch_size, **shape(sizes.image)).save_pretrained(files.image_encoder)
    words = SimpleTokenizer()  # OpenAI's vocabulary, as open_clip reads it; it renames the two special words
    vocabulary = [*list(words.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, merges=list(words.bpe_ranks), model_max_length=77
    ).save_pretrained(files.config / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (files.config / "model_index.json").write_text(json.dumps(index, indent=1))


def pipeline(files: Files, dtype: torch.dtype = torch.float32) -> nn.Module:
    """diffusers' StableDiffusionPipeline with the image encoder, without an adapter."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_single_file(
        str(files.base),
        config=str(files.config),
        local_files_only=True,
        torch_dtype=dtype,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(files.image_encoder, dtype=dtype),
        feature_extractor=CLIPImageProcessorPil(),  # the default one resizes with torchvision, which rounds otherwise
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attach(pipe: nn.Module, adapter: Path) -> None:
    """`load_ip_adapter` from a file in the released layout."""
    pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None)


def diffusers_unet(unet: UNet, adapter: IPAdapter, scale: float) -> nn.Module:
    """The same tensors, not copies, in diffusers' UNet2DConditionModel with the adapter loaded."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = unet.config
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            block_out_channels=config.channels, cross_attention_dim=config.context_dim, attention_head_dim=config.heads
        )
    state = unet.state_dict(prefix="model.diffusion_model.")
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, theirs.config), assign=True)
    theirs._load_ip_adapter_weights(
        [{"image_proj": adapter.image_proj.state_dict(), "ip_adapter": adapter.ip_adapter.state_dict()}]
    )
    set_scale(theirs, scale)
    return theirs.requires_grad_(False).eval()


def diffusers_controlnet(net: ControlNet) -> nn.Module:
    """The same tensors, not copies, in diffusers' ControlNetModel."""
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config = net.config
    with torch.device("meta"):
        theirs = ControlNetModel(
            block_out_channels=config.channels, cross_attention_dim=config.context_dim, attention_head_dim=config.heads
        )
    theirs.load_state_dict(convert_controlnet_checkpoint(net.state_dict(), {"layers_per_block": 2}), assign=True)
    return theirs.requires_grad_(False).eval()


def set_scale(theirs: nn.Module, scale: float) -> None:
    """What a pipeline's `set_ip_adapter_scale` does, for its UNet alone."""
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]


def drawn(
    theirs: nn.Module, text: str, negative: str, images: object, steps: int, guidance: float, seed: int, **more: object
) -> Image.Image:
    """The picture of a pipeline of theirs; `more` is what only some take."""
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": torch.Generator().manual_seed(seed)}
    return theirs(text, negative_prompt=negative, ip_adapter_image=images, **how, **more).images[0]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of the medians, and the least and the greatest of a single turn."""
    turns = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(ours) / median(theirs):.3f} ({min(turns):.3f}-{max(turns):.3f})"
