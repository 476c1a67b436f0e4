"""A custom base: the adapter on a fine-tuned model that it never saw.

python -m experiments.custom_base --style openmoji

The tiny UNet is fine-tuned on the drawings of one style with their captions, without any adapter; then the bundled
adapter, trained on the original base, prompts both. What is kept of its effect is the part of the gain in CLIP-I
(over an empty prompt, on the same base) that is left on the custom base.
"""

import torch
from tqdm import tqdm

from experiments.lab import BASE_ADAPTER, Lab, Variant, arguments, decoupled, noised
from ipadapter import Prompt
from ipadapter.objective import noise_loss
from training.order import pair_at
from unet import UNet
from weights import load_adapter


def main() -> None:
    style = {"default": "openmoji", "help": "the drawings to fine-tune on (default: %(default)s)"}
    lab = Lab(arguments(__doc__, style=style))
    custom = fine_tuned(lab)
    adapter = load_adapter(BASE_ADAPTER)
    rows, columns = {}, {}
    for name, unet in (("original base", lab.base.unet()), ("custom base", custom)):
        without = Variant(name, unet, adapter.image_proj, lambda text, tokens: Prompt(text))
        with_image = Variant(f"{name}, image prompt", unet, adapter.image_proj, decoupled(adapter))
        for variant in (without, with_image):
            y = lab.pictures(variant)
            rows[variant.name] = lab.scores(y)
            columns[variant.name] = y[0]
    gains = [
        (rows[f"{name}, image prompt"]["CLIP-I"] - rows[name]["CLIP-I"]).mean().item()
        for name in ("original base", "custom base")
    ]
    lab.report("custom_base", rows, columns)
    print(f"gain in CLIP-I by the image prompt: {gains[0]:.3f} and {gains[1]:.3f}: {gains[1] / gains[0]:.0%} is kept")


def fine_tuned(lab: Lab) -> UNet:
    """The base after some hundred steps on one style: eps loss, texts dropped in a tenth of the samples."""
    args, unet = lab.args, lab.base.unet().requires_grad_()
    style = [i for i in range(len(lab.data)) if lab.styles[i] == args.style]
    if not style:
        raise SystemExit(f"--style {args.style}: no such style; there are {', '.join(sorted(set(lab.styles)))}")
    optimizer = torch.optim.AdamW(unet.parameters(), args.learning_rate / 10, weight_decay=0.01)
    bar = tqdm(range(args.steps), desc=f"fine-tuning on {args.style}", unit="step")
    for step in bar:
        places = list(range(step * args.batch_size, (step + 1) * args.batch_size))
        batch = lab.batch([style[pair_at(args.seed, place, len(style))] for place in places])
        x, eps, t, text, _ = noised(batch, lab.null, args.seed, places, (0.1, 0.0, 0.0))
        loss = noise_loss(unet(x, t, Prompt(text)), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return unet.requires_grad_(False)


if __name__ == "__main__":
    main()
