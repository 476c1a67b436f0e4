"""Stage 3: the UNet, text-conditional: noise prediction, empty prompt 10%, min-SNR weights (arXiv 2303.09556).

python -m tiny.train_unet
"""

import torch
from torch import Tensor, nn

from ipadapter import Prompt
from ipadapter.objective import adapter_loss
from sampler import add_noise, loss_weight
from tiny import drawings, presets
from tiny.latents import Captions, scaled_vae, towers, views
from tiny.trainer import arguments, train
from unet import UNet


def new_unet() -> UNet:
    """Random weights; the last convolution of each residual branch starts at zero, as in the original."""
    unet = UNet(presets.TINY_UNET)
    for name, module in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def main() -> None:
    args = arguments(__doc__, steps=30000, batch_size=256, learning_rate=8e-4)
    data = drawings.load("train")
    with torch.no_grad():
        latents = torch.stack([view[0] for view in views(scaled_vae(args, data), data, args.device)])
        captions = Captions(towers(args).text, data, args.device)
    model = new_unet().to(args.device, memory_format=torch.channels_last)
    batch = args.batch_size

    def loss() -> Tensor:
        i = torch.randint(len(data), (batch,), device=args.device)
        x = latents[torch.randint(len(latents), (batch,), device=args.device), i]
        t = torch.randint(1000, (batch,), device=args.device)
        noise = torch.randn_like(x)
        prompt = Prompt(captions.draw(i, torch.rand(batch, device=args.device) < 0.1))
        noisy = add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        return adapter_loss(model, noisy, noise, t, prompt, loss_weight(t, "min-snr"))

    train("unet", model, loss, args)


if __name__ == "__main__":
    main()
