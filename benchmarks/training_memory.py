"""Peak memory of one training step: a full-size UNet of random weights, a base adapter, batch 1, cached features, on the CPU.

python -m benchmarks.training_memory --base sd15 --side 512
python -m benchmarks.training_memory --base sdxl --side 1024 --storage float16 --gradient-checkpointing
"""

import argparse
import resource
import time

import torch

from clip import CLIPImageConfig
from training.ranks import Ranks
from training.recipes import new_adapter
from training.trainer import Trainer
from unet import SD15, SDXL, UNet
from weights.storage import STORAGES, store

VIT_H = CLIPImageConfig(1280, 32, 16, 5120, False, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--storage", choices=STORAGES)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--optimizer", default="adamw")
    args = parser.parse_args()
    config = SDXL if args.base == "sdxl" else SD15
    made_in = {None: torch.float32, "float8": torch.bfloat16}  # of random weights none is to outweigh the step
    torch.set_default_dtype(made_in.get(args.storage) or STORAGES[args.storage])
    unet = UNet(config).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    if args.storage:
        store(unet, STORAGES[args.storage], torch.float32)
    if args.gradient_checkpointing:
        unet.recompute()
    adapter, sized = new_adapter("base", unet, VIT_H).float().requires_grad_(), bool(config.vector_dim)
    null = {"text": torch.zeros(77, config.context_dim), "image": torch.zeros(1024)}
    null |= {"pooled": torch.zeros(1280)} if sized else {}
    batch = {key: torch.randn(1, *value.shape) for key, value in null.items()}
    batch |= {key: torch.rand(1, 4, args.side // 8, args.side // 8) for key in ("mean", "std")}
    batch |= {"sizes": torch.tensor([[args.side, args.side, 0, 0, args.side, args.side]])} if sized else {}
    ranks, recipe = Ranks(torch.device("cpu")), {"seed": 0, "dtype": torch.float32, "learning_rate": 1e-4, "ema": 0.0}
    recipe |= {"weight_decay": 0.01, "loss": None, "drop": (0.0, 0.0, 0.0), "warmup": 0, "clip_grad": 0.0}
    trainer = Trainer(adapter, unet, null, ranks, **recipe, sinusoids=256 * sized, optimizer=args.optimizer)
    seconds = time.time()
    loss = trainer.update([([0], batch)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.base} at {args.side}: peak {peak:.1f} GiB, the step {time.time() - seconds:.0f} s, loss {loss:.3f}")


if __name__ == "__main__":
    main()
