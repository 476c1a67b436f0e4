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

import argparse
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from clip import CLIPImageConfig, PictureError, preprocess
from ipadapter import ImageProjection, ImagePrompt, IPAdapter, PatchProjection, Prompt, Resampler, flags
from ipadapter.features import SHARD, Cache, Encoders, Features, Places, Prepared, Readable, deaf, places, stack
from ipadapter.pairs import DataError, Pairs, open_pairs
from ipadapter.run import Run, stored_settings
from ipadapter.trainer import Ranks, Trainer
from sample import TINY, TINY_FILES, decode, resolve_names
from sampler import ddim, guided, noise
from tiny.places import place
from unet import UNet
from weights import Base, WeightsError, check_fit, load_adapter, load_image_encoder, load_vae, open_base
from weights.hashes import sha256

KINDS = {PatchProjection: "full-face", Resampler: "plus", ImageProjection: "base"}
# What stands for a flag that is not given: the paper's recipe; and what suits the tiny model and a laptop.
PAPER = {
    "kind": "base",
    "steps": 1_000_000,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "warmup": 0,
    "ema": 0.0,
    "loss": "eps",
    "drop_text": 0.05,
    "resolution": 512,
    "save_every": 1000,
    "validate_every": 1000,
}
TINY_RUN = {
    "base": str(TINY_FILES["base"]),
    "image_encoder": str(TINY_FILES["image_encoder"]),
    "validation": [str(TINY / "data/unseen-drawings-*.tar.gz")],
    "limit": 2000,  # of 9,142: to encode them all takes as long as to train
    "data": [str(TINY / "data/train-*.tar.gz")],
    "kind": "full-face",
    "steps": 250,  # less than a quarter of an hour on two cores, features and all
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup": 20,
    "ema": 0.98,
    "loss": "v",
    "drop_text": 0.5,  # a drawing's name tells nearly everything: beside it little is left for the image to tell
    "resolution": 128,
    "save_every": 50,
    "validate_every": 125,
}
MODELS = ("base", "image_encoder", "vae")
# Another run, if one of these differs.
IDENTITY = (*(f"{name} (sha256)" for name in MODELS), "kind", "resolution", "seed", "data", "limit")
SHOWN = 6  # image prompts of the validation
VALIDATION_STEPS = 30  # DDIM


def main() -> None:
    args = parse()
    ranks = Ranks(args.device)
    base = open_base(args.base, args.dtype, ranks.device)
    if base.family.name != "SD 1.x" or base.prediction != "eps":
        raise flags.UserError(
            f"--base {args.base}: {base.family.name}, predicting {base.prediction}; training is for SD 1.x, predicting eps"
        )
    hashes = {f"{name} (sha256)": sha256(path) for name in MODELS if (path := getattr(args, name))}
    run = Run(args.output, ranks, settings(args, ranks) | hashes, IDENTITY, args.resume)
    pairs = open_pairs(args.data)
    seen = look(args, ranks, base, pairs, hashes)

    torch.manual_seed(args.seed)  # for the image projection of a new adapter
    unet = base.unet()
    if args.gradient_checkpointing:
        unet.recompute()
    adapter = seen.adapter or new_adapter(args.kind, unet, seen.encoder)
    begun = args.resume and any((args.output / "checkpoints").glob("*"))
    if args.kind == "full-face" and args.base == TINY_RUN["base"] and not seen.adapter and not begun:
        place_keys(adapter, unet, seen, ranks)
    adapter.to(ranks.device, torch.float32).requires_grad_().attach(unet)
    trainer = Trainer(
        adapter,
        torch.compile(unet) if args.compile else unet,
        seen.null,
        ranks,
        seed=args.seed,
        dtype=args.dtype,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        loss=args.loss,
        drop=(args.drop_text, args.drop_image, args.drop_both),
        warmup=args.warmup,
        clip_grad=args.clip_grad,
        ema=args.ema,
    )
    ranks.say(f"{sum(p.numel() for p in adapter.parameters()):,} trainable parameters, {len(seen.source):,} pairs")
    run.open(trainer, pairs, args.resume)
    stop = Stop(ranks)
    order = places(
        trainer.place, (args.steps - trainer.step) * args.grad_accumulation, args.batch_size, ranks.rank, ranks.size
    )
    drawn = Places(seen.source, args.seed)
    batches = iter(DataLoader(drawn, 1, None, None, order, args.workers, stack, worker_init_fn=deaf))
    with tqdm(total=args.steps, initial=trainer.step, desc="training", unit="step", disable=not ranks.first) as bar:
        while trainer.step < args.steps and not stop:
            parts = []
            for at, pairs_or_features, bad in islice(batches, args.grad_accumulation):
                parts.append((at, seen.encode(pairs_or_features)))
                run.skipped += bad
            run.log(trainer.update(parts))
            bar.update()
            bar.set_postfix(loss=f"{run.smooth:.4f}", lr=f"{trainer.rate:.1e}")
            if trainer.step % args.save_every == 0 or trainer.step == args.steps:
                run.save()
            if seen.prompts and trainer.step % args.validate_every == 0:
                run.show(seen.prompts, validate(args, base, unet, trainer, seen))
    if trainer.step < args.steps:
        run.save()
        ranks.say(f"stopped behind step {trainer.step}; --resume goes on behind step {run.saved}")
        sys.exit(130)
    if seen.prompts and not run.shown():  # also where a run was killed between its last step and here
        run.show(seen.prompts, validate(args, base, unet, trainer, seen))
    run.close()
    if run.saved < trainer.step:
        ranks.say(f"no finite loss in the last steps: the adapter is that of step {run.saved}")
    made = [args.output / name for name in ("adapter.safetensors", "validation.png", "curve.png")]
    ranks.say("\n".join(str(path) for path in made if path.exists()))
    ranks.close()


