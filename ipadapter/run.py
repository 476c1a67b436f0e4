"""The folder of a training run: settings, log, checkpoints, the adapter, pictures. One process writes it.

settings.json             all that the run was started with, and the hashes of the models
log.jsonl                 one object per step: step, loss, lr, seconds, skipped
adapter.safetensors       the newest adapter, in the layout of the released files
checkpoints/00001000.safetensors   the two newest states, complete
validation/00001000.png   the pictures of a validation, side by side; validation.png: prompts, early, later, now
curve.png                 loss against steps
skipped.txt               pairs that could not be used, and why
"""

import json
import math
import time
from pathlib import Path

from PIL import Image

from ipadapter.flags import UserError
from ipadapter.pairs import Pairs
from ipadapter.pictures import curve, save_png, sheet
from ipadapter.trainer import Ranks, Trainer
from weights import WeightsError
from weights.save import read_checked, write, write_text

KEPT = 2  # checkpoints
PATIENCE = 5  # steps in a row without a finite loss


class Run:
    """Args:
    settings: all that the run is started with; those of `identity` must be the same when it goes on.
    resume: whether the folder holds a run to go on with.

    Raises:
        UserError: the folder holds a run and should not, or the other way round, or another run than this.
    """

    def __init__(self, folder: Path, ranks: Ranks, settings: dict, identity: tuple[str, ...], resume: bool):
        self.folder, self.ranks, self.settings = folder, ranks, settings
        self.skipped: list[str] = []  # why pairs could not be used, since it was last written down
        note = folder / "settings.json"
        if note.exists() and not resume:
            raise UserError(
                f"--output {folder}: holds a run already; go on with it by --resume, or name another folder"
            )
        if resume and not note.exists():
            raise UserError(f"--resume: --output {folder} holds no run to go on with")
        if resume:
            before = json.loads(note.read_text())
            for key in identity:
                if (old := before.get(key)) != (new := json.loads(json.dumps(settings.get(key)))):
                    raise UserError(f"--resume: the run in {folder} has another {key} ({old}; now {new})")

    def open(self, trainer: Trainer, pairs: Pairs, resume: bool) -> None:
        """Begin, or go on from the newest checkpoint that is whole."""
        self.trainer, self.seconds, self.losses = trainer, 0.0, []
        if resume:
            self.restore()
        if self.ranks.first:
            for folder in ("checkpoints", "validation"):
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "settings.json", json.dumps(self.settings, indent=1, default=str))
            done = [line for line in self.log_lines() if line["step"] <= trainer.step]
            write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in done))
            self.losses = [math.nan if line["loss"] is None else line["loss"] for line in done]
            self.file = (self.folder / "log.jsonl").open("a")
            if not resume:
                write_text(self.folder / "skipped.txt", "".join(f"{line}\n" for line in pairs.skipped))
        self.began = time.monotonic() - self.seconds

    def restore(self) -> None:
        found = sorted((self.folder / "checkpoints").glob("*.safetensors"), reverse=True)
        for path in found:
            try:
                tensors, notes = read_checked(path)
            except WeightsError as error:
                self.ranks.say(f"{error}; going on from the checkpoint before it")
                continue
            self.trainer.load_state(tensors, notes)
            self.seconds = notes["seconds"]
            return
        if found:
            raise UserError(f"--resume: no checkpoint in {self.folder / 'checkpoints'} is whole")
        self.ranks.say(f"{self.folder}: stopped before its first checkpoint; beginning anew")

    def log_lines(self) -> list[dict]:
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut short

    def log(self, loss: float) -> None:
        """Write down a step.

        Raises:
            UserError: too many steps in a row without a finite loss; the last checkpoint is from before them.
        """
        trainer = self.trainer
        if self.ranks.first:
            self.losses.append(loss)
            line = {"step": trainer.step, "loss": loss if math.isfinite(loss) else None, "lr": trainer.rate}
            line |= {"seconds": round(time.monotonic() - self.began, 3), "skipped": trainer.skipped}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if trainer.in_a_row >= PATIENCE:
            raise UserError(
                f"the loss is {loss} at step {trainer.step}, for the {PATIENCE}th time in a row: stopped. The state before "
                f"is kept in {self.folder / 'checkpoints'}; try a smaller --learning-rate, --clip-grad 1 or --dtype bfloat16"
            )

    @property
    def smooth(self) -> float:
        recent = [loss for loss in self.losses[-20:] if math.isfinite(loss)]
        return sum(recent) / len(recent) if recent else 0.0

    def save(self) -> None:
        """A checkpoint, whole or not at all, and the adapter; the oldest checkpoint goes."""
        skipped, self.skipped = self.ranks.gather(self.skipped), []
        if not self.ranks.first or self.trainer.in_a_row:  # a state in doubt must not push out a good one
            return
        tensors, notes = self.trainer.state()
        folder = self.folder / "checkpoints"
        write(
            folder / f"{self.trainer.step:08d}.safetensors", tensors, notes | {"seconds": time.monotonic() - self.began}
        )
        write(self.folder / "adapter.safetensors", {k: v.half() for k, v in self.trainer.weights().items()})
        for old in sorted(folder.glob("*.safetensors"))[:-KEPT]:
            old.unlink()
        with (self.folder / "skipped.txt").open("a") as file:
            file.writelines(f"{line}\n" for line in skipped)

    def show(self, prompts: list[Image.Image], pictures: list[Image.Image]) -> None:
        """Keep the pictures of a validation, and lay the prompts beside what was made early, later and now."""
        width, height = pictures[0].size
        strip = Image.new("RGB", (width * len(pictures), height))
        for i, picture in enumerate(pictures):
            strip.paste(picture, (i * width, 0))
        save_png(strip, self.folder / "validation" / f"{self.trainer.step:08d}.png")
        strips = sorted((self.folder / "validation").glob("*.png"))
        chosen = [strips[i] for i in sorted({0, len(strips) // 2, len(strips) - 1})]
        columns = []
        for path in chosen:
            with Image.open(path) as whole:
                columns.append([whole.crop((i * width, 0, (i + 1) * width, height)) for i in range(len(pictures))])
        titles = ["image prompt", *(f"step {int(path.stem):,}" for path in chosen)]
        save_png(
            sheet(list(zip(prompts, *columns, strict=True)), titles, side=max(width, 128)),
            self.folder / "validation.png",
        )

    def close(self) -> None:
        """Draw the loss curve."""
        if self.ranks.first:
            self.file.close()
            if self.losses:
                save_png(curve(self.losses, "steps", "loss"), self.folder / "curve.png")
