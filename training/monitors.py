"""A run in TensorBoard or Weights & Biases, beside its own log.jsonl, where these are installed."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from files.errors import UserError, untrusted


class Monitor(Protocol):
    def numbers(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, picture: Image.Image) -> None: ...

    def close(self) -> None: ...


# What opens one, from the folder of a run, its settings, and the step that it goes on behind.
Opener = Callable[[Path, dict, int], Monitor]


class TensorBoard:
    """Event files in the folder's `tensorboard`; steps behind `step` that lie there are purged."""

    def __init__(self, writer: type, folder: Path, step: int):
        self.writer = writer(str(folder / "tensorboard"), purge_step=step + 1)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project `ip-adapter`, called as the folder; `wandb.txt` there keeps its id, so that it is gone on with."""

    def __init__(self, wandb: object, folder: Path, settings: dict):
        note = folder / "wandb.txt"
        if not note.exists():
            note.write_text(secrets.token_hex(4))
        self.wandb, name = wandb, folder.resolve().name
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        how = {"project": "ip-adapter", "name": name, "dir": str(folder), "id": note.read_text(), "resume": "allow"}
        with untrusted(UserError, "`log` wandb: cannot begin; `wandb login`, or WANDB_MODE=offline, may help"):
            self.run = wandb.init(**how, config=settings)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


def tensorboard() -> Opener:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"`log` tensorboard: not installed ({error}): pip install tensorboard") from None
    return lambda folder, settings, step: TensorBoard(SummaryWriter, folder, step)


def wandb() -> Opener:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"`log` wandb: not installed ({error}): pip install wandb") from None
    return lambda folder, settings, step: WandB(wandb, folder, settings)


# By name, what finds one that is installed, or raises UserError.
MONITORS: dict[str, Callable[[], Opener]] = {"tensorboard": tensorboard, "wandb": wandb}
