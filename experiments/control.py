"""Sheets of what an image prompt does in a part of the steps, and of a negative picture; the bundled model.

python -m experiments.control --output docs
"""

import argparse
from pathlib import Path

from PIL import Image

from files.pictures import save_picture, to_pil
from files.sheets import sheet
from generate import ImageGroup, Models, open_models, pictures, prompts
from tiny import drawings

TEXT = "red apple"
WINDOWS = {  # shares of the run
    "text alone": None,
    "--until 0.5": (0.0, 0.5),
    "all steps": (0.0, 1.0),
    "--from 0.5": (0.5, 1.0),
}
SHOWN = ("emojione_birthday-cake", "fluent-emoji_rugby-football")
PAIRS = (  # an image prompt, and what it should not be
    ("emojione_birthday-cake", "fluent-emoji_rugby-football"),
    ("fluent-emoji_rugby-football", "emojione_birthday-cake"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/experiments"), help="(default: %(default)s)")
    args = parser.parse_args()
    data, models = drawings.load("unseen-drawings"), open_models(device="cpu")
    by_name = dict(zip(data.keys, to_pil(drawings.to_unit(data.pixels)), strict=True))
    args.output.mkdir(parents=True, exist_ok=True)

    def draw(text: str, *groups: ImageGroup) -> Image.Image:
        return one(models, text, groups, args.seed, args.steps)

    rows = [
        (by_name[name], *(draw(TEXT, *window(by_name[name], shares)) for shares in WINDOWS.values())) for name in SHOWN
    ]
    save_picture(sheet(rows, ["image prompt", *WINDOWS]), args.output / "control-window.png")

    rows = []
    for name, other in PAIRS:
        image, negative = by_name[name], by_name[other]
        groups = ImageGroup([image]), ImageGroup([image], negative_image=[negative])
        rows.append((image, negative, *(draw("", group) for group in groups)))
    titles = ["image prompt", "negative picture", "without it", "with it"]
    save_picture(sheet(rows, titles), args.output / "control-negative.png")


def window(image: Image.Image, shares: tuple[float, float] | None) -> list[ImageGroup]:
    return [ImageGroup([image], scale=1.0, start=shares[0], until=shares[1])] if shares else []


def one(models: Models, text: str, groups: tuple[ImageGroup, ...], seed: int, steps: int) -> Image.Image:
    prompt, null = prompts(models, text, images=groups)
    return next(pictures(models, prompt, null, seed, steps=steps))


if __name__ == "__main__":
    main()
