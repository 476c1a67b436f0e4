"""Speed of one guided step of SD 1.5 with an IP-Adapter on a CPU, ours against diffusers on the same random weights.

    python -m benchmarks.step
    python -m benchmarks.step --control                        beside a ControlNet
    python -m benchmarks.step --sizes 256 --dtypes bfloat16     slow where the CPU has no bfloat16 of its own

Needs diffusers, transformers and accelerate; full size takes 8 GB of memory. A guided step is the UNet on a batch of
two and the guidance formula. The variants take turns within one process, so that all see the same load and clocks;
"cl" stands for torch.channels_last, which is how sample.py runs. With --control a ControlNet acts in each step: ours has
read its hint before, theirs reads it at each step, as its pipeline does. A ratio is ours/theirs of medians, in brackets the
least and the greatest of a single turn. Where other programs run, `--threads 1` and the ratio of CPU times tell more.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.reference import diffusers_controlnet, diffusers_unet, distance, randomize, ratio
from control import Control, ControlNet, attentions, controlled
from ipadapter import ImageProjection, IPAdapter, Prompt, prepared
from sampler import SD, guided
from unet import SD15, UNet

GUIDANCE, SCALE, EMBED_DIM, NUM_TOKENS = 7.5, 0.6, 1024, 4
T = torch.tensor(481)


def seconds(call: Callable[[], Tensor]) -> tuple[float, float]:
    """Of the clock, and of the CPU (the sum over threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides of the picture in pixels")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed, after one that is not")
    parser.add_argument("--narrow", action="store_true", help="a narrow UNet, to try this script out")
    parser.add_argument("--control", action="store_true", help="with a ControlNet; 3 GB more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = replace(SD15, channels=(32, 64, 96, 96)) if args.narrow else SD15
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False).eval()
        adapter = IPAdapter.for_unet(unet, ImageProjection(EMBED_DIM, config.context_dim, NUM_TOKENS))
        net = ControlNet(config).requires_grad_(False).eval() if args.control else None
    for seed, model in enumerate(filter(None, (unet, adapter.requires_grad_(False), net))):
        model.load_state_dict(randomize(model.state_dict(), seed, torch.float32), assign=True)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("dtype     size  variant        seconds  ratio of seconds       ratio of CPU time      distance", flush=True)
    for dtype in (getattr(torch, name) for name in args.dtypes):
        unet.to(dtype, memory_format=torch.contiguous_format)
        theirs = diffusers_unet(unet, adapter.to(dtype), SCALE)
        nets = [diffusers_controlnet(net.to(dtype, memory_format=torch.contiguous_format))] if net else []
        theirs_cl = diffusers_unet(unet.to(memory_format=torch.channels_last), adapter, SCALE)
        nets += [diffusers_controlnet(net.to(memory_format=torch.channels_last))] if net else []
        for size in args.sizes:
            text, embeds = torch.randn(2, 77, config.context_dim, dtype=dtype), torch.randn(2, EMBED_DIM, dtype=dtype)
            x = torch.randn(1, 4, size // 8, size // 8)
            tokens = adapter.image_proj(embeds)
            null, prompt = (Prompt(text[i : i + 1], (adapter.prompt(tokens[i : i + 1], SCALE),)) for i in (0, 1))
            hint, controls = torch.rand(1, 3, size, size, dtype=dtype), []
            if net:
                controls = [Control(net, net.encode(hint))]
                null, prompt = (prepared(one, attentions(unet, controls)) for one in (null, prompt))
            predict = guided(controlled(unet, controls) if net else unet, prompt, null, GUIDANCE)
            added = {"image_embeds": [embeds[:, None]]}

            def step(model: Callable, nets: Sequence, x=x, text=text, added=added, hint=hint) -> Tensor:
                both, more = torch.cat([x, x]).to(text), {}
                for one in nets:
                    down, middle = one(both, T, text, torch.cat([hint, hint]), 1.0, return_dict=False)
                    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                pair = model(both, T, text, added_cond_kwargs=added, return_dict=False, **more)[0]
                eps_null, eps_prompt = pair.float().chunk(2)
                return eps_null + GUIDANCE * (eps_prompt - eps_null)

            calls = {
                "ours cl": lambda predict=predict, x=x: predict(x, SD.level(T.item()))[0],
                "diffusers": partial(step, theirs, nets[:1]),
                "diffusers cl": partial(step, theirs_cl, nets[1:]),
            }
            outs = {name: call() for name, call in calls.items()}  # the turn that is not timed
            times = {name: [] for name in calls}
            for _ in range(args.repeats):
                for name, call in calls.items():
                    times[name].append(seconds(call))
            for name, other in times.items():
                (wall, cpu), (our_wall, our_cpu) = zip(*other, strict=True), zip(*times["ours cl"], strict=True)
                apart = distance(outs["ours cl"], outs[name])
                cells = f"{str(dtype).removeprefix('torch.'):9} {size:4}  {name:12} {median(wall):9.3f}"
                print(f"{cells}  {ratio(our_wall, wall):21}  {ratio(our_cpu, cpu):21}  {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
