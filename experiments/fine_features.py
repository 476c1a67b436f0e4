"""Global against fine-grained features: fidelity to the image prompt against diversity between seeds.

python -m experiments.fine_features

The paper's section 4.4.2, at tiny scale: one global embedding as 4 tokens, a Resampler's 16 tokens over the patches, and
every patch a token; the same steps, order and noise for all.
"""

from functools import partial

from experiments.lab import Lab, arguments
from ipadapter import ImageProjection, PatchProjection, Resampler


def main() -> None:
    lab = Lab(arguments(__doc__))
    projections = {
        "global, 4 tokens": lambda: ImageProjection(128, 64, num_tokens=4),
        "plus, 16 tokens": lambda: Resampler(128, dim=64, depth=2, heads=1, num_tokens=16, context_dim=64),
        "full, 65 tokens": lambda: PatchProjection(128, 64),
    }
    lab.compare("fine_features", {name: partial(lab.adapter, name, make) for name, make in projections.items()})


if __name__ == "__main__":
    main()
