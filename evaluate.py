"""CLIP-I and CLIP-T over pairs of picture and caption, as in the paper's Table 1 (arXiv 2308.06721).

  python evaluate.py                            the bundled model on bundled drawings that it has not seen
  python evaluate.py --data D --limit 100       pictures of yours as image prompts
  python evaluate.py --data D --results R       pictures that exist: R/name.png, or R/name_0.png, R/name_1.png, ...

The paper's setting: the 5,000 pictures of COCO val2017 with a caption each, SD 1.5, OpenAI's ViT-L/14 as the judge:
  python evaluate.py --data coco --base v1-5-pruned-emaonly.safetensors --adapter ip-adapter_sd15.safetensors \\
      --image-encoder model.safetensors --clip ViT-L-14/openai

CLIP-I is the cosine of a result's image embedding and its prompt's, CLIP-T that of a result and the prompt's caption.
CLIPScore (arXiv 2104.08718) is 2.5 * max(CLIP-T, 0), and puts "A photo depicts " before each caption; here nothing is
put there unless --caption-prefix says so. Sample j of each pair starts from the noise of seed + j, whatever the batch.
Run again, it goes on where it stopped.
"""

import argparse
import json
import logging
import math
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice, takewhile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

import cli
from clip import CLIPImage, CLIPText, preprocess, tokenize
from files.errors import UserError
from files.pictures import PictureError, open_picture, save_png, to_pil
from files.sheets import sheet
from files.whole import write_text
from ipadapter import ImagePrompt, Prompt
from sample import MODELS, TINY, TINY_FILES, resolve_names
from sampler import ddim, guided, noise
from training.pairs import PICTURES, BadSample, Pair, Pairs, open_pairs
from unet import size_vector
from weights import WeightsError, check_fit, load_adapter, load_image_encoder, load_vae, open_base, read
from weights.clip import load_clip
from weights.diffusers import model_sha256

SCORES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "clip_t_x2.5": "CLIP-T x2.5"}
MAKING = ("steps", "guidance_scale", "scale", "seed", "height", "width", "text", "dtype_name")
SHOWN = 4  # on the sheet: pairs of the best and of the worst, and samples of each


@dataclass
class Judge:
    """A CLIP as two functions, each to vectors of unit length, (n, dim) fp32."""

    images: Callable[[list[Image.Image]], Tensor]
    texts: Callable[[list[str]], Tensor]
    gelu: str | None = None  # of a CLIP file, whose tensors cannot tell: quick or erf


def main() -> None:
    args = parse()
    pairs = open_pairs(args.data, args.data_root, uncaptioned=True, once=True)
    names = result_names(args, pairs)
    judge = open_judge(args)
    skipped = dict.fromkeys(pairs.skipped)  # a set of messages that keeps their order
    if not args.results:
        make(args, pairs, names, skipped)
    scored = score(args, judge, pairs, names, skipped)
    if not scored:
        raise UserError(f"--data {' '.join(args.data)}: no pair can be scored: {next(iter(skipped))}")
    settings = {name: str(v) if isinstance(v, Path | torch.device) else v for name, v in vars(args).items()}
    settings |= {"clip_gelu": judge.gelu, "torch": torch.__version__, "made_with": made_with(args)}
    skips = len(skipped) + pairs.skipped_count - len(pairs.skipped)  # of very many, not all are told
    found = summary(scored) | {"skipped": list(skipped), "skipped_count": skips, "settings": settings, "pairs": scored}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_png(best_and_worst(args, pairs, scored), args.output.with_suffix(".png"))
    write_text(args.output, json.dumps(found, indent=1))
    report(args, found)


def result_names(args: argparse.Namespace, pairs: Pairs) -> list[str]:
    """What each pair's results are called: a path without suffix that cannot leave the folder, each pair its own."""
    names: dict[str, None] = {}
    for i in range(min(len(pairs), args.limit or len(pairs))):
        path = Path(*(part for part in Path(pairs.names[i]).parts if part not in ("/", "..")))
        name = str(path.with_suffix("") if path.suffix[1:].lower() in PICTURES else path)
        if name in names:
            raise UserError(f"--data: two pairs are called {name!r}; results go by name, each pair needs its own")
        names[name] = None
    return list(names)


