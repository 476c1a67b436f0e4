"""The processes of one run, as `torchrun` starts them."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed


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
        distributed.all_reduce(total)
        return total.item() / self.size

    def gather(self, lines: list[str]) -> list[str]:
        """The lines of all processes, on each of them."""
        if self.size == 1:
            return lines
        parts: list[list[str]] = [[] for _ in range(self.size)]
        distributed.all_gather_object(parts, lines)
        return [line for part in parts for line in part]

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()

    def close(self) -> None:
        if self.size > 1:
            distributed.destroy_process_group()


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
