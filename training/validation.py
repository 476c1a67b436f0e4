"""Of a run under way: what the adapter makes of some image prompts, and whether it reads them."""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn

from generate.models import Models
from generate.picture import decode, denoise
from ipadapter.objective import adapter_loss
from sampler import SAMPLERS, add_noise, guided, noise, velocity
from training.cache import Readable
from training.captions import DataError
from training.features import PROMPTS
from training.pairs import Pair, Pairs
from training.ready import Ready
from training.run import Run
from training.trainer import Trainer

SHOWN = 6  # image prompts that are drawn
MEASURED = 8  # pictures of which the loss is measured
STEPS = 30  # of DDIM
GUIDANCE = 7.5
TIMESTEPS = (100, 300, 500, 700, 900)  # at which the loss is measured


def validation_pictures(pairs: Pairs, name: str, count: int = MEASURED) -> list[Pair]:
    """The first whose pictures can be read. `name`: what was given, for errors."""
    readable = Readable(pairs)
    pictures = (pair for pair, bad in (readable[i] for i in range(len(pairs))) if not bad)
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
            if ready.held_out:
                run.measured(held_out_loss(unet, trainer, ready))
            x = latents(models, unet, trainer, ready)
        run.show(ready.prompts * len(ready.texts), list(decode(models, x)))

    return validate


def latents(models: Models, unet: nn.Module, trainer: Trainer, ready: Ready) -> Tensor:
    """What the adapter makes of the image prompts, beside each of the texts, each time from the seeds 0, 1, ..."""
    count, side, sampler = len(ready.prompts), ready.resolution, SAMPLERS["ddim"]
    start = noise(0, count, side, side).to(trainer.ranks.device)
    sizes = torch.tensor([side, side, 0, 0, side, side], device=start.device).expand(count, -1)
    seen = {key: value[:count] for key, value in ready.seen.items() if key in PROMPTS}
    kept, parts = torch.zeros(count, dtype=torch.bool, device=start.device), []
    for text, scale in ready.texts:
        pair = []
        for features in (seen | text, ready.negative):
            told = {key: value.expand(count, *value.shape[1:]) for key, value in features.items()} | {"sizes": sizes}
            pair.append(trainer.whole.prompt(**trainer.conditions(told, kept, kept), scale=scale))
        with trainer.whole.autocast(start.device):
            predict = guided(unet, *pair, GUIDANCE, models.base.schedule.prediction)
            parts.append(denoise(sampler, predict, start, sampler.levels(models.base.schedule, STEPS)))
    return torch.cat(parts)


def held_out_loss(unet: nn.Module, trainer: Trainer, ready: Ready) -> list[dict]:
    """The mean squared error of what the base predicts, for pictures held out, at fixed timesteps and noise, with no text.

    With the right picture as image prompt, with none, and with the next one's, a stranger's. A gap to none alone may be
    what all the pictures have in common; only a gap to the stranger's means that the image prompt is read.

    Returns:
        For each timestep {"t": t, "right": loss, "none": loss, "stranger": loss}.
    """
    mean, schedule = ready.seen["mean"].float(), trainer.noise_schedule
    eps = noise(0, len(mean), 8 * mean.shape[2], 8 * mean.shape[3]).to(mean)
    kept, rows = torch.zeros(len(mean), dtype=torch.bool, device=mean.device), [{"t": t} for t in TIMESTEPS]
    sizes = {key: value for key, value in ready.seen.items() if key == "sizes"}
    right = {key: value for key, value in ready.seen.items() if key in PROMPTS}
    stranger = {key: value.roll(1, 0) for key, value in right.items()}
    for name, features in {"right": right, "none": {}, "stranger": stranger}.items():
        prompt = trainer.whole.prompt(**trainer.conditions(features | sizes, kept, kept))
        with trainer.whole.autocast(mean.device):
            for row in rows:
                t = torch.full((len(mean),), row["t"], device=mean.device)
                noisy = add_noise(mean, eps, t, schedule).to(trainer.dtype)
                target = eps if schedule.prediction == "eps" else velocity(mean, eps, t, schedule)
                row[name] = adapter_loss(unet, noisy, target, t, prompt).item()
    return rows
