"""Flags of sample.py, by what they are about."""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import cli
import image_flags
from files.errors import UserError
from generate.layers import check_layers, read_curve
from generate.syntax import SYNTAXES
from sampler import SAMPLERS
from weights.storage import STORAGES

PADDING = 32  # pixels around a mask, of --only-masked without a number


# What belongs to an image prompt, and what it is where nothing is said
OF_IMAGE = {
    "adapter": None,
    "scale": None,
    "weights": (),
    "layers": "all",
    "start": 0.0,
    "until": 1.0,
    "curve": "constant",
    "mask": None,
    "framing": "crop",
    "crop_position": "centre",
    "negative_image": [],
    "negative_noise": 0.0,
    "less": None,
    "save_embedding": None,
    "each": False,
    "face_embedding": [],
    "structure_scale": None,
    "faceid_v2": False,
}


OF_BOTH = ("scale", "start", "until", "mask")  # belongs to a --control, too


def images(parser: argparse.ArgumentParser) -> None:
    """--image, and what belongs to the last one before it: --scale, --weights, --layers, --from, --until, --curve, --mask.

    FaceID's too: --face-embedding, --faceid-v2, --structure-scale.
    """
    told = "what stands behind an --image belongs to it, what stands before the first to all of them"
    add = parser.add_argument_group("image prompts", told).add_argument
    together = "pictures, or embeddings of them, that prompt together; - is a pipe; given again: another image prompt beside it"
    add("--image", nargs="*", action=cli.Opens, metavar="FILE", help=together)
    of_image = {"action": cli.Belongs, "groups": ("image",)}
    of_both = {"action": cli.Belongs, "groups": ("image", "control")}
    weight = "weight of the image prompt; several: one picture for each (default: 1.0, with text 0.6)"
    add("--scale", nargs="+", type=cli.number(), metavar="S", help=weight, **of_both)
    add("--weights", nargs="+", type=cli.number(), metavar="W", help="of each of its pictures (or FILE:W)", **of_image)
    parts = (
        "all, style, layout, style+layout, down, middle, up, or blocks as down.block_2=0.3,up.block_0.1=1, or a weight type "
        "of ComfyUI: ease-in, weak-output, strong-middle, style-transfer, style-precise, ... (default: all)"
    )
    add("--layers", metavar="SPEC", help=parts, **of_image)
    add("--from", dest="start", type=cli.share, metavar="A", help="the share of the steps where it begins", **of_both)
    add("--until", type=cli.share, metavar="B", help="the share of the steps where it ends", **of_both)
    curve = "over the steps: constant, fade-in, fade-out, or weights as 1,0.5,0, each for an equal share of them"
    add("--curve", help=curve, **of_image)
    add("--mask", metavar="FILE", help="where it acts: a grey picture, white is here, black is not", **of_both)
    image_flags.seen(parser)
    add = parser.add_argument_group("FaceID adapters").add_argument
    numbers = (
        "512 numbers, .npy, .safetensors or .bin: insightface's normed_embedding (default: of the faces in --image)"
    )
    add("--face-embedding", nargs="+", metavar="FILE", help=numbers, **of_image)
    version = "the file is FaceID-plus version 2; no tensor tells"
    add("--faceid-v2", nargs=0, const=True, help=version, **of_image)
    structure = "version 2: how far to follow the picture of the face, beside the embedding (default: 1.0)"
    add("--structure-scale", type=cli.number(0), metavar="S", help=structure, **of_image)


def image_groups(
    opened: Iterable[argparse.Namespace], common: Mapping[str, object], before: Sequence[Mapping[str, object]] = ()
) -> list[argparse.Namespace]:
    """Every image prompt with all that belongs to it.

    Args:
        opened: the groups of the command line.
        common: what stands before the first, by name; None is not given.
        before: the groups of a picture that is made again: what is not said anew for each in turn is as it was. Where none
            is opened, all of them.

    Raises:
        UserError: what belongs to an image prompt, and there is none; several scales for more than one; layers or a
            curve that say nothing.
    """
    given = [vars(group) for group in opened if hasattr(group, "image")]
    common = {name: common[name] for name in OF_IMAGE if common.get(name) is not None}
    if not given and not before and "face_embedding" in common:
        given = [{"image": []}]
    given = given or [{} for _ in before]
    old = [*before, *({} for _ in given)]
    groups = [argparse.Namespace(**{"image": []} | OF_IMAGE | old[i] | common | group) for i, group in enumerate(given)]
    shared = {"adapter", *OF_BOTH} if any(hasattr(group, "control") for group in opened) else {"adapter"}
    if lone := next((name for name in common if name not in shared and not groups), None):
        raise UserError(f"`{lone}` belongs to an image prompt: it goes with `image`")
    if sum(len(group.scale or ()) > 1 for group in groups) > 1:
        raise UserError("`scale`: several of them are for one image prompt, not for more")
    if sum(group.each for group in groups) > 1:
        raise UserError("`each`: for one image prompt, not for more")
    for group in groups:
        group.image, group.weights = weights_of(group.image, group.weights)
        check_layers(group.layers)
        group.curve = read_curve(group.curve) if isinstance(group.curve, str) else group.curve
        group.image = image_flags.spread(group) if group.each else group.image
        if not group.image and not group.face_embedding:
            raise UserError("`image`: a group without a picture; a file, or `face_embedding` behind it, is wanted")
    return groups