def place_keys(adapter: IPAdapter, unet: UNet, seen: "Seen", ranks: Ranks) -> None:
    """Let a full-face adapter of the tiny model begin with each patch looked at from its own place (tiny/places.py)."""
    ranks.say("keys in place first")
    readable, parts = Readable(seen.source), []
    for start in range(0, count := min(2000, len(seen.source)), 8):
        some = (readable[i] for i in range(start, min(start + 8, count)))
        if good := [pair for pair, bad in some if not bad]:
            parts.append(seen.encode(default_collate(good)))
    features = {key: torch.cat([part[key] for part in parts]).to(ranks.device).float() for key in ("mean", "image")}
    adapter.to(ranks.device, torch.float32)
    empty = seen.null["text"][None].to(ranks.device).float()
    steps = min(3000, 2 * len(features["mean"]))
    place(adapter, deepcopy(unet).float(), empty, features["mean"], features["image"], steps)


def settings(args: argparse.Namespace, ranks: Ranks) -> dict:
    """What `settings.json` holds beside the hashes of the models: every flag, and what the run is made with."""
    given = {key: value for key, value in vars(args).items() if key not in ("device", "dtype", "resume")}
    return given | {"processes": ranks.size, "torch": torch.__version__}


@dataclass
class Seen:
    """What is left of data and encoders when the training begins."""

    source: Dataset  # features from the cache, or prepared pairs
    encode: Callable[[Features], Features]  # nothing more to do, or the encoders
    null: Features  # of the empty prompt and of no image
    encoder: CLIPImageConfig
    adapter: IPAdapter | None  # the one to go on with
    prompts: list[Image.Image]  # of the validation
    prompt_features: Tensor


def look(args: argparse.Namespace, ranks: Ranks, base: Base, pairs: Pairs, hashes: dict[str, str]) -> Seen:
    """Load the encoders; fill the cache, if there is to be one, and let them go."""
    image = load_image_encoder(args.image_encoder, args.dtype, ranks.device)
    adapter = load_adapter(args.adapter) if args.adapter else None
    if adapter:
        check_fit(adapter, args.adapter, base, image, args.image_encoder)
    vae = load_vae(args.vae, args.dtype, ranks.device) if args.vae else base.vae()
    encoders = Encoders(vae, base.text(), image, patches=args.kind != "base")
    null = encoders.null()
    source = prepared = Prepared(pairs, args.limit or len(pairs), args.resolution, image.config.image_size)
    if args.cache:
        source = fill(args, ranks, encoders, null, prepared, hashes)
    prompts = validation_prompts(args, pairs) if args.validate_every and ranks.first else []
    pixels = [preprocess(prompt, image.config.image_size) for prompt in prompts]
    return Seen(
        source,
        encode=(lambda features: features) if args.cache else encoders,
        null=null,
        encoder=image.config,
        adapter=adapter,
        prompts=prompts,
        prompt_features=torch.cat([encoders.image_features(x) for x in pixels]) if prompts else torch.empty(0),
    )


