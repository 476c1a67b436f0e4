"""Released adapters: which kind a file is, and whether it fits the base and the image encoder."""

import re
from pathlib import Path

import torch

from clip import CLIPImage
from files.faces import FACE_DIM
from files.tensors import State, WeightsError
from ipadapter import FacePlusProjection, FaceProjection, ImageProjection, IPAdapter, PatchProjection, Resampler
from ipadapter.adapter import Projection
from weights.base import Base
from weights.configs import count
from weights.diffusers import read_part
from weights.families import ENCODERS, of_width
from weights.fill import fill, peeled, strangers
from weights.kinds import adapter_base, other_base, what_is


def load_adapter(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> IPAdapter:
    """A released IP-Adapter (.safetensors or .bin), or a trainer's checkpoint; the kind is read from its tensors.

    Base, light, plus, plus-face, full-face, FaceID, FaceID-plus (no tensor tells version 1 from 2: `IPAdapter.tokens` is
    told) and FaceID-portrait, for any base.

    Raises:
        WeightsError: unreadable, another kind of file, or keys missing or left over.
    """
    state = read_part(path)
    if not all(map(PUBLISHED.match, state)):
        state = adapter_alone(path, state)
    if "image_proj.latents" in state:
        check_adapter(path, state)
    try:
        return fill(build_adapter, state, path, dtype, device)
    except WeightsError:
        check_adapter(path, state)
        raise


PUBLISHED = re.compile(r"(image_proj|ip_adapter\.\d+)\.")


def adapter_alone(path: str | Path, state: State) -> State:
    """Under the published names, without what the file holds besides. Raises WeightsError: there is none."""
    state = adapter_names(state)
    check_adapter(path, state)
    return {key: state[key] for key in strangers(state, path)}


def check_adapter(path: str | Path, state: State) -> None:
    """Refuse adapters that are not read here; a Resampler of another kind differs from ours in nothing but its numbers.

    Raises:
        WeightsError: what it is.
    """
    lacks = [part for part in ("ip_adapter.", "image_proj.") if not any(key.startswith(part) for key in state)]
    if len(lacks) == 2 or other_base(state):
        raise WeightsError(f"{path}: an IP-Adapter for SD 1.x, SD 2.x or SDXL is wanted here; this is {what_is(state)}")
    if lacks:
        raise WeightsError(f"{path}: only half of an IP-Adapter, without {lacks[0]}*")
    if not PROJECTIONS.keys() & state.keys():
        raise WeightsError(
            f"{path}: an IP-Adapter whose image projection is none of: base, light, plus, full-face, FaceID, "
            f"FaceID-plus, FaceID-portrait; it is {what_is(state)}"
        )
    if state.get("image_proj.proj_in.weight", torch.empty(0)).shape[1:] == (FACE_DIM,):
        raise WeightsError(
            f"{path}: a Resampler of raw face embeddings (InstantID, the 'unnorm' portrait) is not supported; the other "
            "FaceID adapters are"
        )


def build_adapter(state: State) -> IPAdapter:
    keys = [key for key in state if key.startswith("ip_adapter.") and key.endswith("to_k_ip.weight")]
    shapes = [tuple(state[key].shape) for key in sorted(keys, key=lambda key: int(key.split(".")[1]))]
    rank = state.get("ip_adapter.1.to_q_lora.down.weight")
    make = next(make for key, make in PROJECTIONS.items() if key in state)
    return IPAdapter(make(state, shapes[0][1]), shapes, 0 if rank is None else rank.shape[0])


def plus(state: State, context_dim: int) -> Resampler:
    _, num_tokens, dim = shape(state, "latents")
    feature_dim, depth, heads = perceiver(state)
    return Resampler(feature_dim, dim, depth, heads, num_tokens, context_dim)


def base_or_light(state: State, context_dim: int) -> ImageProjection:
    rows, embed_dim = shape(state, "proj.weight")
    return ImageProjection(embed_dim, context_dim, rows // context_dim)


def full_face(state: State, context_dim: int) -> PatchProjection:
    return PatchProjection(shape(state, "proj.0.weight")[1], context_dim)


def faceid(state: State, context_dim: int) -> FaceProjection | FacePlusProjection:
    face_dim, num_tokens = shape(state, "proj.0.weight")[1], shape(state, "proj.2.weight")[0] // context_dim
    if "image_proj.perceiver_resampler.proj_in.weight" not in state:  # FaceID, portrait
        return FaceProjection(face_dim, context_dim, num_tokens)
    return FacePlusProjection(face_dim, *perceiver(state, "perceiver_resampler."), num_tokens, context_dim)


# By the tensor that tells them, each after those that have it, too.
PROJECTIONS = {
    "image_proj.latents": plus,
    "image_proj.proj.weight": base_or_light,
    "image_proj.proj.3.weight": full_face,
    "image_proj.proj.2.weight": faceid,
}


def perceiver(state: State, prefix: str = "") -> tuple[int, int, int]:
    """Of a Resampler, or of the one in FaceID-plus: the width of the features that it reads, its depth and its heads."""
    depth, heads = count(state, f"image_proj.{prefix}layers."), shape(state, f"{prefix}layers.0.0.to_q.weight")[0] // 64
    return shape(state, f"{prefix}proj_in.weight")[1], depth, heads


def shape(state: State, key: str) -> tuple[int, ...]:
    return tuple(state[f"image_proj.{key}"].shape)


# One processor of diffusers' UNet: where its attention stands, which of the two there it is, its tensor.
PROCESSOR = re.compile(
    r"(?:unet|ip_adapter)\.(?:(down)_blocks\.(\d+)|(up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\."
    r"transformer_blocks\.(\d+)\.attn([12])\.processor\.(to_[kv]_ip\..*|to_\w+_lora\..*)"
)


def adapter_names(state: State) -> State:
    """An adapter under the published names, from what the official trainers save.

    Their checkpoints have the whole UNet beside the adapter; it is left aside. The adapter's layers stand there twice, in
    `adapter_modules` and in the UNet, as the same tensors, and accelerate writes shared tensors to a safetensors file
    but once: under `unet.*.processor`. Then their numbers follow from the order of diffusers' `unet.attn_processors`
    (down, up, middle), in which the trainers number them too.
    """
    state = peeled(state, "image_proj", "ip_adapter.", "adapter_modules.")
    state = {adapter_key(key): value for key, value in state.items()}
    found = {key: match for key in state if (match := PROCESSOR.match(key))}
    inner = {key: value for key, value in state.items() if not key.startswith("unet.") and key not in found}
    if any(key.startswith("ip_adapter.") for key in inner):
        return inner
    places = {key: place(match) for key, match in found.items()}
    order = {where: 2 * i for i, where in enumerate(sorted(set(places.values())))}
    numbers = {key: order[places[key]] + int(match[7]) - 1 for key, match in found.items()}
    return inner | {f"ip_adapter.{numbers[key]}.{match[8]}": state[key] for key, match in found.items()}


def place(match: re.Match) -> tuple[int, ...]:
    """Of a transformer block, as diffusers' UNet lists them: on the way down, on the way up, in the middle."""
    way = 0 if match[1] else 1 if match[3] else 2
    return way, *(int(number or 0) for number in (match[2] or match[4], match[5], match[6]))


def adapter_key(key: str) -> str:
    key = key.replace("image_proj_model.", "image_proj.", 1)
    return key.replace("adapter_modules.", "ip_adapter.", 1)


def check_fit(
    adapter: IPAdapter, adapter_path: str | Path, base: Base, encoder: CLIPImage | None, encoder_path: str | Path | None
) -> None:
    """Refuse adapter, base and image encoder that do not fit together, naming what would.

    Args:
        encoder: None where the adapter reads face embeddings alone.
    """
    projection = adapter.image_proj
    base_dim = base.layers[0][1]
    if projection.context_dim != base_dim:
        raise WeightsError(f"{adapter_path}: {of_other_width(projection.context_dim, base, base_dim)}")
    layers = [tuple(ip.to_k_ip.weight.shape) for ip in adapter.key_values()]
    if layers != base.layers:
        raise WeightsError(f"{adapter_path}: {of_other_layers(layers, base)}")
    if encoder is None:
        return
    yields = encoder.config.width if projection.patches else encoder.config.projection
    if projection.feature_dim != yields:
        raise WeightsError(f"{adapter_path}: {of_other_encoder(projection, encoder_path, yields)}")


def of_other_width(width: int, base: Base, base_width: int) -> str:
    row = of_width(width)
    other = f" (`base` {row.base})" if row else ""
    return (
        f"this adapter is {adapter_base(width)} (tokens of {width}); the base {base.path} is {base.family.name} and has "
        f"tokens of {base_width}: give a base that fits{other}, or an adapter for {base.family.name}"
    )


def of_other_layers(layers: list[tuple[int, int]], base: Base) -> str:
    return (
        f"this adapter is for {len(layers)} cross-attention layers ({layers[0][0]} to {max(layers)[0]} wide), the base "
        f"{base.path} has {len(base.layers)} ({base.layers[0][0]} to {max(base.layers)[0]} wide), in another order or number"
    )


def of_other_encoder(projection: Projection, encoder_path: str | Path, yields: int) -> str:
    wants, patches = projection.feature_dim, projection.patches
    row = next((row for row in ENCODERS if wants == (row.width if patches else row.projection)), None)
    return (
        f"this adapter wants {f'{row.name} ' if row else ''}{'patch features' if patches else 'image embeddings'} of "
        f"{wants}, the image encoder given ({encoder_path}) yields {yields}"
        + (f"; `image_encoder` {row.preset}" if row else "")
    )
