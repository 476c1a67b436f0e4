"""The judge of the measures (tiny/judge.py): which thing, which style, told by cross-entropy.

python -m tiny.train_judge
"""

import json

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, normalize

from tiny import drawings
from tiny.judge import DIM, STYLES, Judge, bench, ceiling, gather
from tiny.train_clip import numbers
from tiny.trainer import arguments, load_ema, train

SHARPNESS = 20.0  # of the cosines between a drawing and the things


class Learning(nn.Module):
    """The judge with a direction for each thing, which is not kept."""

    def __init__(self, things: int):
        super().__init__()
        self.judge = Judge()
        self.things = nn.Parameter(torch.randn(things, DIM))


def main() -> None:
    args = arguments(__doc__, steps=4000, batch_size=96, learning_rate=3e-3)
    data, learned = gather()
    pixels = data.pixels[learned]
    captions, styles = ([w for w, k in zip(words, learned, strict=True) if k] for words in (data.captions, data.styles))
    things, style = numbers(captions, "cpu"), torch.tensor([STYLES.index(s) for s in styles])
    torch.manual_seed(args.seed)
    model = Learning(len(set(captions))).to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        i = torch.randint(len(pixels), (args.batch_size,))
        x = blemish(drawings.jitter(drawings.to_unit(pixels[i]), shift=0.08, zoom=0.15, flip=True, turn=0.2))
        seen, found = model.judge(x.contiguous(memory_format=torch.channels_last))
        logits = SHARPNESS * seen @ normalize(model.things, dim=-1).T
        return cross_entropy(logits, things[i], label_smoothing=0.1) + 0.5 * cross_entropy(found, style[i])

    train("judge", model, loss, args)
    judge = load_ema(Learning(len(set(captions))), "judge", args).judge
    known = bench(judge, data, learned)
    for among in (None, 200):
        print(json.dumps(ceiling(known, data, learned, among)))


def blemish(x: Tensor) -> Tensor:
    """What generated pictures suffer from: more or less contrast, noise, and some of them are blurred."""
    n = len(x)
    mean = x.mean(dim=(2, 3), keepdim=True)
    x = mean + (x - mean) * (0.8 + 0.4 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    soft = avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.4, soft, x).clamp(-1, 1)


if __name__ == "__main__":
    main()
