"""Stage 5: the averaged weights of all stages as fp16 files in the layouts of the released ones.

python -m tiny.pack --output tiny/weights
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import drawings
from tiny.latents import scaled_vae, towers
from tiny.train_adapter import new_adapter
from tiny.train_control import new_control
from tiny.train_judge import Learning
from tiny.train_unet import new_unet
from tiny.trainer import RUNS, WEIGHTS, load_ema
from tiny.tune_clip import Tuned
from weights import load_adapter

RANK = 16  # of what the ControlNet adds to the UNet's encoder


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    args.device = "cpu"

    clip = towers(args)
    unet = load_ema(new_unet(), "unet", args)
    parts = {
        "model.diffusion_model.": unet.state_dict(),
        "first_stage_model.": scaled_vae(args, drawings.load("train", limit=1024)).state_dict(),
        "cond_stage_model.transformer.text_model.": clip.text.text_model.state_dict(),
    }
    base = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}
    # A whole CLIP model's file less its text layers, which are in the base: the projection is kept for scores.
    encoder = clip.image.state_dict() | {
        "text_projection.weight": clip.text.text_projection.weight,
        "logit_scale": clip.logit_scale,
    }
    files = {"sd": base, "clip": encoder}
    for kind, name in (("base", "ip-adapter"), ("plus", "ip-adapter-plus"), ("full-face", "ip-adapter-full-face")):
        if (args.runs / f"adapter-{kind}.pt").exists():
            files[name] = load_ema(new_adapter(unet, kind), f"adapter-{kind}", args).state_dict()
        elif kind == "base" and (args.runs / "distilled.safetensors").exists():
            files[name] = load_file(args.runs / "distilled.safetensors")
        elif kind == "full-face" and (args.runs / "clip-tuned.pt").exists():  # its projection has followed the tower
            followed = load_ema(Tuned(clip), "clip-tuned", args).patches.state_dict()
            before = load_adapter(WEIGHTS / f"{name}-tiny.safetensors").state_dict()
            files[name] = before | {f"image_proj.{key}": value for key, value in followed.items()}
    for kind, name in (("edges", "control-edges"), ("silhouette", "t2i-silhouette")):
        if (args.runs / f"control-{kind}.pt").exists():
            net = load_ema(new_control(unet, kind), f"control-{kind}", args).state_dict()
            files[name] = thin(net, unet.state_dict()) if kind == "edges" else net
    if (args.runs / "judge.pt").exists():
        state = torch.load(args.runs / "judge.pt", weights_only=True)["model"]
        files["judge"] = load_ema(Learning(len(state["things"])), "judge", args).judge.state_dict()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, state in files.items():
        path = args.output / f"{name}-tiny.safetensors"
        save_file({key: value.detach().half().contiguous() for key, value in state.items()}, path)
        print(f"{path}: {sum(v.numel() for v in state.values()):,} parameters, {path.stat().st_size / 1e6:.1f} MB")


def thin(net: dict[str, Tensor], unet: dict[str, Tensor], rank: int = RANK) -> dict[str, Tensor]:
    """A ControlNet as a Control-LoRA, a quarter of the size: of a weight that the UNet has, too, the best product of two
    thin matrices for what was added to it.
    """
    state = {"lora_controlnet": torch.zeros(1)}
    for key, w in net.items():
        if key not in unet or w.ndim < 2:
            state[key] = w
            continue
        u, s, v = torch.linalg.svd((w - unet[key]).flatten(1), full_matrices=False)
        name = key.removesuffix("weight")
        state[f"{name}up"] = (u[:, :rank] * s[:rank].sqrt()).reshape(-1, len(s[:rank]), *(1,) * (w.ndim - 2))
        state[f"{name}down"] = (s[:rank].sqrt()[:, None] * v[:rank]).reshape(-1, *w.shape[1:])
    return state


if __name__ == "__main__":
    main()
