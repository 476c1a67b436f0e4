"""DDIM, its schedule, guidance and noise: equal to diffusers step by step."""

import copy

import pytest
import torch
from counterparts import rel
from diffusers import DDIMScheduler

from ipadapter import ImagePrompt, Prompt
from sampler import add_noise, alphas_cumprod, ddim, guided, noise
from sampler.ddim import timesteps


@pytest.fixture
def scheduler() -> DDIMScheduler:
    """As configured in Stable Diffusion 1.5's repository."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


W = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2


def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Some function of x and t, bent and mixing channels."""
    return torch.einsum("oc,bchw->bohw", W, torch.tanh(x)) + torch.sin(x + t / 300)


def theirs(scheduler: DDIMScheduler, x: torch.Tensor, steps: int, eta: float, seed: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    generator, xs = torch.Generator().manual_seed(seed), []
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x, eta=eta, generator=generator).prev_sample
        xs.append(x)
    return xs


# diffusers' own rule visits t = 1000 here, which its table does not have: those counts are tested apart.
STEPS = [1, 2, 3, 4, 6, 7, 20, 30, 50, 333, 500, 999]


@pytest.mark.parametrize("steps", STEPS)
def test_timesteps_equal_diffusers(scheduler, steps):
    scheduler.set_timesteps(steps)
    assert timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps, allowed", [(1, 1e-6), (4, 1e-6), (7, 1e-6), (30, 1e-6), (50, 1e-6), (999, 1e-5)])
def test_every_step_of_ddim_equals_diffusers(scheduler, draw, steps, allowed, eta):
    """To fp32 rounding, which adds up over 999 steps."""
    x = draw(2, 4, 8, 8)
    wanted = theirs(scheduler, x, steps, eta, seed=3)
    found = list(ddim(eps, x, steps, eta, torch.Generator().manual_seed(3)))
    assert len(found) == steps
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) <= allowed


def test_x_is_not_changed_in_place(draw):
    x = draw(1, 4, 8, 8)
    before = x.clone()
    *_, last = ddim(eps, x, 4)
    assert torch.equal(x, before) and not torch.equal(last, before)


def test_a_thousand_steps_visit_every_timestep_that_exists(draw):
    visited = timesteps(1000)
    assert len(visited) == 1000 and visited[0] == 999 and visited[-1] == 1 and set(visited) == set(range(1, 1000))
    *_, last = ddim(eps, draw(1, 4, 4, 4), 1000)
    assert last.isfinite().all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_that_do_not_exist_are_refused(draw, steps):
    with pytest.raises(ValueError, match=f"^steps: {steps} given, 1 to 1000 allowed$"):
        next(ddim(eps, draw(1, 4, 4, 4), steps))


def test_steps_are_told_the_timestep_as_a_tensor(draw):
    seen = []
    list(ddim(lambda x, t: seen.append(t) or x, draw(1, 4, 4, 4), 4))
    assert [t.item() for t in seen] == [751, 501, 251, 1] and all(t.dtype == torch.int64 for t in seen)


def test_alphas_equal_diffusers(scheduler):
    assert alphas_cumprod().dtype == torch.float32 and alphas_cumprod().shape == (1000,)
    assert rel(alphas_cumprod(), scheduler.alphas_cumprod) <= 1e-6
    assert ((alphas_cumprod() / scheduler.alphas_cumprod - 1).abs() <= 1e-5).all()


def test_the_last_step_ends_at_the_first_alpha_and_not_at_one(scheduler, draw):
    """From t = 1 a noise prediction of x / sqrt(1 - alpha) leaves nothing but the noise of alphas_cumprod[0]."""
    x = draw(1, 4, 4, 4)
    spread = (1 - scheduler.alphas_cumprod[1]).sqrt()
    (last,) = ddim(lambda x, t: x / spread, x, 1)
    assert rel(last, x / spread * (1 - scheduler.final_alpha_cumprod).sqrt()) <= 1e-5
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


def test_add_noise_equals_diffusers(scheduler, draw):
    x, n, t = draw(5, 4, 4, 4), draw(5, 4, 4, 4), torch.tensor([0, 1, 300, 998, 999])
    assert rel(add_noise(x, n, t), scheduler.add_noise(x, n, t)) <= 1e-6


# Noise


def test_noise_of_picture_j_is_that_of_seed_plus_j():
    batch = noise(40, 3, 64, 96)
    assert batch.shape == (3, 4, 8, 12) and batch.dtype == torch.float32
    for j in range(3):
        wanted = torch.randn((1, 4, 8, 12), generator=torch.Generator("cpu").manual_seed(40 + j))
        assert torch.equal(batch[j : j + 1], wanted)
        assert torch.equal(batch[j : j + 1], noise(40 + j, 1, 64, 96))


def test_noise_is_diffusers_noise():
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(7 + j) for j in range(3)]
    assert torch.equal(noise(7, 3, 64, 64), randn_tensor((3, 4, 8, 8), generator=generators))


# Guidance


@pytest.mark.parametrize("guidance_scale", [0, 0.5, 3, 7.5])
def test_guidance_is_the_formula(unet, base_adapter, draw, guidance_scale):
    guided_unet = copy.deepcopy(unet)
    base_adapter.attach(guided_unet)
    x, t = draw(1, 4, 8, 8), torch.tensor(500)
    prompt, null = (Prompt(draw(1, 77, 64), (ImagePrompt(draw(1, 4, 64), 0.7),)) for _ in range(2))
    e_prompt, e_null = (guided_unet(x, t, p) for p in (prompt, null))
    found = guided(guided_unet, prompt, null, guidance_scale)(x, t)
    assert rel(found, e_null + guidance_scale * (e_prompt - e_null)) <= 1e-5
    assert rel(e_prompt, e_null) > 0.01


def test_guidance_of_one_is_the_prompt_alone_and_runs_it_alone(unet, draw):
    x, t = draw(2, 4, 8, 8), torch.tensor(500)
    prompt, null = Prompt(draw(2, 77, 64)), Prompt(draw(2, 77, 64))
    batches = []
    handle = unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    assert torch.equal(guided(unet, prompt, null, 1)(x, t), unet(x, t, prompt))
    guided(unet, prompt, null, 2)(x, t)
    handle.remove()
    assert batches == [2, 2, 4]


def test_guidance_answers_in_fp32_whatever_the_unet(unet, draw):
    half = copy.deepcopy(unet).bfloat16()
    prompt, null = Prompt(draw(1, 77, 64).bfloat16()), Prompt(draw(1, 77, 64).bfloat16())
    for guidance_scale in (1, 7.5):
        assert guided(half, prompt, null, guidance_scale)(draw(1, 4, 8, 8), torch.tensor(9)).dtype == torch.float32
