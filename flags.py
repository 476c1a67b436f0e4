"""Flags of sample.py, by what they are about."""

import argparse

import cli
from generate.syntax import SYNTAXES

PADDING = 32  # pixels around a mask, of --only-masked without a number


def editing(parser: argparse.ArgumentParser) -> None:
    """--init, --strength, --inpaint, --outpaint, --only-masked."""
    add = parser.add_argument_group("a picture to begin with").add_argument
    add("--init", metavar="PICTURE", help="draw on from this picture, in its size; - is a pipe")
    far = "how far to go from it: the last int(steps * S) steps run (default: 0.8, with a mask 1: all)"
    add("--strength", type=cli.share, metavar="S", help=far)
    add("--inpaint", metavar="MASK", help="make anew what is white in this picture, keep what is black")
    sides = "add so many pixels, and make them anew"
    add("--outpaint", nargs=4, type=cli.whole(0), metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help=sides)
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
