"""What the frozen autoencoder and the frozen text tower make of the drawings, computed once for the later stages."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from clip import CLIPText, tokenize
from files.whole import whole
from tiny import drawings, presets
from tiny.train_clip import TwoTowers
from tiny.trainer import load_ema
from tiny.tune_clip import Tuned
from vae import VAE

VIEWS = 8  # of each drawing: as it is, and moved, scaled and mirrored a little
Features = Callable[[Tensor], Tensor]


def scaled_vae(args: argparse.Namespace, data: drawings.Drawings) -> VAE:
    """The autoencoder with its latents shifted and scaled so that Stable Diffusion's scale brings them to N(0, 1).

    Both are folded into `quant_conv` and `post_quant_conv`, which are linear.
    """
    vae = load_ema(VAE(presets.TINY_VAE), "vae", args)
    if not (args.runs / "vae.pt").exists():  # from the files in the tree: done
        return vae
    x = [drawings.to_unit(p.to(args.device)) for p in data.pixels[:1024].split(64)]
    center = torch.cat([vae.moments(part)[0] for part in x]).mean(dim=(0, 2, 3))
    gain = 1 / torch.cat([vae.encode(part) for part in x]).std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    n = len(gain)
    post.bias.add_(post.weight[:, :, 0, 0] @ center)
    post.weight.div_(gain[None, :, None, None])
    quant.weight[:n].mul_(gain[:, None, None, None])
    quant.bias[:n].sub_(center).mul_(gain)
    quant.bias[n:].add_(2 * gain.log())
    return vae


def views(
    vae: VAE, data: drawings.Drawings, device: str, features: Features | None = None, count: int = VIEWS
) -> list[list[Tensor]]:
    """For each view the latents (n, 4, 16, 16), and what `features` makes of its preprocessed pictures."""
    mirrors = torch.tensor([not any(w in ("left", "right") for w in c.split()) for c in data.captions], device=device)
    out = []
    step = 256 if device == "cuda" else 8
    for view in range(count):
        parts = []
        for start in range(0, len(data), step):
            x = drawings.to_unit(data.pixels[start : start + step].to(device))
            if view:
                x = drawings.jitter(x, shift=0.05, zoom=0.08, flip=False)
            if view % 2:
                x = torch.where(mirrors[start : start + step, None, None, None], x.flip(-1), x)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                parts.append([vae.encode(x).float(), *([features(drawings.clip_pixels(x)).half()] if features else [])])
        out.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return out


def stored(args: argparse.Namespace, data: drawings.Drawings) -> Tensor:
    """The latents (n, 4, 16, 16) of the drawings as they are, from a file in `args.runs` that is made piece by piece."""
    path = args.runs / "latents.pt"
    done = (
        torch.load(path, map_location=args.device) if path.exists() else torch.empty(0, 4, 16, 16, device=args.device)
    )
    vae = None if len(done) >= len(data) else scaled_vae(args, data).to(memory_format=torch.channels_last)
    while len(done) < len(data):
        some = data.pixels[len(done) : len(done) + 500].to(args.device)
        done = torch.cat([done, *(vae.encode(drawings.to_unit(p)).float() for p in some.split(8))])
        with whole(path) as part:
            torch.save(done, part)
    return done[: len(data)]


class Captions:
    """Text features of every caption, plain and styled, and of the empty prompt."""

    def __init__(self, text: CLIPText, data: drawings.Drawings, device: str):
        texts = ["", *sorted({*data.captions, *(data.styled(i) for i in range(len(data)))})]
        place = {caption: i for i, caption in enumerate(texts)}
        parts = [text(tokenize(texts[i : i + 512]).to(device)) for i in range(0, len(texts), 512)]
        self.features = torch.cat(parts).to(torch.bfloat16 if device == "cuda" else torch.float32)
        self.plain = torch.tensor([place[c] for c in data.captions], device=device)
        self.styled = torch.tensor([place[data.styled(i)] for i in range(len(data))], device=device)

    def draw(self, i: Tensor, drop: Tensor) -> Tensor:
        """Features (batch, 77, 64) of a caption for each drawing i, styled half the time, empty where `drop`."""
        pick = torch.where(torch.rand(len(i), device=i.device) < 0.5, self.plain[i], self.styled[i])
        return self.features[torch.where(drop, 0, pick)]


def towers(args: argparse.Namespace) -> TwoTowers:
    """Both towers, the image tower as it was tuned, where it was."""
    both = load_ema(TwoTowers(), "clip", args)
    if (args.runs / "clip-tuned.pt").exists():
        tuned = load_ema(Tuned(both), "clip-tuned", args)
        both.logit_scale.data.copy_(tuned.logit_scale)  # the image tower is the same object
    return both
