"""What the experiments share: the tiny models, the bundled drawings as features, a training loop, scores, a report.

All run on the tiny model, by default in minutes on two cores; the judge is the tiny CLIP, which is also the adapter's
own image encoder, and 16x16 colour thumbnails, which took no part in any training.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import default_collate
from tqdm import tqdm

from clip import TextEncoder, tokenize
from files.pictures import save_picture, to_pil
from files.sheets import sheet
from files.whole import write_text
from generate.picture import denoise
from ipadapter import IPAdapter, Prompt
from ipadapter.adapter import null_features
from ipadapter.objective import drops, noise_loss
from sampler import SAMPLERS, add_noise, guided, noise, v_weight
from tiny import drawings
from tiny.measure import image_embeds, text_embeds, thumbnail
from tiny.trainer import BASE, ENCODER
from training.cache import Cache
from training.chance import draws
from training.data import open_pairs
from training.features import Encoders, Prepared
from training.order import pair_at
from weights import load_image_encoder, open_base, read
from weights.diffusers import model_sha256
from weights.hub import cached
from weights.presets import PRESETS

BASE_ADAPTER = cached(PRESETS["adapter", "tiny"])  # the paper's kind; the default is full-face
DATA = Path(drawings.__file__).parent / "data"
SIDE = 128
SHOWN = 8  # drawings on a sheet
Scores = dict[str, Tensor | int]  # by name, (trainings, drawings) each; or one number for all


def arguments(doc: str, **more: dict) -> argparse.Namespace:
    """The flags of an experiment; `more` adds its own ones, by name."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--steps", type=int, default=100, help="of each training (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2000, help="training drawings (default: %(default)s)")
    parser.add_argument(
        "--trainings", type=int, default=3, help="of each variant, each with a seed of its own (default: 3)"
    )
    parser.add_argument(
        "--count", type=int, default=100, help="unseen drawings as image prompts (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=2, help="pictures of each (default: %(default)s)")
    parser.add_argument("--ddim-steps", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/experiments"), help="(default: %(default)s)")
    return parser.parse_args()


def noised(
    batch: dict[str, Tensor], null: dict[str, Tensor], seed: int, places: list[int], drop: tuple[float, float, float]
) -> tuple[Tensor, ...]:
    """Noisy latents, the noise, t, text and image of a batch, with what is random at its places in the run.

    drop: the shares that lose their text, their image, and both.
    """
    mean, std, text, image = (batch[key] for key in ("mean", "std", "text", "image"))
    u, t, posterior, eps = draws(seed, places, mean.shape[1:])
    drop_text, drop_image = drops(u, *drop)
    text = torch.where(drop_text[:, None, None], null["text"], text)
    image = torch.where(drop_image.view(-1, *[1] * (image.ndim - 1)), null["image"], image)
    return add_noise(mean + std * posterior, eps, t), eps, t, text, image


def interval(scores: Tensor, resamplings: int = 2000) -> tuple[float, float]:
    """The 95% interval of a mean, by bootstrap over trainings and drawings: scores (trainings, drawings)."""
    generator, (rows, columns) = torch.Generator().manual_seed(0), scores.shape
    i = torch.randint(rows, (resamplings, rows, 1), generator=generator)
    j = torch.randint(columns, (resamplings, 1, columns), generator=generator)
    return tuple(scores.double()[i, j].mean((1, 2)).quantile(torch.tensor([0.025, 0.975]).double()).tolist())


@dataclass
class Variant:
    """A model that can be prompted with images, and what of it is trained."""

    name: str
    unet: nn.Module
    projection: nn.Module  # CLIP features to tokens
    prompt: Callable[[Tensor, Tensor], Prompt]  # text features and tokens to what the UNet reads
    trained: list[nn.Parameter] = field(default_factory=list)
    learning_rate: float | None = None  # None: that of the flags


def decoupled(adapter: IPAdapter, scale: float = 1.0) -> Callable[[Tensor, Tensor], Prompt]:
    return lambda text, tokens: Prompt(text, (adapter.prompt(tokens, scale),))


class Lab:
    """The models, the training drawings as features on disk, the unseen drawings in memory."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args, self.base = args, open_base(BASE)
        self.image, self.text, self.vae = load_image_encoder(ENCODER), self.base.text(), self.base.vae()
        self.text_projection = read(ENCODER)["text_projection.weight"].float()
        pairs = open_pairs(str(DATA / "train-*.tar.gz"))
        encoders = Encoders(self.vae, TextEncoder(self.text), self.image, patches=True)
        pairs.cut(args.pairs)
        prepared = Prepared(pairs, len(pairs), SIDE, SIDE)
        models = {name: model_sha256(path) for name, path in (("base", BASE), ("image_encoder", ENCODER))}
        self.data = Cache(args.output / f"cache-{args.pairs}", models, prepared.identities())
        self.styles = drawings.load("train", limit=args.pairs).styles  # in the order of the pairs
        self.null = encoders.null()
        if missing := self.data.missing():
            self.data.begin(prepared, self.null)
            with tqdm(total=sum(map(len, missing)), desc="features", unit="pair") as bar:
                for _ in self.data.fill(missing, encoders, prepared, workers=0):
                    bar.update()
            self.data.find()
        unseen = drawings.load("unseen-drawings", limit=args.count)
        self.x = drawings.to_unit(unseen.pixels)
        self.captions = [unseen.styled(i) for i in range(len(unseen))]
        with torch.no_grad():
            self.patches = torch.cat([self.image.penultimate(p) for p in drawings.clip_pixels(self.x).split(8)])

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Features of these training drawings."""
        return default_collate([self.data.take(i, caption=0) for i in numbers])

    @torch.no_grad()
    def features(self, variant: Variant, patches: Tensor) -> Tensor:
        """What it reads: the patches of the penultimate layer, or the global embedding."""
        return patches if variant.projection.patches else self.image.last(patches)

    def no_image(self, variant: Variant) -> Tensor:
        return null_features(self.image, torch.zeros(1, 3, SIDE, SIDE), variant.projection.patches)

    def adapter(self, name: str, make: Callable[[], nn.Module]) -> Variant:
        """A new adapter, with a new image projection, on the frozen base."""
        projection, unet = make(), self.base.unet()
        adapter = IPAdapter.for_unet(unet, projection)
        return Variant(name, unet, projection, decoupled(adapter), list(adapter.parameters()))

    def compare(self, name: str, makers: Mapping[str, Callable[[], Variant]]) -> None:
        """Train the variants, each made anew for each training, and report."""
        rows, columns = {}, {}
        for title, make in makers.items():
            rows[title], columns[title] = self.trial(make)
        self.report(name, rows, columns)

    def trial(self, make: Callable[[], Variant]) -> tuple[Scores, Tensor]:
        """Train a variant some times: its scores, one line for each training, and the first one's pictures."""
        rows, shown = [], None
        for seed in range(self.args.seed, self.args.seed + self.args.trainings):
            torch.manual_seed(seed)
            variant = make()
            self.fit(variant, seed)
            y = self.pictures(variant)
            shown = y[0] if shown is None else shown
            rows.append(self.scores(y))
        trained = {"trained": sum(p.numel() for p in variant.trained)}
        return trained | {key: torch.cat([row[key] for row in rows]) for key in rows[0]}, shown

    def fit(self, variant: Variant, seed: int) -> None:
        """Train by the recipe of `train.py` for the tiny model: v loss, text dropped in half of the steps."""
        args, rate = self.args, variant.learning_rate or self.args.learning_rate
        optimizer = torch.optim.AdamW(variant.trained, rate, weight_decay=0.01)
        averages = [p.detach().clone() for p in variant.trained]
        null = {"text": self.null["text"], "image": self.no_image(variant)[0]}
        bar = tqdm(range(args.steps), desc=variant.name, unit="step")
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20)
            places = list(range(step * args.batch_size, (step + 1) * args.batch_size))
            batch = self.batch([pair_at(seed, place, len(self.data)) for place in places])
            batch["image"] = self.features(variant, batch["image"])
            x, eps, t, text, image = noised(batch, null, seed, places, (0.5, 0.05, 0.05))
            found = variant.unet(x, t, variant.prompt(text, variant.projection(image)))
            loss = noise_loss(found, eps, v_weight(t))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(0.98, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, [p.detach() for p in variant.trained], 1 - decay)
            bar.set_postfix(loss=f"{loss.item():.4f}")
        for p, average in zip(variant.trained, averages, strict=True):
            p.data.copy_(average)

    @torch.no_grad()
    def pictures(self, variant: Variant, texts: Sequence[str] | None = None) -> Tensor:
        """Each unseen drawing as image prompt, beside a text of its own or none: (samples, count, 3, 128, 128)."""
        args, done, sampler = self.args, [], SAMPLERS["ddim"]
        levels = sampler.levels(self.base.schedule, args.ddim_steps)
        tokens = variant.projection(self.features(variant, self.patches))
        nothing = variant.projection(self.no_image(variant))
        text = self.text(tokenize(texts or [""] * len(tokens)))
        starts = torch.stack([noise(args.seed + j, 1, SIDE, SIDE)[0] for j in range(args.samples)])
        with tqdm(total=args.samples * len(tokens), desc=f"{variant.name}: pictures", unit="picture") as bar:
            for start in starts:
                row = []
                for some, words in zip(tokens.split(20), text.split(20), strict=True):
                    prompt = variant.prompt(words, some)
                    null = variant.prompt(self.null["text"].expand_as(words), nothing.expand_as(some))
                    predict = guided(variant.unet, prompt, null, 7.5)
                    z = denoise(sampler, predict, start.expand(len(some), -1, -1, -1), levels)
                    row.append(torch.cat([self.vae.decode(part) for part in z.split(4)]))
                    bar.update(len(some))
                done.append(torch.cat(row))
        return torch.stack(done)

    @torch.no_grad()
    def scores(self, y: Tensor, texts: Sequence[str] | None = None) -> Scores:
        """Of pictures (samples, count, 3, 128, 128), made with these texts or by the image prompts alone: (1, count) each.

        CLIP-I: cosine to the image prompt. CLIP-T: cosine to the text, or the prompt's own caption. Own: share of
        pictures whose nearest prompt by thumbnails is their own. Diversity: 1 - cosine between two seeds.
        """
        prompts = normalize(self.image.last(self.patches), dim=-1)
        words = text_embeds(self.text, self.text_projection, texts or self.captions)
        made = torch.stack([image_embeds(self.image, row) for row in y])
        nearest = torch.cdist(thumbnail(y.flatten(0, 1)), thumbnail(self.x)).argmin(1).view(len(y), -1)
        found = {
            "CLIP-I": (made * prompts).sum(-1),
            "CLIP-T": (made * words).sum(-1),
            "own": (nearest == torch.arange(len(self.x))).float(),
        }
        if len(y) > 1:
            found["diversity"] = 1 - (made[:1] * made[1:2]).sum(-1)
        return {key: value.mean(0, keepdim=True) for key, value in found.items()}

    def report(self, name: str, rows: dict[str, Scores], columns: dict[str, Tensor]) -> None:
        """Print and keep a table (row: its scores), and a sheet of the first drawings (title: pictures of each).

        The table is Markdown; behind each mean stands its 95% interval.
        """
        keys = list(dict.fromkeys(key for row in rows.values() for key in row))
        table = [f"| | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
        kept = {}
        for title, row in rows.items():
            cells, kept[title] = [], {}
            for key, value in row.items():
                found = value if isinstance(value, int) else (value.mean().item(), *interval(value))
                kept[title][key] = found
                cells.append(f"{found:,}" if isinstance(found, int) else "{:.3f} ({:.3f} to {:.3f})".format(*found))
            table.append(f"| {title} | {' | '.join(cells)} |")
        print(*table, sep="\n")
        settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(self.args).items()}
        self.args.output.mkdir(parents=True, exist_ok=True)
        write_text(self.args.output / f"{name}.json", json.dumps({"settings": settings, "rows": kept}, indent=1))
        lines = [to_pil(x[:SHOWN]) for x in (self.x, *columns.values())]
        save_picture(
            sheet(list(zip(*lines, strict=True)), ["image prompt", *columns]), self.args.output / f"{name}.png"
        )
        print(self.args.output / f"{name}.json", self.args.output / f"{name}.png", sep="\n")
