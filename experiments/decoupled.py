"""Decoupled cross-attention against the simple adapter, whose image tokens join the text tokens in the frozen attention.

python -m experiments.decoupled

The paper's section 4.4.1, at tiny scale: the same image projection, steps, order and noise for both.
"""

import torch
from torch import Tensor

from experiments.lab import Lab, Variant, arguments, decoupled
from ipadapter import ImageProjection, IPAdapter, Prompt


def simple(text: Tensor, tokens: Tensor) -> Prompt:
    return Prompt(torch.cat([text, tokens], dim=1))


def main() -> None:
    lab = Lab(arguments(__doc__))
    rows, columns = {}, {}
    for name, prompt in (("decoupled", decoupled), ("simple", simple)):
        torch.manual_seed(lab.args.seed)
        unet, projection = lab.base.unet(), ImageProjection(128, 64, num_tokens=4)
        trained = projection
        if prompt is decoupled:
            trained = IPAdapter.for_unet(unet, projection)
            trained.attach(unet)
        variant = Variant(name, unet, projection, prompt, list(trained.parameters()))
        lab.fit(variant)
        y = lab.pictures(variant)
        rows[name] = {"trained": sum(p.numel() for p in variant.trained)} | lab.scores(y)
        columns[name] = y[0]
    lab.report("decoupled", rows, columns)


if __name__ == "__main__":
    main()
