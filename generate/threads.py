"""How many threads a model is worth on a CPU.

Threads wait for each other at every operation, spinning. In a small model there are thousands of tiny ones: the wait costs
more than the help, and beside another busy process many times more (`python -m benchmarks.neighbour`).
"""

import os

import torch

SMALL = 128  # channels of the widest attention layer, up to which one thread is quicker
usual = ours = torch.get_num_threads()


def suit(widest: int, device: torch.device) -> None:
    """Use one thread for a small model, and as many as before for a large one.

    Left alone is what a user has said, by OMP_NUM_THREADS or `torch.set_num_threads`.
    """
    global ours
    said = "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != ours
    if device.type == "cpu" and not said:
        ours = 1 if widest <= SMALL else usual
        torch.set_num_threads(ours)
