"""The objective, the order of the samples, the step of the optimiser: against diffusers, plain torch and arithmetic."""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from counterparts import diffusers_unet_with, rel
from diffusers.optimization import get_scheduler
from torch.nn.functional import mse_loss

from clip import TextEncoder, tokenize
from files.sheets import curve
from files.whole import read_checked, write
from ipadapter import ImageProjection, IPAdapter, PatchProjection, Prompt, Resampler
from ipadapter.objective import Objective, adapter_loss, drops
from sampler import SD, Schedule, add_noise, loss_weight, noise
from tiny.places import place
from training.chance import draws, generator_at
from training.features import Encoders
from training.order import Places, pair_at, places
from training.pairs import BadSample
from training.ranks import Ranks
from training.ready import Ready
from training.trainer import RATE_SCHEDULES, Trainer, rate_at
from training.validation import TIMESTEPS, held_out_loss
from unet import SD15, UNet

RECIPE = {
    "seed": 0,
    "dtype": torch.float32,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "loss": "eps",
    "drop": (0.05, 0.05, 0.05),
    "warmup": 0,
    "clip_grad": 0.0,
    "ema": 0.0,
}
KINDS = {"base": (96,), "plus": (17, 128), "full-face": (17, 128)}  # shape of an image prompt's features


def new(kind: str, unet: UNet) -> IPAdapter:
    projection = {
        "base": lambda: ImageProjection(96, 64, 4),
        "plus": lambda: Resampler(128, 64, depth=4, heads=1, num_tokens=6, context_dim=64),
        "full-face": lambda: PatchProjection(128, 64),
    }[kind]()
    return IPAdapter.for_unet(unet, projection)


def features(kind: str, places: list[int]) -> dict[str, torch.Tensor]:
    """Of the pairs at these places."""
    shapes = {"mean": (4, 8, 8), "std": (4, 8, 8), "text": (77, 64), "image": KINDS[kind]}
    rows = [{k: torch.randn(s, generator=torch.Generator().manual_seed(p)) for k, s in shapes.items()} for p in places]
    return {key: torch.stack([row[key] for row in rows]) for key in shapes}


def trainer(unet: UNet, kind: str = "base", **recipe) -> Trainer:
    torch.manual_seed(0)
    unet = copy.deepcopy(unet)
    adapter = new(kind, unet)
    null = {"text": torch.ones(77, 64), "image": torch.zeros(KINDS[kind])}
    return Trainer(adapter, unet, null, Ranks(torch.device("cpu")), **RECIPE | recipe)


def weights(of: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in of.params.values()])


# Objective


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_diffusers(unet, kind):
    """Their UNet with their attention processors, differentiated by autograd: the same loss, the same gradients."""
    ours = trainer(unet, kind)
    theirs = diffusers_unet_with(unet, ours.adapter).requires_grad_()
    batch = features(kind, [0, 1, 2])
    torch.manual_seed(0)
    noise, t = torch.randn_like(batch["mean"]), torch.tensor([10, 500, 990])
    noisy = add_noise(batch["mean"], noise, t)
    loss = ours.objective(noisy, noise, t, batch["text"], batch["image"])
    loss.backward()
    added = {"image_embeds": [batch["image"][:, None]]}
    eps = theirs(noisy, t, batch["text"], added_cond_kwargs=added).sample
    their_loss = mse_loss(eps, noise)
    their_loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)

    layers = [p for p in theirs.attn_processors.values() if hasattr(p, "to_k_ip")]
    found = {tuple(p.to_k_ip[0].weight.shape) for p in layers}
    assert len(layers) == 16 and len(found) == 3
    # diffusers lists the middle between the way down and the way up; in the published order it is the last
    names = [name for name, p in theirs.attn_processors.items() if hasattr(p, "to_k_ip")]
    order = sorted(range(16), key=lambda i: ("down_blocks", "up_blocks", "mid_block").index(names[i].split(".")[0]))
    for layer, ip in zip([layers[i] for i in order], ours.adapter.ip_adapter.values(), strict=True):
        assert rel(ip.to_k_ip.weight.grad, layer.to_k_ip[0].weight.grad) < 1e-3
        assert rel(ip.to_v_ip.weight.grad, layer.to_v_ip[0].weight.grad) < 1e-4


