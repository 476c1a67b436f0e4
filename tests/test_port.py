"""Port it: the adapter on another backbone, PixArt-alpha's transformer (arXiv 2310.00426), equal to diffusers with its own.

1. Where the backbone attends to the text it hears the image prompts, too, with the same queries:

       for k, v, gain in heard(prompt, self.layer, grid):
           z = z + gain * scaled_dot_product_attention(q, self.split(k), self.split(v))

2. These layers are told their numbers once, in the order of the adapter's keys:

       number(block.cross_attn for block in model.blocks)

3. The adapter has W_k' and W_v' of these shapes, (width of the keys, width of the tokens) for each layer:

       adapter = IPAdapter(ImageProjection(1024, 1152, num_tokens=4), [(1152, 1152)] * 28)

4. A prompt is made of tokens once and handed down with the text; so is the grid of the feature map, which masks need:

       prompt = Prompt(text, (adapter.prompt(adapter.tokens(clip_image, pixels), scale=0.6, mask=mask),))
       eps = model(x, t, prompt)

That is all. A model called as `model(x, t, prompt)` works with `guided` and the samplers, and is trained by `Objective`.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from counterparts import randomise, rel
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from ipadapter import ImageProjection, IPAdapter, Prompt, heard, number
from ipadapter.objective import Objective
from sampler import SAMPLERS, Schedule, guided
from unet.unet import timestep_embedding


class PixArt(nn.Module):
    """Predicts the noise in latents; names as in the original files (PixArt-alpha, diffusion/model/nets).

    Args:
        base: side of the feature map that positions are counted for; at 1024 pixels 64, scaled by 2.
    """

    def __init__(self, dim: int, depth: int, heads: int, text_dim: int, base: int, scale: float = 1.0):
        super().__init__()
        self.base, self.scale = base, scale
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, dim, 2, stride=2)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = TextEmbedder(text_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final_layer = FinalLayer(dim)
        number(block.cross_attn for block in self.blocks)

    def forward(self, x: Tensor, t: Tensor, prompt: Prompt) -> Tensor:
        """x (batch, 4, H/8, W/8), t (batch,) or () in 0..999, T5's features without padding -> (batch, 4, H/8, W/8)."""
        x = self.x_embedder.proj(x)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + self.positions(*grid).to(x)
        t = self.t_embedder.mlp(timestep_embedding(t.expand(len(x)), 256).to(x))
        prompt = replace(prompt, text=self.y_embedder.y_proj(prompt.text))
        shifts = self.t_block(t).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, shifts, prompt, grid)
        x = self.final_layer(x, t).unflatten(2, (2, 2, 8)).unflatten(1, grid)  # (batch, rows, columns, 2, 2, 8)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return x[:, :4]  # the other half is a variance

    def positions(self, rows: int, columns: int) -> Tensor:
        """Sinusoids of the column, then of the row: (rows * columns, dim)."""

        def sinusoids(n: int) -> Tensor:
            place = torch.arange(n) * self.base / n / self.scale
            cosines, sines = timestep_embedding(place, self.x_embedder.proj.out_channels // 2).chunk(2, dim=1)
            return torch.cat([sines, cosines], dim=1)

        across, down = sinusoids(columns).expand(rows, -1, -1), sinusoids(rows)[:, None].expand(-1, columns, -1)
        return torch.cat([across, down], dim=2).flatten(0, 1)


class TextEmbedder(nn.Module):
    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.y_embedding = nn.Parameter(torch.empty(120, text_dim))  # the text of the empty prompt
        self.y_proj = nn.Sequential()
        self.y_proj.add_module("fc1", nn.Linear(text_dim, dim))
        self.y_proj.add_module("act", nn.GELU(approximate="tanh"))
        self.y_proj.add_module("fc2", nn.Linear(dim, dim))


class Block(nn.Module):
    """Attention to itself, to the prompt, and an MLP; t says how much to shift, scale and add (adaLN-single)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
        self.attn = SelfAttention(dim, heads)
        self.cross_attn = CrossAttention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor, shifts: Tensor, prompt: Prompt, grid: tuple[int, int]) -> Tensor:
        """x (batch, positions, dim), shifts (batch, 6, dim)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + shifts).split(1, dim=1)
        x = x + gate * self.attn(norm(x) * (1 + scale) + shift)
        x = x + self.cross_attn(x, prompt, grid)
        h = self.mlp.fc1(norm(x) * (1 + scale_mlp) + shift_mlp)
        return x + gate_mlp * self.mlp.fc2(gelu(h, approximate="tanh"))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """PixArt's own, keys and values of the text in one matrix with a bias; the loop is what the port adds."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.q_linear, self.kv_linear = heads, nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, prompt: Prompt, grid: tuple[int, int]) -> Tensor:
        q, (k, v) = self.split(self.q_linear(x)), self.kv_linear(prompt.text).chunk(2, dim=-1)
        z = scaled_dot_product_attention(q, self.split(k), self.split(v))
        for k, v, gain in heard(prompt, self.layer, grid):
            z = z + gain * scaled_dot_product_attention(q, self.split(k), self.split(v))
        return self.proj(z.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FinalLayer(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale_shift_table, self.linear = nn.Parameter(torch.empty(2, dim)), nn.Linear(dim, 2 * 2 * 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None]).split(1, dim=1)
        return self.linear(norm(x) * (1 + scale) + shift)


def norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


# The same in diffusers' code

DIM, DEPTH, TOKENS, T = 72, 5, 4, torch.tensor([981, 1])
NAMES = {
    "x_embedder.": "pos_embed.",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc": "caption_projection.linear_",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "blocks.": "transformer_blocks.",
    "final_layer.linear": "proj_out",
    "final_layer.": "",
}
FUSED = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v")}


def their_state(model: PixArt) -> dict[str, Tensor]:
    state = {}
    for key, w in model.state_dict().items():
        if key == "y_embedder.y_embedding":
            continue
        fused = next((name for name in ("cross_attn.kv_linear", "attn.qkv") if name in key), None)
        names = [key.replace(fused, name) for name in FUSED[fused]] if fused else [key]
        for name, part in zip(names, w.chunk(len(names)), strict=True):
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            state[name] = part
    return state


@pytest.fixture(scope="module")
def model() -> PixArt:
    return randomise(PixArt(DIM, DEPTH, heads=4, text_dim=48, base=8, scale=2.0), 40)


@pytest.fixture(scope="module")
def adapter() -> IPAdapter:
    return randomise(IPAdapter(ImageProjection(96, DIM, TOKENS), [(DIM, DIM)] * DEPTH), 41)


@pytest.fixture(scope="module")
def theirs(model, adapter) -> PixArtTransformer2DModel:
    """With their generic processor on every `attn2`, filled as their loader does for a UNet."""
    theirs = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=DIM // 4,
        num_layers=DEPTH,
        cross_attention_dim=DIM,
        caption_channels=48,
        sample_size=16,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    theirs.load_state_dict(their_state(model), strict=True)
    layers = iter(adapter.key_values())

    def processor(name: str) -> nn.Module | AttnProcessor2_0:
        if "attn2" not in name:
            return AttnProcessor2_0()
        ip, made = next(layers), IPAdapterAttnProcessor2_0(DIM, DIM, (TOKENS,))
        made.load_state_dict({f"{key}.0.weight": getattr(ip, key).weight for key in ("to_k_ip", "to_v_ip")})
        return made

    theirs.set_attn_processor({name: processor(name) for name in theirs.attn_processors})
    return theirs.requires_grad_(False).eval()


@pytest.fixture
def run(theirs) -> Callable[..., Tensor]:
    """Their answer, with tokens (batch, TOKENS, DIM), scales and masks as `ip_adapter_masks`."""

    def run(x: Tensor, text: Tensor, tokens: Tensor, scales: list[float], masks: list[Tensor] | None = None) -> Tensor:
        for block, scale in zip(theirs.transformer_blocks, scales, strict=True):
            block.attn2.processor.scale = [scale]
        project, theirs.caption_projection = theirs.caption_projection, None
        context = (project(text), [tokens[:, None] if masks else tokens])
        kwargs = {"ip_adapter_masks": masks} if masks else None
        added = {"resolution": None, "aspect_ratio": None}
        try:
            return theirs(x, context, T, added, cross_attention_kwargs=kwargs).sample[:, :4]
        finally:
            theirs.caption_projection = project

    return run


@pytest.fixture
def inputs(draw, adapter) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of a picture that is not square, text features, image tokens."""
    return draw(2, 4, 16, 24), draw(2, 10, 48), adapter.image_proj(3 * draw(2, 96))


