"""The adapter on a frozen base against the whole UNet fine-tuned on image prompts in the place of text.

python -m experiments.finetune

The paper's Table 1 compares with models of the second kind (unCLIP, image variations); here both are trained from the
same tiny base, with the same image projection, steps, order and noise, the UNet at a tenth of the learning rate.
"""

import torch
from torch import Tensor

from experiments.lab import Lab, Variant, arguments, decoupled
from ipadapter import ImageProjection, IPAdapter, Prompt


def instead_of_text(text: Tensor, tokens: Tensor) -> Prompt:
    return Prompt(tokens)


def main() -> None:
    lab = Lab(arguments(__doc__))
    rows, columns = {}, {}
    for name, prompt in (("adapter, base frozen", decoupled), ("UNet fine-tuned", instead_of_text)):
        torch.manual_seed(lab.args.seed)
        unet, projection = lab.base.unet(), ImageProjection(128, 64, num_tokens=4)
        if prompt is decoupled:
            adapter = IPAdapter.for_unet(unet, projection)
            adapter.attach(unet)
            variant, rate = Variant(name, unet, projection, prompt, list(adapter.parameters())), lab.args.learning_rate
        else:
            trained = [*unet.requires_grad_().parameters(), *projection.parameters()]
            variant, rate = Variant(name, unet, projection, prompt, trained), lab.args.learning_rate / 10
        lab.fit(variant, learning_rate=rate)
        y = lab.pictures(variant)
        rows[name] = {"trained": sum(p.numel() for p in variant.trained)} | lab.scores(y)
        columns[name] = y[0]
    lab.report("finetune", rows, columns)


if __name__ == "__main__":
    main()
