"""Structure beside an image prompt, as in the paper's Figure 7, by the bundled model.

    python -m experiments.structure --output docs

Writes structure.png: rows follow the edges of a drawing (a ControlNet) or its silhouette (a T2I-Adapter), columns have an
image prompt each; there is no text. The drawings are unseen ones.
"""

import argparse
from pathlib import Path

from cli import flags, terminal
from control.canny import canny
from files.pictures import save_picture, to_pil
from files.sheets import sheet
from generate import Hint, open_models, pictures, prompts
from tiny import drawings
from tiny.train_control import silhouette

SCALE = 0.5  # of the image prompts: they tell where things are, too, and at 1 they would win
STEPS = 20
SIDE = 76  # pixels of a picture in the sheet
HINTS, PROMPTS = (2, 3, 4, 8), (1, 7, 10, 11, 13)  # of the unseen drawings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=flags.path, default=Path("outputs"), help="a folder (default: %(default)s)")
    parser.add_argument("--seed", type=flags.seed(2**63 - 1), default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    models = open_models(controls=["tiny-edges", "tiny-silhouette"])
    data = drawings.load("unseen-drawings", limit=max(HINTS + PROMPTS) + 1)
    seen = to_pil(drawings.to_unit(data.pixels))
    pairs = [prompts(models, images=[seen[i]], scale=SCALE) for i in PROMPTS]
    rows = [[None, None, *(seen[i] for i in PROMPTS)]]
    for row, i in enumerate(HINTS):
        filled = to_pil(drawings.to_unit(silhouette(data.pixels[i])[None].expand(-1, 3, -1, -1)))[0]
        net = row % 2
        hint = Hint([canny(seen[i]), filled][net], net)
        made = [next(pictures(models, *pair, args.seed, steps=STEPS, controls=[hint])) for pair in pairs]
        rows.append([seen[i], hint.picture, *made])
    save_picture(sheet(rows, (), SIDE), args.output / "structure.png")


if __name__ == "__main__":
    terminal.run(main)
