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
import start  # noqa: F401, isort: skip, before what is slow to import

import argparse
import time
from itertools import zip_longest
from pathlib import Path

from PIL import Image

import cli
import flags
from files.errors import UserError
from files.faces import read_embedding
from files.masks import open_mask
from files.outputs import reserved
from files.pictures import save_picture
from files.sheets import sheet
from generate import attention_sheet, open_models, pictures, prompts, scaled
from generate.editing import canvas_of, size_of, steps_that_run
from generate.picture import BATCH, usual_guidance
from generate.prompt import default_scale
from generate.record import Hashes, again, record
from generate.syntax import parts
from generate.text import words_of
from sampler import SAMPLERS
from weights.hub import table
from weights.storage import STORAGES

EXAMPLE = Path(__file__).parent / "tiny/example.png"  # one of the unseen drawings
NEXT = """That was a bundled drawing as image prompt, and the bundled tiny model. Now with a picture of yours:
  python sample.py --image FILE --prompt "a rocket" --scale 0 0.5 1 --grid
With Stable Diffusion and a released adapter: see python sample.py --help, and --list"""
# Of what was asked for, this goes into every picture, beside what the models and the files are.
RECORDED = (
    "image",
    "face_embedding",
    "prompt",
    "negative_prompt",
    "structure_scale",
    "sampler",
    "steps",
    "guidance_rescale",
    "image_guidance_scale",
    "prompt_syntax",
    "long_prompt",
    "clip_skip",
    "init",
    "inpaint",
    "strength",
    "outpaint",
    "only_masked",
)


