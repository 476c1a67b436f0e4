"""The processes of one run, as `torchrun` starts them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread

import torch
from torch import distributed

PULSE = 3.0  # seconds from one sign of life to the next
LOST = 40.0  # without any, and a process is taken for dead
GONE = "a process of the run has ended; `resume` goes on behind the newest checkpoint, with fewer if need be"


class Ranks:
    """The processes of one run, as `torchrun` starts them; alone, all of this does nothing.

    Args:
        device: of this process.
        write: shows a line.
    """

    def __init__(self, device: torch.device, write: Callable[[str], object] | None = None):
        self.write = write or (lambda line: sys.stderr.write(line + "\n"))
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # The default of minutes would end a run while one process makes its part of a cache.
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
            self.watch()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """To the screen, once."""
        if self.first:
            self.write(line)

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device if self.device.type == "cuda" else "cpu")
        with self.together():
            distributed.all_reduce(total)
        return total.item() / self.size

    def gather(self, lines: list[str]) -> list[str]:
        """The lines of all processes, on each of them."""
        if self.size == 1:
            return lines
        parts: list[list[str]] = [[] for _ in range(self.size)]
        with self.together():
            distributed.all_gather_object(parts, lines)
        return [line for part in parts for line in part]

    def wait(self) -> None:
        if self.size > 1:
            with self.together():
                distributed.barrier()

    def close(self) -> None:
        if self.size > 1:
            self.wait()
            self.watching = False
            distributed.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Stands around what all processes do together: where one of them has died, the others end with one line."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
                raise
            self.end()

    def watch(self) -> None:
        """Each process shows signs of life to the others: one that is killed may leave them waiting, or its machine is gone."""
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=LOST)
        )
        self.store, self.watching = store, True
        store.set(f"pulse {self.rank}", "0")
        self.wait()

        def live() -> None:
            beat, seen = 0, {}
            while self.watching:
                beat += 1
                try:
                    store.set(f"pulse {self.rank}", str(beat))
                    pulses = [store.get(f"pulse {rank}") for rank in range(self.size)]
                except RuntimeError:  # the process that the others meet at
                    return self.end() if self.watching else None
                for rank, pulse in enumerate(pulses):
                    if seen.get(rank, (None,))[0] != pulse:
                        seen[rank] = pulse, time.monotonic()
                    elif time.monotonic() - seen[rank][1] > LOST and self.watching:
                        self.end()
                time.sleep(PULSE)

        Thread(target=live, daemon=True).start()

    def end(self) -> None:
        """End this process at once, with one line in all."""
        told = False
        with suppress(RuntimeError):  # the store may be gone, too
            told = self.store.add("told", 1) > 1
        if not told:
            self.write(GONE)
        sys.stderr.flush()
        os._exit(2)


class Stop:
    """Turns Ctrl-C and a scheduler's SIGTERM into an end behind the step that is being made, on all ranks at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.asked = ranks, False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.ask)

    def ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:  # asked twice: at once
            raise KeyboardInterrupt
        self.asked = True

    def __bool__(self) -> bool:
        return self.ranks.mean(float(self.asked)) > 0
