"""3x3 convolutions in a fourth of the multiplications, on a CPU and in fp32: F(4x4, 3x3) of arXiv 1509.09308.

The results of a tile of 4x4 positions are a polynomial's coefficients; it is evaluated at six points along each side, there
one number is multiplied with one, and the coefficients are found from the 36 products. What that saves is lost again on
few channels, where the evaluation takes longer than the products. The rounding is that of fp32, some four times as large.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Evaluated at 0, 1, -1, 2, -2 and infinity: six inputs, three weights; and back, to four results (section 4.3 there).
INPUTS = (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0)
INPUTS += ((0, 4, 0, -5, 0, 1),)
WEIGHTS = (6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24)  # of 24
RESULTS = (1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)
CHANNELS = 256  # fewer are convolved as ever
TILES = 128  # at once: their numbers lie in the cache


class Winograd(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias)


def hasten(model: nn.Module) -> None:
    """Let the convolutions of a frozen model be done so, in place, where that is quicker."""
    for layer in model.modules():
        if type(layer) is nn.Conv2d and layer.kernel_size == (3, 3) and layer.stride == layer.padding == (1, 1):
            wide, weight = min(layer.in_channels, layer.out_channels) >= CHANNELS, layer.weight
            if wide and weight.device.type == "cpu" and weight.dtype == torch.float32:
                layer.__class__ = Winograd


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Padding 1: x (batch, C, H, W), weight (O, C, 3, 3), bias (O,) -> (batch, O, H, W)."""
    inputs, weights, results = (torch.kron(m, m) for m in map(torch.tensor, (INPUTS, WEIGHTS, RESULTS)))
    (batch, c, height, width), o = x.shape, len(weight)
    rows, columns = -(-height // 4), -(-width // 4)  # of tiles
    w = (weights / 24**2 @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, o, c).transpose(1, 2)
    x = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 4 * columns - width + 1, 1, 4 * rows - height + 1))
    y = x.new_empty(batch, rows, 4, columns, 4, o)
    for picture, found in zip(x, y, strict=True):
        tiles = picture.unfold(0, 6, 4).unfold(1, 6, 4).permute(3, 4, 0, 1, 2)  # (6, 6, rows, columns, C)
        for part, to in zip(
            *(whole.split(max(1, TILES // columns), i) for whole, i in ((tiles, 2), (found, 0))), strict=True
        ):
            products = (inputs.to(x) @ part.reshape(36, -1)).view(36, -1, c) @ w
            to.copy_((results.to(x) @ products.flatten(1)).view(4, 4, -1, columns, o).permute(2, 0, 3, 1, 4))
    return (y.view(batch, 4 * rows, 4 * columns, o)[:, :height, :width] + bias).permute(0, 3, 1, 2)
