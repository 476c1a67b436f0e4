"""Train an IP-Adapter by the paper's recipe (arXiv 2308.06721): the base model frozen, new keys and values for images.

  python train.py                                     the tiny model's adapter, on the bundled drawings
  python sample.py --adapter outputs/train/adapter.safetensors

With Stable Diffusion 1.5, an image encoder and image-caption pairs (tar shards, a folder, or a list):
  python train.py --base v1-5-pruned-emaonly.safetensors --image-encoder model.safetensors \\
      --data "shards/{00000..00099}.tar" --output runs/first --cache runs/cache --dtype bfloat16

On several GPUs, --batch-size for each:
  torchrun --nproc-per-node 8 train.py --base ...

A run is a folder. It can be stopped at any moment; --resume goes on with it, with its settings but for those given anew.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also under python -P
from cli import start  # noqa: F401, isort: skip, before what is slow to import

import argparse
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from cli import flags, terminal
from cli.training import declare
from files.errors import UserError
from generate import open_models
from tiny.places import place_features
from training.buckets import open_buckets
from training.data import identity, open_pairs
from training.loop import training
from training.monitors import MONITORS
from training.optimizers import OPTIMIZERS
from training.ranks import Ranks
from training.ready import ready
from training.recipes import (
    PAPER,
    TINY_RUN,
    check_faces,
    kind_named,
    new_adapter,
    resolve_trainable,
    trainable_kind,
    wants_encoder,
)
from training.references import open_references
from training.remote import fetched
from training.run import Run, check_folder, saved, stored_settings
from training.trainer import Trainer
from training.validation import SHOWN, validation, validation_pictures
from weights import load_adapter
from weights.diffusers import model_sha256
from weights.hub import cached
from weights.presets import BUNDLED

MODELS = ("base", "image_encoder", "vae")
NAMED = (*MODELS, "adapter")
# Another run, if one of these differs.
IDENTITY = (*(f"{name} (sha256)" for name in MODELS), "kind", "optimizer", "resolution", "seed")
IDENTITY += ("data (pairs)", "data (sha256)", "references")
# What the step and the loop take under the names of their flags.
RECIPE = ("seed", "learning_rate", "weight_decay", "loss", "warmup", "clip_grad", "ema", "steps")
RECIPE += ("optimizer", "noise_offset", "least_t")
LOOP = ("steps", "batch_size", "workers", "save_every", "validate_every", "random_crop", "flip")


def main() -> None:
    args = parse()
    ranks = Ranks(args.device, write=lambda line: tqdm.write(terminal.flagged(line), file=sys.stderr))
    # What can be refused without the models is refused before them: they may have to be fetched.
    monitors, _ = [MONITORS[name]() for name in args.log], OPTIMIZERS[args.optimizer]()
    check_folder(args.output, args.resume)
    keep = {"fetch": partial(fetch, args.shards, ranks), "index": (args.cache or args.output) / "index"}
    pairs = open_pairs(args.data, args.data_root, uncaptioned=True, **keep)
    if args.limit:
        pairs.cut(args.limit)
    references = open_references(pairs, args.reference, args.reference_share)
    shown = open_pairs(args.validation, args.data_root, uncaptioned=True, **keep) if args.validation else pairs
    given = {name: vars(args)[name] for name in NAMED}
    expected = kind_named(given, args.kind)
    check_faces(expected, args.data, pairs)
    how = {"device": ranks.device, "dtype": args.dtype_name, "storage": args.storage, "keep": False, "tell": ranks.say}
    models = open_models(**given, new_adapter=True, image=wants_encoder(given, args.kind), **how)
    kind = trainable_kind(models, args.kind)
    check_faces(kind, args.data, pairs)
    args.resolution, args.loss = args.resolution or models.side, args.loss or models.base.schedule.prediction
    hashes = {f"{name} (sha256)": model_sha256(path) for name in MODELS if (path := models.files.get(name))}
    settings = {key: value for key, value in vars(args).items() if key not in ("device", "resume")} | {"kind": kind}
    settings |= {name: str(path) for name, path in models.files.items()}
    settings |= {"processes": ranks.size, "torch": torch.__version__} | hashes | identity(pairs, ranks, references)
    run = Run(args.output, ranks, settings, IDENTITY, args.resume, monitors)
    for told in filter(None, (pairs.told(), references and references.told())):
        ranks.say(told)
    held_out = []
    if args.validate_every and ranks.first:
        check_faces(kind, args.validation or args.data, shown)
        held_out = validation_pictures(shown, " ".join(args.validation or args.data))
    buckets = None
    if args.buckets is not None:
        batch = args.batch_size * args.grad_accumulation * ranks.size
        count = len(references.begins) if references else len(pairs)
        buckets = open_buckets(pairs, count, args.buckets, args.resolution, batch, ranks)
        ranks.say(buckets.told())
    seen = ready(
        models,
        pairs,
        held_out if args.validation else held_out[:SHOWN],  # else they are trained on
        SHOWN,
        bool(args.validation),
        args.validation_prompt,
        ranks,
        kind,
        resolution=args.resolution,
        references=references,
        buckets=buckets,
        cache=args.cache,
        hashes=hashes,
        workers=args.workers,
        on_pair=terminal.counter("features", "pair", ranks.first),
    )

    torch.manual_seed(args.seed)  # for the image projection of a new adapter
    unet = models.unet()
    if args.gradient_checkpointing:
        unet.recompute()
    adapter = load_adapter(models.files["adapter"]) if models.adapter_kind else new_adapter(kind, unet, seen.encoder)
    adapter.to(ranks.device, torch.float32).requires_grad_()
    adapter.attach(unet)
    new, tiny = not models.adapter_kind and not saved(args.output), models.base.path == cached(BUNDLED)
    if new and tiny and kind == "full-face" and args.resolution == models.side and not buckets:
        place_features(adapter, unet, seen)
    trainer = Trainer(
        adapter,
        torch.compile(unet) if args.compile else unet,
        seen.null,
        ranks,
        dtype=models.dtype,
        drop=(args.drop_text, args.drop_image, args.drop_both),
        rate_schedule=args.schedule,
        noise_schedule=models.base.schedule,
        sinusoids=models.base.sinusoids,
        structure_scale=1.0 if kind == "faceid-plusv2" else None,
        **{name: vars(args)[name] for name in RECIPE},
    )
    ranks.say(f"{sum(p.numel() for p in adapter.parameters()):,} trainable parameters, {len(seen.source):,} pairs")
    run.open(trainer, pairs, args.resume)
    with tqdm(total=args.steps, initial=trainer.step, desc="training", unit="step", disable=not ranks.first) as bar:
        for _ in training(
            trainer,
            run,
            seen,
            accumulation=args.grad_accumulation,
            **{name: vars(args)[name] for name in LOOP},
            validate=validation(models, unet, trainer, seen, run),
        ):
            bar.update()
            bar.set_postfix(loss=f"{run.smooth:.4f}", lr=f"{trainer.rate:.1e}")
    if trainer.step < args.steps:
        ranks.say(f"stopped behind step {trainer.step}; --resume goes on behind step {run.saved}")
        ranks.close()
        sys.exit(130)
    if run.saved < trainer.step:
        ranks.say(f"no finite loss in the last steps: the adapter is that of step {run.saved}")
    made = [args.output / name for name in ("adapter.safetensors", "validation.png", "curve.png")]
    ranks.say("\n".join(str(path) for path in made if path.exists()))
    ranks.close()


def fetch(folder: Path, ranks: Ranks, url: str) -> list[str]:
    """Remote shards, and a bar while they come."""
    return fetched(url, folder, on_shard=terminal.counter("shards", "shard", ranks.first))


def parse() -> argparse.Namespace:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    declare(parser)
    args = parser.parse_args()
    if args.resume:  # what is not said anew is as it was
        known = {action.dest for action in parser._actions} - {"output", "resume", "device", "help"}
        before = stored_settings(args.output)
        parser.set_defaults(**{name: value for name, value in before.items() if name in known})
        args = parser.parse_args()
    flags.check_writable("--output", args.output, args.output)
    if args.base and not args.data:
        raise UserError("--data is wanted beside --base")
    if args.storage and args.compile:
        raise UserError("--storage and --compile: one of them; what is brought up anew at each use is not compiled")
    given = {name: vars(args)[name] for name in NAMED}
    tiny = resolve_trainable(given, wants_encoder(given, args.kind))["base"] == BUNDLED and not args.base
    if not args.data and not tiny:
        raise UserError(
            f"--data is wanted beside --adapter {args.adapter}, which brings another base than the tiny one"
        )
    if args.cache and (args.random_crop or args.flip):
        named = "--random-crop" if args.random_crop else "--flip"
        raise UserError(f"{named} and --cache: one of them; a cache holds each picture as it was cropped once")
    args.shards = args.shards or (args.cache or args.output) / "shards"
    if not args.data and not args.random_crop and not args.flip:
        args.cache = args.cache or args.output / "cache"
    follows = {"kind"} if args.adapter else set()  # the adapter, or the user's own data
    follows |= {"validation", "limit"} if args.data else set()
    for name, value in (TINY_RUN if tiny else PAPER).items():
        if getattr(args, name) is None and name not in follows:
            setattr(args, name, value)
    if args.drop_text + args.drop_image + args.drop_both > 1:
        raise UserError("--drop-text, --drop-image and --drop-both: more than 1 in all")
    if args.workers is None:
        args.workers = 4 if args.device.type == "cuda" else 0
    return args


if __name__ == "__main__":
    terminal.run(main)
