"""Which layers of the tiny model carry what of an image prompt: colour and style, or the shape.

python -m experiments.layers
python -m experiments.layers --adapters base --beside text --layers style layout

Each block alone hears the image prompt, and then all but it. Beside no text, and beside the thing of another drawing without a
style. Compared with what the base makes without an image prompt ("none") and with all layers ("all"), from the same noise.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from clip import tokenize
from files.pictures import save_picture, to_pil
from files.sheets import sheet
from files.whole import write_text
from generate.layers import factors
from ipadapter import Prompt
from tiny import drawings
from tiny.judge import told
from tiny.measure import ADAPTERS, image_tokens, load_judge, pictures
from tiny.trainer import BASE, ENCODER, WEIGHTS
from unet import layer_names
from weights import load_adapter, load_image_encoder, open_base
from weights.families import TINY

SHOWN = 8  # drawings on a sheet


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="unseen drawings as image prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=["full-face", "base"])
    parser.add_argument("--beside", nargs="+", choices=("nothing", "text"), default=["nothing", "text"])
    rows = "these instead of the sweep, lines of sample.py's --layers: down.block_1 up.block_2+up.block_3"
    parser.add_argument("--layers", nargs="+", metavar="SPEC", help=rows)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--output", type=Path, default=Path("outputs/experiments"), help="(default: %(default)s)")
    args = parser.parse_args()

    base, encoder = open_base(args.weights / BASE.name), load_image_encoder(args.weights / ENCODER.name)
    unet, vae, text = base.unet().to(memory_format=torch.channels_last), base.vae(), base.text()
    judge, _ = load_judge(args.weights)
    data = drawings.load("unseen-drawings", limit=args.count)
    x, n = drawings.to_unit(data.pixels), len(data)
    things = [data.captions[(i + 1) % n] for i in range(n)]
    empty = text(tokenize("")).expand(n, -1, -1)
    words = {"nothing": empty, "text": text(tokenize(things))}
    found = {}
    for kind in args.adapters:
        adapter = load_adapter(args.weights / f"{ADAPTERS[kind]}.safetensors")
        tokens, null = image_tokens(adapter, encoder, x)
        for beside in args.beside:
            columns, rows = {"image prompt": x}, {}
            for name, scales in variants(layer_names(unet.config), args.layers):
                asked = (Prompt(w, (adapter.prompt(t, scales),)) for w, t in ((words[beside], tokens), (empty, null)))
                y = pictures(unet, vae, *asked, args.steps, args.guidance_scale, f"{kind}, {beside}, {name}")
                columns[name] = y
                own, other = (told(judge, y, asked, data.styles) for asked in (data.captions, things))
                rows[name] = {
                    "style": own["style"],
                    "colours": colours(y, x),
                    "silhouette": overlap(silhouette(y), silhouette(x)),
                    "edges": edge_score(y, x),
                    "thing": own["thing of five"],
                    "text's thing": other["thing of five"],
                }
                print(f"{kind:10} {beside:8} {name:20}", *(f"{key} {value:.3f}" for key, value in rows[name].items()))
            found[f"{kind}, beside {beside}"] = rows
            args.output.mkdir(parents=True, exist_ok=True)
            cells = list(zip(*(to_pil(column[:SHOWN]) for column in columns.values()), strict=True))
            save_picture(sheet(cells, list(columns)), args.output / f"layers-{kind}-{beside}.png")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_text(args.output / "layers.json", json.dumps({"settings": settings, "rows": found}, indent=1))


def variants(names: Sequence[str], specs: Sequence[str] | None) -> Iterator[tuple[str, list[float]]]:
    """A title and a scale for each layer: none, all, and these lines of `--layers`; or each block alone, and all but it."""
    yield "none", [0.0] * len(names)
    yield "all", [1.0] * len(names)
    for spec in specs or ():
        found = factors(spec, names, TINY)
        yield spec, list(found.heard) if found else [1.0] * len(names)
    if not specs:
        of = [name.rpartition(".")[0] or name for name in names]
        for block in dict.fromkeys(of):
            yield block, [float(one == block) for one in of]
        for block in dict.fromkeys(of):
            yield f"not {block}", [float(one != block) for one in of]


def silhouette(x: Tensor) -> Tensor:
    """Where a drawing is, on its white ground: (n, 3, 128, 128) -> (n, 32, 32)."""
    return interpolate((x.amin(1, keepdim=True) < 0.8).float(), size=32, mode="area")[:, 0] > 0.5


def overlap(one: Tensor, other: Tensor) -> float:
    """Of masks (n, h, w): the shared part of all that either covers, mean over the pictures."""
    either = (one | other).sum((1, 2)).clamp(min=1)
    return ((one & other).sum((1, 2)) / either).mean().item()


def colours(y: Tensor, x: Tensor) -> float:
    """How much of the colours two pictures share, white ground left out: of histograms of 4x4x4 the smaller part, mean."""

    def histogram(pictures: Tensor) -> Tensor:
        bins = ((pictures.clamp(-1, 1) + 1) * 1.999).long()
        number, drawn = bins[:, 0] * 16 + bins[:, 1] * 4 + bins[:, 2], (pictures.amin(1) < 0.8).float()
        counts = torch.zeros(len(pictures), 64).scatter_add_(1, number.flatten(1), drawn.flatten(1))
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    return torch.minimum(histogram(y), histogram(x)).sum(1).mean().item()


def edge_score(y: Tensor, x: Tensor) -> float:
    """F1 of the strongest tenth of gradients at 64x64, a pixel beside counts as met: mean over the pictures."""

    def edges(pictures: Tensor) -> Tensor:
        grey = interpolate(pictures.clamp(-1, 1).mean(1, keepdim=True), size=64, mode="area")
        length = grey.diff(dim=2)[..., :-1].square() + grey.diff(dim=3)[:, :, :-1].square()
        return (length > length.flatten(1).quantile(0.9, dim=1).clamp(min=1e-3).view(-1, 1, 1, 1)).float()

    def met(one: Tensor, other: Tensor) -> Tensor:
        return (one * max_pool2d(other, 3, 1, 1)).sum((1, 2, 3)) / one.sum((1, 2, 3)).clamp(min=1)

    precision, recall = met(edges(y), edges(x)), met(edges(x), edges(y))
    return (2 * precision * recall / (precision + recall).clamp(min=1e-6)).mean().item()


if __name__ == "__main__":
    main()
