"""A training step of SD 1.5's adapter on the CPU: `train.py`, with and without a cache, against the official recipe.

    python -m benchmarks.training --steps 3
    python -m benchmarks.training --batch-size 1 --side 512 --threads 1 --turns 2 --rows official ours

Needs diffusers, transformers and accelerate; downloads nothing. The official step (tutorial_train.py of
tencent-ailab/IP-Adapter) is rebuilt from public modules on the same random files: diffusers' UNet with its attention
processors, all encoders held in memory and run at every step, AdamW on projection and processors. In fp32; no captions
are met twice in 8 samples, and without --drop nothing is dropped (what train.py drops it does not encode). Each run is a
process of its own, and they take turns: start and first step are left out of the seconds, the peak counts all, mapped
file pages too. Where other programs run, `--threads 1` and the ratio of CPU seconds tell more.
"""

import argparse
import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from benchmarks import reference
from benchmarks.command import ROOT, Cost, cost
from benchmarks.reference import FULL, NARROW, Files, ratio

# A run of train.py that writes down the clock and the CPU time behind each step.
OURS = """
import json, runpy, sys, time
from pathlib import Path
from training.run import Run

log, times = Run.log, []

def timed(run, loss):
    log(run, loss)
    times.append((time.perf_counter(), time.process_time()))
    Path(out).write_text(json.dumps(times))

Run.log = timed
script, out, sys.argv = sys.argv[1], sys.argv[2], sys.argv[1:2] + sys.argv[3:]
runpy.run_path(script, run_name="__main__")
"""

OFFICIAL = """
import sys, time, json
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from pathlib import Path
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
from benchmarks.reference import Files, attach, pipeline

folder, data, steps, batch, side, log = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]), sys.argv[6]
files = Files(Path(folder))
pipe = pipeline(files)
attach(pipe, files.adapter)
unet, vae, text, tokenizer, encoder = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.image_encoder
for model in (unet, vae, text, encoder):
    model.requires_grad_(False)
processors = [p for p in unet.attn_processors.values() if isinstance(p, torch.nn.Module)]
params = [p for module in (unet.encoder_hid_proj, *processors) for p in module.parameters()]
for p in params:
    p.requires_grad_(True)
optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=1e-2)
schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
processor = CLIPImageProcessorPil()
pictures = sorted(data.glob("*.png"))
times = []
for step in range(steps + 1):
    chosen = [pictures[(step * batch + i) % len(pictures)] for i in range(batch)]
    images = [Image.open(path).convert("RGB") for path in chosen]
    captions = [path.with_suffix(".txt").read_text() for path in chosen]
    squares = pipe.image_processor.preprocess([image.resize((side, side)) for image in images])
    with torch.no_grad():
        latents = vae.encode(squares).latent_dist.sample() * vae.config.scaling_factor
        embeds = encoder(processor(images, return_tensors="pt").pixel_values).image_embeds
        ids = tokenizer(captions, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
        hidden = text(ids)[0]
    noise = torch.randn_like(latents)
    t = torch.randint(0, 1000, (batch,))
    noisy = schedule.add_noise(latents, noise, t)
    eps = unet(noisy, t, hidden, added_cond_kwargs={"image_embeds": [embeds[:, None]]}).sample
    loss = torch.nn.functional.mse_loss(eps.float(), noise.float())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item(), flush=True)
    times.append((time.perf_counter(), time.process_time()))
Path(log).write_text(json.dumps(times))
"""


def ours(files: Files, data: Path, output: Path, steps: int, batch: int, side: int, *flags: str) -> list[str]:
    given = {
        "--base": files.base,
        "--image-encoder": files.image_encoder / "model.safetensors",
        "--data": data,
        "--output": output,
        "--steps": steps + 1,
        "--batch-size": batch,
        "--resolution": side,
        "--validate-every": 0,
        "--save-every": 10**6,
        "--device": "cpu",
    }
    given = [str(part) for flag in given.items() for part in flag]
    return [sys.executable, "-c", OURS, str(ROOT / "train.py"), str(output.with_suffix(".json")), *given, *flags]


def steps_of(log: Path) -> list[tuple[float, float]]:
    """Seconds of each step but the first, of the clock and of the CPU."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(json.loads(log.read_text()))]


def main() -> None:
    cached = "--cache", "CACHE"
    kinds = {"official": None, "ours": (), "cached": cached, "recomputed": (*cached, "--gradient-checkpointing")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=1, help="runs of each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--side", type=int, default=256, help="of the pictures (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=kinds, default=[*kinds], help="(default: all)")
    parser.add_argument("--drop", action="store_true", help="drop text and images as train.py does")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--narrow", action="store_true", help="small widths, to try this script out")
    parser.add_argument("--folder", type=Path, help="keep the weight files here (3.5 GB)")
    args = parser.parse_args()
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = reference.write(args.folder or folder / "files", NARROW if args.narrow else FULL)
        data = folder / "data"
        data.mkdir()
        picture = Image.open(files.picture)
        for i in range(8):
            picture.rotate(40 * i).resize((400, 400)).save(data / f"{i}.png")
            (data / f"{i}.txt").write_text(f"picture number {i}, coloured squares")
        shape = args.batch_size, args.side
        drops = () if args.drop else ("--drop-text", "0", "--drop-image", "0", "--drop-both", "0")

        def run(name: str, turn: int, steps: int) -> tuple[Cost, list[tuple[float, float]]]:
            output = folder / f"{name}-{turn}"
            log = output.with_suffix(".json")
            flags = [str(folder / "cache") if flag == "CACHE" else flag for flag in (*(kinds[name] or ()), *drops)]
            official = [sys.executable, "-c", OFFICIAL, *map(str, (files.folder, data, steps, *shape, log))]
            return cost(official if name == "official" else ours(files, data, output, steps, *shape, *flags)), steps_of(
                log
            )

        if {"cached", "recomputed"} & {*args.rows}:
            run("cached", -1, 0)  # fills the cache
        turns = [{name: run(name, turn, args.steps) for name in args.rows} for turn in range(args.turns)]
    print(f"{'':12} s/step  ratio                CPU s/step  ratio           peak GiB  ratio")
    rows = {}
    for name in args.rows:
        seconds = [zip(*turn[name][1], strict=True) for turn in turns]
        wall, cpu = zip(*[map(median, pair) for pair in seconds], strict=True)  # of each turn
        rows[name] = wall, cpu, [turn[name][0].peak_gib for turn in turns]
        cells = [
            f"{median(values):6.2f}  {ratio(values, rows[args.rows[0]][i])}" for i, values in enumerate(rows[name])
        ]
        print(f"{name:12} {'  '.join(cells)}")


if __name__ == "__main__":
    main()
