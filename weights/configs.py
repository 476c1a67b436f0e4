"""Reads the shape of a model off its tensors; what they cannot tell (heads, the GELU kind) comes from the family."""

from dataclasses import replace

from clip import CLIPImageConfig, CLIPTextConfig
from control import T2IConfig
from files.tensors import State
from unet import UNetConfig
from vae import SD_VAE, VAEConfig


def count(state: State, prefix: str) -> int:
    """How many different numbers stand behind a prefix, and before a dot.

    Not one more than the largest: a damaged name would have a model of a billion layers built.
    """
    behind = {key[len(prefix) :].partition(".")[:2] for key in state if key.startswith(prefix)}
    return sum(number.isdecimal() for number, dot in behind if dot)


def unet_config(state: State) -> UNetConfig:
    """From a UNet in the original layout."""
    encoder = encoder_config(state)
    per_level = len(encoder.down[0]) + 1
    going_up = [depth(state, f"output_blocks.{i}.1") for i in range(per_level * len(encoder.down))]
    up = tuple(tuple(going_up[i : i + per_level]) for i in range(0, len(going_up), per_level))
    return replace(encoder, out_channels=state["out.2.weight"].shape[0], up=up)


def encoder_config(state: State) -> UNetConfig:
    """From a UNet's way down and its middle, which are all that a ControlNet has."""
    # Going down, each level ends with a Downsample (`op`), except the last.
    channels, down, level = [], [], []
    for i in range(1, count(state, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in state:
            down.append(tuple(level))
            level = []
            continue
        if not level:
            channels.append(state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0])
        level.append(depth(state, f"input_blocks.{i}.1"))
    down.append(tuple(level))

    middle: list[int] = []
    for i in range(count(state, "middle_block.")):
        if f"middle_block.{i}.in_layers.0.weight" in state:
            middle.append(0)
        else:  # a transformer, behind the ResBlock before it
            middle[-1] = depth(state, f"middle_block.{i}")

    context = next((w.shape[1] for key, w in state.items() if key.endswith("attn2.to_k.weight")), 0)
    linear = next(w for key, w in state.items() if key.endswith(".1.proj_in.weight")).ndim == 2
    vector, guidance = state.get("label_emb.0.0.weight"), state.get("cond_proj.weight")
    return UNetConfig(
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=0,
        channels=tuple(channels),
        down=tuple(down),
        middle=tuple(middle),
        up=(),
        context_dim=context,
        heads=None if linear else 8,  # SD 1.x has 8 heads everywhere, its successors heads of 64
        head_dim=64 if linear else None,
        linear_proj=linear,
        vector_dim=None if vector is None else vector.shape[1],
        guidance_dim=None if guidance is None else guidance.shape[1],
    )


def depth(state: State, transformer: str) -> int:
    """How many blocks a transformer has: 0 where there is none, -1 where there are its norm and projections alone."""
    blocks = count(state, f"{transformer}.transformer_blocks.")
    return blocks or -(f"{transformer}.proj_in.weight" in state)


def hint_widths(state: State) -> tuple[int, ...]:
    """Of a ControlNet's hint encoder: of the picture, then what every second convolution gives."""
    first, *rest = range(0, 2 * count(state, "input_hint_block."), 2)
    return (
        state[f"input_hint_block.{first}.weight"].shape[1],
        state[f"input_hint_block.{first}.weight"].shape[0],
        *(state[f"input_hint_block.{i}.weight"].shape[0] for i in rest[1:-1:2]),
    )


def t2i_config(state: State) -> T2IConfig:
    """From a T2I-Adapter in the original layout. SDXL's shrinks a hint of 1 or 3 channels by 16, the others by 8."""
    light = "conv_in.weight" not in state
    before = state["body.0.in_conv.weight" if light else "conv_in.weight"].shape[1]
    blocks = count(state, "body.")
    if light:
        channels = tuple(state[f"body.{i}.out_conv.weight"].shape[0] for i in range(blocks))
        return T2IConfig(before // 64, channels, light=True)
    channels = tuple(state[f"body.{i}.block2.weight"].shape[0] for i in range(0, blocks, 2))
    how = {
        "kernel": state["body.0.block2.weight"].shape[-1],
        "strided": any(key.endswith(".down_opt.op.weight") for key in state),
    }
    if before in (256, 768):
        return T2IConfig(before // 256, channels, shrink=16, pooled=(2,), blocks=(3, 5, 8, 9), **how)
    return T2IConfig(before // 64, channels, **how)


def vae_config(state: State, latent_scale: float = SD_VAE.latent_scale) -> VAEConfig:
    """From an autoencoder in the original layout."""
    levels = count(state, "encoder.down.")
    return VAEConfig(
        channels=tuple(state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)),
        res_blocks=count(state, "encoder.down.0.block."),
        latent_channels=state["post_quant_conv.weight"].shape[0],
        latent_scale=latent_scale,
    )


TEXT_HEADS = {64: 4, 768: 12, 1024: 16, 1280: 20}  # by width: the tiny model, CLIP-L, OpenCLIP ViT-H, ViT-bigG
IMAGE_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}  # ViT-B, L, H, g, bigG


def text_config(state: State, quick_gelu: bool = True, heads: int | None = None) -> CLIPTextConfig:
    """From a text tower in the transformers layout, `text_model.*`."""
    tokens = state["text_model.embeddings.token_embedding.weight"]
    projection = state.get("text_projection.weight")
    return CLIPTextConfig(
        width=tokens.shape[1],
        layers=count(state, "text_model.encoder.layers."),
        heads=heads or TEXT_HEADS.get(tokens.shape[1], max(1, tokens.shape[1] // 64)),
        mlp=state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        quick_gelu=quick_gelu,
        projection=None if projection is None else projection.shape[0],
        vocabulary=tokens.shape[0],
        context=state["text_model.embeddings.position_embedding.weight"].shape[0],
    )


def image_config(state: State, quick_gelu: bool = False, heads: int | None = None) -> CLIPImageConfig:
    """From an image tower in the transformers layout."""
    patches = state["vision_model.embeddings.patch_embedding.weight"]
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    projection = state.get("visual_projection.weight")
    width, patch = patches.shape[0], patches.shape[-1]
    return CLIPImageConfig(
        width=width,
        layers=count(state, "vision_model.encoder.layers."),
        heads=heads or IMAGE_HEADS.get(width, max(1, width // 64)),
        mlp=state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        quick_gelu=quick_gelu,
        projection=None if projection is None else projection.shape[0],
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
    )
