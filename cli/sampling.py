"""The flags of sample.py, by what they are about."""

import argparse
from pathlib import Path

from cli import flags
from cli.flags import MAX_SIDE, Belongs, Opens, called, number, path, seed, share, side, text, weighted, whole
from clip import POSITIONS
from generate.framing import FRAMINGS
from generate.syntax import SYNTAXES
from sampler import SAMPLERS
from weights.control import SAME, SHUFFLE, TASKS
from weights.storage import STORAGES

PADDING = 32  # pixels around a mask, of --only-masked without a number
BEHIND_IMAGE = {"action": Belongs, "groups": ("image",)}
BEHIND_CONTROL = {"action": Belongs, "groups": ("control",)}
BEHIND_EITHER = {"action": Belongs, "groups": ("image", "control")}


def declare(parser: argparse.ArgumentParser) -> None:
    """All of them; `groups` are the image prompts and the nets, in their order."""
    parser.set_defaults(groups=())
    for about in (drawing, images, structure, texts, editing, models, where):
        about(parser)


def drawing(parser: argparse.ArgumentParser) -> None:
    """--prompt, --negative-prompt, --sampler, --steps, --guidance-scale, --seed, --num-images, ...: what is drawn, and how."""
    add = parser.add_argument
    add("--prompt", type=text, default="", help="text prompt")
    add("--negative-prompt", type=text, default="", help="what the picture should not be")
    usual = "(default: %(default)s; dpm++ is the 2M one with Karras steps)"
    add("--sampler", choices=SAMPLERS, default="ddim", help=usual)
    add("--steps", type=whole(1, 1000), help="(default: 50; dpm++ and unipc 20, lcm 4)")
    follow = "how far to follow the prompts; 1 and less is off (default: 7.5, lcm 1)"
    add("--guidance-scale", type=number(), metavar="G", help=follow)
    spread = "bring the spread of the guided prediction back to the prompt's own, 0 to 1 (default: 0, not at all)"
    add("--guidance-rescale", type=share, default=0.0, metavar="R", help=spread)
    alone = "how far to follow the image prompt by itself, and --guidance-scale the text: a third pass (default: alike)"
    alone += "; with an instruct-pix2pix base, the picture of --init (default: 1.5)"
    add("--image-guidance-scale", type=number(0), metavar="G", help=alone)
    seeds = "picture j is made from the noise of seed + j; -1: a random one, printed (default: %(default)s)"
    add("--seed", type=seed(2**63 - 1), default=0, help=seeds)
    add("--num-images", type=whole(1), default=1, metavar="N", help="pictures to make (default: %(default)s)")
    high = "pixels, a multiple of 8 (default: what the base was made for, or that of --init)"
    add("--height", type=side, help=high)
    add("--width", type=side, help="pixels, a multiple of 8 (default: what the base was made for)")
    add("--again", type=path, metavar="PICTURE", help="make this picture again, but for the flags that differ")