def fill(
    args: argparse.Namespace,
    ranks: Ranks,
    encoders: Encoders,
    null: Features,
    prepared: Prepared,
    hashes: dict[str, str],
) -> Cache:
    """Make what is missing of the cache, each process its share of the files."""
    features = {"features": "patches" if encoders.patches else "embedding", "resolution": args.resolution}
    fingerprint = hashes | features | {"dtype": args.dtype_name, "data (sha256)": prepared.pairs.digest()}
    cache = Cache(args.cache, fingerprint, len(prepared))
    mine = cache.missing()[ranks.rank :: ranks.size]  # before any process has begun to fill it
    ranks.wait()
    if ranks.first and mine:
        cache.begin(null, args.resolution)
    ranks.wait()
    if mine:
        total = min(len(mine) * SHARD, len(prepared))
        with tqdm(total=total, desc="features", unit="pair", disable=not ranks.first) as bar:
            for _ in cache.fill(mine, encoders, prepared, args.workers):
                bar.update()
    ranks.wait()
    return cache


def validation_prompts(args: argparse.Namespace, pairs: Pairs) -> list[Image.Image]:
    """The image prompts that are drawn now and then: the first readable pairs of --validation, or else of --data."""
    found, readable = [], Readable(open_pairs(args.validation) if args.validation else pairs)
    for i in range(len(readable.source)):
        pair, bad = readable[i]
        found += [] if bad else [pair.image]
        if len(found) == SHOWN:
            break
    if not found:
        raise DataError(f"--validation {' '.join(args.validation or args.data)}: no picture in it can be read")
    return found


