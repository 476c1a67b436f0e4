"""ControlNets and T2I-Adapters: the same random weights in ours and in diffusers."""

from dataclasses import replace

import pytest
import torch
from counterparts import randomise, rel
from diffusers import ControlNetModel, ControlNetUnionModel
from diffusers import T2IAdapter as TheirT2IAdapter
from narrow import NARROW_SD2, NARROW_UNET, NARROW_XL
from torch import Tensor, nn

from control import ControlNet, ControlNetUnion, T2IAdapter
from ipadapter import Prompt
from unet import UNetConfig
from weights.configs import encoder_config, t2i_config
from weights.diffusers_names import control_from_diffusers, t2i_from_diffusers
from weights.fill import under

HINT = (3, 8, 16, 24, 32)


def their_controlnet(
    config: UNetConfig, seed: int, depths: list[int] | None = None, kind: type = ControlNetModel, **more
):
    added = {}
    if config.vector_dim:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (config.vector_dim - 32) // 6,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    theirs = kind(
        block_out_channels=config.channels,
        down_block_types=["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in config.down],
        transformer_layers_per_block=depths or [max(max(depths), 1) for depths in config.down],
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.heads or [width // config.head_dim for width in config.channels],
        use_linear_projection=config.linear_proj,
        conditioning_embedding_out_channels=HINT[1:],
        **added,
        **more,
    )
    return randomise(theirs, seed)


def ours_of(theirs: nn.Module) -> ControlNet:
    state = control_from_diffusers(theirs.state_dict())
    config, tasks = encoder_config(state), state.get("task_embedding")
    ours = ControlNet(config, HINT) if tasks is None else ControlNetUnion(config, len(tasks), HINT, sinusoids=8)
    ours.load_state_dict(state, strict=True)
    return ours.requires_grad_(False).eval()


def residuals(found: tuple[list[Tensor], Tensor]) -> list[Tensor]:
    return [*found[0], found[1]]


def close(ours: dict[int, Tensor], theirs: list[Tensor]) -> None:
    assert list(ours) == list(range(len(theirs)))
    assert max(rel(a, b) for a, b in zip(ours.values(), theirs, strict=True)) <= 1e-5


def told(config: UNetConfig, draw, theirs: nn.Module) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What SDXL hears beside the text, as ours and theirs take it."""
    if not config.vector_dim:
        return None, {}
    pooled, sizes = draw(2, 32), torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
    vector = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).view(2, -1)], dim=1)
    return vector, {"text_embeds": pooled, "time_ids": sizes}


NO_TRANSFORMERS = replace(NARROW_XL, down=((0, 0), (0, 0), (0, 0)))
UNION = replace(NARROW_XL, channels=(320, 64, 64))  # theirs knows no other width of the first level
SHAPES = {  # and the depths of diffusers' transformers, where they are not the config's
    "SD 1.x": (NARROW_UNET, None),
    "SD 2.x": (NARROW_SD2, None),
    "SDXL": (NARROW_XL, None),
    "SDXL mid": (NARROW_XL, [0, 0, 1]),
    "SDXL small": (NO_TRANSFORMERS, [0, 0, 0]),
}
T = torch.tensor(500)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_controlnet_is_diffusers_own(shape, draw):
    config, depths = SHAPES[shape]
    theirs = their_controlnet(config, 30, depths)
    ours, x, text, hint = ours_of(theirs), draw(2, 4, 8, 8), draw(2, 77, config.context_dim), draw(1, 3, 64, 64)
    vector, added = told(config, draw, theirs)
    wanted = theirs(x, T, text, hint, 1.0, added_cond_kwargs=added, return_dict=False)
    close(ours(x, T, Prompt(text, vector=vector), *ours.encode(hint)).skips, residuals(wanted))


@pytest.mark.parametrize("task", (0, 5))
def test_a_union_is_diffusers_own(task, draw):
    theirs = their_controlnet(UNION, 31, kind=ControlNetUnionModel)
    ours, x, text, hint = ours_of(theirs), draw(2, 4, 8, 8), draw(2, 77, 96), draw(1, 3, 64, 64)
    vector, added = told(UNION, draw, theirs)
    flags = torch.zeros(2, 6)
    flags[:, task] = 1
    wanted = theirs(
        x, T, text, [torch.cat([hint, hint])], flags, [task], 1.0, added_cond_kwargs=added, return_dict=False
    )
    close(ours(x, T, Prompt(text, vector=vector), *ours.encode(hint, task)).skips, residuals(wanted))


@pytest.mark.parametrize("kind", ("full_adapter", "light_adapter", "full_adapter_xl"))
def test_a_t2i_adapter_is_diffusers_own(kind, draw):
    light, xl = kind == "light_adapter", kind == "full_adapter_xl"
    channels = [32, 64, 96] if light else [32, 64, 96, 96]
    theirs = randomise(TheirT2IAdapter(3, channels, 4 if light else 2, 16 if xl else 8, kind), 32)
    ours = T2IAdapter(t2i_config(state := t2i_from_diffusers(under("adapter.", theirs.state_dict()))))
    ours.load_state_dict(state, strict=True)
    hint = draw(1, 3, 128, 192)
    for a, b in zip(ours.encode(hint), theirs(hint), strict=True):
        assert rel(a, b) <= 1e-5
