"""The step of the optimiser, with all its state."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ipadapter.adapter import IPAdapter
from ipadapter.objective import Objective, drops
from sampler import SD, Schedule, add_noise, loss_weight, velocity
from training.chance import draws
from training.features import TEXTS, Features
from training.optimizers import OPTIMIZERS, restored
from training.ranks import Ranks
from unet import told_vector

RATE_SCHEDULES = ("constant", "cosine", "linear")
COUNTS = ("step", "place", "skipped", "in_a_row")  # what the trainer counts


class Trainer:
    """An optimiser on the adapter alone, with drops, accumulation, clipping, mixed precision, EMA; and all that is to resume.

    Args:
        null: features of the empty prompt and of no image, as `Encoders.null` makes them.
        seed: of the samples' noise, timesteps and drops.
        dtype: in which the frozen UNet computes; the adapter and the optimiser stay in fp32.
        loss: "eps", the paper's, "v" or "min-snr", see `loss_weight`; None: the error of what the base predicts. That of v
            says more of large forms, and sooner.
        optimizer: one of `optimizers.OPTIMIZERS`.
        least_t: timesteps are drawn from here to 999.
        noise_offset: how much of the noise is the same over a whole channel: so pictures learn to be dark, or bright.
        drop: probabilities of dropping the text, the image, and both.
        warmup: steps in which the learning rate grows from 0.
        rate_schedule: what it does then, see `rate_at`; `steps`: where it ends.
        clip_grad: largest norm of the gradient; 0: as it comes.
        ema: decay of the averaged weights; 0: none.
        noise_schedule, sinusoids: the base's.
        structure_scale: as in `Objective`.
    """

    def __init__(
        self,
        adapter: IPAdapter,
        unet: nn.Module,
        null: Features,
        ranks: Ranks,
        seed: int,
        dtype: torch.dtype,
        learning_rate: float,
        weight_decay: float,
        loss: str | None,
        drop: tuple[float, float, float],
        warmup: int,
        clip_grad: float,
        ema: float,
        rate_schedule: str = "constant",
        steps: int = 0,
        noise_schedule: Schedule = SD,
        noise_offset: float = 0.0,
        least_t: int = 0,
        sinusoids: int = 0,
        structure_scale: float | None = None,
        optimizer: str = "adamw",
    ):
        self.adapter, self.ranks, self.seed, self.dtype, self.drop = adapter, ranks, seed, dtype, drop
        self.loss, self.sinusoids = loss or noise_schedule.prediction, sinusoids
        self.noise_offset, self.least_t = noise_offset, least_t
        self.clip_grad, self.decay, self.noise_schedule = clip_grad or torch.inf, ema, noise_schedule
        self.rates = partial(rate_at, top=learning_rate, warmup=warmup, schedule=rate_schedule, steps=steps)
        self.null = {key: value.to(ranks.device, dtype) for key, value in null.items()}
        self.whole = Objective(adapter, unet, dtype, structure_scale)
        self.objective = DistributedDataParallel(self.whole) if ranks.size > 1 else self.whole
        self.params = dict(adapter.named_parameters())
        self.averages = {key: p.detach().clone() for key, p in self.params.items()} if ema else {}
        self.optimised_by = optimizer
        self.optimizer = OPTIMIZERS[optimizer]()(self.params.values(), learning_rate, weight_decay=weight_decay)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
        self.rate = 0.0  # the learning rate of the latest step
        self.step = 0  # finished steps, skipped ones among them
        self.place = 0  # finished samples, over all processes
        self.skipped = 0  # steps without a finite loss or gradient
        self.in_a_row = 0  # of those, the latest without a good one between them

    def update(self, parts: list[tuple[list[int], Features]]) -> float:
        """One step on the places and features of this process, in parts that fit into memory; all of one size.

        Returns the loss, the mean over all processes. A step whose loss or gradient is not finite changes nothing.
        """
        self.rate = self.rates(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad()
        total = 0.0
        for i, (places, features) in enumerate(parts):
            alone = self.ranks.size == 1 or i == len(parts) - 1  # the others' gradients are wanted once, at the end
            with nullcontext() if alone else self.objective.no_sync():
                loss = self.objective(**self.noised(places, features)) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        loss = self.ranks.mean(float(total))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.params.values(), self.clip_grad)
        sound = bool(norm.isfinite()) and loss - loss == 0
        if sound:
            self.scaler.step(self.optimizer)
            self.average()
        self.scaler.update()
        self.skipped += not sound
        # In fp16 an infinite gradient is how the scale of the loss finds its place; an infinite loss is not.
        harmless = sound or (self.scaler.is_enabled() and self.scaler.get_scale() > 1 and loss - loss == 0)
        self.in_a_row = 0 if harmless else self.in_a_row + 1
        self.step += 1
        self.place += sum(len(places) for places, _ in parts) * self.ranks.size
        return loss

    def noised(self, places: list[int], features: Features) -> dict[str, Tensor | float]:
        """The arguments of `Objective.forward`, with what is random at these places."""
        features = {key: value.to(self.ranks.device) for key, value in features.items()}
        mean, std = features["mean"].float(), features["std"].float()
        drawn = draws(self.seed, places, mean.shape[1:], self.noise_offset, self.least_t)
        u, t, posterior, noise = (draw.to(mean.device) for draw in drawn)
        x, schedule = mean + std * posterior, self.noise_schedule
        return self.conditions(features, *drops(u, *self.drop)) | {
            "noisy": add_noise(x, noise, t, schedule).to(self.dtype),
            "target": noise if schedule.prediction == "eps" else velocity(x, noise, t, schedule),
            "t": t,
            "weight": loss_weight(t, self.loss, schedule),
        }

    def dropped(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """Which of the samples at these places lose their text, and which their image: two (batch,) bools."""
        u, *_ = draws(self.seed, places, ())  # drawn before all else, whatever the shape
        return drops(u, *self.drop)

    def conditions(self, features: Features, drop_text: Tensor, drop_image: Tensor) -> dict[str, Tensor]:
        """The arguments of `Objective.prompt` of a batch, in which some, (batch,), lose their text, or their image.

        What the features lack is lost to all.
        """
        kept = {}
        for key, none in self.null.items():
            dropped = drop_text if key in TEXTS else drop_image
            kept[key] = torch.where(dropped.view(-1, *[1] * none.ndim), none, features.get(key, none).to(none))
        if "pooled" in kept:
            kept["vector"] = told_vector(kept.pop("pooled"), features["sizes"], self.sinusoids)
        return kept

    @torch.no_grad()
    def average(self) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))  # young averages forget their start sooner
        for key, average in self.averages.items():
            average.lerp_(self.params[key], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[IPAdapter]:
        """The adapter with the weights that the run has learned, for a while."""
        learning = {key: p.detach().clone() for key, p in self.params.items()}
        self.adapter.load_state_dict(self.weights())
        try:
            yield self.adapter
        finally:
            self.adapter.load_state_dict(learning)

    def weights(self) -> dict[str, Tensor]:
        """What the run has learned: the averages if there are any."""
        return self.averages or {key: p.detach() for key, p in self.params.items()}

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """All that is to resume, as tensors and as notes. What is random follows from the place."""
        tensors = {f"adapter.{key}": p.detach() for key, p in self.params.items()}
        tensors |= {f"ema.{key}": average for key, average in self.averages.items()}
        for key, p in self.params.items():
            for name, value in self.optimizer.state[p].items():
                # The levels of 8-bit moments (qmap) are one tensor for all parameters, which a file does not take.
                if value is not None:
                    tensors[f"{name}.{key}"] = value.clone() if name.startswith("qmap") else torch.as_tensor(value)
        numbers = {name: getattr(self, name) for name in COUNTS}
        return tensors, numbers | {"scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], notes: dict) -> None:
        for key, p in self.params.items():
            p.copy_(tensors[f"adapter.{key}"])
            if self.averages:  # a run that begins to average starts from where it is
                self.averages[key].copy_(tensors.get(f"ema.{key}", p))
            self.optimizer.state[p] = restored(self.optimised_by, p, key, tensors)
        for name in COUNTS:
            setattr(self, name, notes[name])
        if notes["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(notes["scaler"])


def rate_at(step: int, top: float, warmup: int, schedule: str, steps: int) -> float:
    """The learning rate of step 0, 1, ...: it grows to `top` in `warmup` steps.

    Then it stays there ("constant"), or falls in a line ("linear") or as half a cosine (arXiv 1608.03983) to 0 behind the
    last of `steps`.
    """
    grown, fallen = min(1.0, (step + 1) / (warmup + 1)), min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    return top * grown * {"constant": 1, "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}[schedule]
