"""How well pictures follow their prompts: CLIP-I and CLIP-T, as in the paper's Table 1, by any CLIP."""

import logging
import math
import os
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip import CLIPImage, CLIPText, preprocess, tokenize
from files.errors import UserError
from files.pictures import open_picture
from files.sheets import sheet
from training.pairs import Pair
from weights import load_image_encoder, open_base, read
from weights.clip import load_clip
from weights.hub import fetch
from weights.presets import PRESETS

CLIP_SCORES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_x2.5": "CLIP-T x2.5"}
SCORES = CLIP_SCORES | {"same_thing": "same thing", "same_style": "same style"}
SHOWN = 4  # on the sheet: pairs of the best and of the worst, and samples of each


@dataclass
class Judge:
    """A CLIP as two functions, each to vectors of unit length, (n, dim) fp32."""

    images: Callable[[list[Image.Image]], Tensor]
    texts: Callable[[list[str]], Tensor]
    gelu: str | None = None  # of a CLIP file, whose tensors cannot tell: quick or erf
    # A classifier beside it, that no adapter has learned from: what thing each shows, (n, dim), and logits of styles
    apart: Callable[[list[Image.Image]], tuple[Tensor, Tensor]] | None = None


def open_judge(clip: str | None, device: torch.device, gelu: str | None = None) -> Judge:
    """The CLIP that scores, in fp32 whatever made the pictures.

    Args:
        clip: a file or folder, or MODEL/PRETRAINED as open_clip names it; None: the tiny model's own.
        gelu: of a file, "quick" or "erf"; None: as `load_clip` finds it.

    Raises:
        UserError: no such file or name, or one that cannot be loaded.
    """
    if clip and not os.path.exists(clip):
        return named_judge(clip, device)
    if clip:
        quick = {"quick": True, "erf": False, None: None}[gelu]
        image, text = load_clip(clip, device=device, quick_gelu=quick)
        return our_judge(image, text, device, "quick" if image.config.quick_gelu else "erf")
    # The tiny CLIP lies in two files: its text tower is the base model's.
    encoder, base = (fetch(PRESETS[role, "tiny"]) for role in ("image_encoder", "base"))
    image, text = load_image_encoder(encoder), open_base(base).text()
    text.text_projection = nn.Linear(text.config.width, image.config.projection, bias=False)
    text.text_projection.weight.data = read(encoder)["text_projection.weight"].float()
    return our_judge(image.to(device), text.to(device), device)


def our_judge(image: CLIPImage, text: CLIPText, device: torch.device, gelu: str | None = None) -> Judge:
    def images(pictures: list[Image.Image]) -> Tensor:
        size = image.config.image_size
        pixels = torch.cat([preprocess(centre(picture, size), size) for picture in pictures])
        return normalize(image(pixels.to(device)), dim=-1)

    return Judge(images, lambda texts: normalize(text.embed(tokenize(texts).to(device)), dim=-1), gelu)


