"""Stage 1b: the image tower alone, tuned so that its embedding tells what is drawn, how, and where.

The text tower is frozen (the UNet reads it), so a drawing can be held against the captions of all drawings at once.
A linear readout of the embedding must give a small copy of the picture: an image projection is linear, so what it cannot
read there no base adapter can show. The patches must go on giving the tokens of the full-face adapter that is there.

    python -m tiny.tune_clip --ema 0.99

The weights in the tree were made in pieces: 512 steps of 128 with weights 10 and 2 below, then with 40 and 8 some 30 steps
of 128 and, up to step 1278 of 1400, steps of 64; the rate followed the cosine of the length that each piece was given.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from clip import tokenize
from tiny import drawings, presets
from tiny.train_clip import TwoTowers, numbers
from tiny.trainer import WEIGHTS, arguments, load_ema, train
from weights import load_adapter

SIDE = 32  # of the small copy
LAYOUT, PATCHES = 40.0, 8.0  # weights of their errors, each a share of the variance
COLOURS = 0.25  # share of drawings with red, green and blue exchanged; their captions do not count


class Tuned(nn.Module):
    """What is trained: the image tower, the readout, and the full-face projection that has to follow the patches."""

    def __init__(self, towers: TwoTowers):
        super().__init__()
        self.image = towers.image
        self.logit_scale = nn.Parameter(towers.logit_scale.detach().clone())
        self.readout = nn.Linear(presets.IMAGE.projection, 3 * SIDE**2)
        self.patches = load_adapter(WEIGHTS / "ip-adapter-full-face-tiny.safetensors").image_proj
        self.requires_grad_()

    @torch.no_grad()
    def fit_readout(self, x: Tensor) -> None:
        """Start the readout from ridge regression; x (n, 3, 128, 128)."""
        e = torch.cat([self.image(drawings.clip_pixels(p)) for p in x.split(64)])
        y = copy(x)
        centre, mean = e.mean(0), y.mean(0)
        e, rest = e - centre, y - mean
        weight = torch.linalg.solve(e.T @ e + 0.01 * e.square().sum() / len(e) * torch.eye(e.shape[1]), e.T @ rest).T
        self.readout.weight.copy_(weight)
        self.readout.bias.copy_(mean - weight @ centre)


def copy(x: Tensor) -> Tensor:
    return interpolate(x, size=(SIDE, SIDE), mode="area").flatten(1)


def main() -> None:
    args = arguments(__doc__, steps=1400, batch_size=128, learning_rate=6e-4)
    data = drawings.load("train")
    pixels = data.pixels
    full = [data.styled(i) for i in range(len(data))]
    things, styled = numbers(data.captions, "cpu"), numbers(full, "cpu")
    towers = load_ema(TwoTowers(), "clip", args)
    before = load_ema(TwoTowers(), "clip", args).image
    tokens_before = load_adapter(WEIGHTS / "ip-adapter-full-face-tiny.safetensors").image_proj
    with torch.no_grad():
        words = [normalize(embed(towers, sorted(set(names))), dim=-1) for names in (data.captions, full)]
    torch.manual_seed(args.seed)
    model = Tuned(towers)
    some = drawings.to_unit(pixels[:2000])
    variance = copy(some).var(dim=0).mean()
    if not (args.runs / "clip-tuned.pt").exists():
        model.fit_readout(some)
    orders = torch.tensor([[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])

    def loss() -> Tensor:
        i = torch.randint(len(pixels), (args.batch_size,))
        x = drawings.jitter(drawings.to_unit(pixels[i]), shift=0.08, zoom=0.12, flip=False)
        exchanged = torch.rand(len(i)) < COLOURS
        order = torch.where(exchanged[:, None], orders[torch.randint(len(orders), (len(i),))], torch.arange(3))
        x = x.gather(1, order[:, :, None, None].expand_as(x))
        z = drawings.clip_pixels(x)
        hidden = model.image.penultimate(z)
        e = model.image.last(hidden)
        named = normalize(e[~exchanged], dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        told = sum(
            cross_entropy(scale * named @ w.T, right[i][~exchanged])
            for w, right in zip(words, (things, styled), strict=True)
        )
        layout = (model.readout(e) - copy(x)).square().mean() / variance
        few = len(i) // 4
        with torch.no_grad():
            wanted = tokens_before(before.penultimate(z[:few]))
        patches = (model.patches(hidden[:few]) - wanted).square().mean() / wanted.var()
        return told + LAYOUT * layout + PATCHES * patches

    train("clip-tuned", model, loss, args)


def embed(towers: TwoTowers, texts: list[str]) -> Tensor:
    return torch.cat([towers.text.embed(tokenize(texts[i : i + 256])) for i in range(0, len(texts), 256)])


if __name__ == "__main__":
    main()