@torch.no_grad()
def make(args: argparse.Namespace, pairs: Pairs, names: list[str], skipped: dict[str, None]) -> None:
    """Save the pictures that are not there yet, each as soon as it is made."""
    base = open_base(args.base, cli.DTYPES[args.dtype_name], args.device)
    encoder = load_image_encoder(args.image_encoder, base.dtype, args.device)
    adapter = load_adapter(args.adapter, base.dtype, args.device)
    if adapter.image_proj.faces:
        raise WeightsError(f"{args.adapter}: a FaceID adapter, it reads faces; one that reads pictures is wanted here")
    check_fit(adapter, args.adapter, base, encoder, args.image_encoder)
    args.height, args.width = args.height or base.side, args.width or base.side
    unet, encode = base.unet(), base.text_encoder()
    vae = load_vae(args.vae, base.vae_dtype, args.device, base.family.latent_scale) if args.vae else base.vae()
    settings = open_folder(args)
    adapter.attach(unet)

    def with_text(text: Tensor, pooled: Tensor | None, tokens: Tensor) -> Prompt:
        vector = None if pooled is None else size_vector(pooled, args.height, args.width, base.sinusoids)
        return Prompt(text, (ImagePrompt(tokens, args.scale),), vector)

    size = encoder.config.image_size
    zeros = torch.zeros(1, 3, size, size, device=args.device, dtype=base.dtype)
    empty, null = encode(""), with_text(*encode.null(""), adapter.null_tokens(encoder, zeros))

    def prompt(pair: Pair) -> Prompt:
        tokens = adapter.tokens(encoder, preprocess(pair.image, size).to(zeros))
        return with_text(*(encode(pair.text) if args.text else empty), tokens)

    def missing(bar: tqdm) -> Iterator[tuple[Prompt, int, Path]]:
        for i, name in enumerate(names):
            paths = [(args.seed + j, args.pictures / f"{name}_{j}.png") for j in range(args.num_samples)]
            todo = [(seed, path) for seed, path in paths if not os.path.isfile(path)]
            bar.update(len(paths) - len(todo))
            try:
                once = prompt(pairs[i]) if todo else None
                yield from ((once, *rest) for rest in todo)
            except BadSample as error:
                skipped[str(error)] = None
                bar.update(len(todo))

    with tqdm(total=len(names) * args.num_samples, desc="pictures", unit="picture") as bar:
        for batch in batches(missing(bar), args.batch_size):
            prompts, seeds, paths = zip(*batch, strict=True)
            start = torch.cat([noise(seed, 1, args.height, args.width) for seed in seeds]).to(args.device)
            nulls = Prompt.cat([null] * len(batch))
            eps = guided(unet, Prompt.cat(prompts), nulls, args.guidance_scale, base.prediction)
            for x in ddim(eps, start, args.steps):
                pass
            for latent, seed, path in zip(x.to(base.vae_dtype).split(1), seeds, paths, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(to_pil(vae.decode(latent))[0], path, settings | {"seed": seed})
                bar.update()


def open_folder(args: argparse.Namespace) -> dict:
    """What the pictures in --pictures depend on, kept there as pictures.json; pictures made otherwise are refused."""
    settings = {name: getattr(args, name) for name in ("data", *MAKING)} | {"sampler": "ddim"}
    settings |= {name: path and model_sha256(path) for name in MODELS for path in [getattr(args, name)]}
    before = made_with(args)
    if before is None:
        if args.pictures.is_dir() and any(args.pictures.iterdir()):
            raise UserError(f"--pictures {args.pictures}: holds other files; a new or empty folder is wanted")
        args.pictures.mkdir(parents=True, exist_ok=True)
        write_text(args.pictures / "pictures.json", json.dumps(settings, indent=1))
    for name, value in settings.items():
        if before and before.get(name) != value:
            flag = "--dtype" if name == "dtype_name" else f"--{name.replace('_', '-')}"
            raise UserError(
                f"--pictures {args.pictures}: made with {flag} {before.get(name)}, now it is {value}; "
                "go on with the same settings, or name a new folder"
            )
    return settings


def made_with(args: argparse.Namespace) -> dict | None:
    """The settings that lie beside the pictures; None for pictures made elsewhere."""
    path = (args.results or args.pictures) / "pictures.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; name a new folder, or remove this one") from None


