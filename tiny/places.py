"""Where the patches are: a full-face adapter that starts with its keys in place.

A patch's token says what is there; to put it there, the UNet's queries must find the patch of their own place. The
frozen queries tell where they are (at 4x4 positions a linear discriminant of one head's twelve numbers puts about a
third of its weight on the right one of sixteen), and so do the patch features; only the keys between the two are missing.
Instead of learning them in many steps through the UNet, they are computed here from one look at its queries.
"""

import math

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ipadapter import IPAdapter, PatchProjection, Prompt
from sampler import add_noise
from training.pairs import BadSample
from training.ready import Ready
from unet import UNet

WAVES = 5  # cosines along a side; their 25 products less the constant tell the place
SHARPNESS = 1.5  # of the keys, against those of the discriminant
NOISY = 500  # queries are taken at timesteps from here to 999, where the layout is decided


def place(adapter: IPAdapter, unet: UNet, empty: Tensor, latents: Tensor, features: Tensor, steps: int = 3000) -> None:
    """Prepare a full-face adapter for training, in place: each patch is looked at from where it is, and adds nothing yet.

    Args:
        empty: (1, 77, 64), the text features of the empty prompt.
        latents, features: (n, 4, 16, 16) and (n, 1 + patches, width) of the training drawings; (n, 1 + 64, 128) of the
            tiny image encoder.
    """
    grid = math.isqrt(features.shape[1])  # patches along a side
    describe(adapter.image_proj, features.float(), grid, steps)
    with torch.no_grad():
        queries = collect_queries(unet, empty, latents)
        tokens = adapter.image_proj(features[:1000].float())[:, 1:].flatten(0, 1)
        gram = tokens.T @ tokens + 1e-3 * len(tokens) * torch.eye(tokens.shape[1], device=tokens.device)
        for layer, ip, q in zip(unet.cross_attentions(), adapter.key_values(), queries, strict=True):
            side = min(grid, math.isqrt(q.shape[1]))
            keys = place_keys(layer.split(q).transpose(0, 1), side)[cells(grid, side)]
            keys = (keys - keys.mean(0)).repeat(len(tokens) // len(keys), 1)
            ip.to_k_ip.weight.copy_(torch.linalg.solve(gram, tokens.T @ keys).T)
            ip.to_v_ip.weight.zero_()


def place_features(adapter: IPAdapter, unet: UNet, ready: Ready, count: int = 1000) -> None:
    """The same, with what a run of train.py has made ready."""
    taken, flaws = [], []
    for i in range(min(count, len(ready.source))):
        try:
            taken.append(ready.source.take(i))
        except BadSample as error:
            flaws.append(error)
    if not taken:
        raise flaws[0]
    device = next(unet.parameters()).device
    parts = [ready.encode(default_collate(taken[i : i + 64])) for i in range(0, len(taken), 64)]
    mean, image = (torch.cat([part[key] for part in parts]).to(device).float() for key in ("mean", "image"))
    place(adapter, unet, ready.null["text"][None].to(device), mean, image, steps=1500)


def describe(projection: PatchProjection, features: Tensor, grid: int, steps: int) -> None:
    """Teach the projection to say of each patch where it is and, in the remaining numbers, what is there."""
    where = waves(grid, features.device)
    what = features[:, 1:] - features[:, 1:].mean(0)
    directions = torch.linalg.svd(what[:2000].flatten(0, 1), full_matrices=False).Vh
    what = what @ directions[: projection.context_dim - where.shape[1]].T
    spread = what.std(dim=(0, 1))
    # The weak directions count, but noise is not blown up; of one picture alone nothing varies.
    what = what / spread.clamp(min=(0.3 * spread[0]).clamp(min=1e-6))
    targets = torch.cat([where.expand(len(what), -1, -1), what / what.square().mean().sqrt().clamp(min=1e-6)], dim=-1)
    optimizer = torch.optim.Adam(projection.parameters(), lr=3e-3)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 * (1 - step / steps)))
    for _ in range(steps):
        i = torch.randint(len(features), (64,), device=features.device)
        error = (projection(features[i])[:, 1:] - targets[i]).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        falling.step()


def waves(grid: int, device: torch.device) -> Tensor:
    """A code of the place, alike for neighbours: (grid * grid, 24), the two-dimensional cosine transform's low frequencies."""
    x = (torch.arange(grid, device=device) + 0.5) / grid
    side = torch.stack([torch.cos(math.pi * k * x) for k in range(WAVES)], dim=1)
    side[:, 1:] *= math.sqrt(2)
    return (side[:, None, :, None] * side[None, :, None, :]).flatten(2).flatten(0, 1)[:, 1:]


def collect_queries(unet: UNet, empty: Tensor, latents: Tensor, count: int = 512) -> list[Tensor]:
    """What each cross-attention layer asks, without any prompt, at noisy drawings: (count, positions, dim) each."""
    layers = list(unet.cross_attentions())
    asked: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        m.to_q.register_forward_hook(lambda _, __, q, a=a: a.append(q)) for m, a in zip(layers, asked, strict=True)
    ]
    for x in latents[torch.randperm(len(latents))[:count]].split(64):
        t = torch.randint(NOISY, 1000, (len(x),), device=x.device)
        unet(add_noise(x, torch.randn_like(x), t), t, Prompt(empty.float().expand(len(x), -1, -1)))
    for hook in hooks:
        hook.remove()
    return [torch.cat(q) for q in asked]


def place_keys(queries: Tensor, side: int) -> Tensor:
    """For each cell of a side x side grid the key that the queries from there answer to most.

    queries (heads, n, positions, head_dim) -> (side * side, heads * head_dim): the linear discriminant of each head,
    scaled as attention divides; its bias, which keys do not have, is put on what all queries have in common.
    """
    _, n, positions, dim = queries.shape
    cell = cells(math.isqrt(positions), side).repeat(n)
    ridge = 1e-4 * torch.eye(dim, device=queries.device)
    keys = []
    for x in queries.flatten(1, 2):
        means = torch.stack([x[cell == c].mean(0) for c in range(side * side)])
        apart, within = means - means.mean(0), x - means[cell]
        key = torch.linalg.solve(within.T @ within / len(x) + ridge, apart.T).T
        bias = -(key * (means.mean(0) + apart / 2)).sum(1)
        common = torch.linalg.solve(x.T @ x / len(x) + ridge, x.mean(0))
        keys.append(SHARPNESS * math.sqrt(dim) * (key + bias[:, None] * common))
    return torch.cat(keys, dim=1)


def cells(side: int, coarse: int) -> Tensor:
    """The cell of the coarser grid that each position of a side x side grid lies in: (side * side,)."""
    rows = torch.arange(side) * coarse // side
    return (rows[:, None] * coarse + rows).flatten()
