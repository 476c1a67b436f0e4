"""Stage 2: the autoencoder, with L1, squared error, an L1 on a Laplacian pyramid, and a weak KL term.

python -m tiny.train_vae
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, l1_loss, mse_loss

from tiny import drawings, presets
from tiny.trainer import arguments, train
from vae import VAE


def main() -> None:
    args = arguments(__doc__, steps=12000, batch_size=48, learning_rate=1.5e-3)
    pixels = drawings.load("train").pixels.to(args.device)
    model = VAE(presets.TINY_VAE).to(args.device, memory_format=torch.channels_last)
    color_orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]], device=args.device)

    def loss() -> Tensor:
        i = torch.randint(len(pixels), (args.batch_size,), device=args.device)
        x = drawings.jitter(drawings.to_unit(pixels[i]), shift=0.1, zoom=0.2, flip=True)
        # Half of the drawings with red, green and blue exchanged: more colours than the drawings themselves have.
        order = torch.randint(6, (args.batch_size,), device=args.device)
        order = torch.where(torch.rand(args.batch_size, device=args.device) < 0.5, order, 0)
        x = x.gather(1, color_orders[order][:, :, None, None].expand_as(x)).contiguous(
            memory_format=torch.channels_last
        )
        mean, logvar = model.moments(x)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        y = model.decoder(model.post_quant_conv(z)).float()
        detail = sum(l1_loss(a, b) for a, b in zip(laplacian(y), laplacian(x), strict=True))
        return l1_loss(y, x) + 2 * mse_loss(y, x) + detail + 2e-4 * kl

    train("vae", model, loss, args)


def laplacian(x: Tensor) -> list[Tensor]:
    """Differences between a picture and its smoothed self, at four scales."""
    bands = []
    for _ in range(4):
        small = avg_pool2d(x, 2)
        bands.append(x - interpolate(small, scale_factor=2.0, mode="bilinear"))
        x = small
    return bands


if __name__ == "__main__":
    main()
