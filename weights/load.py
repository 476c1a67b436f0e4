"""From files to models: each model is built without memory ("meta") and given the file's tensors.

Every key of a file is used, or stands in a short list of what is left aside; anything else is an error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip import CLIPImage, CLIPText
from ipadapter import ImageProjection, IPAdapter, PatchProjection, Resampler
from unet import UNet
from vae import VAE
from weights import configs
from weights.files import State, WeightsError, read
from weights.kinds import ENCODERS, adapter_base, family, what_is
from weights.openclip import from_openclip

# What checkpoints carry beside the weights: averaged copies, the noise schedule, position counters, the training loss.
IGNORED = re.compile(
    r"model_ema\.|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    r"log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    r"posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar|scale_factor|global_step|"
    r"lvlb_weights)$|(.*\.)?position_ids$|(first_stage_model\.)?loss\.|optimizer_states\.|lr_schedulers\.|"
    r"cond_stage_model\.logit_scale$|cond_stage_model\.transformer\.text_projection\.weight$"
)
# Parts of a whole CLIP model that an image encoder does without.
TEXT_SIDE = re.compile(r"text_model\.|text_projection|logit_scale$|logit_bias$")

UNET, VAE_, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


@dataclass
class Base:
    """A Stable Diffusion 1.x checkpoint, its keys checked, its models built when they are asked for."""

    path: Path
    layers: list[tuple[int, int]]  # (dim, context_dim) of each cross-attention, in the order of an adapter's keys
    dtype: torch.dtype
    device: torch.device | str

    def unet(self) -> UNet:
        return self._build(UNET, lambda state: UNet(configs.unet_config(state)))

    def vae(self) -> VAE:
        return self._build(VAE_, lambda state: VAE(configs.vae_config(state)))

    def text(self) -> CLIPText:
        return self._build(TEXT, lambda state: CLIPText(configs.text_config(state)))

    def _build(self, prefix: str, make: Callable[[State], nn.Module]) -> nn.Module:
        # Read anew each time: a mapped file costs nothing to open, and its pages can go when the model is built.
        state = under(prefix, read(self.path))
        return fill(make, state, self.path, self.dtype, self.device)


def open_base(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Base:
    """An SD 1.x checkpoint in the original layout (.safetensors or .ckpt).

    Raises:
        WeightsError: unreadable, another kind or family of file, or keys missing or left over.
    """
    state = read(path)
    if not any(key.startswith(UNET) for key in state):
        raise WeightsError(f"{path}: a base model is wanted here (SD 1.x, original layout); this is {what_is(state)}")
    if (found := family(state)) != "SD 1.x":
        raise WeightsError(f"{path}: an SD 1.x checkpoint is wanted here; this is {what_is(state)}, found {found}")
    parts = {prefix: under(prefix, state) for prefix in (UNET, VAE_, TEXT)}
    for prefix, name in ((UNET, "UNet"), (VAE_, "autoencoder"), (TEXT, "text tower")):
        if not parts[prefix]:
            raise WeightsError(
                f"{path}: the {name} ({prefix}*) is missing; a whole SD 1.x checkpoint has all three parts"
            )
    try:
        unet, text = configs.unet_config(parts[UNET]), configs.text_config(parts[TEXT])
        vae = configs.vae_config(parts[VAE_])
    except (KeyError, StopIteration, IndexError) as error:
        raise WeightsError(f"{path}: not a whole SD 1.x checkpoint, the key {error} is missing") from None
    if unet.in_channels != vae.latent_channels:
        raise WeightsError(
            f"{path}: its UNet takes {unet.in_channels} channels (an inpainting or depth model?), "
            f"{vae.latent_channels} are wanted"
        )
    left = [key for key in state if not key.startswith((UNET, VAE_, TEXT)) and not IGNORED.match(key)]
    shapes = build(lambda _: UNet(unet), parts[UNET], path, left).cross_attentions()
    build(lambda _: VAE(vae), parts[VAE_], path)
    build(lambda _: CLIPText(text), parts[TEXT], path)
    layers = [(layer.to_k.out_features, layer.to_k.in_features) for layer in shapes]
    return Base(Path(path), layers, dtype, device)


def load_vae(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VAE:
    """A stand-alone autoencoder in the original layout, with or without the prefix `first_stage_model.`."""
    state = read(path)
    inner = under(VAE_, state) or {key: value for key, value in state.items() if not IGNORED.match(key)}
    if "encoder.conv_in.weight" not in inner or "encoder.down_blocks.0.resnets.0.conv1.weight" in inner:
        found = "an autoencoder of a diffusers folder" if "encoder.conv_in.weight" in inner else what_is(state)
        raise WeightsError(f"{path}: an autoencoder in the original layout is wanted here; this is {found}")
    if "post_quant_conv.weight" in inner and (channels := inner["post_quant_conv.weight"].shape[0]) != 4:
        raise WeightsError(f"{path}: an autoencoder of 4 latent channels is wanted here; this one has {channels}")
    return fill(lambda state: VAE(configs.vae_config(state)), inner, path, dtype, device)


def load_image_encoder(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CLIPImage:
    """A CLIP image tower, in the transformers layout or in OpenCLIP's; a text tower in the same file is left aside."""
    state = read(path)
    if "visual.conv1.weight" in state:
        inner, quick_gelu = from_openclip(state), False
    elif "vision_model.embeddings.patch_embedding.weight" in state:
        width = state["vision_model.embeddings.patch_embedding.weight"].shape[0]
        inner = {key: value for key, value in state.items() if not TEXT_SIDE.match(key) and not IGNORED.match(key)}
        quick_gelu = width in (768, 1024)  # OpenAI's own ViT-B and ViT-L; ViT-H and bigG are OpenCLIP's
    else:
        raise WeightsError(f"{path}: a CLIP image encoder is wanted here; this is {what_is(state)}")
    return fill(lambda state: CLIPImage(configs.image_config(state, quick_gelu)), inner, path, dtype, device)


