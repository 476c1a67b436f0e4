"""How good the tiny model is, on drawings that no part of it was trained on. The README's figures come from here.

python -m tiny.measure
python -m tiny.measure --runs image
python -m tiny.measure --runs text+image --scales 0.3 0.5 0.8 --layers style

Seen from outside: the models are read from their files like anybody's, and whether a result shows its image prompt is
told by 16x16 colour thumbnails, which no adapter was trained with (the image tower was tuned so that a 32x32 copy can be
read off its embedding), and by the judge (tiny/judge.py), a network that nothing else uses. CLIP-I and CLIP-T are by the
adapter's own encoder, and flatter.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, linear, normalize
from tqdm import tqdm

from clip import CLIPImage, CLIPText, tokenize
from files.pictures import save_picture, to_pil
from files.sheets import sheet
from generate.layers import factors
from generate.picture import denoise
from ipadapter import IPAdapter, Prompt
from ipadapter.scale import Scale
from sampler import SAMPLERS, SD, guided, noise, numbered
from tiny import drawings, presets
from tiny.judge import Bench, bench, ceiling, gather, open_network, told
from tiny.trainer import BASE, ENCODER, WEIGHTS
from unet import UNet, layer_names
from vae import VAE
from weights import load_adapter, load_image_encoder, open_base, read
from weights.families import TINY

AT_ONCE = 25  # pictures
RUNS = {  # scale of the image prompt (None: there is none), and the text beside it
    "image": (1.0, "no text"),
    "text": (None, "its own text"),
    "text+image": (0.5, "another drawing's thing"),  # the style is left to the image prompt
    "styled-text+image": (0.5, "another drawing's text"),
}
ADAPTERS = {
    "base": "ip-adapter-tiny",
    "plus": "ip-adapter-plus-tiny",
    "full-face": "ip-adapter-full-face-tiny",
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--count", type=int, default=200, help="unseen drawings as image prompts (default: %(default)s)"
    )
    parser.add_argument("--split", choices=drawings.SPLITS[1:], default="unseen-drawings")
    kinds = ", ".join(ADAPTERS)
    parser.add_argument("--adapters", nargs="+", default=["full-face"], help=f"{kinds}, or files (default: full-face)")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="what to prompt with (default: all)"
    )
    parser.add_argument("--scales", type=float, nargs="+", help="of the image prompt (default: the run's own)")
    parser.add_argument("--layers", default="all", help="where it is heard, as in sample.py (default: %(default)s)")
    parser.add_argument("--start", type=float, default=0.0, help="share of the steps without it (default: 0)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--output", type=Path, default=Path("outputs/measure"))
    args = parser.parse_args()

    base = open_base(args.weights / BASE.name)
    unet, vae, text = base.unet().to(memory_format=torch.channels_last), base.vae(), base.text()
    encoder = load_image_encoder(args.weights / ENCODER.name)
    projection = read(args.weights / ENCODER.name)["text_projection.weight"].float()
    data = drawings.load(args.split)
    x = drawings.to_unit(data.pixels[: args.count])
    n = len(x)
    captions = [data.styled(i) for i in range(len(data))]

    images_of = image_embeds(encoder, drawings.to_unit(data.pixels))
    texts = text_embeds(text, projection, captions)
    found: dict = {"split": args.split, "count": n, "clip": retrieval(texts @ images_of.T) | {"among": len(data)}}
    found["psnr"] = torch.cat([drawings.psnr(vae.decode(vae.encode(p)), p)[None] for p in x.split(1)]).mean().item()

    judge, known = load_judge(args.weights)
    found["judge, of real drawings"] = {"of all things": ceiling(judge, *known), f"of {n}": ceiling(judge, *known, n)}
    print(json.dumps(found))

    empty = text(tokenize("")).expand(n, -1, -1)
    following = [(i + 1) % n for i in range(n)]  # each image prompt with the caption of the next drawing
    others = [captions[i] for i in following]
    other_embeds = text_embeds(text, projection, others)
    words = {
        "no text": empty,
        "another drawing's text": text(tokenize(others)),
        "another drawing's thing": text(tokenize([data.captions[i] for i in following])),
        "its own text": text(tokenize(captions[:n])),
    }
    todo = [(run, scale) for run in args.runs for scale in (RUNS[run][0] and args.scales or [RUNS[run][0]])]
    rows = [to_pil(x[:20])]
    factor = factors(args.layers, layer_names(unet.config), TINY)
    heard = factor and factor.heard
    for kind in args.adapters:
        adapter = load_adapter(args.weights / f"{ADAPTERS[kind]}.safetensors" if kind in ADAPTERS else kind)
        tokens, null = image_tokens(adapter, encoder, x)
        for run, weight in todo:
            beside = RUNS[run][1]
            scale = weight and Scale(weight, heard, args.start)
            images, null_images = ((adapter.prompt(t, scale or 0.0),) for t in (tokens, null))
            asked = Prompt(words[beside], images), Prompt(empty, null_images)
            name = f"{kind}: {run}" + ("" if weight is None else f" at {weight:g}")
            y = pictures(unet, vae, *asked, args.steps, args.guidance_scale, name)
            made = image_embeds(encoder, y)
            things = [data.captions[i] for i in (following if beside.startswith("another") else range(n))]
            found[name] = {
                "beside": beside,
                "thumbnails": retrieval(-torch.cdist(thumbnail(y), thumbnail(x))),
                "judge, the text's thing and the picture's style": told(judge, y, things, data.styles[:n]),
                "clip_i, which flatters": (made * images_of[:n]).sum(1).mean().item(),
                "clip_t of the other text": (made * other_embeds).sum(1).mean().item(),
            }
            print(name, json.dumps(found[name]))
            rows.append(to_pil(y[:20]))
    print(json.dumps(found, indent=1))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "measure.json").write_text(json.dumps(found, indent=1))
    # The first drawings of the split, ten to a line: image prompts, and below them what each run makes of them.
    save_picture(
        sheet([row[i : i + 10] for i in range(0, len(rows[0]), 10) for row in rows]), args.output / "measure.png"
    )


def retrieval(scores: Tensor) -> dict[str, float]:
    """Share of rows whose own column is the best, and among the best five; scores (n, n)."""
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return {"first": (rank < 1).float().mean().item(), "first five": (rank < 5).float().mean().item()}


def load_judge(weights: Path) -> tuple[Bench, tuple[drawings.Drawings, Tensor]]:
    """The judge, and the drawings with those that it has learned from."""
    known = gather()
    return bench(open_network(weights), *known), known


def thumbnail(x: Tensor) -> Tensor:
    return interpolate(x.clamp(-1, 1), size=(16, 16), mode="area").flatten(1)


def image_embeds(encoder: CLIPImage, x: Tensor) -> Tensor:
    """x (n, 3, 128, 128) in [-1, 1] -> (n, 128), unit length."""
    return normalize(torch.cat([encoder(drawings.clip_pixels(p.clamp(-1, 1))) for p in x.split(64)]), dim=-1)


def text_embeds(text: CLIPText, projection: Tensor, captions: list[str]) -> Tensor:
    tokens = tokenize(captions)
    hidden = torch.cat([text(part) for part in tokens.split(128)])
    return normalize(linear(hidden[torch.arange(len(tokens)), tokens.argmax(-1)], projection), dim=-1)


def image_tokens(adapter: IPAdapter, encoder: CLIPImage, x: Tensor) -> tuple[Tensor, Tensor]:
    """One image prompt per drawing: tokens (n, num_tokens, 64), and those of no image."""
    tokens = torch.cat([adapter.tokens(encoder, p) for p in drawings.clip_pixels(x).split(1)])
    return tokens, adapter.null_tokens(encoder, drawings.clip_pixels(x[:1])).expand_as(tokens)


def pictures(
    unet: UNet,
    vae: VAE,
    prompt: Prompt,
    null: Prompt,
    steps: int,
    guidance_scale: float,
    name: str = "pictures",
    followed: Callable[[slice], Callable] | None = None,
) -> Tensor:
    """One picture per row of the prompt, picture j from the noise of seed j: (n, 3, 128, 128) in [-1, 1].

    Args:
        followed: the UNet for some of the rows, where each follows a hint of its own; None: the same for all.
    """
    done, sampler, n = [], SAMPLERS["ddim"], len(prompt.text)
    levels, starts = numbered(sampler.levels(SD, steps)), noise(0, n, presets.SIZE, presets.SIZE)
    for part in tqdm([slice(i, i + AT_ONCE) for i in range(0, n, AT_ONCE)], desc=name):
        predict = guided(followed(part) if followed else unet, cut(prompt, part), cut(null, part), guidance_scale)
        done.append(vae.decode(denoise(sampler, predict, starts[part], levels)))
    return torch.cat(done)


def cut(prompt: Prompt, part: slice) -> Prompt:
    """Some rows of a batch."""
    images = (replace(image, key_values=[(k[part], v[part]) for k, v in image.key_values]) for image in prompt.images)
    return Prompt(prompt.text[part], tuple(images))


if __name__ == "__main__":
    main()
