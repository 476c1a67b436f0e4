"""A training step of SD 1.5's adapter on the CPU: `train.py`, with and without a cache, against the official recipe.

    python -m benchmarks.training --steps 3

Needs diffusers, transformers and accelerate; downloads nothing. The official step (tutorial_train.py of
tencent-ailab/IP-Adapter) is rebuilt from public modules on the same random files: diffusers' UNet with its attention
processors, all encoders held in memory and run at every step, AdamW on projection and processors. Batch 2 at 256x256,
fp32. Each run is a process of its own: start and first step are left out of the seconds, the peak counts all, mapped
file pages too. One run per line, one after the other: let nothing else run beside them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

from PIL import Image

from benchmarks import reference
from benchmarks.command import ROOT, Cost, cost
from benchmarks.reference import FULL, NARROW, Files

BATCH, SIDE = 2, 256

OFFICIAL = """
import sys, time, json
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from PIL import Image
from itertools import pairwise
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
seconds = []
for step in range(steps + 1):
    began = time.perf_counter()
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
    seconds.append(time.perf_counter() - began)
    print(step, loss.item(), seconds[-1], flush=True)
Path(log).write_text(json.dumps({"parameters": sum(p.numel() for p in params), "seconds": seconds[1:]}))
"""


def ours(files: Files, data: Path, output: Path, steps: int, *flags: str) -> list[str]:
    given = {
        "--base": files.base,
        "--image-encoder": files.image_encoder / "model.safetensors",
        "--data": data,
        "--output": output,
        "--steps": steps + 1,
        "--batch-size": BATCH,
        "--resolution": SIDE,
        "--validate-every": 0,
        "--save-every": 10**6,
        "--device": "cpu",
    }
    return [sys.executable, str(ROOT / "train.py"), *(str(part) for flag in given.items() for part in flag), *flags]


def steps_of(output: Path) -> list[float]:
    """Seconds of each step of a run but the first."""
    ends = [json.loads(line)["seconds"] for line in (output / "log.jsonl").read_text().splitlines()]
    return [b - a for a, b in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run (default: %(default)s)")
    parser.add_argument("--narrow", action="store_true", help="small widths, to try this script out")
    parser.add_argument("--folder", type=Path, help="keep the weight files here (3.5 GB)")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = reference.write(args.folder or folder / "files", NARROW if args.narrow else FULL)
        data = folder / "data"
        data.mkdir()
        picture = Image.open(files.picture)
        for i in range(8):
            picture.rotate(40 * i).resize((400, 400)).save(data / f"{i}.png")
            (data / f"{i}.txt").write_text(f"picture number {i}, coloured squares")
        cache = ("--cache", str(folder / "cache"))
        subprocess.run(ours(files, data, folder / "first", 0, *cache), check=True, stderr=subprocess.DEVNULL)
        log = folder / "official.json"
        arguments = files.folder, data, args.steps, BATCH, SIDE, log
        rows: dict[str, tuple[Cost, list[float]]] = {}
        spent = cost([sys.executable, "-c", OFFICIAL, *map(str, arguments)])
        rows["official recipe"] = spent, json.loads(log.read_text())["seconds"]
        for name, flags in {
            "ours": (),
            "ours, cached": cache,
            "ours, cached, --gradient-checkpointing": (*cache, "--gradient-checkpointing"),
        }.items():
            output = folder / name
            rows[name] = cost(ours(files, data, output, args.steps, *flags)), steps_of(output)
        their_cost, theirs = rows["official recipe"]
        print(f"{'':42} s/step  ratio  peak GiB  ratio")
        for name, (spent, seconds) in rows.items():
            ratios = median(seconds) / median(theirs), spent.peak_gib / their_cost.peak_gib
            print(f"{name:42} {median(seconds):6.2f} {ratios[0]:6.2f} {spent.peak_gib:9.2f} {ratios[1]:6.2f}")


if __name__ == "__main__":
    main()