def centre(picture: Image.Image, size: int) -> Image.Image:
    """Shortest edge to `size` (bicubic), centre crop, as in OpenAI's CLIP: half a pixel is rounded to the even number.

    `preprocess` alone would round it down, as transformers does.
    """
    width, height = (int(size * edge / min(picture.size)) for edge in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def named_judge(name: str, device: torch.device) -> Judge:
    """MODEL/PRETRAINED, as open_clip names and downloads them, with open_clip's own preprocessing and tokenizer."""
    import open_clip  # seconds long, and the one place where another's model is wanted

    model, _, tag = name.partition("/")
    known = open_clip.get_pretrained_cfg(model, tag)
    if not known:
        raise UserError(f"`clip` {name}: no such file, nor a name that open_clip knows, as ViT-L-14/openai")
    logging.disable(logging.ERROR)  # a failed download is told in twenty lines; one is enough
    try:
        quick = known.get("quick_gelu", False)  # open_clip only warns where the model's name says otherwise
        net, transform = open_clip.create_model_from_pretrained(model, tag, device=device, force_quick_gelu=quick)
        tokenizer = open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        raise UserError(f"`clip` {name}: open_clip cannot load it ({' '.join(str(error).split())})"[:400]) from None
    finally:
        logging.disable(logging.NOTSET)
    net.eval()
    return Judge(
        lambda pictures: normalize(net.encode_image(torch.stack([*map(transform, pictures)]).to(device)), dim=-1),
        lambda texts: normalize(net.encode_text(tokenizer(texts).to(device)), dim=-1),
    )


@torch.no_grad()
def scores(
    judge: Judge, batch: Sequence[tuple[Pair, Sequence[Image.Image]]], caption_prefix: str = ""
) -> list[dict[str, float]]:
    """Compare each pair with the pictures made of it: means over them, by the names in SCORES.

    A picture without a caption has a CLIP-I alone. A classifier beside the CLIP compares each result with the picture: the
    cosine of what they show, and whether the likeliest style is the same.
    """
    texts = judge.texts([caption_prefix + pair.text for pair, _ in batch])
    pictures = [picture for pair, made in batch for picture in (pair.image, *made)]
    sizes = [1 + len(made) for _, made in batch]
    images = judge.images(pictures)
    found = []
    for (pair, made), text, part in zip(batch, texts, images.split(sizes), strict=True):
        clip_i, clip_t = part[1:] @ part[0], part[1:] @ text
        means = clip_i.mean().item(), clip_t.mean().item(), 2.5 * clip_t.clamp_min(0).mean().item()
        told = means if pair.texts else (means[0], None, None)
        found.append({"samples": len(made)} | dict(zip(CLIP_SCORES, told, strict=True)))
    if judge.apart:
        things, styles = (values.split(sizes) for values in judge.apart(pictures))
        for row, thing, style in zip(found, things, (part.argmax(-1) for part in styles), strict=True):
            row["same_thing"] = (thing[1:] @ thing[0]).mean().item()
            row["same_style"] = (style[1:] == style[0]).float().mean().item()
    return found


def summary(scored: list[dict]) -> dict:
    """Means over pairs, each with the normal 95% interval of the mean (None: one pair has none).

    CLIP-T is of the pairs that have captions; None without any.
    """
    found = {"n": len(scored), "samples": sum(pair["samples"] for pair in scored)}
    for key in (key for key in SCORES if key in scored[0]):
        values = [pair[key] for pair in scored if pair[key] is not None]
        mean = found[key] = statistics.fmean(values) if values else None
        half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[f"{key}_interval"] = None if half is None else [mean - half, mean + half]
    return found


def best_and_worst(
    scored: Sequence[dict], pairs: Sequence[Pair], results: Mapping[str, Sequence[Path]], side: int = 192
) -> Image.Image:
    """A sheet of the pairs with the highest and the lowest CLIP-I: a card of the scores, the prompt, samples.

    Args:
        scored: entries as `scores` makes them, each with the "number" of its pair and the "name" of its results.
    """
    order, cells = sorted(scored, key=lambda entry: -entry["clip_i"]), []
    for rank in sorted({*range(len(order))[:SHOWN], *range(len(order))[-SHOWN:]}):
        entry, pair = order[rank], pairs[order[rank]["number"]]
        lines = [
            f"{rank + 1} of {len(order)}",
            *(f"{title} {shown(entry[key], 3)}" for key, title in SCORES.items() if key in entry),
            "",
        ]
        lines += textwrap.wrap(pair.name, 26)[:2] + textwrap.wrap(pair.text, 26)[:6]
        card = Image.new("RGB", (side, side), "white")
        font = ImageFont.load_default(side // 14)
        ImageDraw.Draw(card).multiline_text((4, 4), "\n".join(lines), fill="black", font=font)
        made = [open_picture(path) for path in results[entry["name"]][:SHOWN]]
        cells.append([card, pair.image, *made, *[None] * (SHOWN - len(made))])
    columns = 2 + max(SHOWN - row.count(None) for row in cells)
    titles = ["", "image prompt", *(f"sample {j}" for j in range(SHOWN))]
    return sheet([row[:columns] for row in cells], titles[:columns], side)


def shown(score: float | None, digits: int) -> str:
    return "-" if score is None else f"{score:.{digits}f}"


def batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
