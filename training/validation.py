"""Of a run under way: what the adapter makes of some image prompts, and whether it reads them."""

from collections.abc import Callable
from itertools import islice

import torch
from PIL import Image
from torch import Tensor, nn

from generate.models import Models
from generate.picture import decode, denoise
from ipadapter import Prompt
from ipadapter.objective import adapter_loss
from sampler import SAMPLERS, add_noise, guided, noise
from training.cache import Readable
from training.captions import DataError
from training.pairs import Pairs
from training.ready import Ready
from training.run import Run
from training.trainer import Trainer

SHOWN = 6  # image prompts that are drawn
MEASURED = 8  # pictures of which the loss is measured
STEPS = 30  # of DDIM
GUIDANCE = 7.5
TIMESTEPS = (100, 300, 500, 700, 900)  # at which the loss is measured


def validation_pictures(pairs: Pairs, name: str, count: int = MEASURED) -> list[Image.Image]:
    """The first readable pictures. `name`: what was given, for errors."""
    readable = Readable(pairs)
    pictures = (pair.image for pair, bad in (readable[i] for i in range(len(pairs))) if not bad)
    found = list(islice(pictures, count))
    if not found:
        raise DataError(f"{name}: no picture in it can be read")
    return found


def validation(models: Models, unet: nn.Module, trainer: Trainer, ready: Ready, run: Run) -> Callable[[], None]:
    """What is to be done now and then: pictures are drawn, and the loss of pictures held out is measured.

    `unet`: the frozen one, not compiled: its batches here are of other sizes.
    """

    @torch.no_grad()
    def validate() -> None:
        with trainer.averaged():
            if len(ready.held_out.get("mean", ())) > 1:
                run.measured(held_out_loss(unet, trainer, ready))
            x = latents(models, unet, trainer, ready)
        run.show(ready.prompts, list(decode(models, x)))

    return validate


def autocast(trainer: Trainer) -> torch.autocast:
    """As in training: UNet, keys and values are computed in the dtype of the frozen parts, the projection in fp32."""
    return torch.autocast(trainer.ranks.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32)


def latents(models: Models, unet: nn.Module, trainer: Trainer, ready: Ready) -> Tensor:
    """What the adapter makes of the image prompts, with no text, at scale 1, from the seeds 0, 1, ..."""
    adapter, count, sampler = trainer.adapter, len(ready.prompts), SAMPLERS["ddim"]
    text = trainer.null["text"].expand(count, -1, -1)
    tokens = adapter.image_proj(ready.prompt_features.float())
    nothing = adapter.image_proj(trainer.null["image"][None].float()).expand_as(tokens)
    start = noise(0, count, ready.resolution, ready.resolution).to(trainer.ranks.device)
    with autocast(trainer):
        prompt, null = (Prompt(text, (adapter.prompt(t),)) for t in (tokens, nothing))
        predict = guided(unet, prompt, null, GUIDANCE, models.base.schedule.prediction)
        return denoise(sampler, predict, start, sampler.levels(models.base.schedule, STEPS))


def held_out_loss(unet: nn.Module, trainer: Trainer, ready: Ready) -> list[dict]:
    """The mean squared error of the noise for pictures held out, at fixed timesteps and noise, with no text.

    With the right picture as image prompt, with none, and with the next one's, a stranger's. A gap to none alone may be
    what all the pictures have in common; only a gap to the stranger's means that the image prompt is read.

    Returns:
        For each timestep {"t": t, "right": loss, "none": loss, "stranger": loss}.
    """
    adapter, mean, image = trainer.adapter, ready.held_out["mean"].float(), ready.held_out["image"].float()
    eps = noise(0, len(mean), 8 * mean.shape[2], 8 * mean.shape[3]).to(mean)
    text, none = trainer.null["text"].expand(len(mean), -1, -1), trainer.null["image"].float().expand_as(image)
    rows = [{"t": t} for t in TIMESTEPS]
    for name, features in {"right": image, "none": none, "stranger": image.roll(1, 0)}.items():
        tokens = adapter.image_proj(features)
        with autocast(trainer):
            prompt = Prompt(text, (adapter.prompt(tokens),))
            for row in rows:
                t = torch.full((len(mean),), row["t"], device=mean.device)
                noisy = add_noise(mean, eps, t, trainer.noise_schedule).to(trainer.dtype)
                row[name] = adapter_loss(unet, noisy, eps, t, prompt).item()
    return rows
