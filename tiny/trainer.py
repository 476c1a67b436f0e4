"""The loop that all stages of the tiny model share: AdamW, warm-up and cosine, EMA, checkpoints, resume.

On a GPU one whole training step is captured as a CUDA graph, because steps this small are bound by kernel launches.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from files.whole import whole
from weights import load_image_encoder, open_base, read
from weights.hub import cached
from weights.presets import PRESETS

RUNS = Path("runs/tiny")
BASE, ENCODER = (cached(PRESETS[kind, "tiny"]) for kind in ("base", "image_encoder"))
WEIGHTS = BASE.parent


def arguments(doc: str, steps: int, batch_size: int, learning_rate: float, **more: dict) -> argparse.Namespace:
    """The flags of a stage; `more` adds its own ones, by name. What is random from here on follows from its seed.

    So a run of as many steps, not stopped between, gives the same weights each time on the same machine.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--steps", type=int, default=steps, help="length of the run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="by the clock instead: no run is as another")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    return args


def train(name: str, model: nn.Module, loss_of_batch: Callable[[], Tensor], args: argparse.Namespace) -> None:
    """Minimise `loss_of_batch()` over the trainable parameters of `model`, in place, from the newest checkpoint on.

    `loss_of_batch` draws its own batch, on `args.device`, without a look at the values (so that it can be captured).
    The result is `RUNS/name.pt`: {"model", "ema", "optimizer", "step", "seconds"}.
    """
    cuda = args.device == "cuda"
    params = [p for p in model.parameters() if p.requires_grad]
    lr = torch.tensor(args.learning_rate, device=args.device)
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=cuda, capturable=cuda)
    ema = [p.detach().clone() for p in params]
    path = args.runs / f"{name}.pt"
    start, spent = resumed(path, model, optimizer, ema, lr) if path.exists() else (0, 0.0)
    torch.manual_seed(args.seed + start)
    total = torch.zeros((), device=args.device)

    def step() -> None:
        for p in params:
            p.grad = None
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda, cache_enabled=False):
            loss = loss_of_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - args.ema)
        total.add_(loss.detach())

    def save() -> None:
        state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        with whole(path) as part:
            torch.save(state | {"step": done, "seconds": seconds}, part)

    def progress() -> float:
        return seconds / (60 * args.minutes) if args.minutes else done / args.steps

    done, seconds, begin, counted = start, spent, time.time(), 0
    saved = begin
    replay = None
    log = (args.runs / f"{name}.jsonl").open("a")
    with tqdm(desc=name, initial=start, total=None if args.minutes else args.steps, mininterval=5) as bar:
        while progress() < 1:
            warm = min(1.0, (done + 1) / 200)
            lr.fill_(args.learning_rate * warm * max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, progress())))))
            if cuda and replay is None and done >= start + 3:
                replay = capture(step)
            replay() if replay else step()
            done, counted = done + 1, counted + 1
            bar.update()
            if counted == 100 or not cuda:
                mean = (total / counted).item()
                total.zero_()
                counted = 0
                bar.set_postfix(loss=f"{mean:.4f}")
                log.write(json.dumps({"step": done, "loss": mean, "seconds": round(seconds, 1)}) + "\n")
                log.flush()
                if not math.isfinite(mean):
                    raise SystemExit(f"{name}: the loss is {mean} at step {done}")
            seconds = spent + time.time() - begin
            if time.time() - saved > 120:
                save()
                saved = time.time()
    save()
    log.close()
    for p, average in zip(params, ema, strict=True):
        p.data.copy_(average)


def resumed(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: list[Tensor], lr: Tensor
) -> tuple[int, float]:
    """Go on from a checkpoint: how many steps it has, and how many seconds they took."""
    state = torch.load(path, map_location=lr.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = lr
    for average, value in zip(ema, state["ema"], strict=True):
        average.copy_(value)
    return state["step"], state["seconds"]


def capture(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def load_ema(model: nn.Module, name: str, args: argparse.Namespace) -> nn.Module:
    """Fill a model with the averaged weights of a finished stage, frozen, for use by the next one.

    A stage without a checkpoint in `args.runs` is taken from the files in the tree.
    """
    path = args.runs / f"{name}.pt"
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        for p, average in zip((p for p in model.parameters() if p.requires_grad), state["ema"], strict=True):
            p.data.copy_(average)
    else:
        model.load_state_dict(packed(name))
    return model.to(args.device).requires_grad_(False).eval()


def packed(name: str) -> dict[str, Tensor]:
    """The weights of a stage as `tiny/pack.py` has written them, in fp32 (the autoencoder's are scaled already)."""
    base = open_base(BASE)
    if name != "clip":
        return getattr(base, name)().state_dict()
    towers = {"text": base.text(), "image": load_image_encoder(ENCODER)}
    state = {f"{tower}.{key}": w for tower, model in towers.items() for key, w in model.state_dict().items()}
    rest = {"text_projection.weight": "text.text_projection.weight", "logit_scale": "logit_scale"}
    return state | {rest[key]: w.float() for key, w in read(ENCODER).items() if key in rest}