def test_the_backbone_equals_diffusers(model, run, inputs):
    x, text, tokens = inputs
    assert rel(model(x, T, Prompt(text)), run(x, text, tokens, [0.0] * DEPTH)) <= 1e-5


@pytest.mark.parametrize("scale", [0.25, 1.0, [0.0, 0.3, 1.2, 0.7, 0.5]], ids=str)
def test_the_adapter_equals_diffusers(model, adapter, run, inputs, scale):
    x, text, tokens = inputs
    ours = model(x, T, Prompt(text, (adapter.prompt(tokens, scale),)))
    scales = scale if isinstance(scale, list) else [scale] * DEPTH
    assert rel(ours, run(x, text, tokens, scales)) <= 1e-5
    assert rel(ours, model(x, T, Prompt(text))) > 0.01
    if isinstance(scale, list):
        assert rel(ours, run(x, text, tokens, scale[::-1])) > 1e-3


def test_masks_equal_diffusers(model, adapter, run, inputs):
    x, text, tokens = inputs
    mask = torch.zeros(1, 1, 128, 192)
    mask[:, :, 30:90, 50:] = 1
    prompt = Prompt(text, (adapter.prompt(tokens, 0.8, mask),))
    ours = model(x, T, prompt)
    assert rel(ours, run(x, text, tokens, [0.8] * DEPTH, [mask])) <= 1e-5
    assert rel(ours, run(x, text, tokens, [0.8] * DEPTH)) > 1e-3


