"""Stage 4: the adapter, by the paper's recipe on the frozen rest.

python -m tiny.train_adapter --kind base
python -m tiny.train_adapter --kind full-face --loss v --drop-text 0.85 --least-t 400

`train.py` does the same for any base; here one step is a CUDA graph, and the drawings are moved and mirrored a little.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ipadapter import ImageProjection, IPAdapter, PatchProjection, Prompt, Resampler
from ipadapter.objective import adapter_loss, drops
from sampler import add_noise, loss_weight
from tiny import drawings, presets
from tiny.latents import VIEWS, Captions, scaled_vae, stored, towers, views
from tiny.places import place
from tiny.train_unet import new_unet
from tiny.trainer import arguments, load_ema, train


def new_adapter(unet: nn.Module, kind: str) -> IPAdapter:
    """A base adapter over the image embedding, or one over the patches of the penultimate layer."""
    context = presets.TEXT.width
    if kind == "base":
        projection = ImageProjection(presets.IMAGE.projection, context, presets.NUM_TOKENS)
    elif kind == "plus":
        projection = Resampler(presets.IMAGE.width, context_dim=context, **presets.PLUS)
    else:
        projection = PatchProjection(presets.IMAGE.width, context)
    return IPAdapter.for_unet(unet, projection)


def main() -> None:
    flags = {
        "kind": {"choices": ("base", "plus", "full-face"), "default": "base"},
        "loss": {"choices": ("eps", "v"), "default": "eps", "help": "as in train.py (default: %(default)s)"},
        "start": {
            "type": Path,
            "help": "an adapter's file to go on from (default: as in the paper; full-face: tiny/places.py)",
        },
        "drop-text": {"type": float, "default": 0.05, "help": "as in train.py (default: %(default)s)"},
        "least-t": {"type": int, "default": 0, "help": "timesteps are drawn from here to 999 (default: %(default)s)"},
    }
    flags["drawings"] = {"type": int, "help": "how many of the drawings to learn from (default: all)"}
    count = {"type": int, "default": VIEWS, "help": "moved and mirrored views of each drawing (default: %(default)s)"}
    args = arguments(__doc__, steps=15000, batch_size=256, learning_rate=1e-3, views=count, **flags)
    data = drawings.load("train", args.drawings)
    clip = towers(args)
    patches = args.kind != "base"
    features = clip.image.penultimate if patches else clip.image
    with torch.no_grad():
        if args.views == 1:
            latents = stored(args, data)[None]
            parts = (drawings.clip_pixels(drawings.to_unit(p.to(args.device))) for p in data.pixels.split(64))
            images = torch.cat([features(part).half() for part in parts])[None]
        else:
            seen = views(scaled_vae(args, data), data, args.device, features, args.views)
            latents, images = (torch.stack([view[part] for view in seen]) for part in (0, 1))
        captions = Captions(clip.text, data, args.device)
        # "No image" is a zero embedding for base, a picture of zeros behind the normalisation for the others.
        nothing = features(torch.zeros(1, 3, presets.SIZE, presets.SIZE, device=args.device))
        nothing = nothing if patches else torch.zeros_like(nothing)
    unet = load_ema(new_unet(), "unet", args).to(memory_format=torch.channels_last)
    adapter = new_adapter(unet, args.kind).to(args.device)
    if args.start:
        adapter.load_state_dict(load_file(args.start))
    elif args.kind == "full-face" and not (args.runs / f"adapter-{args.kind}.pt").exists():
        torch.manual_seed(args.seed)
        place(adapter, unet, captions.features[:1], latents[0], images[0])
    batch = args.batch_size

    def loss() -> Tensor:
        i = torch.randint(len(data), (batch,), device=args.device)
        view = torch.randint(len(latents), (batch,), device=args.device)
        t = torch.randint(args.least_t, 1000, (batch,), device=args.device)
        drop_text, drop_image = drops(torch.rand(batch, device=args.device), args.drop_text)
        image = images[view, i].float()
        image = torch.where(drop_image.view(-1, *[1] * (image.ndim - 1)), nothing, image)
        noise = torch.randn_like(latents[0, :1].expand(batch, -1, -1, -1))
        noisy = add_noise(latents[view, i], noise, t).contiguous(memory_format=torch.channels_last)
        prompt = Prompt(captions.draw(i, drop_text), (adapter.prompt(adapter.image_proj(image)),))
        return adapter_loss(unet, noisy, noise, t, prompt, loss_weight(t, args.loss))

    train(f"adapter-{args.kind}", adapter, loss, args)


if __name__ == "__main__":
    main()