def images(parser: argparse.ArgumentParser) -> None:
    """--image, and what belongs to the last one before it: --scale, ..., --mask, `seen`; --face-embedding, ..., FaceID's."""
    told = "what stands behind an --image belongs to it, what stands before the first to all of them"
    add = parser.add_argument_group("image prompts", told).add_argument
    together = "pictures, or embeddings of them, that prompt together; - is a pipe; given again: another image prompt beside it"
    add("--image", nargs="*", action=Opens, metavar="FILE", help=together)
    weight = "weight of the image prompt; several: one picture for each (default: 1.0, with text 0.6)"
    add("--scale", nargs="+", type=number(), metavar="S", help=weight, **BEHIND_EITHER)
    add("--weights", nargs="+", type=number(), metavar="W", help="of each of its pictures (or FILE:W)", **BEHIND_IMAGE)
    parts = "all, style, layout, style+layout, down, middle, up, or blocks as down.block_2=0.3,up.block_0.1=1, or a weight type "
    parts += "of ComfyUI: ease-in, weak-output, strong-middle, style-transfer, style-precise, ... (default: all)"
    add("--layers", metavar="SPEC", help=parts, **BEHIND_IMAGE)
    add("--from", dest="start", type=share, metavar="A", help="the share of the steps where it begins", **BEHIND_EITHER)
    add("--until", type=share, metavar="B", help="the share of the steps where it ends", **BEHIND_EITHER)
    curve = "over the steps: constant, fade-in, fade-out, or weights as 1,0.5,0, each for an equal share of them"
    add("--curve", help=curve, **BEHIND_IMAGE)
    add("--mask", metavar="FILE", help="where it acts: a grey picture, white is here, black is not", **BEHIND_EITHER)
    seen(parser)
    add = parser.add_argument_group("FaceID adapters").add_argument
    numbers = "512 numbers, .npy, .safetensors or .bin: insightface's normed_embedding (default: those in --image)"
    add("--face-embedding", nargs="+", metavar="FILE", help=numbers, **BEHIND_IMAGE)
    version = "the file is FaceID-plus version 2; no tensor tells"
    add("--faceid-v2", nargs=0, const=True, help=version, **BEHIND_IMAGE)
    structure = "version 2: how far to follow the picture of the face, beside the embedding (default: 1.0)"
    add("--structure-scale", type=number(0), metavar="S", help=structure, **BEHIND_IMAGE)


def seen(parser: argparse.ArgumentParser) -> None:
    """--framing, --crop-position, --negative-image, --negative-noise, --less, --save-embedding, --each."""
    add = parser.add_argument_group("what an adapter sees; behind an --image, as above").add_argument
    framing = "crop a square, pad to one, squash, or tile: squares of a long picture, which act where they lie (default: crop)"
    add("--framing", choices=FRAMINGS, help=framing, **BEHIND_IMAGE)
    add("--crop-position", choices=POSITIONS, metavar="WHERE", help=f"{', '.join(POSITIONS)}", **BEHIND_IMAGE)
    against = "pictures in the place of no image on the unconditional side: one for all, or one for each"
    add("--negative-image", nargs="+", metavar="FILE", help=against, **BEHIND_IMAGE)
    noise = "how much of a picture of noise is blended in there, 0 to 1"
    add("--negative-noise", type=share, metavar="X", help=noise, **BEHIND_IMAGE)
    off = "take a text off the picture's embedding, so much of it (default: 1)"
    add("--less", type=text, metavar="TEXT[:W]", help=off, **BEHIND_IMAGE)
    keep = "write what the adapter reads of the pictures; as --image it gives what they give"
    add("--save-embedding", type=path, metavar="FILE.safetensors", help=keep, **BEHIND_IMAGE)
    each = "a result for each picture of the folder (or of the files), named after it"
    add("--each", nargs=0, const=True, help=each, **BEHIND_IMAGE)


def structure(parser: argparse.ArgumentParser) -> None:
    """--control, and what belongs to the last one before it: --hint, ..., --control-type; --scale and the like may, too."""
    told = "what stands behind a --control belongs to it; --scale, --from, --until and --mask may, too"
    add = parser.add_argument_group("structure", told).add_argument
    several = "a ControlNet or T2I-Adapter, a file or a name; given again: another beside it"
    add("--control", action=Opens, metavar="FILE", help=several)
    shown = "what it is to follow: edges, depth, a skeleton, ...; of a Union several, of as many types"
    add("--hint", nargs="+", metavar="PICTURE", help=shown, **BEHIND_CONTROL)
    add("--hint-from", metavar="PICTURE", help="a picture in which --edges finds the hint", **BEHIND_CONTROL)
    add("--edges", nargs=0, const=True, help="of --hint-from: white on black, Canny's", **BEHIND_CONTROL)
    weakly = "follow it with the prompt alone, and more weakly the finer: for prompts that say little"
    add("--guess", nargs=0, const=True, help=weakly, **BEHIND_CONTROL)
    kinds = "for a Union: the type of each hint; shuffle, inpaint: a ControlNet for that (default: by the file's name)"
    add("--control-type", nargs="+", choices=(*TASKS, *SAME, SHUFFLE), metavar="TYPE", help=kinds, **BEHIND_CONTROL)