def test_scale_zero_is_the_backbone_bit_for_bit(model, adapter, inputs):
    x, text, tokens = inputs
    bare = model(x, T, Prompt(text))
    for scale in (0, 0.0, [0.0] * DEPTH):
        assert torch.equal(model(x, T, Prompt(text, (adapter.prompt(tokens, scale),))), bare)


def test_guidance_and_samplers_serve_it(model, adapter, inputs):
    """The sampler's side of a port: its schedule, a value."""
    x, text, tokens = inputs
    prompt, null = Prompt(text, (adapter.prompt(tokens, 0.6),)), Prompt(-text, (adapter.prompt(-tokens, 0.4),))
    t, schedule = torch.tensor(500), Schedule(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    e_prompt, e_null, predict = model(x, t, prompt), model(x, t, null), guided(model, prompt, null, 4.5)
    assert rel(predict(x, schedule.level(500))[0], e_null + 4.5 * (e_prompt - e_null)) <= 1e-5
    sampler = SAMPLERS["dpm++"]
    *_, latents = sampler.run(predict, x, sampler.levels(schedule, 3))
    assert latents.shape == x.shape and latents.isfinite().all()


@torch.enable_grad()
def test_the_objective_trains_the_adapter(model, inputs, draw):
    """From the paper's start: W_k' and W_v' are copies of the layer's own."""
    adapter, (x, text, _) = IPAdapter(ImageProjection(96, DIM, TOKENS), [(DIM, DIM)] * DEPTH), inputs
    for block, ip in zip(model.blocks, adapter.key_values(), strict=True):
        for to, w in zip((ip.to_k_ip, ip.to_v_ip), block.cross_attn.kv_linear.weight.chunk(2), strict=True):
            to.weight.data.copy_(w)
    Objective(adapter, model, torch.float32)(x, draw(*x.shape), T, text, draw(2, 96)).backward()
    assert all(p.grad.norm() > 0 for p in adapter.parameters())


def test_published_size():
    """PixArt-XL-2 at 512 pixels: the names and shapes that diffusers has."""
    with torch.device("meta"):
        full = PixArt(1152, 28, heads=16, text_dim=4096, base=32)
        config = {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False}
        theirs = PixArtTransformer2DModel(**config)
    state = their_state(full)
    assert {key: w.shape for key, w in state.items()} == {key: w.shape for key, w in theirs.state_dict().items()}
    assert sum(w.numel() for w in state.values()) == 610_856_096
