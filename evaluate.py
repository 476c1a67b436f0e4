"""CLIP-I and CLIP-T over pairs of picture and caption, as in the paper's Table 1 (arXiv 2308.06721).

  python evaluate.py                            the bundled model on bundled drawings that it has not seen
  python evaluate.py --data D --limit 100       pictures of yours as image prompts
  python evaluate.py --data D --results R       pictures that exist: R/name.png, or R/name_0.png, ..., or R/name/0.png
                                                (also .jpg, .webp; any numbering)

The paper's setting: the 5,000 pictures of COCO val2017 with a caption each, SD 1.5, OpenAI's ViT-L/14 as the judge:
  python evaluate.py --data coco/val2017 --base v1-5-pruned-emaonly.safetensors --adapter ip-adapter_sd15.safetensors \\
      --image-encoder model.safetensors --clip ViT-L-14/openai

CLIP-I is the cosine of a result's image embedding and its prompt's, CLIP-T that of a result and the prompt's caption.
CLIPScore (arXiv 2104.08718) is 2.5 * max(CLIP-T, 0), and puts "A photo depicts " before each caption; here nothing is
put there unless --caption-prefix says so. Sample j of each pair starts from the noise of seed + j, whatever the batch.
Run again, it goes on where it stopped.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also under python -P
from cli import start  # noqa: F401, isort: skip, before what is slow to import

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from cli import flags, terminal
from files.errors import UserError
from files.pictures import save_picture
from files.whole import write_text
from generate import Models, open_models, pictures, prompts
from ipadapter import Prompt
from tiny.judge import classifier
from training.data import open_pairs
from training.measures import SCORES, batches, best_and_worst, open_judge, scores, shown, summary
from training.pairs import Pair
from training.recipes import TINY, check_reads_pictures, resolve_pictures
from training.results import find_results, made_results, made_with, open_folder, readable, result_names, to_make
from weights.diffusers import model_sha256

MODELS = ("base", "adapter", "image_encoder", "vae")
FLATTERS = "the tiny CLIP (its own adapters' encoder: it flatters) and the tiny judge (same thing, same style)"
MAKING = ("steps", "guidance_scale", "scale", "seed", "height", "width", "text", "dtype_name")


def main() -> None:
    args = parse()
    pairs = open_pairs(args.data, args.data_root, uncaptioned=True, once=True)
    data = {"data (sha256)": pairs.digest()}
    if told := pairs.told():
        print(told, file=sys.stderr)
    names = result_names(pairs, args.limit)
    skipped = dict.fromkeys(pairs.skipped)  # a set of messages that keeps their order
    folder = args.results or args.pictures
    if args.results:
        found, left = find_results(folder, names, args.num_samples)
    else:
        resolve_pictures({name: getattr(args, name) for name in MODELS})
    judge = open_judge(args.clip, args.device, args.clip_gelu)
    if not args.clip:
        judge = replace(judge, apart=classifier(args.device))
    if not args.results:
        models = open_models(*(getattr(args, name) for name in MODELS), device=args.device, dtype=args.dtype_name)
        check_reads_pictures(models)
        size = {"height": args.height or models.side, "width": args.width or models.side}
        vars(args).update(size | {name: str(path) for name, path in models.files.items()})
        settings = data | {name: getattr(args, name) for name in MAKING} | {"sampler": "ddim"}
        settings |= {name: model_sha256(models.files[name]) if name in models.files else None for name in MODELS}
        open_folder(folder, settings)
        how = {"steps": args.steps, "guidance_scale": args.guidance_scale, **size}
        with tqdm(total=len(names) * args.num_samples, desc="pictures", unit="picture") as bar:
            missing = to_make(pairs, names, folder, args.num_samples, args.seed, skipped, bar.update)
            make(models, missing, how, args.scale, args.text, args.batch_size, settings, bar.update)
        found, left = made_results(folder, names, args.num_samples), []
    scored = []
    rows = readable(pairs, tqdm(names, desc="scores", unit="pair"), found, folder, skipped)
    for batch in batches(rows, args.batch_size):
        marks = scores(judge, [(pair, made) for _, _, pair, made in batch], args.caption_prefix)
        scored += [{"number": i, "name": name, **row} for (i, name, _, _), row in zip(batch, marks, strict=True)]
    if not scored:
        others = f"; {len(left)} of other names are there, {left[0].name} the first" if left else ""
        raise UserError(f"--data {' '.join(args.data)}: no pair can be scored: {next(iter(skipped))}{others}")
    settings = {name: str(v) if isinstance(v, Path | torch.device) else v for name, v in vars(args).items()}
    settings |= data | {"clip_gelu": judge.gelu, "torch": torch.__version__, "made_with": made_with(folder)}
    skips = len(skipped) + pairs.skipped_count - len(pairs.skipped)  # of very many, not all are told
    result = summary(scored) | {"skipped": list(skipped), "skipped_count": skips, "not_scored": len(left)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(best_and_worst(scored, pairs, found), args.output.with_suffix(".png"))
    write_text(args.output, json.dumps(result | {"settings": settings, "pairs": scored}, indent=1))
    report(result, f"{args.clip or FLATTERS}{f' ({judge.gelu} GELU)' if judge.gelu else ''}")
    print(args.output, args.output.with_suffix(".png"), sep="\n")
    if left:
        print(f"not scored: {len(left):,} pictures in {folder}; the first: {left[0]}", file=sys.stderr)
    if skipped:
        more = "; ..." if len(skipped) > 5 else ""
        print(f"skipped {skips}: {'; '.join(list(skipped)[:5])}{more}", file=sys.stderr)


def make(
    models: Models,
    missing: Iterator[tuple[Pair, list[tuple[int, Path]]]],
    how: dict,
    scale: float,
    with_text: bool,
    batch_size: int,
    settings: dict,
    done: Callable[[], object],
) -> None:
    """Make pictures of pairs, several pairs to a batch, and save each as soon as it is made."""

    def jobs() -> Iterator[tuple[Prompt, Prompt, int, Path]]:
        for pair, todo in missing:
            prompt, null = prompts(models, pair.text if with_text else "", images=[pair.image], scale=scale)
            yield from ((prompt, null, seed, path) for seed, path in todo)

    for batch in batches(jobs(), batch_size):
        some, nulls, seeds, paths = zip(*batch, strict=True)
        made = pictures(models, Prompt.cat(some), Prompt.cat(nulls), seeds, **how)
        for picture, seed, path in zip(made, seeds, paths, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(picture, path, settings | {"seed": seed})
            done()


def report(result: dict, judge: str) -> None:
    print(f"{'':<12}   mean     95% interval")
    for key, title in ((key, title) for key, title in SCORES.items() if key in result):
        bounds = result[f"{key}_interval"] or []
        none = "no captions" if result[key] is None else "of one pair: none"
        print(f"{title:<12} {shown(result[key], 4):>7}   ", " to ".join(f"{b:.4f}" for b in bounds) or none)
    print(f"{result['n']} pairs, {result['samples']} results, by {judge}")


def parse() -> argparse.Namespace:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    bundled = str(TINY / "data/unseen-drawings-*.tar.gz")
    add("--data", nargs="+", default=[bundled], help="pairs: folder, shards or list (default: bundled unseen drawings)")
    root = "where relative paths in lists start (default: each list's own folder)"
    add("--data-root", type=flags.path, metavar="DIR", help=root)
    add("--limit", type=flags.whole(1), metavar="N", help="the first N pairs (default: all)")
    add("--results", type=flags.path, metavar="R", help="score the pictures in this folder; make none")
    add("--pictures", type=flags.path, metavar="P", help="where the made pictures go (default: --output without .json)")
    add("--output", type=flags.path, default=Path("outputs/evaluate.json"), help="a .json (default: %(default)s)")
    add("--clip", metavar="C", help="the judge: a CLIP file, or MODEL/PRETRAINED of open_clip (default: the tiny CLIP)")
    add("--clip-gelu", choices=("quick", "erf"), help="of a CLIP file (default: quick for ViT-B and ViT-L, else erf)")
    add("--caption-prefix", default="", help='before captions when scoring, as "A photo depicts " (default: nothing)')
    add("--num-samples", type=flags.whole(1), metavar="N", help="for each pair (default: 4; of --results: all)")
    add("--text", action="store_true", help="each pair's caption as text prompt (default: empty text)")
    add("--scale", type=flags.number(0), default=1.0, metavar="S", help="of the image prompt (default: %(default)s)")
    add("--steps", type=flags.whole(1, 1000), default=50, help="DDIM steps (default: %(default)s)")
    add("--guidance-scale", type=flags.number(0), default=7.5, metavar="G", help="1 is off (default: %(default)s)")
    add("--seed", type=flags.whole(0, 2**62), default=0, help="sample j: noise of seed + j (default: %(default)s)")
    add("--height", type=flags.side, help="pixels, a multiple of 8 (default: the base's; tiny 128)")
    add("--width", type=flags.side, help="pixels, a multiple of 8 (default: the base's; tiny 128)")
    add("--batch-size", type=flags.whole(1), default=8, metavar="B", help="pictures at a time (default: %(default)s)")
    flags.models(parser)
    flags.machine(parser, what="when making")
    args = parser.parse_args()

    if args.output.suffix != ".json" or args.output.is_dir():
        raise UserError(f"--output {args.output}: a name that ends in .json is wanted")
    if args.results and not args.results.is_dir():
        raise UserError(f"--results {args.results}: no such folder")
    if args.clip_gelu and not os.path.exists(args.clip or ""):
        raise UserError(f"--clip-gelu {args.clip_gelu}: goes with --clip FILE")
    for name in (*MODELS, "pictures"):
        flag = f"--{name.replace('_', '-')}"
        if args.results and getattr(args, name):
            raise UserError(f"{flag}: --results makes no pictures; they go without each other")
    if args.results:  # how the pictures were made is not for these flags to say
        vars(args).update(dict.fromkeys(MAKING))
    else:
        args.pictures = args.pictures or args.output.with_suffix("")
        args.num_samples = args.num_samples or 4
        args.dtype_name = args.dtype_name or ("float16" if args.device.type == "cuda" else "float32")
    for flag, path in (("--output", args.output), ("--pictures", args.pictures or args.output)):
        flags.check_writable(flag, path, path.absolute().parent)
    return args


if __name__ == "__main__":
    terminal.run(main)