@torch.no_grad()
def test_the_v_loss_is_the_error_of_v(unet):
    """v = sqrt(a) eps - sqrt(1 - a) x_0 (arXiv 2202.00512): its squared error, from x_0 as the predicted noise tells it."""
    ours = trainer(unet, loss="v", drop=(0, 0, 0))
    place = next(place for place in range(100) if 300 < draws(0, [place], ())[1] < 700)  # where nothing is clipped
    given = ours.noised([place], features("base", [place]))
    noisy, noise, t, text, image = (given[name] for name in ("noisy", "target", "t", "text", "image"))
    a = SD.alphas_cumprod[t].double()
    eps = ours.objective.frozen[0](
        noisy, t, Prompt(text, (ours.adapter.prompt(ours.adapter.image_proj(image)),))
    ).double()

    def v_of(eps: torch.Tensor) -> torch.Tensor:
        return a.sqrt() * eps - (1 - a).sqrt() * (noisy - (1 - a).sqrt() * eps) / a.sqrt()

    wanted = (v_of(eps) - v_of(noise)).square().mean()
    assert ours.objective(**given).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert ours.noised(list(range(64)), features("base", list(range(64))))["weight"].max() == 16


@torch.no_grad()
def test_min_snr_weighs_as_in_the_paper(unet):
    """arXiv 2303.09556, section 3.4: min(SNR, 5) for the predicted picture, min(SNR, 5) / SNR for the noise, / (SNR + 1) for v."""
    t = torch.tensor([0, 50, 200, 400, 700, 999])
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    snr, alpha, sigma = a / (1 - a), *(x.sqrt().view(-1, 1, 1, 1) for x in (a, 1 - a))
    x, eps, wrong = torch.randn(3, len(t), 4, 8, 8, dtype=torch.float64)
    wrong_x = (alpha * x + sigma * eps - sigma * wrong) / alpha  # the picture that the predicted noise tells
    wanted = snr.clamp(max=5) * (wrong_x - x).square().mean(dim=(1, 2, 3))
    missed = {"eps": wrong - eps, "v": alpha * (wrong - eps) - sigma * (wrong_x - x)}
    for prediction, error in missed.items():
        weight = loss_weight(t, "min-snr", replace(SD, prediction=prediction))
        assert rel(weight * error.square().mean(dim=(1, 2, 3)), wanted) < 1e-5


def test_drops_are_one_uniform_draw():
    u = torch.arange(1000) / 1000 + 0.0005
    text, image = drops(u, 0.05, 0.05, 0.05)
    assert Counter(zip(text.tolist(), image.tolist(), strict=True)) == {
        (False, False): 850,
        (True, False): 50,
        (False, True): 50,
        (True, True): 50,
    }
    text, image = drops(u, 0.5, 0.2, 0.0)
    assert (text.sum(), image.sum(), (text & image).sum()) == (500, 200, 0)


