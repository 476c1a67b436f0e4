"""Decoupled cross-attention against the simple adapter, whose image tokens join the text tokens in the frozen attention.

python -m experiments.decoupled

The paper's section 4.4.1, at tiny scale: the same image projection, steps, order and noise for both.
"""

import torch
from torch import Tensor

from experiments.lab import Lab, Variant, arguments
from ipadapter import ImageProjection, Prompt


def simple(text: Tensor, tokens: Tensor) -> Prompt:
    return Prompt(torch.cat([text, tokens], dim=1))


def main() -> None:
    lab = Lab(arguments(__doc__))

    def concatenated() -> Variant:
        projection = ImageProjection(128, 64, num_tokens=4)
        return Variant("simple", lab.base.unet(), projection, simple, list(projection.parameters()))

    def decoupled() -> Variant:
        return lab.adapter("decoupled", lambda: ImageProjection(128, 64, num_tokens=4))

    lab.compare("decoupled", {"decoupled": decoupled, "simple": concatenated})


if __name__ == "__main__":
    main()
