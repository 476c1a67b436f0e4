"""Pictures of a run under way: what the adapter makes of some image prompts."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import nn

from generate.models import Models
from generate.picture import decode, denoise
from ipadapter import Prompt
from sampler import SAMPLERS, guided, noise
from training.cache import Readable
from training.pairs import DataError, Pairs
from training.ready import Ready
from training.trainer import Trainer

SHOWN = 6  # image prompts
STEPS = 30  # of DDIM
GUIDANCE = 7.5


def validation_prompts(pairs: Pairs, name: str) -> list[Image.Image]:
    """The image prompts that are drawn now and then: the first readable pictures. `name`: what was given, for errors."""
    found, readable = [], Readable(pairs)
    for i in range(len(pairs)):
        pair, bad = readable[i]
        found += [] if bad else [pair.image]
        if len(found) == SHOWN:
            break
    if not found:
        raise DataError(f"{name}: no picture in it can be read")
    return found


@torch.no_grad()
def validate(
    models: Models,
    unet: nn.Module,
    trainer: Trainer,
    ready: Ready,
    resolution: int,
    on_step: Callable[[], object] = lambda: None,
) -> list[Image.Image]:
    """What the adapter as it now is makes of the image prompts, with no text, at scale 1, from the seeds 0, 1, ..."""
    device, count, sampler = trainer.ranks.device, len(ready.prompts), SAMPLERS["ddim"]
    with (
        trainer.averaged() as adapter,
        torch.autocast(device.type, models.dtype, enabled=models.dtype != torch.float32),
    ):
        text = trainer.null["text"].expand(count, -1, -1)
        tokens = adapter.image_proj(ready.prompt_features.float())
        nothing = adapter.image_proj(trainer.null["image"][None].float()).expand_as(tokens)
        prompt, null = (Prompt(text, (adapter.prompt(t),)) for t in (tokens, nothing))
        predict = guided(unet, prompt, null, GUIDANCE, models.base.schedule.prediction)
        start = noise(0, count, resolution, resolution).to(device)
        x = denoise(sampler, predict, start, sampler.levels(models.base.schedule, STEPS), on_step=on_step)
    return list(decode(models, x))
