"""How well the tiny nets for structure hold it, and what is left of the image prompt, on drawings that nothing has seen.

python -m tiny.measure_control
python -m tiny.measure_control --kind silhouette

Each picture follows the structure of one drawing, and the look of the next one as image prompt, without text.
Counted is how far the edges of the result are those of the hint, within one pixel (F1, of Canny's edges), how far its
silhouette is (shared area over joint area), and how often the result is nearest to its own image prompt, of all of them.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from clip import tokenize
from control import Control, controlled
from files.pictures import save_picture, to_pil
from files.sheets import sheet
from ipadapter import Prompt
from tiny import drawings
from tiny.measure import image_tokens, pictures, retrieval, thumbnail
from tiny.train_control import HINTS
from tiny.trainer import BASE, ENCODER, WEIGHTS
from unet import UNet
from weights import load_adapter, load_image_encoder, open_base
from weights.control import Net, load_control
from weights.hub import cached
from weights.presets import PRESETS


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=HINTS, default="edges")
    parser.add_argument("--net", type=Path, help="a file (default: the bundled one)")
    parser.add_argument("--count", type=int, default=100, help="unseen drawings (default: %(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0], help="of the net (default: 0 1)")
    parser.add_argument("--image-scale", type=float, default=0.5, help="of the image prompt (default: %(default)s)")
    parser.add_argument("--adapter", type=Path, default=WEIGHTS / "ip-adapter-full-face-tiny.safetensors")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--output", type=Path, default=Path("outputs/measure"))
    args = parser.parse_args()

    base = open_base(BASE)
    unet, vae, encoder = base.unet(), base.vae(), load_image_encoder(ENCODER)
    net = load_control(args.net or cached(PRESETS["control", f"tiny-{args.kind}"]), base)
    adapter = load_adapter(args.adapter)
    pixels = drawings.load("unseen-drawings").pixels[: args.count]
    hints = torch.stack([HINTS[args.kind](one) for one in pixels]).float() / 255
    shown = drawings.to_unit(pixels.roll(-1, 0))  # each with the next drawing's look
    tokens, null = image_tokens(adapter, encoder, shown)
    empty = base.text()(tokenize("")).expand(len(pixels), -1, -1)
    prompt, absent = (Prompt(empty, (adapter.prompt(one, args.image_scale),)) for one in (tokens, null))
    columns = [to_pil(hints[:10].expand(-1, 3, -1, -1) * 2 - 1), to_pil(shown[:10])]
    for scale in args.scales:
        follow = partial(following, unet, net, hints, scale)
        y = pictures(unet, vae, prompt, absent, args.steps, args.guidance_scale, f"at {scale:g}", follow)
        columns.append(to_pil(y[:10]))
        made = ((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        found = {
            "kind": args.kind,
            "scale": scale,
            "pictures": len(y),
            "edges, F1": f1(seen("edges", made), seen("edges", pixels)),
            "silhouette, shared of joint area": overlap(seen("silhouette", made), seen("silhouette", pixels)),
            "image prompt": retrieval(-torch.cdist(thumbnail(y), thumbnail(shown))),
        }
        print(json.dumps(found), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    save_picture(sheet(list(zip(*columns, strict=True))), args.output / f"{args.kind}.png")


def following(unet: UNet, net: Net, hints: Tensor, scale: float, part: slice) -> Callable[..., Tensor]:
    """The UNet with a hint for each row of a batch of both halves of the guidance."""
    hint = hints[part].expand(-1, 1 if hasattr(net.config, "hint_channels") else 3, -1, -1)
    return controlled(unet, [Control(net, [torch.cat([part, part]) for part in net.encode(hint)], scale)])


def seen(kind: str, pixels: Tensor) -> Tensor:
    """(n, 1, H, W), 0 or 1."""
    return (torch.stack([HINTS[kind](one) for one in pixels]) > 0).float()


def f1(found: Tensor, wanted: Tensor) -> float:
    """Of edges that lie within one pixel of an edge of the other, over all pictures."""
    precision = (found * max_pool2d(wanted, 3, 1, 1)).sum() / found.sum()
    recall = (wanted * max_pool2d(found, 3, 1, 1)).sum() / wanted.sum()
    return (2 * precision * recall / (precision + recall)).item()


def overlap(found: Tensor, wanted: Tensor) -> float:
    shared, joint = (found * wanted).sum((1, 2, 3)), torch.maximum(found, wanted).sum((1, 2, 3))
    return (shared / joint).mean().item()


if __name__ == "__main__":
    main()
