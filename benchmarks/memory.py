"""Peak memory of a whole run on the CPU, at the settings that trade time or digits for it.

    python -m benchmarks.memory                          SD 1.5; writes 4 GB of random weights to a temporary folder
    python -m benchmarks.memory --families sd15 sdxl --folder weights         SDXL: 8 GB more, and up to 17 GB of memory
    python -m benchmarks.memory --control                beside a ControlNet: 0.7 GB more on the disk
    python -m benchmarks.memory --vae 1024 2048          the autoencoder's decoder alone, whole and in strips

A run loads fp16 files, encodes an image prompt and a text, takes guided steps and decodes, as sample.py does, in fp32. Each
is a process of its own. The peak counts mapped file pages, too; "over the start" is what lies above importing torch.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.command import ROOT, Cost, cost
from benchmarks.reference import FULL, NARROW, randomize
from clip import CLIPImage, CLIPText, CLIPTextConfig
from control import ControlNet
from generate import Hint, open_models, pictures, prompts
from ipadapter import ImageProjection, IPAdapter
from unet import SDXL, UNet, UNetConfig
from vae import SD_VAE, VAE, VAEConfig

BIGG = CLIPTextConfig(width=1280, layers=32, heads=20, mlp=5120, quick_gelu=False, projection=1280)
GUIDANCE, SCALE, TEXT = 7.5, 0.6, "a red fox in the snow"


SETTINGS = {  # of open_models
    "fp32": {},
    "fp16 storage": {"storage": "float16"},
    "fp8 storage": {"storage": "float8"},
    "fp16 storage, strips, guidance apart": {"storage": "float16", "low_memory": True},
    "fp8 storage, strips, guidance apart": {"storage": "float8", "low_memory": True},
}


def run(family: str, folder: Path, name: str, side: int, steps: int, control: bool) -> None:
    """One run, from files to pixels, each model freed when it has done its part."""
    example = ROOT / "tiny/example.png"
    nets = {"controls": [folder / f"{family}-control.safetensors"]} if control else {}
    models = open_models(
        base=folder / f"{family}.safetensors",
        adapter=folder / f"{family}-adapter.safetensors",
        image_encoder=folder / "image_encoder.safetensors",
        device="cpu",
        keep=False,
        **SETTINGS[name],
        **nets,
    )
    prompt, null = prompts(models, TEXT, images=[example], scale=SCALE)
    how = {"height": side, "width": side, "controls": [Hint(example)] if control else ()}
    (_,) = pictures(models, prompt, null, seed=7, steps=steps, guidance_scale=GUIDANCE, **how)


@torch.no_grad()
def decode(side: int, rows: int | None, config: VAEConfig) -> None:
    """The decoder alone, with its own random initialisation."""
    torch.manual_seed(0)
    vae = VAE(config).eval().to(memory_format=torch.channels_last)
    assert vae.decode(torch.randn(1, 4, side // 8, side // 8), rows).isfinite().all()


def write(folder: Path, families: list[str], narrow: bool, control: bool) -> None:
    """All files in fp16; those that are there already are kept."""
    sizes = NARROW if narrow else FULL
    unets: dict[str, UNetConfig] = {"sd15": sizes.unet, "sdxl": SDXL}
    texts = {"sd15": {"cond_stage_model.transformer.": sizes.text}}
    texts["sdxl"] = {"conditioner.embedders.0.transformer.": sizes.text, "conditioner.embedders.1.transformer.": BIGG}
    if narrow:
        unets["sdxl"] = replace(SDXL, channels=(64, 128, 192), context_dim=128, vector_dim=64 + 6 * 256)
        texts["sdxl"]["conditioner.embedders.1.transformer."] = replace(
            BIGG, width=64, layers=2, heads=4, projection=64
        )
    with torch.device("meta"):
        contents = {"image_encoder": CLIPImage(sizes.image).state_dict()}
        for family in families:
            unet = UNet(unets[family])
            contents[family] = UNet.state_dict(unet, prefix="model.diffusion_model.") | VAE(sizes.vae).state_dict(
                prefix="first_stage_model."
            )
            for prefix, config in texts[family].items():
                contents[family] |= CLIPText(config).state_dict(prefix=prefix)
            projection = ImageProjection(sizes.image.projection, unets[family].context_dim, 4)
            contents[f"{family}-adapter"] = IPAdapter.for_unet(unet, projection).state_dict()
            if control:
                net = ControlNet(replace(unets[family], up=(), out_channels=0))
                contents[f"{family}-control"] = net.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, shapes) in enumerate(contents.items()):
        if not (path := folder / f"{name}.safetensors").exists():
            save_file(randomize(shapes, seed, torch.float16), path)


def measure(*arguments: object) -> Cost:
    return cost([sys.executable, "-m", "benchmarks.memory", *map(str, arguments)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=("sd15", "sdxl"), default=["sd15"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--side", type=int, default=512, help="pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--vae", nargs="+", type=int, metavar="SIDE", help="the decoder alone, pixels along a side")
    parser.add_argument("--control", action="store_true", help="with a ControlNet, too")
    parser.add_argument("--narrow", action="store_true", help="small widths, to try this script out")
    parser.add_argument("--folder", type=Path, help="keep the weight files here")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # a run, in a process of its own
    args = parser.parse_args()
    small = ["--narrow"] * args.narrow + ["--control"] * args.control
    if args.one:
        kind, *rest = args.one
        if kind == "run":
            run(rest[0], args.folder, rest[1], args.side, args.steps, args.control)
        elif kind == "decode":
            decode(args.side, int(rest[0]) or None, NARROW.vae if args.narrow else SD_VAE)
        elif kind == "write":
            write(args.folder, rest, args.narrow, args.control)
        return
    start = measure("--one", "start").peak_gib
    print(f"{'peak GiB':>60}  over the start  seconds")

    def report(name: str, spent: Cost) -> None:
        print(f"{name:52}{spent.peak_gib:8.2f}{spent.peak_gib - start:16.2f}{spent.seconds:9.1f}", flush=True)

    for side in args.vae or []:
        for rows in (0, 64):
            name = f"decoder, {side}x{side}, " + (f"strips of {rows} rows" if rows else "whole")
            report(name, measure("--one", "decode", rows, "--side", side, *small))
    if args.vae:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        # Apart, too: a child starts with its parent's peak.
        measure("--one", "write", *args.families, "--folder", folder, *small)
        for family in args.families:
            for name in args.settings:
                flags = ("--folder", folder, "--side", args.side, "--steps", args.steps, *small)
                report(f"{family}, {name}", measure("--one", "run", family, name, *flags))


if __name__ == "__main__":
    main()
