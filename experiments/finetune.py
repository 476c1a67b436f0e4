"""The adapter on a frozen base against the whole UNet fine-tuned on image prompts in the place of text.

python -m experiments.finetune

The paper's Table 1 compares with models of the second kind (unCLIP, image variations); here both are trained from the
same tiny base, with the same image projection, steps, order and noise, the UNet at a tenth of the learning rate.
"""

from torch import Tensor

from experiments.lab import Lab, Variant, arguments
from ipadapter import ImageProjection, Prompt


def instead_of_text(text: Tensor, tokens: Tensor) -> Prompt:
    return Prompt(tokens)


def main() -> None:
    lab = Lab(arguments(__doc__))

    def adapter() -> Variant:
        return lab.adapter("adapter, base frozen", lambda: ImageProjection(128, 64, num_tokens=4))

    def fine_tuned() -> Variant:
        projection, unet = ImageProjection(128, 64, num_tokens=4), lab.base.unet().requires_grad_()
        trained = [*unet.parameters(), *projection.parameters()]
        return Variant("UNet fine-tuned", unet, projection, instead_of_text, trained, lab.args.learning_rate / 10)

    lab.compare("finetune", {"adapter, base frozen": adapter, "UNet fine-tuned": fine_tuned})


if __name__ == "__main__":
    main()
