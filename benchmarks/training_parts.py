"""Where a training step of SD 1.5 on the CPU spends its time: each part alone, full-size random weights, CPU seconds.

    python -m benchmarks.training_parts --side 256
    python -m benchmarks.training_parts --parts autoencoder image --dtype bfloat16

The least of three, one picture, one thread.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch

from clip import CLIPImage, CLIPText
from clip.model import SD15_TEXT, VIT_H
from ipadapter.objective import Objective
from training.recipes import new_adapter
from unet import SD15, UNet
from vae import SD_VAE, VAE
from vae.winograd import hasten

PARTS = ("autoencoder", "image", "text", "unet")


def report(name: str, call: Callable[[], object]) -> None:
    call()
    seconds = []
    for _ in range(3):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    print(f"{name:40} {min(seconds):6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype, last = getattr(torch, args.dtype), torch.channels_last
    with torch.no_grad():
        if "autoencoder" in args.parts:
            vae, pixels = VAE(SD_VAE).to(dtype, memory_format=last), torch.rand(1, 3, args.side, args.side, dtype=dtype)
            hastened = copy.deepcopy(vae)
            hasten(hastened.encoder)
            report("autoencoder, its convolutions as ever", lambda: vae.posterior(pixels))
            report("autoencoder", lambda: hastened.posterior(pixels))
        if "image" in args.parts:
            image, seen = CLIPImage(VIT_H).to(dtype), torch.randn(1, 3, 224, 224, dtype=dtype)
            report("image tower, ViT-H", lambda: image(seen))
            del image
        if "text" in args.parts:
            text, tokens = CLIPText(SD15_TEXT).to(dtype), torch.zeros(1, 77, dtype=torch.long)
            report("text tower", lambda: text(tokens))
    if "unet" in args.parts:
        unet = UNet(SD15).requires_grad_(False).to(dtype, memory_format=last)
        adapter = new_adapter("base", unet, VIT_H).float()
        objective, noise = Objective(adapter, unet, dtype), torch.randn(1, 4, args.side // 8, args.side // 8)
        told = torch.tensor([500]), torch.randn(1, 77, 768, dtype=dtype), torch.randn(1, 1024, dtype=dtype)
        optimizer = torch.optim.AdamW(adapter.parameters(), 1e-4)
        report("UNet, there", lambda: objective(noise.to(dtype), noise, *told))
        report("UNet, there and back", lambda: objective(noise.to(dtype), noise, *told).backward())
        report("AdamW", optimizer.step)


if __name__ == "__main__":
    main()