def weights_of(images: Sequence[str], weights: Sequence[float]) -> tuple[list[str], Sequence[float]]:
    """Pictures and their weights, which may also stand behind each: FILE:W. Raises UserError: both, or no number."""
    read = [cli.called(name) for name in images]
    if not any(weight for _, weight in read):
        return list(images), weights
    if weights:
        raise UserError("`weights`: given behind the pictures too")
    for name, (_, weight) in zip(images, read, strict=True):
        if weight and not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", weight):
            raise UserError(f"`image` {name}: its weight is {weight}, a number is wanted")
    return [file for file, _ in read], [float(weight) if weight else 1.0 for _, weight in read]


def brought(groups: Iterable[argparse.Namespace], nets: Iterable[argparse.Namespace] = ()) -> list[str]:
    """The pictures and embeddings of image prompts, and the hints of nets, as files."""
    images = [name for group in groups for name in files_of(group) if name]
    return images + [name for net in nets for name in (net.hint, net.mask) if name]


def files_of(group: argparse.Namespace) -> list[str | None]:
    return [*group.image, *group.negative_image, *group.face_embedding, group.mask]


def shown(group: argparse.Namespace) -> list[str]:
    """The names of an image prompt's pictures, for a sheet; those of weight 0 are left out."""
    each = zip_longest(group.image or group.face_embedding, group.weights, fillvalue=1.0)
    return [Path(name).name for name, weight in each if weight]


def editing(parser: argparse.ArgumentParser) -> None:
    """--init, --strength, --inpaint, --outpaint, --only-masked."""
    add = parser.add_argument_group("a picture to begin with").add_argument
    add("--init", metavar="PICTURE", help="draw on from this picture, in its size; - is a pipe")
    far = "how far to go from it: the last int(steps * S) steps run (default: 0.8, with a mask 1: all)"
    add("--strength", type=cli.share, metavar="S", help=far)
    add("--inpaint", metavar="MASK", help="make anew what is white in this picture, keep what is black")
    sides = "add so many pixels, and make them anew"
    add("--outpaint", nargs=4, type=cli.whole(0, cli.MAX_SIDE), metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help=sides)
    alone = (
        f"work on the part around the mask alone, so many pixels more ({PADDING}), and paste it back: all else stays"
    )
    add("--only-masked", nargs="?", type=cli.whole(0), const=PADDING, metavar="PADDING", help=alone)


def texts(parser: argparse.ArgumentParser) -> None:
    """--prompt-syntax, --long-prompt, --clip-skip, --embedding."""
    add = parser.add_argument_group("how texts are read").add_argument
    ways = "how words are weighed: (red:1.2) as in A1111 or ComfyUI (default: %(default)s, where brackets are text)"
    add("--prompt-syntax", choices=SYNTAXES, default="plain", help=ways)
    long = (
        "read texts beyond 75 tokens in chunks, instead of cutting them; BREAK begins one (a1111 and comfy always do)"
    )
    add("--long-prompt", action="store_true", help=long)
    skip = "leave out so many of the text tower's last layers, as diffusers counts; A1111 counts one more (default: 0)"
    add("--clip-skip", type=cli.whole(0), default=0, metavar="N", help=skip)
    words = "textual inversions, which texts call by their files' names or by NAME"
    add("--embedding", nargs="+", type=cli.called, default=[], metavar="FILE[:NAME]", help=words)


def run(parser: argparse.ArgumentParser) -> None:
    """--sampler, --steps, --guidance-scale, --seed, --num-images, --height, --width, ...: how it is drawn."""
    add = parser.add_argument
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
    alone = (
        "how far to follow the image prompt by itself, and --guidance-scale the text: a third pass (default: alike); "
    )
    alone += "with an instruct-pix2pix base, the picture of --init (default: 1.5)"
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


def models(parser: argparse.ArgumentParser) -> None:
    """--list, and each file: --base, --adapter, ..., --text-encoder, --lora, --spacing, --prediction."""
    files = parser.add_argument_group("models, each a file or a published name")
    files.add_argument("--list", action="store_true", help="print all names, and what of them is already here")
    cli.models(files, several=True)
    add = files.add_argument
    towers = "text towers for a base without any, files or folders"
    add("--text-encoder", nargs="+", type=cli.path, default=[], metavar="FILE", help=towers)
    merged = "LoRAs for the base, each with a weight (default: 1)"
    add("--lora", nargs="+", type=cli.weighted, default=[], metavar="FILE[:W]", help=merged)
    visited = "which timesteps are visited (default: as the base's file tells, or as the sampler is used to)"
    add("--spacing", choices=("leading", "trailing", "linspace"), help=visited)
    add("--prediction", choices=("eps", "v"), help="what the UNet predicts (default: as the base's file tells)")


def where(parser: argparse.ArgumentParser) -> None:
    """--output, --overwrite, --attention, --grid, --device, --dtype, --storage, --low-memory."""
    group = parser.add_argument_group("where and how")
    add = group.add_argument
    kinds = "a .png, .jpg or .webp, or a folder (default: %(default)s)"
    add("--output", type=cli.path, default=Path("outputs"), help=kinds)
    add("--overwrite", action="store_true", help="replace pictures that are there already")
    looked = "also write a sheet for each picture: where each image prompt acts, where each word attends; slower"
    add("--attention", action="store_true", help=looked)
    add("--grid", action="store_true", help="also write a sheet: prompts beside results, a column per scale")
    cli.machine(group)
    stored = "keep large weights in it, and bring each up to --dtype when it is used"
    add("--storage", choices=STORAGES, help=stored)
    less = "--storage float16, one picture at a time, the halves of the guidance one by one, decoded in strips: slower"
    add("--low-memory", action="store_true", help=less)
