"""Stage 4: the adapter, by the paper's recipe on the frozen rest.

python -m tiny.train_adapter --kind base
python -m tiny.train_adapter --kind plus
"""

import torch
from torch import Tensor

from ipadapter import ImageProjection, IPAdapter, Resampler
from ipadapter.training import adapter_loss, drops
from sampler import add_noise
from tiny import drawings, presets
from tiny.latents import VIEWS, Captions, scaled_vae, towers, views
from tiny.train_unet import new_unet
from tiny.trainer import arguments, load_ema, train


def new_adapter(unet: torch.nn.Module, kind: str) -> IPAdapter:
    """A base adapter over the image embedding, or a plus adapter over the patches of the penultimate layer."""
    if kind == "plus":
        return IPAdapter.for_unet(unet, Resampler(presets.IMAGE.width, context_dim=presets.TEXT.width, **presets.PLUS))
    return IPAdapter.for_unet(unet, ImageProjection(presets.IMAGE.projection, presets.TEXT.width, presets.NUM_TOKENS))


def main() -> None:
    kind = {"choices": ("base", "plus"), "default": "base"}
    count = {"type": int, "default": VIEWS, "help": "moved and mirrored views of each drawing (default: %(default)s)"}
    args = arguments(__doc__, steps=15000, batch_size=256, learning_rate=1e-3, kind=kind, views=count)
    data = drawings.load("train")
    clip = towers(args)
    features = clip.image.penultimate if args.kind == "plus" else clip.image
    with torch.no_grad():
        seen = views(scaled_vae(args, data), data, args.device, features, args.views)
        latents, images = (torch.stack([view[part] for view in seen]) for part in (0, 1))
        captions = Captions(clip.text, data, args.device)
        # "No image" is a zero embedding for base, a picture of zeros behind the normalisation for plus.
        nothing = features(torch.zeros(1, 3, presets.SIZE, presets.SIZE, device=args.device))
        nothing = nothing if args.kind == "plus" else torch.zeros_like(nothing)
    unet = load_ema(new_unet(), "unet", args).to(memory_format=torch.channels_last)
    adapter = new_adapter(unet, args.kind).to(args.device)
    adapter.attach(unet)
    batch = args.batch_size

    def loss() -> Tensor:
        i = torch.randint(len(data), (batch,), device=args.device)
        view = torch.randint(len(latents), (batch,), device=args.device)
        t = torch.randint(1000, (batch,), device=args.device)
        drop_text, drop_image = drops(torch.rand(batch, device=args.device))
        image = images[view, i].float()
        image = torch.where(drop_image.view(-1, *[1] * (image.ndim - 1)), nothing, image)
        noise = torch.randn_like(latents[0, :1].expand(batch, -1, -1, -1))
        noisy = add_noise(latents[view, i], noise, t).contiguous(memory_format=torch.channels_last)
        return adapter_loss(unet, noisy, noise, t, captions.draw(i, drop_text), adapter.image_proj(image))

    train(f"adapter-{args.kind}", adapter, loss, args)


if __name__ == "__main__":
    main()