def test_what_is_dropped_is_not_encoded_and_a_caption_once(unet, vae, text_tower, image_tower, draw):
    """The loss of a step is that of everything encoded; the towers see no more than is read."""
    ours, encoders = trainer(unet, drop=(0.3, 0.3, 0.2)), Encoders(vae, TextEncoder(text_tower), image_tower, False)
    at = list(range(6))
    no_text, no_image = ours.dropped(at)
    assert 0 < no_text.sum() < 6 and 0 < no_image.sum() < 6
    batch = {"pixels": draw(6, 3, 64, 64), "clip": draw(6, 3, 64, 64), "tokens": tokenize([*"abcabc"])}
    read = {image_tower: [], text_tower: []}
    hooks = [tower.register_forward_pre_hook(lambda tower, given: read[tower].append(len(given[0]))) for tower in read]
    found = encoders(batch, no_text, no_image)
    assert read[text_tower] == [1] * len({"abcabc"[i] for i in at if not no_text[i]})
    everything = encoders(batch)
    nothing = encoders(batch, *torch.ones(2, 6, dtype=torch.bool))
    assert nothing.keys() == {"mean", "std"}
    assert read == {image_tower: [int((~no_image).sum()), 6], text_tower: [1, 1, 1]}
    for hook in hooks:
        hook.remove()
    for key in ("mean", "std", "text", "image"):
        kept = ~{"text": no_text, "image": no_image}.get(key, torch.zeros(6, dtype=torch.bool))
        assert rel(found[key][kept], everything[key][kept]) <= 1e-5
    with torch.no_grad():
        losses = [ours.objective(**ours.noised(at, features)) for features in (found, everything)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


def test_a_new_adapter_starts_from_the_text_weights(unet):
    for layer, ip in zip(unet.cross_attentions(), new("base", unet).ip_adapter.values(), strict=True):
        assert torch.equal(ip.to_k_ip.weight, layer.to_k.weight) and torch.equal(ip.to_v_ip.weight, layer.to_v.weight)


def test_placed_keys_add_nothing_yet_whatever_the_grid_of_patches(unet, draw):
    """Values of 0, and keys that are not what they were: of 4x4 patches as of any other number."""
    adapter, x = new("full-face", unet), draw(4, 4, 16, 16)
    before = adapter.key_values()[0].to_k_ip.weight.clone()
    place(adapter, unet, draw(1, 77, 64), x, draw(4, 1 + 16, 128), steps=2)
    text, t, tokens = draw(1, 77, 64), torch.tensor([500]), adapter.image_proj(draw(1, 17, 128))
    with torch.no_grad():
        placed = unet(x[:1], t, Prompt(text, (adapter.prompt(tokens),)))
        assert torch.equal(placed, unet(x[:1], t, Prompt(text)))
    assert rel(adapter.key_values()[0].to_k_ip.weight, before) > 0.1


def test_trainable_parameters_of_sd15():
    """The counts of the released files."""
    with torch.device("meta"):
        unet = UNet(SD15)
        for projection, wanted in (
            (ImageProjection(1024, 768, 4), 22_319_616),
            (Resampler(1280, 768, 4, 12, 16, 768), 49_087_488),
            (PatchProjection(1280, 768), 21_794_304),
        ):
            assert sum(p.numel() for p in IPAdapter.for_unet(unet, projection).parameters()) == wanted


# Order and randomness


def test_each_pair_comes_once_an_epoch_in_another_order():
    epochs = [[pair_at(3, epoch * 50 + i, 50) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [pair_at(4, i, 50) for i in range(50)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_places_of_all_processes_are_the_batches_of_one(ranks):
    of_each = [list(places(16, 3, 8 // ranks, rank, ranks)) for rank in range(ranks)]
    batches = [[place for rank in range(ranks) for place in of_each[rank][i]] for i in range(3)]
    assert batches == [list(range(16 + 8 * i, 24 + 8 * i)) for i in range(3)]


def test_what_is_random_depends_on_seed_and_place_alone():
    whole, part = draws(1, [5, 6, 7, 8], (4, 2, 2)), draws(1, [7, 8], (4, 2, 2))
    assert all(torch.equal(a[2:], b) for a, b in zip(whole, part, strict=True))
    assert not torch.equal(whole[3], draws(2, [5, 6, 7, 8], (4, 2, 2))[3])
    u, t, posterior, noise = draws(0, list(range(4000)), (1,))
    assert u.mean() == pytest.approx(0.5, abs=0.02) and t.float().mean() == pytest.approx(499.5, abs=15)
    assert 0 <= t.min() <= 3 and 996 <= t.max() <= 999 and 0 <= u.min() and u.max() < 1
    assert 400 <= draws(0, list(range(400)), (1,), least_t=400)[1].min() <= 410
    for one in (posterior, noise):
        assert one.mean() == pytest.approx(0, abs=0.05) and one.std() == pytest.approx(1, abs=0.04)
    columns = torch.stack([u, t / 1000, posterior[:, 0], noise[:, 0]])
    assert (torch.corrcoef(columns) - torch.eye(4)).abs().max() < 0.05


def test_the_randomness_of_a_place_is_what_it_always_was():
    """A run that was begun by an earlier version goes on with the same pairs and the same noise."""
    seeds = [generator_at(seed, place).initial_seed() for seed, place in ((0, 5), (7, -1))]
    assert seeds == [28486110198147923, 53795450754875127]


def test_one_of_several_captions_is_drawn_at_each_place():
    """From seed and place alone, each of them as often; what was drawn before there were several is as it was."""

    class Source(list):
        def take(self, i: int, caption: int) -> str:
            if i == 3:
                raise BadSample("three")
            return f"{i}: {caption % 5}"

    def run(seed: int, places: Iterable[int]) -> list[str]:
        return [Places(Source(range(10)), seed)[place][1] for place in places]

    drawn = run(0, range(2000))
    assert drawn[7:60:3] == run(0, range(7, 60, 3)) and drawn[:50] != run(1, range(50))
    counts = Counter(drawn)
    assert len(counts) == 45 and all(20 <= count <= 95 for count in counts.values())
    assert [int(text[0]) for text in drawn[:20]] == [pair_at(0, p, 10, pair_at(0, p, 10) == 3) for p in range(20)]


# The step


def test_a_step_is_adamw_on_the_mean_loss(unet):
    """Against the same step in plain torch, written out."""
    ours = trainer(unet, weight_decay=0.1)
    plain = copy.deepcopy(ours.adapter)
    plain_unet = copy.deepcopy(unet)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    for batch_places in ([0, 1, 2, 3], [4, 5, 6, 7]):
        batch = features("base", batch_places)
        loss = ours.update([(batch_places, batch)])
        u, t, posterior, noise = draws(0, batch_places, (4, 8, 8))
        x = batch["mean"] + batch["std"] * posterior
        no_text, no_image = drops(u)
        for i in range(4):
            if no_text[i]:
                batch["text"][i] = 1
            if no_image[i]:
                batch["image"][i] = 0
        optimizer.zero_grad()
        prompt = Prompt(batch["text"], (plain.prompt(plain.image_proj(batch["image"])),))
        wanted = adapter_loss(plain_unet, add_noise(x, noise, t), noise, t, prompt)
        wanted.backward()
        optimizer.step()
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(weights(ours), torch.cat([p.flatten() for p in plain.parameters()]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_moves(unet, kind):
    ours = trainer(unet, kind)
    before = {key: p.clone() for key, p in ours.params.items()}
    frozen = ours.objective.frozen[0]
    wanted = copy.deepcopy(frozen.state_dict())
    for i in range(2):
        ours.update([([2 * i, 2 * i + 1], features(kind, [2 * i, 2 * i + 1]))])
    assert all(torch.equal(value, wanted[key]) for key, value in frozen.state_dict().items())
    assert all(p.grad is None for p in frozen.parameters())
    still = [key for key, p in ours.params.items() if torch.equal(p, before[key])]
    assert not still


def test_accumulated_parts_are_one_batch(unet):
    whole, parts = trainer(unet), trainer(unet)
    whole.update([([0, 1, 2, 3], features("base", [0, 1, 2, 3]))])
    parts.update([([0, 1], features("base", [0, 1])), ([2, 3], features("base", [2, 3]))])
    assert rel(weights(parts) - weights(trainer(unet)), weights(whole) - weights(trainer(unet))) < 1e-3
    assert parts.place == whole.place == 4


def test_warmup_and_clipping(unet):
    ours = trainer(unet, warmup=3)
    rates = []
    for i in range(5):
        ours.update([([i], features("base", [i]))])
        rates.append(ours.rate)
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001])
    clipped = trainer(unet, clip_grad=1e-3)
    clipped.update([([0], features("base", [0]))])
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in clipped.params.values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("schedule", RATE_SCHEDULES)
def test_the_learning_rate_behind_the_warmup_is_that_of_diffusers(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    for step in range(20):
        ours = rate_at(step, 3.0, 4, schedule, 20)
        assert ours == pytest.approx(theirs.get_last_lr()[0] if step >= 4 else 3.0 * (step + 1) / 5, abs=1e-12)
        optimizer.step()
        theirs.step()
    assert rate_at(0, 1.0, 0, schedule, 1) == 1.0


def test_noise_is_added_by_the_schedule_of_the_base(unet):
    linear = Schedule(0.0001, 0.02, "linear")
    ours = trainer(unet, loss="v", drop=(0, 0, 0), noise_schedule=linear)
    places, batch = [0, 1, 2], features("base", [0, 1, 2])
    given = ours.noised(places, batch)
    noisy, noise, t, weight = (given[name] for name in ("noisy", "target", "t", "weight"))
    _, _, posterior, _ = draws(0, places, (4, 8, 8))
    a = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)[t].float()
    x = batch["mean"] + batch["std"] * posterior
    wanted = a.sqrt().view(-1, 1, 1, 1) * x + (1 - a).sqrt().view(-1, 1, 1, 1) * noise
    assert torch.allclose(noisy, wanted, atol=1e-6) and torch.allclose(weight, (1 / a).clamp(max=16), rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_the_held_out_loss_tells_the_right_picture_from_none_and_from_a_stranger(unet):
    """Written out, one picture and one noise level at a time."""
    ours = trainer(unet)
    batch = features("base", [0, 1, 2])
    given = Ready(None, None, None, None, 64, [], {"mean": batch["mean"], "image": batch["image"]}, [], {}, True)
    rows = held_out_loss(unet, ours, given)
    assert [row["t"] for row in rows] == list(TIMESTEPS)
    text, eps = ours.null["text"][None], noise(0, 3, 64, 64)
    for row in rows:
        t = torch.tensor([row["t"]])
        for name in ("right", "none", "stranger"):
            errors = []
            for i in range(3):
                image = {"right": batch["image"][i], "none": torch.zeros(96), "stranger": batch["image"][i - 1]}[name]
                prompt = Prompt(text, (ours.adapter.prompt(ours.adapter.image_proj(image[None])),))
                found = unet(add_noise(batch["mean"][i : i + 1], eps[i : i + 1], t), t, prompt)
                errors.append(mse_loss(found, eps[i : i + 1]).item())
            assert row[name] == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert len({row["right"], row["none"], row["stranger"]}) == 3
    for layer in ours.adapter.ip_adapter.values():
        layer.to_v_ip.weight.zero_()  # an adapter that says nothing
    deaf = held_out_loss(unet, ours, given)
    assert all(row["right"] == row["none"] == row["stranger"] for row in deaf)


def test_a_curve_of_a_million_steps_is_drawn_at_each_checkpoint():
    """In a moment, and the fall is seen: black on the left above, on the right below."""
    losses = (np.linspace(1, 0, 1_000_000) + np.random.default_rng(0).normal(0, 0.3, 1_000_000)).tolist()
    page = np.asarray(curve([*losses, math.nan], "steps", "loss").convert("L"))
    left, right = (np.flatnonzero(page[30:420, x] == 0) for x in (100, 900))
    assert page.shape == (480, 960) and left.max() + 200 < right.min()


def test_averaged_weights(unet):
    ours = trainer(unet, ema=0.5)
    average = weights(ours)
    for i in range(3):
        ours.update([([i], features("base", [i]))])
        decay = min(0.5, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * weights(ours)
    learning = weights(ours)
    with ours.averaged() as adapter:
        assert torch.allclose(torch.cat([p.flatten() for p in adapter.parameters()]), average, atol=1e-7)
    assert torch.equal(weights(ours), learning)


def test_a_loss_that_is_not_finite_changes_nothing(unet):
    ours = trainer(unet, ema=0.9)
    ours.update([([0], features("base", [0]))])
    tensors = {key: value.clone() for key, value in ours.state()[0].items()}
    bad = features("base", [1])
    bad["mean"][0, 0, 0, 0] = math.inf
    for i in (1, 2):
        assert not math.isfinite(ours.update([([i], bad)]))
    assert (ours.step, ours.skipped, ours.in_a_row) == (3, 2, 2)
    assert all(torch.equal(value, tensors[key]) for key, value in ours.state()[0].items())
    assert math.isfinite(ours.update([([3], features("base", [3]))]))
    assert (ours.skipped, ours.in_a_row) == (2, 0)


def test_a_state_goes_on_bit_for_bit(unet):
    straight, first, second = (trainer(unet, ema=0.9, warmup=2) for _ in range(3))
    for i in range(4):
        straight.update([([i], features("base", [i]))])
    for i in range(2):
        first.update([([i], features("base", [i]))])
    second.load_state(*copy.deepcopy(first.state()))
    for i in range(2, 4):
        second.update([([i], features("base", [i]))])
    ours, theirs = second.state(), straight.state()
    assert ours[1] == theirs[1]
    assert all(torch.equal(ours[0][key], value) for key, value in theirs[0].items())


def test_levels_of_8_bit_moments_that_all_parameters_share_are_kept(unet, tmp_path):
    """As bitsandbytes has them."""
    ours, levels = trainer(unet, optimizer="adamw"), torch.linspace(-1, 1, 256)
    for p in ours.params.values():
        ours.optimizer.state[p] = {"step": 3, "state1": torch.zeros_like(p, dtype=torch.uint8), "qmap1": levels}
    tensors, _ = ours.state()
    write(tmp_path / "state.safetensors", tensors, {})
    found, _ = read_checked(tmp_path / "state.safetensors")
    assert all(torch.equal(found[f"qmap1.{key}"], levels) for key in ours.params)


def test_recomputed_layers_give_the_same_gradients(unet):
    plain, spare = trainer(unet), trainer(unet)
    spare.objective.frozen[0].recompute()
    for one in (plain, spare):
        one.update([([0, 1], features("base", [0, 1]))])
    assert torch.equal(weights(plain), weights(spare))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_and_keeps_the_adapter_in_fp32(unet, kind):
    ours = trainer(unet, kind, dtype=torch.bfloat16)
    ours.objective.frozen[0].to(torch.bfloat16)
    loss = ours.update([([0, 1], features(kind, [0, 1]))])
    assert loss == pytest.approx(trainer(unet, kind).update([([0, 1], features(kind, [0, 1]))]), rel=0.02)
    assert {p.dtype for p in ours.params.values()} == {torch.float32}
    assert {value.dtype for value in ours.state()[0].values()} == {torch.float32}


def test_the_image_projection_is_computed_in_fp32_beside_a_half_precision_unet(unet):
    ours = new("plus", unet)
    seen = []
    ours.image_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    half = copy.deepcopy(unet).to(torch.bfloat16)
    batch = features("plus", [0])
    x = batch["mean"].to(torch.bfloat16)
    Objective(ours, half, torch.bfloat16)(x, batch["std"], torch.tensor([5]), batch["text"].bfloat16(), batch["image"])
    assert seen == [torch.float32]
