"""Stage 1: both CLIP towers, contrastive.

Image against caption as in CLIP, and picture against another view of itself as in SLIP (arXiv 2112.12750), so that the
image embedding tells two drawings of one thing apart. A caption that names no style fits every drawing of its thing,
so a row may have several right answers.

    python -m tiny.train_clip
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip import CLIPImage, CLIPText, tokenize
from tiny import drawings, presets
from tiny.trainer import arguments, train


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = CLIPText(presets.TEXT)
        self.image = CLIPImage(presets.IMAGE)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.image.vision_model["embeddings"].class_embedding, std=0.02)


def main() -> None:
    args = arguments(__doc__, steps=4000, batch_size=1024, learning_rate=1e-3)
    data = drawings.load("train")
    pixels = data.pixels.to(args.device)
    things, styles = numbers(data.captions, args.device), numbers(data.styles, args.device)
    plain = tokenize(data.captions).to(args.device)
    styled = tokenize([data.styled(i) for i in range(len(data))]).to(args.device)
    model = TwoTowers().to(args.device)

    def loss() -> Tensor:
        i = torch.randint(len(pixels), (args.batch_size,), device=args.device)
        with_style = torch.rand(args.batch_size, device=args.device) < 0.7
        tokens = torch.where(with_style[:, None], styled[i], plain[i])
        x = drawings.to_unit(pixels[i])
        views = [drawings.clip_pixels(drawings.jitter(x, shift=0.08, zoom=0.12, flip=False)) for _ in range(2)]
        a, b = normalize(model.image(torch.cat(views)).float(), dim=-1).chunk(2)
        text = normalize(model.text.embed(tokens).float(), dim=-1)
        scale = model.logit_scale.exp().clamp(max=100)
        same_style = (styles[i][:, None] == styles[i]) | ~with_style[:, None]
        fits = (things[i][:, None] == things[i]) & same_style  # caption (row) fits picture (column)
        clip = (cross_entropy(scale * text @ a.T, fits) + cross_entropy(scale * a @ text.T, fits.T)) / 2
        itself = i[:, None] == i
        views = (cross_entropy(20 * a @ b.T, itself) + cross_entropy(20 * b @ a.T, itself)) / 2
        return clip + views

    train("clip", model, loss, args)


def numbers(words: list[str], device: str) -> Tensor:
    place = {word: i for i, word in enumerate(sorted(set(words)))}
    return torch.tensor([place[word] for word in words], device=device)


def cross_entropy(logits: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy with the probability spread over all right answers of a row."""
    target = right.float() / right.sum(1, keepdim=True)
    return -(target * logits.log_softmax(1)).sum(1).mean()


if __name__ == "__main__":
    main()
