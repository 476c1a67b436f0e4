"""The adapter on a frozen base against the whole UNet fine-tuned on image prompts in the place of text.

python -m experiments.finetune

The paper's Table 1 compares with models of the second kind (unCLIP, image variations); here both are trained from the
same tiny base, with the same image projection, steps, order and noise, the UNet at a tenth of the learning rate.
"""

import torch
from torch import Tensor

from experiments.lab import Lab, Variant, arguments
from ipadapter import ImageProjection, Prompt


def instead_of_text(text: Tensor, tokens: Tensor) -> Prompt:
    return Prompt(tokens)


def main() -> None:
    lab = Lab(arguments(__doc__))
    rows, columns = {}, {}
    for name in ("adapter, base frozen", "UNet fine-tuned"):
        torch.manual_seed(lab.args.seed)
        projection, rate = ImageProjection(128, 64, num_tokens=4), lab.args.learning_rate
        if name == "UNet fine-tuned":
            unet, rate = lab.base.unet().requires_grad_(), rate / 10
            trained = [*unet.parameters(), *projection.parameters()]
            variant = Variant(name, unet, projection, instead_of_text, trained)
        else:
            variant = lab.adapter(name, projection)
        rows[name], columns[name] = lab.trial(variant, rate)
    lab.report("finetune", rows, columns)


if __name__ == "__main__":
    main()
