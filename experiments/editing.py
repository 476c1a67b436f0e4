"""Image to image and inpainting with an image prompt, as in the paper's Figures 8 and 9, by the bundled model.

    python -m experiments.editing --output docs

Writes image-to-image.png and inpainting.png. The pictures are the first unseen drawings, in pairs: one to begin with, one as
image prompt; there is no text.
"""

import argparse
from pathlib import Path

from PIL import Image

from cli import flags, terminal
from files.pictures import save_picture, to_pil
from files.sheets import sheet
from generate import Models, open_models, pictures, prompts
from tiny import drawings

STRENGTHS = (0.4, 0.6, 0.8)
SIDE = 76  # pixels of a picture in the sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=flags.path, default=Path("outputs"), help="a folder (default: %(default)s)")
    parser.add_argument("--rows", type=flags.whole(1, 100), default=4, help="of each sheet (default: %(default)s)")
    parser.add_argument("--seed", type=flags.seed(2**63 - 1), default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    models = open_models()
    some = to_pil(drawings.to_unit(drawings.load("unseen-drawings", limit=2 * args.rows).pixels))
    drawn, painted = [], []
    for i, (begin, prompt) in enumerate(zip(some[::2], some[1::2], strict=True)):
        mask = half(begin, below=i % 2 == 1)
        drawn.append([begin, prompt, *(made(models, prompt, args.seed, init=begin, strength=s) for s in STRENGTHS)])
        kept = Image.composite(Image.new("RGB", begin.size, "grey"), begin, mask)
        painted.append([begin, kept, prompt, made(models, prompt, args.seed, init=begin, inpaint=mask)])
    titles = ["to begin with", "image prompt", *(f"strength {s:g}" for s in STRENGTHS)]
    save_picture(sheet(drawn, titles, SIDE), args.output / "image-to-image.png")
    titles = ["picture", "what stays", "image prompt", "made anew"]
    save_picture(sheet(painted, titles, SIDE), args.output / "inpainting.png")


def made(models: Models, prompt: Image.Image, seed: int, **begin: object) -> Image.Image:
    return next(pictures(models, *prompts(models, images=[prompt]), seed, **begin))


def half(picture: Image.Image, below: bool) -> Image.Image:
    """A mask of the lower half, or of the right one."""
    mask, (width, height) = Image.new("L", picture.size), picture.size
    mask.paste(255, (0, height // 2, width, height) if below else (width // 2, 0, width, height))
    return mask


if __name__ == "__main__":
    terminal.run(main)
