"""The folder of a training run: settings, log, checkpoints, the adapter, pictures. One process writes it.

settings.json             all that the run was started with, and the hashes of the models
log.jsonl                 one object per step: step, loss, lr, seconds, skipped; and of each validation with pictures
                          held out: step, held_out {right, none, stranger}, levels [{t, right, none, stranger}, ...]
adapter.safetensors       the newest adapter, in the layout of the released files
checkpoints/00001000.safetensors   the two newest states, complete
validation/00001000.png   the pictures of a validation, side by side; validation.png: prompts, early, later, now
curve.png                 loss against steps, as of the newest checkpoint; below it the loss of pictures held out
skipped.txt               pairs that could not be used, and why
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from files.errors import UserError
from files.pictures import save_picture
from files.sheets import curve, plot, sheet, stacked
from files.tensors import WeightsError
from files.whole import read_checked, write, write_text
from training.monitors import Monitor, Opener
from training.pairs import Pairs
from training.ranks import Ranks
from training.trainer import Trainer

KEPT = 2  # checkpoints
PATIENCE = 5  # steps in a row without a finite loss


def stored_settings(folder: Path) -> dict:
    """Of the run in a folder, {} without one. Raises UserError."""
    path = folder / "settings.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError, OSError):
        raise UserError(f"{path}: damaged; the run cannot be gone on with") from None


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder with a run that is not to be gone on with, or without one. One that made no step is none.

    Raises:
        UserError
    """
    log = folder / "log.jsonl"
    begun = (log.exists() and log.stat().st_size > 0) or saved(folder)
    if begun and not resume:
        raise UserError(f"`output` {folder}: holds a run already; go on with it by `resume`, or name another folder")
    if resume and not (folder / "settings.json").exists():
        raise UserError(f"`resume`: `output` {folder} holds no run to go on with")


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest first."""
    return sorted((folder / "checkpoints").glob("*.safetensors"), reverse=True)


class Run:
    """A run and its folder.

    Args:
        settings: all that the run is started with; those of `identity` must be the same when it goes on.
        resume: whether the folder holds a run to go on with.
        monitors: where numbers and pictures go beside the folder.

    Raises:
        UserError: the folder holds another run than this.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        settings: dict,
        identity: tuple[str, ...],
        resume: bool,
        monitors: Sequence[Opener] = (),
    ):
        self.folder, self.ranks, self.settings, self.openers = folder, ranks, settings, monitors
        self.skipped: list[str] = []  # why pairs could not be used, since it was last written down
        self.told: set[str] = set()  # what was written down of that
        before = {"optimizer": "adamw"} | stored_settings(folder) if resume else {}  # once there was no other
        for key in identity if resume else ():
            if (old := before.get(key)) != (new := json.loads(json.dumps(settings.get(key)))):
                raise UserError(f"`resume`: the run in {folder} has another {key} ({old}; now {new})")

    def open(self, trainer: Trainer, pairs: Pairs, resume: bool) -> None:
        """Begin, or go on from the newest checkpoint that is whole.

        Raises:
            UserError: the folder cannot be written to; no checkpoint is whole; the run is behind its last step already.
        """
        self.trainer, self.seconds, self.losses, self.saved = trainer, 0.0, [], 0
        self.held_out: dict[int, dict] = {}  # step -> mean losses
        self.monitors: list[Monitor] = []
        if resume:
            self.restore()
            if trainer.step > self.settings["steps"]:
                raise UserError(
                    f"`steps` {self.settings['steps']}: the run in {self.folder} is at step {trainer.step} already"
                )
        if self.ranks.first:
            try:
                for folder in ("checkpoints", "validation"):
                    (self.folder / folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"`output` {self.folder}: cannot write there ({error.strerror})") from None
            self.monitors = [opener(self.folder, self.settings, trainer.step) for opener in self.openers]
            write_text(self.folder / "settings.json", json.dumps(self.settings, indent=1, default=str))
            done = [line for line in self.log_lines() if line["step"] <= trainer.step]
            write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in done))
            self.losses = [math.nan if line["loss"] is None else line["loss"] for line in done if "loss" in line]
            self.held_out = {line["step"]: line["held_out"] for line in done if "held_out" in line}
            self.file = (self.folder / "log.jsonl").open("a")
            if not resume:
                more = pairs.skipped_count - len(pairs.skipped)
                lines = [*pairs.skipped, f"and {more} more"] if more else pairs.skipped
                write_text(self.folder / "skipped.txt", "".join(f"{line}\n" for line in lines))
        self.began = time.monotonic() - self.seconds

    def restore(self) -> None:
        found = saved(self.folder)
        for path in found:
            try:
                tensors, notes = read_checked(path)
            except WeightsError as error:
                self.ranks.say(f"{error}; going on from the checkpoint before it")
                continue
            self.trainer.load_state(tensors, notes)
            self.seconds, self.saved = notes["seconds"], notes["step"]
            break
        if found and not self.saved:
            raise UserError(f"`resume`: no checkpoint in {self.folder / 'checkpoints'} is whole")
        if not found:
            self.ranks.say(f"{self.folder}: stopped before its first checkpoint; beginning anew")
        if len(set(self.ranks.gather([str(self.saved)]))) > 1:
            raise UserError(
                f"`resume`: the processes see different checkpoints in {self.folder}; do they share the disk?"
            )

    def log_lines(self) -> list[dict]:
        path = self.folder / "log.jsonl"
        found = []
        with suppress(ValueError):  # the last lines may be cut short or damaged, when the machine went down
            for line in path.read_text().splitlines() if path.exists() else []:
                found.append(json.loads(line))
        return found

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
            self.write(line)
            if math.isfinite(loss):
                self.monitor({"loss": loss, "lr": trainer.rate})
        if trainer.in_a_row >= PATIENCE:
            raise UserError(
                f"the loss is {loss} at step {trainer.step}, for the {PATIENCE}th time in a row: stopped. The state before "
                f"is kept in {self.folder / 'checkpoints'}; try a smaller `learning_rate`, `clip_grad` 1 or `dtype` bfloat16"
            )

    def measured(self, levels: list[dict]) -> None:
        """Write down the loss of pictures held out, as `validation.held_out_loss` gives it."""
        step, names = self.trainer.step, ("right", "none", "stranger")
        found = {name: sum(level[name] for level in levels) / len(levels) for name in names}
        if step not in self.held_out:
            self.held_out[step] = found
            self.write({"step": step, "held_out": found, "levels": levels})
            self.monitor({f"held_out/{name}": value for name, value in found.items()})
        right, none, stranger = (found[name] for name in names)
        gaps = f"{none - right:+.4f} with none, {stranger - right:+.4f} with a stranger's"
        self.ranks.say(f"step {step:,}: held-out loss {right:.4f} with the right picture, {gaps}")

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def monitor(self, values: dict[str, float]) -> None:
        for monitor in self.monitors:
            monitor.numbers(self.trainer.step, values)

    @property
    def smooth(self) -> float:
        recent = [loss for loss in self.losses[-20:] if math.isfinite(loss)]
        return sum(recent) / len(recent) if recent else 0.0

    def save(self) -> None:
        """A checkpoint, whole or not at all, and the adapter; the oldest checkpoint goes."""
        if self.trainer.in_a_row:  # a state in doubt must not push out a good one
            return
        skipped, self.skipped = self.ranks.gather(self.skipped), []
        self.saved = self.trainer.step
        if not self.ranks.first:
            return
        tensors, notes = self.trainer.state()
        folder = self.folder / "checkpoints"
        write(
            folder / f"{self.trainer.step:08d}.safetensors", tensors, notes | {"seconds": time.monotonic() - self.began}
        )
        write(self.folder / "adapter.safetensors", {k: v.half() for k, v in self.trainer.weights().items()})
        for old in saved(self.folder)[KEPT:]:
            old.unlink()
        with (self.folder / "skipped.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in dict.fromkeys(skipped) if line not in self.told)
        self.told.update(skipped)
        self.draw()

    def show(self, prompts: list[Image.Image], pictures: list[Image.Image]) -> None:
        """Keep the pictures of a validation, and lay the prompts beside what was made early, later and now."""
        width, height = pictures[0].size
        strip = Image.new("RGB", (width * len(pictures), height))
        for i, picture in enumerate(pictures):
            strip.paste(picture, (i * width, 0))
        save_picture(strip, self.folder / "validation" / f"{self.trainer.step:08d}.png")
        strips = sorted((self.folder / "validation").glob("*.png"))
        chosen = [strips[i] for i in sorted({0, len(strips) // 2, len(strips) - 1})]
        columns = []
        for path in chosen:
            with Image.open(path) as whole:
                columns.append([whole.crop((i * width, 0, (i + 1) * width, height)) for i in range(len(pictures))])
        titles = ["image prompt", *(f"step {int(path.stem):,}" for path in chosen)]
        page = sheet(list(zip(prompts, *columns, strict=True)), titles, side=max(width, 128))
        save_picture(page, self.folder / "validation.png")
        for monitor in self.monitors:
            monitor.picture(self.trainer.step, "validation", page)
        self.draw()

    def shown(self) -> bool:
        """Whether the pictures of this step are there."""
        return (self.folder / "validation" / f"{self.trainer.step:08d}.png").exists()

    def draw(self) -> None:
        """The curve of the loss, and that of pictures held out."""
        names = {"right": "right picture", "none": "none", "stranger": "a stranger's"}
        lines = {name: [(step, found[key]) for step, found in self.held_out.items()] for key, name in names.items()}
        pages = [curve(self.losses, "steps", "loss")] if self.losses else []
        pages += [plot(lines, "steps", "loss of pictures held out")] if self.held_out else []
        if pages:
            save_picture(stacked(pages), self.folder / "curve.png")

    def close(self) -> None:
        """The last curve; nothing is written behind this."""
        if self.ranks.first:
            self.draw()
            self.file.close()
            for monitor in self.monitors:
                monitor.close()