def load_adapter(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> IPAdapter:
    """A released IP-Adapter (.safetensors or .bin): base, light, plus or full-face; the kind is read from its tensors."""
    state = {rename_trainer_keys(key): value for key, value in read(path).items() if not key.startswith("unet.")}
    if any("_lora." in key for key in state):
        raise WeightsError(
            f"{path}: an adapter of the FaceID kind (with LoRA); base, light, plus and full-face are supported"
        )
    if "ip_adapter.1.to_k_ip.weight" not in state or not any(key.startswith("image_proj.") for key in state):
        raise WeightsError(f"{path}: an IP-Adapter is wanted here; this is {what_is(state)}")
    if not any(key in state for key in ("image_proj.latents", "image_proj.proj.weight", "image_proj.proj.3.weight")):
        raise WeightsError(f"{path}: {what_is(state)}; base, light, plus and full-face are supported")
    return fill(build_adapter, state, path, dtype, device)


def build_adapter(state: State) -> IPAdapter:
    numbers = sorted(int(key.split(".")[1]) for key in state if key.startswith("ip_adapter.") and "to_k_ip" in key)
    shapes = [tuple(state[f"ip_adapter.{n}.to_k_ip.weight"].shape) for n in numbers]
    context_dim = shapes[0][1]
    if "image_proj.proj.3.weight" in state:
        return IPAdapter(PatchProjection(state["image_proj.proj.0.weight"].shape[1], context_dim), shapes)
    if "image_proj.latents" not in state:
        rows, embed_dim = state["image_proj.proj.weight"].shape
        return IPAdapter(ImageProjection(embed_dim, context_dim, rows // context_dim), shapes)
    _, num_tokens, dim = state["image_proj.latents"].shape
    heads = state["image_proj.layers.0.0.to_q.weight"].shape[0] // 64
    depth = configs.count(state, r"image_proj\.layers\.(\d+)\.")
    feature_dim = state["image_proj.proj_in.weight"].shape[1]
    return IPAdapter(Resampler(feature_dim, dim, depth, heads, num_tokens, context_dim), shapes)


def rename_trainer_keys(key: str) -> str:
    """The official trainers save under other names than the released files have."""
    return key.replace("image_proj_model.", "image_proj.", 1).replace("adapter_modules.", "ip_adapter.", 1)


def check_fit(
    adapter: IPAdapter, adapter_path: str | Path, base: Base, encoder: CLIPImage, encoder_path: str | Path
) -> None:
    """Refuse adapter, base and image encoder that do not fit together, naming what would."""
    projection = adapter.image_proj
    base_dim = base.layers[0][1]
    if projection.context_dim != base_dim:
        state = {f"ip_adapter.{k}": v for k, v in adapter.ip_adapter.state_dict().items()}
        raise WeightsError(
            f"{adapter_path}: this adapter is {adapter_base(state)} (tokens of {projection.context_dim}); "
            f"the base {base.path} has tokens of {base_dim}"
        )
    layers = [tuple(ip.to_k_ip.weight.shape) for ip in adapter.ip_adapter.values()]
    if layers != base.layers:
        raise WeightsError(
            f"{adapter_path}: this adapter is for {len(layers)} cross-attention layers "
            f"({layers[0][0]} to {max(layers)[0]} wide), the base {base.path} has {len(base.layers)} "
            f"({base.layers[0][0]} to {max(base.layers)[0]} wide), in another order or number"
        )
    patches = projection.patches
    wants, what = projection.feature_dim, "patch features" if patches else "image embeddings"
    yields = encoder.config.width if patches else encoder.config.projection
    if wants != yields:
        names = {1280: "ViT-H/14", 1664: "ViT-bigG/14", 1024: "ViT-L/14"} if patches else ENCODERS
        name = f"{names[wants]} " if wants in names else ""
        raise WeightsError(
            f"{adapter_path}: this adapter wants {name}{what} of {wants}, "
            f"the image encoder given ({encoder_path}) yields {yields}"
        )


def under(prefix: str, state: State) -> State:
    """The part of a state whose keys start with the prefix, without it, and without what is left aside."""
    return {key[len(prefix) :]: w for key, w in state.items() if key.startswith(prefix) and not IGNORED.match(key)}


def fill(
    make: Callable[[State], nn.Module], state: State, path: str | Path, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Build a model on `meta` and assign it the tensors of a file, one by one brought to dtype and device."""
    model = build(make, state, path)
    for key, value in state.items():
        state[key] = value.to(device, dtype, memory_format=layout(value, device))
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def build(
    make: Callable[[State], nn.Module], state: State, path: str | Path, left: list[str] | None = None
) -> nn.Module:
    """The model that a file's tensors describe, on `meta`; the file is refused unless it fits."""
    try:
        model = on_meta(lambda: make(state))
    except (KeyError, StopIteration, IndexError) as error:
        raise WeightsError(f"{path}: the key {error} is missing; the file is {what_is(state)}") from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: tensors of a wrong shape, no model has them ({error})") from None
    check(model, state, path, left)
    return model


def layout(value: Tensor, device: torch.device | str) -> torch.memory_format:
    """On a CPU convolutions are faster with the channels last; done here it costs no second pass over the weights."""
    last = value.ndim == 4 and torch.device(device).type == "cpu"
    return torch.channels_last if last else torch.preserve_format


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the shapes of its tensors and no memory behind them."""
    with torch.device("meta"), NoInit():
        return make()


class NoInit(TorchFunctionMode):
    """Skips `torch.nn.init`: the values come from a file, and on `meta` drawing them imports seconds' worth of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def check(model: nn.Module, state: State, path: str | Path, left: list[str] | None = None) -> None:
    """Refuse a state that is not exactly the model's, listing both sides."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted] + (left or [])
    wrong = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    sides = [("missing", missing), ("not known", extra), ("of a wrong shape", wrong)]
    if missing or extra or wrong:
        text = "; ".join(f"{len(keys)} {side}: {sample(keys)}" for side, keys in sides if keys)
        raise WeightsError(f"{path}: its keys do not fit a {type(model).__name__}: {text}")


def sample(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
