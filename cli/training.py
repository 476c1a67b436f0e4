"""The flags of train.py, by what they are about."""

import argparse
from pathlib import Path

from cli import flags
from cli.flags import number, path, share, side, size, text, whole
from training.monitors import MONITORS
from training.optimizers import OPTIMIZERS
from training.recipes import KINDS, PAPER, TINY_RUN
from training.references import RULES, SHARE
from training.trainer import RATE_SCHEDULES
from weights.storage import STORAGES


def declare(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    for about in (files, recipe, machine):
        about(parser)


def preset(name: str) -> str:
    return f"(default: {PAPER[name]:,}; tiny {TINY_RUN[name]:,})"


def files(parser: argparse.ArgumentParser) -> None:
    """--base, --adapter, ..., --data, --validation, --reference, --limit, --cache, --output, --resume, ..."""
    group = parser.add_argument_group("files, models also by name")
    flags.models(group)
    add = group.add_argument
    forms = "tar shards (globs and {000..099} work, https:// and s3:// too), folders of these or of pictures with .txt, .json, .caption or "
    forms += "metadata.jsonl or COCO's annotations, or without captions; .json, .jsonl and .csv lists of "
    add("--data", nargs="+", metavar="D", help=f'pairs: {forms}{{"image_file", "text"}}')
    root = "where relative paths in lists start (default: each list's own folder)"
    add("--data-root", type=path, metavar="DIR", help=root)
    drawn = "pairs held out, drawn and measured now and then (default: some of --data, drawn alone)"
    add("--validation", nargs="+", metavar="D", help=drawn)
    beside = "texts to draw its pictures with (default: the empty one)"
    add("--validation-prompt", nargs="+", type=text, default=[""], metavar="TEXT", help=beside)
    rule = "whose picture is the prompt: that of a list's `reference`, or of the same folder, or name but for its end"
    add("--reference", choices=RULES, help=f"{rule} (default: field where a list has it, else the pair's own)")
    others = f"of the places where another picture is the prompt (default: {SHARE})"
    add("--reference-share", type=share, metavar="P", help=others)
    add("--limit", type=whole(1), metavar="N", help="the first N pairs (default: all)")
    kept = "keep what the encoders make here; for each pair they run once, also where data grow or are moved"
    add("--cache", type=path, metavar="DIR", help=kept)
    copies = "keep remote shards here, each fetched once (default: shards in --cache, else in --output)"
    add("--shards", type=path, metavar="DIR", help=copies)
    add("--output", type=path, default=Path("outputs/train"), help="folder of the run (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --output")


def recipe(parser: argparse.ArgumentParser) -> None:
    """--kind, --steps, --batch-size, --learning-rate, ..., --seed: what a run is."""
    add = parser.add_argument_group("recipe").add_argument
    add("--kind", choices=KINDS, help=f"(default: {PAPER['kind']}; tiny {TINY_RUN['kind']})")
    add("--steps", type=whole(1), help=preset("steps"))
    pairs = "pairs to a step, of each process " + preset("batch_size")
    add("--batch-size", type=whole(1), metavar="N", help=pairs)
    add("--grad-accumulation", type=whole(1), default=1, metavar="N", help="batches to a step (default: 1)")
    add("--learning-rate", type=number(0), metavar="R", help=preset("learning_rate"))
    add("--warmup", type=whole(0), metavar="N", help="steps in which it grows " + preset("warmup"))
    then = f"what it does then (default: {PAPER['schedule']}; tiny {TINY_RUN['schedule']})"
    add("--schedule", choices=RATE_SCHEDULES, help=then)
    add("--weight-decay", type=number(0), default=0.01, metavar="D", help="(default: %(default)s)")
    add("--clip-grad", type=number(0), default=0.0, metavar="N", help="largest norm (default: 0, none)")
    weighed = "error of the noise, that of v, or as min-SNR weighs it (default: what the base predicts; tiny v)"
    add("--loss", choices=("eps", "v", "min-snr"), help=weighed)
    add("--least-t", type=whole(0, 999), metavar="T", help="timesteps are drawn from here on " + preset("least_t"))
    offset = "share of the noise that is the same over a channel: darker and brighter pictures (default: 0)"
    add("--noise-offset", type=number(0), default=0.0, metavar="O", help=offset)
    light = "adafactor holds next to nothing, at a rate relative to the weights' size; adamw8bit wants bitsandbytes"
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help=f"(default: adamw) {light}")
    add("--ema", type=share, metavar="D", help="decay of averaged weights, 0: none " + preset("ema"))
    add("--drop-text", type=share, metavar="P", help="share of pairs without their text " + preset("drop_text"))
    add("--drop-image", type=share, default=0.05, metavar="P", help="without their image (default: %(default)s)")
    add("--drop-both", type=share, default=0.05, metavar="P", help="without either (default: %(default)s)")
    add("--resolution", type=side, metavar="R", help="of the pictures, a square (default: as the base's own)")
    shapes = "pictures as they are: batches of one size each, of R x R pixels or sizes WxH (default: squares; R: --resolution)"
    add("--buckets", nargs="*", type=size, metavar="R", help=shapes)
    add("--random-crop", action="store_true", help="crop anywhere, not the middle; not with --cache")
    add("--flip", action="store_true", help="mirror half of the pictures; not with --cache")
    add("--seed", type=whole(0, 2**40), default=0, help="(default: %(default)s)")


def machine(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype, --storage, ..., --save-every, --validate-every, --log: where and how it is computed."""
    group = parser.add_argument_group("machine")
    flags.machine(group, "float32", "of the frozen parts")
    add = group.add_argument
    stored = "keep the frozen parts' large weights in it, and bring each up to --dtype when it is used"
    add("--storage", choices=STORAGES, help=stored)
    add("--compile", action="store_true", help="compile the UNet (torch.compile)")
    anew = "compute activations anew on the way back: less memory, more time"
    add("--gradient-checkpointing", action="store_true", help=anew)
    add("--workers", type=whole(0), metavar="N", help="processes that read pairs (default: 4 beside a GPU, else 0)")
    save = "steps from checkpoint to checkpoint " + preset("save_every")
    add("--save-every", type=whole(1), metavar="N", help=save)
    draw = "the same for pictures and the held-out loss, 0: none " + preset("validate_every")
    add("--validate-every", type=whole(0), metavar="N", help=draw)
    beside = "log there too, where it is installed; several with spaces between"
    add("--log", nargs="*", choices=MONITORS, default=[], help=beside)
