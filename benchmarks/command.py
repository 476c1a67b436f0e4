"""The whole command, from files to a PNG: `python sample.py ...` against the same picture from a script on diffusers.

    python -m benchmarks.command --repeats 3

Needs diffusers, transformers and accelerate; downloads nothing. Writes random weights first: SD 1.5 (fp16, 2 GB), ViT-H/14
(fp16, 1.3 GB) and an adapter. Both compute in fp32 on the CPU: one image prompt with text, 4 DDIM steps, 256 x 256. Each
run is a process of its own; they take turns, and the first turn is not counted. A ratio is ours/theirs of medians, in
brackets the least and the greatest of a single turn. The peak counts mapped file pages, too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks import reference
from benchmarks.reference import FULL, NARROW, Files, ratio

ROOT = Path(__file__).parents[1]
TEXT, SCALE, STEPS, SIDE, SEED = "a red fox in the snow", 0.6, 4, 256, 7

THEIRS = """
import sys
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import load_image, logging
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

base, config, encoder, folder, adapter, picture, text, scale, steps, side, seed, out = sys.argv[1:]
logging.disable_progress_bar()
pipe = StableDiffusionPipeline.from_single_file(
    base,
    config=config,
    local_files_only=True,
    torch_dtype=torch.float32,
    image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder, dtype=torch.float32),
    feature_extractor=CLIPImageProcessorPil(),
    safety_checker=None,
)
pipe.load_ip_adapter(folder, subfolder="", weight_name=adapter, image_encoder_folder=None)
pipe.set_ip_adapter_scale(float(scale))
pipe.set_progress_bar_config(disable=True)
pipe(
    text,
    ip_adapter_image=load_image(picture),
    num_inference_steps=int(steps),
    height=int(side),
    width=int(side),
    generator=torch.Generator().manual_seed(int(seed)),
).images[0].save(out)
"""


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    seconds: float
    cpu_seconds: float
    peak_gib: float


def ours(files: Files, out: Path) -> list[str]:
    flags = {
        "--base": files.base,
        "--image-encoder": files.image_encoder / "model.safetensors",
        "--adapter": files.adapter,
        "--image": files.picture,
        "--prompt": TEXT,
        "--scale": SCALE,
        "--steps": STEPS,
        "--height": SIDE,
        "--width": SIDE,
        "--seed": SEED,
        "--device": "cpu",
        "--dtype": "float32",
        "--output": out,
    }
    given = (str(part) for flag in flags.items() for part in flag)
    return [sys.executable, str(ROOT / "sample.py"), *given, "--overwrite"]


def theirs(files: Files, out: Path) -> list[str]:
    adapter = files.adapter.parent, files.adapter.name
    args = files.base, files.config, files.image_encoder, *adapter, files.picture, TEXT, SCALE, STEPS, SIDE, SEED, out
    return [sys.executable, "-c", THEIRS, *map(str, args)]


def cost(command: list[str]) -> Cost:
    """Run to the end; a failure shows what the command printed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)  # unlike getrusage, the peak of this child alone
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{log.read().decode()}\n{command[1]}: exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--narrow", action="store_true", help="small widths, to try this script out")
    parser.add_argument("--folder", type=Path, help="keep the weight files here (3.5 GB)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        files = reference.write(args.folder or Path(temporary), NARROW if args.narrow else FULL)
        pictures = [Path(temporary) / "ours.png", Path(temporary) / "theirs.png"]
        commands = [ours(files, pictures[0]), theirs(files, pictures[1])]
        turns = []
        for turn in range(1 + args.repeats):
            turns.append([cost(command) for command in commands])
            print("warm-up" if turn == 0 else f"turn {turn}", *turns[-1], flush=True)
        a, b = (np.asarray(Image.open(path), dtype=int) for path in pictures)
    print(f"largest difference of the two pictures: {abs(a - b).max()}/255")
    print("              ours    theirs  ours/theirs")
    for field in fields(Cost):
        our, their = ([getattr(turn[side], field.name) for turn in turns[1:]] for side in (0, 1))
        print(f"{field.name:12} {median(our):7.2f} {median(their):9.2f}  {ratio(our, their)}")


if __name__ == "__main__":
    main()
