"""Stage 6: what follows a structure, beside the frozen rest: a ControlNet on edges, a T2I-Adapter on silhouettes.

python -m tiny.train_control --kind edges --minutes 60 --ema 0.98
python -m tiny.train_control --kind silhouette --minutes 45 --ema 0.998

A slow average would hold the ControlNet back: nothing of it shows until its convolutions have left zero, some 300 steps on.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from control import ControlNet, T2IAdapter, T2IConfig
from control.canny import canny
from files.whole import whole
from ipadapter import Prompt
from ipadapter.objective import noise_loss
from sampler import add_noise, loss_weight
from tiny import drawings, presets
from tiny.latents import Captions, stored, towers
from tiny.train_unet import new_unet
from tiny.trainer import arguments, load_ema, train
from unet import UNet

HINT = (3, 8, 16, 32, 64)  # narrower than usual, as the model is: at 128x128 pixels the usual one would cost the most
SHADOW = 64  # steps of grey between white paper and what counts as drawn


def new_control(unet: UNet, kind: str) -> ControlNet | T2IAdapter:
    """As the papers begin: a copy of the UNet's encoder, or random weights; neither adds anything yet."""
    if kind == "edges":
        net = ControlNet(unet.config, HINT)
        net.load_state_dict(
            {key: w.clone() for key, w in unet.state_dict().items() if key in net.state_dict()}, strict=False
        )
        last = (net.input_hint_block[-1], *(conv[0] for conv in net.zero_convs), net.middle_block_out[0])
    else:
        net = T2IAdapter(T2IConfig(hint_channels=1, channels=presets.TINY_UNET.channels))
        last = ()
    for conv in last:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    return net


def edges(pixels: Tensor) -> Tensor:
    """A drawing (3, H, W) uint8 -> its edges, white on black: (1, H, W) uint8, 0 or 255."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return torch.from_numpy(np.asarray(canny(picture))[..., 0].copy())[None]


def silhouette(pixels: Tensor) -> Tensor:
    """A drawing (3, H, W) uint8 on white paper -> white where something is drawn: (1, H, W) uint8, 0 or 255."""
    return ((255 - pixels.int()).amax(0, keepdim=True) >= SHADOW).to(torch.uint8) * 255


HINTS: dict[str, Callable[[Tensor], Tensor]] = {"edges": edges, "silhouette": silhouette}


def hints(args: argparse.Namespace, data: drawings.Drawings) -> Tensor:
    """(n, 1, 128, 128) uint8, from a file in `args.runs` if it is there."""
    path = args.runs / f"{args.kind}-hints.pt"
    if not path.exists():
        with whole(path) as part:
            torch.save(torch.stack([HINTS[args.kind](pixels) for pixels in data.pixels]), part)
    return torch.load(path, weights_only=True)[: len(data)].to(args.device)


def main() -> None:
    flags = {
        "kind": {"choices": HINTS, "default": "edges"},
        "loss": {"choices": ("eps", "v"), "default": "v", "help": "as in train.py (default: %(default)s)"},
        "drop-text": {"type": float, "default": 0.5, "help": "empty texts among them (default: %(default)s)"},
        "drawings": {"type": int, "help": "how many of the drawings to learn from (default: all)"},
    }
    args = arguments(__doc__, steps=2000, batch_size=8, learning_rate=5e-4, **flags)
    data = drawings.load("train", args.drawings)
    with torch.no_grad():
        latents, shown = stored(args, data), hints(args, data)
        captions = Captions(towers(args).text, data, args.device)
    unet = load_ema(new_unet(), "unet", args).to(memory_format=torch.channels_last)
    net = new_control(unet, args.kind).to(args.device, memory_format=torch.channels_last)
    batch = args.batch_size

    def loss() -> Tensor:
        i = torch.randint(len(data), (batch,), device=args.device)
        t = torch.randint(1000, (batch,), device=args.device)
        prompt = Prompt(captions.draw(i, torch.rand(batch, device=args.device) < args.drop_text))
        noise = torch.randn_like(latents[i])
        noisy = add_noise(latents[i], noise, t).contiguous(memory_format=torch.channels_last)
        hint = shown[i].float() / 255
        hint = hint.expand(-1, 3, -1, -1) if args.kind == "edges" else hint
        added = net(noisy, t, prompt, *net.encode(hint))
        return noise_loss(unet(noisy, t, prompt, added=added), noise, loss_weight(t, args.loss))

    train(f"control-{args.kind}", net, loss, args)


if __name__ == "__main__":
    main()
