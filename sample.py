"""Make pictures with image prompts.

  python sample.py                                    the bundled example, with the bundled tiny model
  python sample.py --image cat.png                    an image prompt
  python sample.py --image cat.png --prompt "a rocket"  an image prompt and text
  python sample.py --prompt "a red apple"             text alone
  python sample.py --again outputs/00000.png --seed 7 what made that picture, with another seed

With published models, by name (python sample.py --list) or by file:
  python sample.py --adapter plus --image cat.png --prompt "in the snow"
  python sample.py --base model.safetensors --adapter ip-adapter_sd15.safetensors --image-encoder vit-h --image cat.png
  python sample.py --adapter faceid --face-embedding face.npy --prompt "portrait of an astronaut"
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also under python -P
from cli import start  # noqa: F401, isort: skip, before what is slow to import

import argparse
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from cli import flags, groups, opened, sampling, terminal
from files.errors import UserError
from files.outputs import reserved
from files.pictures import save_picture
from generate import attention_sheet, open_models, prompts
from generate.again import again
from generate.control import check_hints
from generate.editing import steps_that_run
from generate.prompt import default_scale
from generate.record import Hashes, record
from generate.sweep import swept
from generate.syntax import parts
from generate.text import words_of
from sampler import SAMPLERS
from weights.hub import table

MOST_ROWS = 200  # of a sheet
EXAMPLE = Path(__file__).parent / "tiny/example.png"  # one of the unseen drawings
NEXT = """That was a bundled drawing as image prompt, and the bundled tiny model. Now with a picture of yours:
  python sample.py --image FILE --prompt "a rocket" --scale 0 0.5 1 --grid
With Stable Diffusion and a released adapter: see python sample.py --help, and --list"""


def main() -> None:
    args = parse()
    asked, brought = vars(args), groups.brought(args.images, args.nets, args.init, args.inpaint)
    # What was brought is opened before anything slow.
    images, canvas = opened.image_groups(args.images), opened.canvas(asked)
    hints = [opened.hint(net, i) for i, net in enumerate(args.nets)]
    # Of one prompt, or of one for each picture of a folder: what is recorded, and what it is made of.
    variants = opened.variants(args.images, images)
    prompting = [some for _, some in variants]
    sweep, folder = opened.sweep(asked), opened.folder(args.images)
    stems = opened.stems(folder) if folder else ()
    files = args.output, sweep.each, args.grid, args.overwrite, brought, args.attention, stems
    with reserved(*files) as names:
        models = open_models(**opened.opening(asked, [*chain(*prompting)]), tell=terminal.say)
        began, hashes = time.time(), Hashes(models, brought, terminal.PIPED)
        drawing = opened.drawing(asked, models, canvas)
        if hints:
            check_hints(models, hints, drawing["height"], drawing["width"])
        reading = opened.reading(asked)
        if any(group.save_embedding for group in args.images):
            prompting = opened.saved(models, args.images, prompting)
        pairs = (prompts(models, images=some, **reading) for some in prompting)
        # The first prompt is read before the bar appears.
        first, run = next(pairs), steps_that_run(models.base, canvas, args.steps)
        told, made = opened.recorded(asked, folder) | drawing, {}
        if args.attention:
            words = words_of(models, args.prompt, args.negative_prompt, args.prompt_syntax, args.long_prompt)
        with terminal.steps(run * sweep.batches(args.low_memory), "denoising") as step:
            drawing |= {"init": canvas, "controls": hints, "on_step": step}
            for job, picture in swept(models, sweep, chain([first], pairs), args.attention, **drawing):
                heard = sweep.told(variants[job.prompt][0], job.scale)
                settings = record(models, hashes, heard, **told, seed=job.seed)
                save_picture(picture, names[job.number], settings)
                if args.attention:
                    page = attention_sheet(picture, job.seen, words, list(map(opened.shown, heard)))
                    save_picture(page, names[len(sweep) + job.number], settings)
                if args.grid:
                    made[job.number] = picture
        if args.grid:
            heard = sweep.told(variants[0][0], sweep.scales)
            settings = None if folder else record(models, hashes, heard, **told, seed=args.seed)
            save_picture(opened.sheet(asked, sweep, made, images, canvas), names[-1], settings)
    terminal.say(opened.said(asked, run, time.time() - began))
    print(*names, sep="\n")
    if models.bundled and [group.image for group in args.images] == [[str(EXAMPLE)]]:
        terminal.say(NEXT)


def parse() -> argparse.Namespace:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sampling.declare(parser)
    args = parser.parse_args()
    if args.list:
        print(terminal.flagged(table()))
        sys.exit(0)
    before, nets = (), ()
    if args.again:
        before, nets = remembered(parser, args.again, vars(args))
        args = parser.parse_args()
    prompted = before or any(hasattr(group, "image") for group in args.groups) or args.face_embedding
    args.nets = groups.control_groups(args.groups, vars(args), nets, args.init)
    if not any((prompted, args.nets, args.prompt, args.base, args.init)):
        args.groups, prompted = [groups.Group(image=[str(EXAMPLE)])], True
    if not any((prompted, args.nets, args.prompt, args.init)):
        raise UserError("--image or --prompt is wanted: what should the picture show?")
    if args.scale and not prompted:
        raise UserError("--scale is the weight of an image prompt: it goes with --image")
    if args.image_guidance_scale is not None and not prompted and not args.init:
        raise UserError("--image-guidance-scale is how far to follow an image prompt: it goes with --image")
    args.images = groups.image_groups(args.groups, vars(args), before)
    for group in args.images:
        group.scale = group.scale or [default_scale(args.prompt)]
    if args.grid and len(opened.folder(args.images)) * args.num_images > MOST_ROWS:
        raise UserError(f"--grid: a sheet has at most {MOST_ROWS} rows, one for each picture of the folder")
    if any(group.save_embedding for group in args.images):
        opened.check_saves(args.images, args.overwrite)
    if args.prompt_syntax != "plain":
        check_syntax(vars(args))
    sampler = SAMPLERS[args.sampler]
    args.steps = args.steps or sampler.steps
    if args.steps > sampler.max_steps:
        raise UserError(f"--steps {args.steps}: 1 to {sampler.max_steps} with --sampler {args.sampler}")
    guidance = sampler.guidance_scale if args.guidance_scale is None else args.guidance_scale
    if guidance <= 1 and args.image_guidance_scale in (None, 1):
        groups.tell_unguided(guidance, vars(args))
    if args.adapter and not prompted:
        terminal.warn("--adapter has no effect without --image or --face-embedding")
    return args


def remembered(
    parser: flags.Parser, picture: Path, asked: Mapping[str, object]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """What made a picture, as the parser's defaults: what is not said anew is as it was. Its image prompts and nets."""
    anew = parser.given("image")
    settings = again(picture, anew, *groups.given_anew(asked["groups"], asked))
    settings = parser.typed(settings, anew, f"--again {picture}")
    before, nets = settings.pop("groups"), settings.pop("controls")
    parser.set_defaults(**settings)
    return before, nets


def check_syntax(asked: Mapping[str, object]) -> None:
    """Before anything is opened. Raises UserError."""
    for name in ("prompt", "negative_prompt"):
        parts(asked[name], asked["prompt_syntax"], name)


if __name__ == "__main__":
    terminal.run(main)
