"""From tensors to models: each model is built without memory ("meta") and given the file's tensors.

Every key of a file is used, or stands in a short list of what is left aside; anything else is an error.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from files.errors import Notice
from files.tensors import State, WeightsError
from weights.kinds import what_is
from weights.pages import give_back, give_back_freed

# What checkpoints carry beside the weights: averaged copies, the noise schedule, position counters, the training loss,
# temperatures and masks of text towers, what says that v is predicted.
IGNORED = re.compile(
    r"model_ema\.|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|"
    r"log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|"
    r"posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2|logvar|scale_factor|global_step|"
    r"lvlb_weights|ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas)|denoiser\.sigmas|v_pred)$|(.*\.)?position_ids$|"
    r"(first_stage_model\.)?(loss|model_ema)\.|optimizer_states\.|"
    r"lr_schedulers\.|(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?(logit_scale|attn_mask)$|"
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.((text|visual)_projection\.weight$|vision_model\.)"
)

# Other models that people's files hold besides: of one that is read they are left aside, and that is told.
BESIDE = re.compile(
    r"(safety_checker|embedding_manager|control_model|depth_model|feature_extractor|image_encoder|text_encoder(_2)?|vae|ema)\.|"
    r"lora_(unet|te\d?)_"
)


def peeled(state: State, *roots: str) -> State:
    """Without what somebody has put before all names (`state_dict.`, `net.`): told by where the roots of a model stand."""
    if any(key.startswith(roots) for key in state):
        return state
    wrap = next((key[: at + 1] for key in state for root in roots if (at := key.find(f".{root}")) > 0), "")
    return {key.removeprefix(wrap): w for key, w in state.items()}


def strangers(keys: Iterable[str], path: str | Path) -> list[str]:
    """Those of other models in the file are told in a Notice; the others are returned."""
    of_others = {key: BESIDE.match(key) for key in keys}
    if names := dict.fromkeys(match[0] for match in of_others.values() if match):
        warnings.warn(Notice(f"{path}: other models in it are left aside ({', '.join(names)})"), stacklevel=2)
    return [key for key, match in of_others.items() if not match]


def under(prefix: str, state: State) -> State:
    """The part of a state whose keys start with the prefix, without it, and without what is left aside."""
    return {key[len(prefix) :]: w for key, w in state.items() if key.startswith(prefix) and not IGNORED.match(key)}


def fill(
    make: Callable[[State], nn.Module], state: State, path: str | Path, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Build a model on `meta` and assign it the tensors of a file, one by one brought to dtype and device."""
    model = twin(build(make, state, path))
    give_back_freed()
    for key, value in state.items():
        state[key] = value.to(device, dtype, memory_format=layout(value, device))
        if state[key] is not value:
            give_back(value)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def build(
    make: Callable[[State], nn.Module], state: State, path: str | Path, left: list[str] | None = None
) -> nn.Module:
    """The model that a file's tensors describe, on `meta`; the file is refused unless it fits."""
    try:
        model = on_meta(lambda: make(state))
    except Exception as error:  # noqa: BLE001, of what shapes may be wrong in there is no end
        raise unbuilt(state, path, error) from None
    check(model, state, path, left)
    return model


def unbuilt(state: State, path: str | Path, error: Exception) -> WeightsError:
    """Why no model could be built of a state."""
    if isinstance(error, KeyError):
        return WeightsError(f"{path}: the key {error} is missing; the file is {what_is(state)}")
    why = f" ({error})" if isinstance(error, ValueError) else ""
    return WeightsError(f"{path}: tensors are missing or of a wrong shape{why}; of what it has, it is {what_is(state)}")


def layout(value: Tensor, device: torch.device | str) -> torch.memory_format:
    """On a CPU convolutions are faster with the channels last; done here it costs no second pass over the weights."""
    last = value.ndim == 4 and torch.device(device).type == "cpu"
    return torch.channels_last if last else torch.preserve_format


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the shapes of its tensors and no memory behind them."""
    with torch.device("meta"), NoInit():
        return make()


@lru_cache(maxsize=16)
def blank(kind: type[nn.Module], config: object) -> nn.Module:
    """A model of this config on `meta`, built once: to be looked at, and to take a twin of."""
    return on_meta(lambda: kind(config))


def twin(model: nn.Module) -> nn.Module:
    """Another module of the same tensors, whose submodules are twins, too: a tenth of the time that building takes."""
    other, own = type(model).__new__(type(model)), (dict, OrderedDict)  # in which a module keeps its tensors and parts
    other.__dict__ = {key: value.copy() if type(value) in own else value for key, value in vars(model).items()}
    other._modules = {key: part if part is None else twin(part) for key, part in model._modules.items()}
    return other


class NoInit(TorchFunctionMode):
    """Skips `torch.nn.init`: the values come from a file, and on `meta` drawing them imports seconds' worth of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def check(model: nn.Module, state: State, path: str | Path, left: list[str] | None = None) -> None:
    """Refuse a state that is not exactly the model's, listing both sides."""
    wanted = model.state_dict()
    fits = {key: w.shape for key, w in wanted.items()} == {key: w.shape for key, w in state.items()}
    if left or not fits or not all(w.is_floating_point() for w in state.values()):
        raise WeightsError(f"{path}: its keys do not fit a {type(model).__name__}: {misfit(wanted, state, left or [])}")


def misfit(wanted: State, state: State, left: list[str]) -> str:
    """What is on one side alone, and what differs."""
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted] + left
    wrong = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    whole = [f"{key} ({state[key].dtype})" for key in wanted if key in state and not state[key].is_floating_point()]
    sides = [
        ("missing", missing),
        ("not known", extra),
        ("of a wrong shape", wrong),
        ("of no floating-point numbers", whole),
    ]
    return "; ".join(f"{len(keys)} {side}: {sample(keys)}" for side, keys in sides if keys)


def sample(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
