"""A start for the base adapter: what the full-face adapter answers each layer of the UNet, said with four tokens.

Learning through the UNet is slow. Here it is run once, with the full-face adapter, and each cross-attention layer's
queries and the answer that they got are kept. The base adapter then learns to give these answers, layer by layer; no
UNet is in that loop, so a step costs little. `tiny/train_adapter.py --start` goes on from the file.

    python -m tiny.distil --drawings 4500 --steps 800
    python -m tiny.train_adapter --kind base --start runs/tiny/distilled.safetensors --loss v --drop-text 0.9 --least-t 400
"""

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from clip import tokenize
from files.whole import whole
from ipadapter import IPAdapter, Prompt
from sampler import add_noise
from tiny import drawings
from tiny.latents import stored, towers
from tiny.train_adapter import new_adapter
from tiny.train_unet import new_unet
from tiny.trainer import WEIGHTS, arguments, load_ema
from unet import UNet
from weights import load_adapter

LEAST_T = 300  # of the noisy drawings that are looked at, to 999
NO_IMAGE = 0.08  # share of them without an image prompt
PLACES = 64  # positions that are kept of each drawing and layer


@torch.no_grad()
def ask(unet: UNet, teacher: IPAdapter, empty: Tensor, latents: Tensor, tokens: Tensor, nothing: Tensor, count: int):
    """Which drawings were looked at (-1: no image), and for each layer the queries and the teacher's answers.

    tokens (n, 65, 64) are the teacher's of each drawing, nothing (1, 65, 64) those of no image
    -> (count,), and per layer two fp16 (count, places, dim)
    """
    layers, asked = list(unet.cross_attentions()), {}
    hooks = [m.to_q.register_forward_hook(lambda _, __, q, m=m: asked.__setitem__(m, q)) for m in layers]
    drawn, kept = [], [([], []) for _ in layers]
    for _ in tqdm(range(0, count, 32), desc="answers"):
        i = torch.randint(len(latents), (32,))
        t = torch.randint(LEAST_T, 1000, (32,))
        without = torch.rand(32) < NO_IMAGE
        said = torch.where(without[:, None, None], nothing, tokens[i].float())
        x = add_noise(latents[i], torch.randn_like(latents[i]), t).contiguous(memory_format=torch.channels_last)
        unet(x, t, Prompt(empty.expand(32, -1, -1), (teacher.prompt(said),)))
        for m, ip, (queries, answers) in zip(layers, teacher.key_values(), kept, strict=True):
            q = asked[m][:, torch.randperm(asked[m].shape[1])[:PLACES]]
            queries.append(q.half())
            answers.append(answer(m, ip, q, said).half())
        drawn.append(torch.where(without, -1, i))
    for hook in hooks:
        hook.remove()
    return torch.cat(drawn), [(torch.cat(queries), torch.cat(answers)) for queries, answers in kept]


def answer(layer: nn.Module, ip: nn.Module, q: Tensor, tokens: Tensor) -> Tensor:
    """Queries (n, places, dim), tokens (n, tokens, 64) -> what the adapter adds behind this layer (n, places, dim)."""
    k, v = layer.split(ip.to_k_ip(tokens)), layer.split(ip.to_v_ip(tokens))
    z = scaled_dot_product_attention(layer.split(q), k, v)
    return z.transpose(1, 2).flatten(2) @ layer.to_out[0].weight.T


def main() -> None:
    flags = {
        "answers": {"type": int, "default": 2560, "help": "noisy drawings to look at (default: %(default)s)"},
        "drawings": {"type": int, "help": "how many of the drawings to learn from (default: all)"},
    }
    args = arguments(__doc__, steps=1500, batch_size=64, learning_rate=5e-3, **flags)
    data = drawings.load("train", args.drawings)
    clip = towers(args)
    unet = load_ema(new_unet(), "unet", args).to(memory_format=torch.channels_last)
    teacher = load_adapter(WEIGHTS / "ip-adapter-full-face-tiny.safetensors").requires_grad_(False)
    torch.manual_seed(args.seed)
    latents = stored(args, data)
    path = args.runs / "answers.pt"
    with torch.no_grad():
        pixels = [drawings.clip_pixels(drawings.to_unit(p)) for p in data.pixels.split(64)]
        embeds = torch.cat([clip.image(p) for p in pixels])
        if not path.exists():
            tokens = torch.cat([teacher.image_proj(clip.image.penultimate(p)).half() for p in pixels])
            nothing = teacher.image_proj(clip.image.penultimate(torch.zeros_like(pixels[0][:1])))
            empty = clip.text(tokenize(""))
            with whole(path) as part:
                torch.save(ask(unet, teacher, empty, latents, tokens, nothing, args.answers), part)
    drawn, kept = torch.load(path)
    adapter = new_adapter(unet, "base").requires_grad_()
    nn.init.normal_(adapter.image_proj.proj.weight, std=0.7 / embeds.shape[1] ** 0.5)
    nn.init.normal_(adapter.image_proj.proj.bias, std=0.7)
    # Learned from directions that all vary alike; the last row, -1, is that of no image, an embedding of zeros.
    centre, turn = white(embeds)
    embeds = (torch.cat([embeds, torch.zeros_like(embeds[:1])]) - centre) @ turn
    spread = [(z[:1000].float() - z[:1000].float().mean(dim=(0, 1))).square().mean() for _, z in kept]
    layers, pairs = list(unet.cross_attentions()), adapter.key_values()
    held = torch.arange(len(drawn) - 256, len(drawn))

    def errors(i: Tensor, places: int) -> Tensor:
        """Of each layer at some places, as a share of the answers' variance."""
        said, found = adapter.image_proj(embeds[drawn[i]]), []
        for m, ip, (q, z), variance in zip(layers, pairs, kept, spread, strict=True):
            some = torch.randperm(q.shape[1])[:places]
            missed = answer(m, ip, q[i][:, some].float(), said) - z[i][:, some].float()
            found.append(missed.square().mean() / variance)
        return torch.stack(found)

    optimizer = torch.optim.Adam(adapter.parameters(), betas=(0.9, 0.99))
    for step in (bar := tqdm(range(args.steps), desc="distil", mininterval=5)):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 50, 1.5 * (1 - step / args.steps))
        loss = errors(torch.randint(len(drawn) - len(held), (args.batch_size,)), places=16).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            with torch.no_grad():
                bar.set_postfix(held=f"{errors(held, PLACES).mean():.3f}")
    with torch.no_grad():
        print(
            "share of the answers' variance that is missed, by layer:",
            [round(e, 3) for e in errors(held, PLACES).tolist()],
        )
        layer = adapter.image_proj.proj
        layer.weight.copy_(layer.weight @ turn.T)
        layer.bias.sub_(layer.weight @ centre)
    path = args.runs / "distilled.safetensors"
    save_file({key: value.detach().contiguous() for key, value in adapter.state_dict().items()}, path)
    print(path)


def white(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and a matrix (d, d) with which rows x (n, d) get directions of about one variance, the weakest less."""
    centre = x.mean(0)
    _, spread, directions = torch.linalg.svd((x - centre) / len(x) ** 0.5, full_matrices=False)
    return centre, directions.T / (spread + 0.05 * spread[0])


if __name__ == "__main__":
    main()