def open_judge(args: argparse.Namespace) -> Judge:
    """The CLIP that scores, in fp32 whatever made the pictures. Raises UserError or WeightsError."""
    if args.clip and not os.path.exists(args.clip):
        return named_judge(args.clip, args.device)
    if args.clip:
        quick = {"quick": True, "erf": False, None: None}[args.clip_gelu]
        image, text = load_clip(args.clip, device=args.device, quick_gelu=quick)
        return our_judge(image, text, args.device, "quick" if image.config.quick_gelu else "erf")
    # The tiny CLIP lies in two files: its text tower is the base model's.
    image, text = load_image_encoder(TINY_FILES["image_encoder"]), open_base(TINY_FILES["base"]).text()
    text.text_projection = nn.Linear(text.config.width, image.config.projection, bias=False)
    text.text_projection.weight.data = read(TINY_FILES["image_encoder"])["text_projection.weight"].float()
    return our_judge(image.to(args.device), text.to(args.device), args.device)


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
        raise UserError(f"--clip {name}: no such file, nor a name that open_clip knows, as ViT-L-14/openai")
    logging.disable(logging.ERROR)  # a failed download is told in twenty lines; one is enough
    try:
        quick = known.get("quick_gelu", False)  # open_clip only warns where the model's name says otherwise
        net, transform = open_clip.create_model_from_pretrained(model, tag, device=device, force_quick_gelu=quick)
        tokenizer = open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        raise UserError(f"--clip {name}: open_clip cannot load it ({error})"[:400]) from None
    finally:
        logging.disable(logging.NOTSET)
    net.eval()
    return Judge(
        lambda pictures: normalize(net.encode_image(torch.stack([*map(transform, pictures)]).to(device)), dim=-1),
        lambda texts: normalize(net.encode_text(tokenizer(texts).to(device)), dim=-1),
    )


@torch.no_grad()
def score(
    args: argparse.Namespace, judge: Judge, pairs: Pairs, names: list[str], skipped: dict[str, None]
) -> list[dict]:
    """Compare each pair with its results, means over them; what cannot be read, or has no result, is noted as skipped.

    A picture without a caption has a CLIP-I alone.

    Returns one of {"number", "name", "samples", "clip_i", "clip_t", "clip_t_x2.5"} for each pair.
    """

    def readable() -> Iterator[tuple[int, Pair, list[Image.Image]]]:
        for i, name in enumerate(tqdm(names, desc="scores", unit="pair")):
            try:
                yield i, pairs[i], [open_picture(path) for path in results(args, name)]
            except (BadSample, PictureError) as error:
                skipped[str(error)] = None

    scored = []
    for batch in batches(readable(), args.batch_size):
        texts = judge.texts([args.caption_prefix + pair.text for _, pair, _ in batch])
        images = judge.images([picture for _, pair, made in batch for picture in (pair.image, *made)])
        for (i, pair, made), text, part in zip(batch, texts, images.split([1 + len(b[2]) for b in batch]), strict=True):
            clip_i, clip_t = part[1:] @ part[0], part[1:] @ text
            means = clip_i.mean().item(), clip_t.mean().item(), 2.5 * clip_t.clamp_min(0).mean().item()
            found = dict(zip(SCORES, means if pair.texts else (means[0], None, None), strict=True))
            scored.append({"number": i, "name": names[i], "samples": len(made), **found})
    return scored