def texts(parser: argparse.ArgumentParser) -> None:
    """--prompt-syntax, --long-prompt, --clip-skip, --embedding."""
    add = parser.add_argument_group("how texts are read").add_argument
    ways = "how words are weighed: (red:1.2) as in A1111 or ComfyUI (default: %(default)s, where brackets are text)"
    add("--prompt-syntax", choices=SYNTAXES, default="plain", help=ways)
    long = "read texts beyond 75 tokens in chunks, not cut; BREAK begins one (a1111 and comfy always do)"
    add("--long-prompt", action="store_true", help=long)
    skip = "leave out so many of the text tower's last layers, as diffusers counts; A1111 counts one more (default: 0)"
    add("--clip-skip", type=whole(0), default=0, metavar="N", help=skip)
    words = "textual inversions, which texts call by their files' names or by NAME"
    add("--embedding", nargs="+", type=called, default=[], metavar="FILE[:NAME]", help=words)


def editing(parser: argparse.ArgumentParser) -> None:
    """--init, --strength, --inpaint, --outpaint, --only-masked."""
    add = parser.add_argument_group("a picture to begin with").add_argument
    add("--init", metavar="PICTURE", help="draw on from this picture, in its size; - is a pipe")
    far = "how far to go from it: the last int(steps * S) steps run (default: 0.8, with a mask 1: all)"
    add("--strength", type=share, metavar="S", help=far)
    add("--inpaint", metavar="MASK", help="make anew what is white in this picture, keep what is black")
    sides = "add so many pixels, and make them anew"
    add("--outpaint", nargs=4, type=whole(0, MAX_SIDE), metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help=sides)
    alone = f"work around the mask alone, so many pixels more ({PADDING}), and paste it back: all else stays"
    add("--only-masked", nargs="?", type=whole(0), const=PADDING, metavar="PADDING", help=alone)


def models(parser: argparse.ArgumentParser) -> None:
    """--list, and each file: --base, --adapter, ..., --text-encoder, --lora, --spacing, --prediction."""
    files = parser.add_argument_group("models, each a file or a published name")
    files.add_argument("--list", action="store_true", help="print all names, and what of them is already here")
    flags.models(files, several=True)
    add = files.add_argument
    towers = "text towers for a base without any, files or folders"
    add("--text-encoder", nargs="+", type=path, default=[], metavar="FILE", help=towers)
    read = "the CLIP image encoder that T2I-Adapter's style adapters read (default: vit-l)"
    add("--style-encoder", metavar="FILE", help=read)
    merged = "LoRAs for the base, each with a weight (default: 1)"
    add("--lora", nargs="+", type=weighted, default=[], metavar="FILE[:W]", help=merged)
    visited = "which timesteps are visited (default: as the base's file tells, or as the sampler is used to)"
    add("--spacing", choices=("leading", "trailing", "linspace"), help=visited)
    add("--prediction", choices=("eps", "v"), help="what the UNet predicts (default: as the base's file tells)")


def where(parser: argparse.ArgumentParser) -> None:
    """--output, --overwrite, --attention, --grid, --device, --dtype, --storage, --low-memory."""
    group = parser.add_argument_group("where and how")
    add = group.add_argument
    kinds = "a .png, .jpg or .webp, or a folder (default: %(default)s)"
    add("--output", type=path, default=Path("outputs"), help=kinds)
    add("--overwrite", action="store_true", help="replace pictures that are there already")
    looked = "also write a sheet for each picture: where each image prompt acts, where each word attends; slower"
    add("--attention", action="store_true", help=looked)
    add("--grid", action="store_true", help="also write a sheet: prompts beside results, a column per scale")
    flags.machine(group)
    stored = "keep large weights in it, and bring each up to --dtype when it is used"
    add("--storage", choices=STORAGES, help=stored)
    less = "--storage float16, one picture at a time, the halves of the guidance one by one, decoded in strips: slower"
    add("--low-memory", action="store_true", help=less)