def new_adapter(kind: str, unet: UNet, encoder: CLIPImageConfig) -> IPAdapter:
    """An adapter as the official ones are: 4 tokens, a Resampler of depth 4 with 16 tokens, or every patch a token."""
    context = unet.config.context_dim
    if kind == "base":
        projection = ImageProjection(encoder.projection, context, num_tokens=4)
    elif kind == "plus":
        projection = Resampler(encoder.width, context, depth=4, heads=context // 64, num_tokens=16, context_dim=context)
    else:
        projection = PatchProjection(encoder.width, context)
    return IPAdapter.for_unet(unet, projection)


@torch.no_grad()
def validate(args: argparse.Namespace, base: Base, unet: UNet, trainer: Trainer, seen: Seen) -> list[Image.Image]:
    """What the adapter as it now is makes of the image prompts, with no text, at scale 1, from the seeds 0, 1, ..."""
    device, count = trainer.ranks.device, len(seen.prompts)
    with trainer.averaged() as adapter, torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
        text = trainer.null["text"].expand(count, -1, -1)
        tokens = adapter.image_proj(seen.prompt_features.float())
        null = adapter.image_proj(trainer.null["image"][None].float()).expand_as(tokens)
        prompt, absent = Prompt(text, (ImagePrompt(tokens),)), Prompt(text, (ImagePrompt(null),))
        start = noise(0, count, args.resolution, args.resolution).to(device)
        steps = ddim(guided(unet, prompt, absent, 7.5), start, VALIDATION_STEPS)
        for x in tqdm(steps, "validation", VALIDATION_STEPS, leave=False):
            pass
    vae = load_vae(args.vae, args.dtype, device) if args.vae else base.vae()  # not held while the training goes on
    return decode(vae, x.to(args.dtype))


class Stop:
    """Turns Ctrl-C and a scheduler's SIGTERM into an end behind the step that is being made, on all ranks at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.asked = ranks, False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.ask)

    def ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:  # asked twice: at once
            raise KeyboardInterrupt
        self.asked = True

    def __bool__(self) -> bool:
        return self.ranks.mean(float(self.asked)) > 0


def parse() -> argparse.Namespace:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def preset(name: str) -> str:
        return f"(default: {PAPER[name]:,}; tiny {TINY_RUN[name]:,})"

    files = parser.add_argument_group("files")
    files.add_argument(
        "--base", metavar="FILE", help="SD 1.x: a checkpoint, a diffusers folder or a name (default: the tiny model)"
    )
    files.add_argument("--image-encoder", metavar="FILE", help="CLIP image encoder, transformers or OpenCLIP layout")
    files.add_argument("--vae", metavar="FILE", help="another autoencoder")
    files.add_argument("--adapter", metavar="FILE", help="go on from this adapter instead of beginning with a new one")
    files.add_argument(
        "--data",
        nargs="+",
        metavar="D",
        help="pairs: tar shards (globs and {000..099} work), folders of pictures with .txt or .json beside them, "
        'or .json and .jsonl lists of {"image_file", "text"}',
    )
    files.add_argument(
        "--validation",
        nargs="+",
        metavar="D",
        help="pairs whose pictures are drawn now and then (default: from --data)",
    )
    files.add_argument("--limit", type=flags.whole(1), metavar="N", help="the first N pairs (default: all)")
    files.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep what the encoders make here; they run once (delete it when pictures are replaced under their old names)",
    )
    files.add_argument(
        "--output", type=Path, default=Path("outputs/train"), help="folder of the run (default: %(default)s)"
    )
    files.add_argument("--resume", action="store_true", help="go on with the run in --output")

    recipe = parser.add_argument_group("recipe")
    add = recipe.add_argument
    add("--kind", choices=KINDS.values(), help=f"(default: {PAPER['kind']}; tiny {TINY_RUN['kind']})")
    add("--steps", type=flags.whole(1), help=preset("steps"))
    add(
        "--batch-size",
        type=flags.whole(1),
        metavar="N",
        help="pairs to a step, of each process " + preset("batch_size"),
    )
    add("--grad-accumulation", type=flags.whole(1), default=1, metavar="N", help="batches to a step (default: 1)")
    add("--learning-rate", type=flags.number(0), metavar="R", help=preset("learning_rate"))
    add("--warmup", type=flags.whole(0), metavar="N", help="steps in which it grows " + preset("warmup"))
    add("--weight-decay", type=flags.number(0), default=0.01, metavar="D", help="(default: %(default)s)")
    add("--clip-grad", type=flags.number(0), default=0.0, metavar="N", help="largest norm (default: 0, none)")
    add("--loss", choices=("eps", "v"), help="error of the noise, or weighted as that of v (default: eps; tiny v)")
    add("--ema", type=flags.share, metavar="D", help="decay of averaged weights, 0: none " + preset("ema"))
    add("--drop-text", type=flags.share, metavar="P", help="share of pairs without their text " + preset("drop_text"))
    add("--drop-image", type=flags.share, default=0.05, metavar="P", help="without their image (default: %(default)s)")
    add("--drop-both", type=flags.share, default=0.05, metavar="P", help="without either (default: %(default)s)")
    add("--resolution", type=flags.side, metavar="R", help="of the pictures, a square " + preset("resolution"))
    add("--seed", type=flags.whole(0, 2**40), default=0, help="(default: %(default)s)")

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add(
        "--device",
        type=flags.device,
        default=flags.default_device(),
        help="cpu, cuda, cuda:1 (default: the fastest here)",
    )
    add(
        "--dtype",
        choices=flags.DTYPES,
        default="float32",
        dest="dtype_name",
        help="of the frozen parts (default: %(default)s)",
    )
    add("--compile", action="store_true", help="compile the UNet (torch.compile)")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations anew on the way back: less memory, more time",
    )
    add(
        "--workers",
        type=flags.whole(0),
        metavar="N",
        help="processes that read pairs (default: 4 beside a GPU, else 0)",
    )
    add(
        "--save-every",
        type=flags.whole(1),
        metavar="N",
        help="steps from checkpoint to checkpoint " + preset("save_every"),
    )
    add(
        "--validate-every",
        type=flags.whole(0),
        metavar="N",
        help="the same for pictures, 0: none " + preset("validate_every"),
    )
    known = parser.parse_args()
    if known.resume:  # what is not said anew is as it was
        flags_of = {action.dest for action in parser._actions} - {"output", "resume", "device", "help"}
        before = stored_settings(known.output)
        parser.set_defaults(**{name: value for name, value in before.items() if name in flags_of})
    args = parser.parse_args()
    flags.check_writable("--output", args.output, args.output)

    if args.base:
        for name in ("image_encoder", "data"):
            if not getattr(args, name):
                raise flags.UserError(f"--{name.replace('_', '-')} is wanted beside --base")
    resolve_names(args)
    if args.adapter:
        found = KINDS.get(type(load_adapter(args.adapter).image_proj))
        if not found:
            raise flags.UserError(f"--adapter {args.adapter}: FaceID; {', '.join(KINDS.values())} can be trained")
        if args.kind and args.kind != found:
            raise flags.UserError(f"--kind {args.kind}: the adapter given ({args.adapter}) is of the kind {found}")
        args.kind = found
    if not args.base and not args.data:
        args.cache = args.cache or args.output / "cache"
    for name, value in (PAPER if args.base else TINY_RUN).items():
        if getattr(args, name) is None and not (args.data and name in ("validation", "limit")):
            setattr(args, name, value)
    if args.drop_text + args.drop_image + args.drop_both > 1:
        raise flags.UserError("--drop-text, --drop-image and --drop-both: more than 1 in all")
    args.dtype = flags.DTYPES[args.dtype_name]
    if args.workers is None:
        args.workers = 4 if args.device.type == "cuda" else 0
    return args


if __name__ == "__main__":
    flags.run(main, (WeightsError, PictureError, DataError))