def main() -> None:
    args = parse()
    images = [cli.picture(name) for name in args.image]  # before anything slow
    begin = {name: getattr(args, name) for name in ("strength", "outpaint", "only_masked")}
    begin |= {
        "init": args.init and cli.picture(args.init),
        "inpaint": args.inpaint and cli.picture(args.inpaint, open_mask),
    }
    if (canvas := canvas_of(**begin)) and args.strength is not None:
        canvas.count(args.steps)
    drawn_on = [name for name in (args.init, args.inpaint) if name]
    brought = args.image + args.face_embedding
    for name in args.face_embedding:
        read_embedding(name)
    total = len(args.scale) * args.num_images
    with reserved(args.output, total, args.grid, args.overwrite, args.image + drawn_on, args.attention) as names:
        models = open_models(
            base=args.base,
            adapter=args.adapter,
            image_encoder=args.image_encoder,
            vae=args.vae,
            text_encoder=args.text_encoder,
            loras=args.lora,
            embeddings=args.embedding,
            image=bool(brought),
            faceid_v2=args.faceid_v2,
            prediction=args.prediction,
            spacing=args.spacing,
            device=args.device,
            dtype=args.dtype_name,
            storage=args.storage,
            low_memory=args.low_memory,
            keep=False,
            tell=lambda line: print(line, file=sys.stderr),
        )
        began, hashes = time.time(), Hashes(models, brought + drawn_on, cli.PIPED)
        size = dict(zip(("height", "width"), size_of(canvas, models.side, args.height, args.width), strict=True))
        run = steps_that_run(models.base, canvas, args.steps)
        guidance = usual_guidance(models, args.sampler) if args.guidance_scale is None else args.guidance_scale
        how = {name: vars(args)[name] for name in RECORDED} | {"guidance_scale": guidance} | size
        texts, faces = (args.prompt, args.negative_prompt), (args.face_embedding, args.structure_scale)
        reading = {name: vars(args)[name] for name in ("prompt_syntax", "long_prompt", "clip_skip")}
        ways = {"syntax": args.prompt_syntax, "long": args.long_prompt}
        prompt, null = prompts(models, *texts, images, args.scale[0] if brought else None, *faces, **reading)
        batches = -(-args.num_images // (1 if args.low_memory else BATCH))
        seen, said = [], [[Path(name).name for name in args.image or args.face_embedding]] if brought else []
        with cli.steps(run * batches * len(args.scale), "denoising") as step:
            made = pictures(
                models,
                [scaled(prompt, scale) for scale in args.scale],
                [scaled(null, scale) for scale in args.scale],
                args.seed,
                args.num_images,
                args.steps,
                guidance,
                sampler=args.sampler,
                guidance_rescale=args.guidance_rescale,
                image_guidance_scale=args.image_guidance_scale,
                **size,
                **begin,
                on_step=step,
                on_seen=seen.append if args.attention else None,
            )
            done = []
            for name, picture in zip(names, made, strict=False):  # behind the pictures' names stands the sheet's
                scale, seed = args.scale[len(done) // args.num_images], args.seed + len(done) % args.num_images
                settings = record(models, hashes, **how, scale=scale, seed=seed)
                save_picture(picture, name, settings)
                if args.attention:
                    page = attention_sheet(picture, seen[len(done)], words_of(models, *texts, **ways), said)
                    save_picture(page, names[total + len(done)], settings)
                done.append(picture)
        if args.grid:
            titles = [f"scale {scale:g}" for scale in args.scale] if brought else [args.prompt]
            page = grid(done, args.num_images, titles, images, min(size["width"], 256))
            save_picture(page, names[-1], record(models, hashes, **how, scale=args.scale, seed=args.seed))
    scales = ", ".join(f"{scale:g}" for scale in args.scale)
    parts = [f"picture {args.init}"] if args.init else []
    parts += [f"image prompt {', '.join(brought)} (scale {scales})"] if brought else []
    parts += [f"text {args.prompt!r}"] if args.prompt else []
    how = f"{args.steps if run == args.steps else f'the last {run} of {args.steps}'} steps of {args.sampler}, seed {args.seed}, {time.time() - began:.1f} s"
    print(f"{' and '.join(parts)}: {how}", file=sys.stderr)
    print(*names, sep="\n")
    if models.bundled and args.image == [str(EXAMPLE)]:
        print(NEXT, file=sys.stderr)


def grid(done: list, rows: int, titles: list[str], images: list, side: int) -> Image.Image:
    """Image prompts on the left, then a column for each scale; a row for each seed."""
    columns = [done[i : i + rows] for i in range(0, len(done), rows)]
    if images:
        columns, titles = [images, *columns], ["image prompt", *titles]
    return sheet(list(zip_longest(*columns)), titles, side)


def parse() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", nargs="+", default=[], metavar="FILE", help="image prompt; several prompt together; - is a pipe")
    add("--prompt", type=cli.text, default="", help="text prompt")
    add("--negative-prompt", type=cli.text, default="", help="what the picture should not be")
    weight = "weight of the image prompt; several: one picture for each (default: 1.0, with text 0.6)"
    add("--scale", nargs="+", type=cli.number(), metavar="S", help=weight)
    add(
        "--sampler",
        choices=SAMPLERS,
        default="ddim",
        help="(default: %(default)s; dpm++ is the 2M one with Karras steps)",
    )
    add("--steps", type=cli.whole(1, 1000), help="(default: 50; dpm++ and unipc 20, lcm 4)")
    follow = "how far to follow the prompts; 1 and less is off (default: 7.5, lcm 1)"
    add("--guidance-scale", type=cli.number(), metavar="G", help=follow)
    spread = "bring the spread of the guided prediction back to the prompt's own, 0 to 1 (default: 0, not at all)"
    add("--guidance-rescale", type=cli.number(0), default=0.0, metavar="R", help=spread)
    alone = "how far to follow the image prompt by itself, and --guidance-scale the text: a third pass (default: alike)"
    add("--image-guidance-scale", type=cli.number(0), metavar="G", help=alone)
    seeds = "picture j is made from the noise of seed + j; -1: a random one, printed (default: %(default)s)"
    add("--seed", type=cli.seed(2**63 - 1), default=0, help=seeds)
    add("--num-images", type=cli.whole(1), default=1, metavar="N", help="pictures to make (default: %(default)s)")
    add(
        "--height",
        type=cli.side,
        help="pixels, a multiple of 8 (default: what the base was made for, or that of --init)",
    )
    add("--width", type=cli.side, help="pixels, a multiple of 8 (default: what the base was made for)")
    add("--again", type=cli.path, metavar="PICTURE", help="make this picture again, but for the flags that differ")

    flags.texts(parser)
    flags.editing(parser)
    files = parser.add_argument_group("models, each a file or a published name")
    files.add_argument("--list", action="store_true", help="print all names, and what of them is already here")
    cli.models(files)
    add = files.add_argument
    towers = "text towers for a base without any, files or folders"
    add("--text-encoder", nargs="+", type=cli.path, default=[], metavar="FILE", help=towers)
    merged = "LoRAs for the base, each with a weight (default: 1)"
    add("--lora", nargs="+", type=cli.weighted, default=[], metavar="FILE[:W]", help=merged)
    visited = "which timesteps are visited (default: as the base's file tells, or as the sampler is used to)"
    add("--spacing", choices=("leading", "trailing", "linspace"), help=visited)
    add("--prediction", choices=("eps", "v"), help="what the UNet predicts (default: as the base's file tells)")

    add = parser.add_argument_group("FaceID adapters").add_argument
    numbers = "512 numbers, .npy or .safetensors: insightface's normed_embedding (default: of the faces in --image)"
    add("--face-embedding", nargs="+", default=[], metavar="FILE", help=numbers)
    add("--faceid-v2", action="store_true", help="the file is FaceID-plus version 2; no tensor tells")
    structure = "version 2: how far to follow the picture of the face, beside the embedding (default: 1.0)"
    add("--structure-scale", type=cli.number(0), metavar="S", help=structure)

    where = parser.add_argument_group("where and how")
    add = where.add_argument
    kinds = "a .png, .jpg or .webp, or a folder (default: %(default)s)"
    add("--output", type=cli.path, default=Path("outputs"), help=kinds)
    add("--overwrite", action="store_true", help="replace pictures that are there already")
    looked = "also write a sheet for each picture: where each image prompt acts, where each word attends; slower"
    add("--attention", action="store_true", help=looked)
    add("--grid", action="store_true", help="also write a sheet: prompts beside results, a column per scale")
    cli.machine(where)
    stored = "keep large weights in it, and bring each up to --dtype when it is used"
    add("--storage", choices=STORAGES, help=stored)
    less = "--storage float16, one picture at a time, the halves of the guidance one by one, decoded in strips: slower"
    add("--low-memory", action="store_true", help=less)

    args = parser.parse_args()
    if args.list:
        print(cli.flagged(table()))
        sys.exit(0)
    if args.again:  # what is not said anew is as it was
        parser.set_defaults(**again(args.again, parser.given()))
        args = parser.parse_args()
    if not any((args.image, args.face_embedding, args.prompt, args.base, args.init)):
        args.image = [str(EXAMPLE)]
    prompted = bool(args.image or args.face_embedding)
    if not prompted and not args.prompt and not args.init:
        raise UserError("--image or --prompt is wanted: what should the picture show?")
    if args.scale and not prompted:
        raise UserError("--scale is the weight of an image prompt: it goes with --image")
    for name in ("prompt", "negative_prompt"):  # before anything is opened
        parts(getattr(args, name), args.prompt_syntax, name)
    args.scale = args.scale or [default_scale(args.prompt)]
    sampler = SAMPLERS[args.sampler]
    args.steps = args.steps or sampler.steps
    if args.steps > sampler.max_steps:
        raise UserError(f"--steps {args.steps}: 1 to {sampler.max_steps} with --sampler {args.sampler}")
    guidance = sampler.guidance_scale if args.guidance_scale is None else args.guidance_scale
    if args.guidance_scale is not None and guidance <= 1:
        cli.warn(f"guidance is off at --guidance-scale {guidance:g}: 1 and less follow the prompt as trained")
    if args.guidance_rescale > 1:
        raise UserError(f"--guidance-rescale {args.guidance_rescale:g}: 0 to 1")
    if args.image_guidance_scale is not None and not prompted and not args.init:
        raise UserError("--image-guidance-scale is how far to follow an image prompt: it goes with --image")
    if args.guidance_rescale and guidance <= 1 and args.image_guidance_scale is None:
        cli.warn(f"--guidance-rescale has no effect at --guidance-scale {guidance:g}")
    if args.negative_prompt and guidance <= 1:
        cli.warn(f"--negative-prompt has no effect at --guidance-scale {guidance:g}")
    if args.adapter and not prompted:
        cli.warn("--adapter has no effect without --image or --face-embedding")
    return args


if __name__ == "__main__":
    cli.run(main)