def results(args: argparse.Namespace, name: str) -> list[Path]:
    """The pictures made of a pair: name_0.png, name_1.png, ..., or name.png alone. Raises PictureError without any."""
    folder = args.results or args.pictures
    numbered = (folder / f"{name}_{j}.png" for j in count())
    found = list(islice(takewhile(os.path.isfile, numbered), args.num_samples))
    single = folder / f"{name}.png"
    if args.results and os.path.isfile(single):
        if found:
            raise UserError(f"--results {folder}: both {single.name} and {found[0].name} are there; which is it?")
        return [single]
    if not found:
        raise PictureError(f"{single}: no such picture, nor {name}_0.png")
    return found


def summary(scored: list[dict]) -> dict:
    """Means over pairs, each with the normal 95% interval of the mean (None: one pair has none).

    CLIP-T is of the pairs that have captions; None without any.
    """
    found = {"n": len(scored), "samples": sum(pair["samples"] for pair in scored)}
    for key in SCORES:
        values = [pair[key] for pair in scored if pair[key] is not None]
        mean = found[key] = statistics.fmean(values) if values else None
        half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[f"{key}_interval"] = None if half is None else [mean - half, mean + half]
    return found


def best_and_worst(args: argparse.Namespace, pairs: Pairs, scored: list[dict], side: int = 192) -> Image.Image:
    """A sheet of the pairs with the highest and the lowest CLIP-I: scores, prompt, samples."""
    order = sorted(scored, key=lambda pair: -pair["clip_i"])
    rows = []
    for rank in sorted({*range(len(order))[:SHOWN], *range(len(order))[-SHOWN:]}):
        entry, pair = order[rank], pairs[order[rank]["number"]]
        lines = [
            f"{rank + 1} of {len(order)}",
            *(f"{title} {shown(entry[key], 3)}" for key, title in SCORES.items()),
            "",
        ]
        lines += textwrap.wrap(pair.name, 26)[:2] + textwrap.wrap(pair.text, 26)[:6]
        card = Image.new("RGB", (side, side), "white")
        font = ImageFont.load_default(side // 14)
        ImageDraw.Draw(card).multiline_text((4, 4), "\n".join(lines), fill="black", font=font)
        made = [open_picture(path) for path in results(args, entry["name"])[:SHOWN]]
        rows.append([card, pair.image, *made, *[None] * (SHOWN - len(made))])
    columns = 2 + min(SHOWN, max(pair["samples"] for pair in scored))
    titles = ["", "image prompt", *(f"sample {j}" for j in range(SHOWN))]
    return sheet([row[:columns] for row in rows], titles[:columns], side)


def shown(score: float | None, digits: int) -> str:
    return "-" if score is None else f"{score:.{digits}f}"


def report(args: argparse.Namespace, found: dict) -> None:
    print(f"{'':<12}   mean     95% interval")
    for key, title in SCORES.items():
        bounds = found[f"{key}_interval"] or []
        interval = " to ".join(f"{b:.4f}" for b in bounds) or (
            "no captions" if found[key] is None else "of one pair: none"
        )
        print(f"{title:<12} {shown(found[key], 4):>7}   ", interval)
    gelu = found["settings"]["clip_gelu"]
    judge = f"{args.clip or 'the tiny CLIP'}{f' ({gelu} GELU)' if gelu else ''}"
    print(f"{found['n']} pairs, {found['samples']} results, by {judge}")
    print(args.output, args.output.with_suffix(".png"), sep="\n")
    if skipped := found["skipped"]:
        print(
            f"skipped {found['skipped_count']}: {'; '.join(skipped[:5])}{'; ...' if skipped[5:] else ''}",
            file=sys.stderr,
        )


def batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def parse() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    bundled = str(TINY / "data/unseen-drawings-*.tar.gz")
    add("--data", nargs="+", default=[bundled], help="pairs: folder, shards or list (default: bundled unseen drawings)")
    add("--data-root", metavar="DIR", help="where relative paths in lists start (default: each list's own folder)")
    add("--limit", type=cli.whole(1), metavar="N", help="the first N pairs (default: all)")
    add("--results", type=Path, metavar="R", help="score the pictures in this folder; make none")
    add("--pictures", type=Path, metavar="P", help="where the made pictures go (default: --output without .json)")
    add("--output", type=Path, default=Path("outputs/evaluate.json"), help="a .json (default: %(default)s)")
    add("--clip", metavar="C", help="the judge: a CLIP file, or MODEL/PRETRAINED of open_clip (default: the tiny CLIP)")
    add("--clip-gelu", choices=("quick", "erf"), help="of a CLIP file (default: quick for ViT-B and ViT-L, else erf)")
    add("--caption-prefix", default="", help='before captions when scoring, as "A photo depicts " (default: nothing)')
    add("--num-samples", type=cli.whole(1), metavar="N", help="for each pair (default: 4; of --results: all)")
    add("--text", action="store_true", help="each pair's caption as text prompt (default: empty text)")
    add("--scale", type=cli.number(0), default=1.0, metavar="S", help="of the image prompt (default: %(default)s)")
    add("--steps", type=cli.whole(1, 1000), default=50, help="DDIM steps (default: %(default)s)")
    add("--guidance-scale", type=cli.number(0), default=7.5, metavar="G", help="1 is off (default: %(default)s)")
    add("--seed", type=cli.whole(0, 2**62), default=0, help="sample j: noise of seed + j (default: %(default)s)")
    add("--height", type=cli.side, help="pixels, a multiple of 8 (default: the base's; tiny 128)")
    add("--width", type=cli.side, help="pixels, a multiple of 8 (default: the base's; tiny 128)")
    add("--batch-size", type=cli.whole(1), default=8, metavar="B", help="pictures at a time (default: %(default)s)")
    add("--base", metavar="FILE", help="SD 1.x, SD 2.x or SDXL: a checkpoint or a folder (default: the tiny model)")
    add("--adapter", metavar="FILE", help="IP-Adapter, .safetensors or .bin")
    add("--image-encoder", metavar="FILE", help="CLIP image encoder, transformers or OpenCLIP layout")
    add("--vae", metavar="FILE", help="another autoencoder")
    add("--device", type=cli.device, default=cli.default_device(), help="default: the fastest here")
    add("--dtype", choices=cli.DTYPES, dest="dtype_name", help="when making (default: float16 on cuda, else float32)")
    args = parser.parse_args()

    if args.output.suffix != ".json" or args.output.is_dir():
        raise UserError(f"--output {args.output}: a name that ends in .json is wanted")
    if args.results and not args.results.is_dir():
        raise UserError(f"--results {args.results}: no such folder")
    if args.clip_gelu and not os.path.isfile(args.clip or ""):
        raise UserError(f"--clip-gelu {args.clip_gelu}: goes with --clip FILE")
    for name in (*MODELS, "pictures"):
        flag = f"--{name.replace('_', '-')}"
        if args.results and getattr(args, name):
            raise UserError(f"{flag}: --results makes no pictures; they go without each other")
        if args.base and name in ("adapter", "image_encoder") and not getattr(args, name):
            raise UserError(f"{flag} FILE is wanted beside --base")
    resolve_names(args)
    if args.results:  # how the pictures were made is not for these flags to say
        vars(args).update(dict.fromkeys(MAKING))
    else:
        args.pictures = args.pictures or args.output.with_suffix("")
        args.num_samples = args.num_samples or 4
        if not args.base:
            args.height, args.width = args.height or 128, args.width or 128
        args.dtype_name = args.dtype_name or ("float16" if args.device.type == "cuda" else "float32")
        vars(args).update({name: getattr(args, name) or str(path) for name, path in TINY_FILES.items()})
    for flag, path in (("--output", args.output), ("--pictures", args.pictures or args.output)):
        cli.check_writable(flag, path, path.absolute().parent)
    return args


if __name__ == "__main__":
    cli.run(main)
