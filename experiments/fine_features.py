"""Global against fine-grained features: fidelity to the image prompt against diversity between seeds.

python -m experiments.fine_features

The paper's section 4.4.2, at tiny scale: one global embedding as 4 tokens, a Resampler's 16 tokens over the patches, and
every patch a token; the same steps, order and noise for all.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from experiments.lab import Lab, Variant, arguments
from ipadapter import ImageProjection, PatchProjection, Resampler


def made(lab: Lab, name: str, make: Callable[[], nn.Module]) -> Variant:
    return lab.adapter(name, make())


def main() -> None:
    lab = Lab(arguments(__doc__))
    makers = {
        "global, 4 tokens": lambda: ImageProjection(128, 64, num_tokens=4),
        "plus, 16 tokens": lambda: Resampler(128, dim=64, depth=2, heads=1, num_tokens=16, context_dim=64),
        "full, 65 tokens": lambda: PatchProjection(128, 64),
    }
    rows, columns = {}, {}
    for name, make in makers.items():
        rows[name], columns[name] = lab.trial(partial(made, lab, name, make))
    lab.report("fine_features", rows, columns)


if __name__ == "__main__":
    main()
