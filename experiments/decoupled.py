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
    rows, columns = {}, {}
    for name in ("decoupled", "simple"):
        torch.manual_seed(lab.args.seed)
        projection = ImageProjection(128, 64, num_tokens=4)
        if name == "decoupled":
            variant = lab.adapter(name, projection)
        else:
            variant = Variant(name, lab.base.unet(), projection, simple, list(projection.parameters()))
        rows[name], columns[name] = lab.trial(variant)
    lab.report("decoupled", rows, columns)


if __name__ == "__main__":
    main()
