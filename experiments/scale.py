"""The scale from 0 to 1: how much a picture follows the image prompt, and how much the text beside it.

python -m experiments.scale

The bundled base adapter; each unseen drawing as image prompt beside the caption of the next one. At scale 0 the pictures must
equal the base model's, bit for bit; the experiment stops if they do not.
"""

import torch

from experiments.lab import BASE_ADAPTER, Lab, Variant, arguments, decoupled
from ipadapter import Prompt
from weights import load_adapter


def main() -> None:
    lab = Lab(arguments(__doc__))
    texts = [lab.captions[(i + 1) % len(lab.captions)] for i in range(len(lab.captions))]
    unet, adapter = lab.base.unet(), load_adapter(BASE_ADAPTER)
    rows, columns = {}, {}
    for scale in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        variant = Variant(f"scale {scale:g}", unet, adapter.image_proj, decoupled(adapter, scale))
        y = lab.pictures(variant, texts)
        if scale == 0:
            base = Variant("base", lab.base.unet(), adapter.image_proj, lambda text, tokens: Prompt(text))
            if not torch.equal(lab.pictures(base, texts), y):
                raise SystemExit("at scale 0 the pictures differ from the base model's")
        rows[variant.name] = lab.scores(y, texts)
        columns[variant.name] = y[0]
    lab.report("scale", rows, columns)


if __name__ == "__main__":
    main()
