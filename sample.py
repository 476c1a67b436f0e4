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
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image

import cli
import flags
import flags_control
import image_flags
from files.errors import UserError
from files.masks import open_mask
from files.outputs import reserved
from files.pictures import save_picture
from files.sheets import sheet
from generate import attention_sheet, open_models, pictures, prompts, scaled
from generate.canvas import canvas_of, size_of
from generate.control import check_hints
from generate.editing import steps_that_run
from generate.embeddings import save_features
from generate.picture import BATCH, usual_guidance
from generate.prompt import default_scale
from generate.record import Hashes, again, record
from generate.seeing import named
from generate.syntax import parts
from generate.text import words_of
from ipadapter import Prompt
from sampler import SAMPLERS
from weights.hub import table

EXAMPLE = Path(__file__).parent / "tiny/example.png"  # one of the unseen drawings
NEXT = """That was a bundled drawing as image prompt, and the bundled tiny model. Now with a picture of yours:
  python sample.py --image FILE --prompt "a rocket" --scale 0 0.5 1 --grid
With Stable Diffusion and a released adapter: see python sample.py --help, and --list"""
# Of what was asked for, this goes into every picture, beside what the models and the files are.
RECORDED = (
    "prompt",
    "negative_prompt",
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
    groups = args.images
    wanted = [(group.adapter, group.faceid_v2, vars(group).get("image_encoder")) for group in groups]
    adapters = list(dict.fromkeys(wanted))
    # Before anything slow:
    images = [image_flags.image_group(*one) for one in zip(groups, map(adapters.index, wanted), strict=True)]
    begin = {name: getattr(args, name) for name in ("strength", "outpaint", "only_masked")}
    begin |= {
        "init": args.init and cli.picture(args.init),
        "inpaint": args.inpaint and cli.picture(args.inpaint, open_mask),
    }
    if (canvas := canvas_of(**begin)) and args.strength is not None:
        canvas.count(args.steps)
    hints = [flags_control.hint(net, i) for i, net in enumerate(args.nets)]
    brought = flags.brought(groups, args.nets) + [name for name in (args.init, args.inpaint) if name]
    swept = next((i for i, group in enumerate(groups) if len(group.scale) > 1), 0)
    scales = groups[swept].scale if groups else [1.0]
    each = next((i for i, group in enumerate(groups) if group.each), None)
    variants = [images] if each is None else image_flags.variants(images, each, groups[each].image)
    image_flags.check_saves(groups, args.overwrite)
    stems = () if each is None else image_flags.stems(groups[each].image)
    per = total = len(scales) * args.num_images
    with reserved(args.output, per, args.grid, args.overwrite, brought, args.attention, stems) as names:
        models = open_models(
            base=args.base,
            adapter=[adapter for adapter, *_ in adapters] or [None],
            image_encoder=encoders(args.image_encoder, [encoder for *_, encoder in adapters]),
            vae=args.vae,
            text_encoder=args.text_encoder,
            loras=args.lora,
            embeddings=args.embedding,
            controls=[net.control for net in args.nets],
            image=bool(groups),
            groups=[group for variant in variants for group in variant],
            encode=[any(i.encodes for i in images if i.adapter == n) for n in range(len(adapters))] or True,
            faceid_v2=[version_2 for _, version_2, _ in adapters] or False,
            prediction=args.prediction,
            spacing=args.spacing,
            device=args.device,
            dtype=args.dtype_name,
            storage=args.storage,
            low_memory=args.low_memory,
            keep=each is not None,
            tell=lambda line: print(line, file=sys.stderr),
        )
        began, hashes = time.time(), Hashes(models, brought, cli.PIPED)
        size = dict(zip(("height", "width"), size_of(canvas, models.side, args.height, args.width), strict=True))
        check_hints(models, hints, size["height"], size["width"])
        run = steps_that_run(models.base, canvas, args.steps)
        guidance = usual_guidance(models, args.sampler) if args.guidance_scale is None else args.guidance_scale
        how = {name: vars(args)[name] for name in RECORDED} | {"guidance_scale": guidance} | size
        told = [vars(group) | {"adapter": image.adapter} for group, image in zip(groups, images, strict=True)]

        def settings(scale: float | list[float], seed: int, variant: int = 0) -> dict:
            said = [group | {"scale": scale if i == swept else group["scale"][0]} for i, group in enumerate(told)]
            if each is not None:
                said[each] |= {"image": [groups[each].image[variant]]}
            nets, others = [vars(net) for net in args.nets], [] if each is None else groups[each].image
            return record(models, hashes, said, nets, others, **how, seed=seed)

        texts = args.prompt, args.negative_prompt
        reading = {name: vars(args)[name] for name in ("prompt_syntax", "long_prompt", "clip_skip")}
        for group, saved in zip(groups, images, strict=True):
            if group.save_embedding:
                found = save_features(models, saved, group.save_embedding)
                variants[0] = [found if one is saved else one for one in variants[0]]
        # Results that differ in a picture go through the UNet together; of tiles there may be more in one than in another.
        alike = each is not None and args.num_images == 1 and not args.low_memory and images[each].framing != "tile"
        parts = in_parts(len(variants), BATCH if alike else 1)
        order = [(i, k, j) for p in parts for k in range(len(scales)) for i in p for j in range(args.num_images)]
        batches = -(-args.num_images // (1 if args.low_memory else BATCH)) * len(parts)
        seen, done = [], []

        def read(part: range) -> list[Prompt]:
            pairs = zip(*(prompts(models, *texts, variants[i], **reading) for i in part), strict=True)
            return [Prompt.cat(side) if len(part) > 1 else side[0] for side in pairs]

        def made(part: range) -> Iterator[Image.Image]:
            prompt, null = first if part == parts[0] else read(part)
            return pictures(
                models,
                [scaled(prompt, scale, swept) for scale in scales],
                [scaled(null, scale, swept) for scale in scales],
                [args.seed] * len(part) if len(part) > 1 else args.seed,
                args.num_images,
                args.steps,
                guidance,
                sampler=args.sampler,
                guidance_rescale=args.guidance_rescale,
                image_guidance_scale=args.image_guidance_scale,
                **size,
                **begin,
                controls=hints,
                on_step=step,
                on_seen=seen.append if args.attention else None,
            )

        first = read(parts[0])
        if args.attention:
            words = words_of(models, *texts, args.prompt_syntax, args.long_prompt)
            names_of_maps = named(first[0], [flags.shown(group) for group in groups])
        with cli.steps(run * batches * len(scales), "denoising") as step:
            for (i, k, j), picture in zip(order, chain.from_iterable(map(made, parts)), strict=False):
                number, told_of = i * per + k * args.num_images + j, settings(scales[k], args.seed + j, i)
                save_picture(picture, names[number], told_of)
                if args.attention:
                    page = attention_sheet(picture, seen[number], words, names_of_maps)
                    save_picture(page, names[total + number], told_of)
                done.append(picture)
        if args.grid:
            titles = [f"scale {scale:g}" for scale in scales] if groups else [args.prompt]
            shown = [picture for image in images for picture in image.images if isinstance(picture, Image.Image)]
            begun = [canvas.picture] if canvas else []
            page = grid(done, args.num_images, titles, shown, begun, min(size["width"], 256))
            save_picture(page, names[-1], settings(scales, args.seed))
    parts = [f"picture {args.init}"] if args.init else []
    for group in groups:
        strengths = ", ".join(f"{scale:g}" for scale in group.scale)
        shown = f"each of {len(group.image)} pictures" if group.each else ", ".join(group.image + group.face_embedding)
        parts.append(f"image prompt {shown} (scale {strengths})")
    parts += [f"structure of {net.hint or args.init} by {net.control}" for net in args.nets]
    parts += [f"text {args.prompt!r}"] if args.prompt else []
    how = f"{args.steps if run == args.steps else f'the last {run} of {args.steps}'} steps of {args.sampler}, seed {args.seed}, {time.time() - began:.1f} s"
    print(f"{' and '.join(parts)}: {how}", file=sys.stderr)
    print(*names, sep="\n")
    if models.bundled and [group.image for group in groups] == [[str(EXAMPLE)]]:
        print(NEXT, file=sys.stderr)


def encoders(given: list[str] | None, before: list[str | None]) -> list[str | None] | str | None:
    """The image encoder of each adapter: one for all, one for each in turn, or that of a picture made again."""
    return given[0] if given and len(given) == 1 else given or before or None


def in_parts(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def grid(done: list, rows: int, titles: list[str], images: list, begun: list, side: int) -> Image.Image:
    """The picture begun with and image prompts on the left, then a column for each scale; a row for each seed."""
    columns = [done[i : i + rows] for i in range(0, len(done), rows)]
    for brought, title in ((images, "image prompt"), (begun, "to begin with")):
        if brought:
            columns, titles = [brought, *columns], [title, *titles]
    return sheet(list(zip_longest(*columns)), titles, side)


def parse() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(groups=())
    add = parser.add_argument
    add("--prompt", type=cli.text, default="", help="text prompt")
    add("--negative-prompt", type=cli.text, default="", help="what the picture should not be")
    flags.run(parser)
    add("--again", type=cli.path, metavar="PICTURE", help="make this picture again, but for the flags that differ")
    for declare in (flags.images, flags_control.structure, flags.texts, flags.editing, flags.models, flags.where):
        declare(parser)
    args = parser.parse_args()
    if args.list:
        print(cli.flagged(table()))
        sys.exit(0)
    before, nets = [], []
    if args.again:  # what is not said anew is as it was
        common = {name for name in (*flags.OF_IMAGE, "image_encoder") if vars(args).get(name) is not None}
        anew = [vars(group).keys() | common for group in args.groups if hasattr(group, "image")]
        opened = [vars(group).keys() for group in args.groups if hasattr(group, "control")]
        settings = again(args.again, parser.given("image"), anew, opened)
        before, nets = settings.pop("groups"), settings.pop("controls")
        parser.set_defaults(**settings)
        args = parser.parse_args()
    prompted = before or any(hasattr(group, "image") for group in args.groups) or args.face_embedding
    args.nets = flags_control.control_groups(args.groups, vars(args), nets, args.init)
    if not any((prompted, args.nets, args.prompt, args.base, args.init)):
        args.groups, prompted = [argparse.Namespace(image=[str(EXAMPLE)])], True
    if not any((prompted, args.nets, args.prompt, args.init)):
        raise UserError("--image or --prompt is wanted: what should the picture show?")
    if args.scale and not prompted:
        raise UserError("--scale is the weight of an image prompt: it goes with --image")
    args.images = flags.image_groups(args.groups, vars(args), before)
    for name in ("prompt", "negative_prompt"):  # before anything is opened
        parts(getattr(args, name), args.prompt_syntax, name)
    for group in args.images:
        group.scale = group.scale or [default_scale(args.prompt)]
    sampler = SAMPLERS[args.sampler]
    args.steps = args.steps or sampler.steps
    if args.steps > sampler.max_steps:
        raise UserError(f"--steps {args.steps}: 1 to {sampler.max_steps} with --sampler {args.sampler}")
    guidance = sampler.guidance_scale if args.guidance_scale is None else args.guidance_scale
    unguided = guidance <= 1 and args.image_guidance_scale in (None, 1)
    if args.guidance_scale is not None and unguided:
        cli.warn(f"guidance is off at --guidance-scale {guidance:g}: 1 and less follow the prompt as trained")
    if args.guidance_rescale > 1:
        raise UserError(f"--guidance-rescale {args.guidance_rescale:g}: 0 to 1")
    if args.image_guidance_scale is not None and not prompted and not args.init:
        raise UserError("--image-guidance-scale is how far to follow an image prompt: it goes with --image")
    if args.guidance_rescale and unguided:
        cli.warn(f"--guidance-rescale has no effect at --guidance-scale {guidance:g}")
    if any(group.each for group in args.images) and (args.grid or args.attention):
        raise UserError("--each: is without --grid and --attention, which show one prompt")
    if any(group.negative_image or group.negative_noise for group in args.images) and unguided:
        cli.warn(f"--negative-image and --negative-noise have no effect at --guidance-scale {guidance:g}")
    if args.negative_prompt and unguided:
        cli.warn(f"--negative-prompt has no effect at --guidance-scale {guidance:g}")
    if args.adapter and not prompted:
        cli.warn("--adapter has no effect without --image or --face-embedding")
    return args


if __name__ == "__main__":
    cli.run(main)
