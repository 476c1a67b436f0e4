"""Speed, memory and agreement with diffusers of one guided step of SD 1.5 with an IP-Adapter, on random weights.

    python -m benchmarks.gpu --json gpu.json

Needs diffusers, transformers and a CUDA GPU with 40 GB.
A guided step is one call of the UNet with a batch of two. diffusers projects the image embedding inside this call,
we do so once before sampling. "fp32" is IEEE fp32: TF32 is off. "cl" stands for torch.channels_last.
"""

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.reference import diffusers_unet, distance
from ipadapter import ImageProjection, IPAdapter, Prompt
from unet import SD15, UNet

SCALE, EMBED_DIM, NUM_TOKENS, SIZES = 0.6, 1024, 4, (256, 512)
WARM_UP, TIMED, DEVICE = 3, 10, "cuda"
COLUMNS = ("dtype", "size", "variant", "ms", "ours/theirs", "peak_gib", "vs_diffusers", "vs_ours_fp32")


def milliseconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_gib(call: Callable[[], object], modules: list[nn.Module]) -> float:
    """Weights of the modules, and what the call allocates on top of what was there."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before + sum(p.nbytes for m in modules for p in m.parameters())) / 2**30


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table here, too")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = UNet(SD15).requires_grad_(False).eval()
        adapter = IPAdapter.for_unet(unet, ImageProjection(EMBED_DIM, SD15.context_dim, NUM_TOKENS))
        adapter.requires_grad_(False)
        text, embeds, t = torch.randn(2, 77, SD15.context_dim), torch.randn(2, EMBED_DIM), torch.tensor(500)
        latents = {size: torch.randn(2, 4, size // 8, size // 8) for size in SIZES}
    other = diffusers_unet(unet, adapter, SCALE)

    rows, exact = [], {}
    print("dtype size  variant         ms  ours/theirs  peak GiB  vs diffusers  vs ours fp32", flush=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        models = {}
        for suffix, layout in (("", torch.contiguous_format), (" cl", torch.channels_last)):
            ours, ip = deepcopy(unet), deepcopy(adapter)
            models["ours" + suffix] = ours.to(dtype, memory_format=layout), ip.to(dtype), layout
            models["diffusers" + suffix] = deepcopy(other).to(dtype, memory_format=layout), None, layout
        c, e = text.to(dtype), embeds.to(dtype)
        for size, latent in latents.items():
            calls = {}
            for name, (model, ip, layout) in models.items():
                x = latent.to(dtype).contiguous(memory_format=layout)
                if ip:
                    calls[name] = partial(model, x, t, Prompt(c, (ip.prompt(ip.image_proj(e), SCALE),)))
                else:
                    calls[name] = partial(model, x, t, c, added_cond_kwargs={"image_embeds": [e[:, None]]})
            # In turn, so that clocks and heat are the same for all.
            times = [[milliseconds(call) for call in calls.values()] for _ in range(WARM_UP + TIMED)][WARM_UP:]
            outs = {name: getattr(out := call(), "sample", out) for name, call in calls.items()}
            exact.setdefault(size, outs["ours"])  # fp32 comes first
            ms = dict(zip(calls, map(median, zip(*times, strict=True)), strict=True))
            for name, (model, ip, _) in models.items():
                ratio = ms[name] / ms[name.replace("ours", "diffusers")]
                gib = peak_gib(calls[name], [model, ip] if ip else [model])
                apart, lost = distance(outs[name], outs["diffusers"]), distance(outs[name], exact[size])
                row = (str(dtype).removeprefix("torch."), size, name, ms[name], ratio, gib, apart, lost)
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                print("{:9}{:4}  {:12}{:8.2f}{:13.3f}{:10.2f}{:14.2e}{:14.2e}".format(*row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
