"""The loop of a training run. Whoever calls it owns the progress bar."""

from collections.abc import Callable, Iterator
from itertools import islice

from torch.utils.data import DataLoader

from training.cache import deaf
from training.order import Places, places, stack
from training.ranks import Stop
from training.ready import Ready
from training.run import Run
from training.trainer import Trainer


def training(
    trainer: Trainer,
    run: Run,
    ready: Ready,
    # Of the whole run, those before it was resumed among them.
    steps: int,
    # Pairs to a batch, of each process.
    batch_size: int,
    # Batches to a step.
    accumulation: int = 1,
    # Processes that read pairs.
    workers: int = 0,
    # Whether pictures are cropped anywhere, and flipped at half of their places.
    random_crop: bool = False,
    flip: bool = False,
    # Steps from checkpoint to checkpoint.
    save_every: int = 1000,
    # Steps from validation to validation; 0: none.
    validate_every: int = 1000,
    # Draws and measures how far it has come; called by the process that writes.
    validate: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Train from where the trainer is, yielding the number of each finished step; the run's folder is kept up to date.

    A signal to stop (Ctrl-C, SIGTERM) ends it behind the step that is being made, with a checkpoint.

    Raises:
        UserError: too many steps in a row without a finite loss.
    """
    ranks, stop = trainer.ranks, Stop(trainer.ranks)
    if ready.buckets:
        trainer.place = ready.buckets.whole(trainer.place)
    order = places(trainer.place, (steps - trainer.step) * accumulation, batch_size, ranks.rank, ranks.size)
    drawn = Places(ready.source, trainer.seed, ready.references, ready.buckets, random_crop, flip)
    batches = iter(DataLoader(drawn, 1, None, None, order, workers, stack, worker_init_fn=deaf))
    every = validate_every if ready.prompts else 0

    def due() -> bool:
        return every > 0 and (trainer.step % every == 0 or trainer.step == steps)

    if trainer.step and due() and not run.shown():  # killed between a checkpoint and its validation
        validate()
    while trainer.step < steps and not stop:
        parts = []
        for at, pairs_or_features, bad in islice(batches, accumulation):
            parts.append((at, ready.encode(pairs_or_features, *trainer.dropped(at))))
            run.skipped += bad
        with ranks.together():
            loss = trainer.update(parts)
        run.log(loss)
        yield trainer.step
        if trainer.step % save_every == 0 or trainer.step == steps:
            run.save()
        if due():
            validate()
    if trainer.step < steps:
        run.save()
    run.close()
