"""The samplers, their schedule, guidance and noise: equal to diffusers step by step."""

import copy
import inspect
from functools import partial

import pytest
import torch
from counterparts import rel
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor

from ipadapter import Prompt
from sampler import MAX_STEPS, SAMPLERS, add_noise, alphas_cumprod, ddim, guided, noise, noise_and_generators
from sampler.ddim import timesteps
from sampler.schedule import eps_from_v, sigmas, timestep

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy


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


def seeded(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + j) for j in range(count)]


def theirs(scheduler: DDIMScheduler, x: torch.Tensor, steps: int, eta: float, seed: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    generators, xs = seeded(seed, len(x)), []
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x, eta=eta, generator=generators).prev_sample
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
    found = list(ddim(eps, x, steps, seeded(3, 2), eta))
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


# All samplers

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
RANDOM = {"euler-a": SAMPLERS["euler-a"], "lcm": SAMPLERS["lcm"], "ddim, eta 0.7": partial(ddim, eta=0.7)}


class Toy(torch.nn.Module):
    """In the UNet's place, and told the prompt; what it was asked is kept."""

    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(0.3))
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        self.asked.append((x, t))
        return eps(x, t) + self.strength * prompt.text.mean(dim=(1, 2))[:, None, None, None]


def diffusers_scheduler(name: str, prediction: str = "eps"):
    own = {"dpm++": {"use_karras_sigmas": True}, "unipc": {"timestep_spacing": "linspace"}}.get(name, {})
    return SCHEDULERS[name].from_config(CONFIG | own | {"prediction_type": PREDICTIONS[prediction]})


def diffusers_run(scheduler, model, x: torch.Tensor, steps: int, **rest) -> tuple[list[torch.Tensor], list[int]]:
    """As the pipelines call a scheduler: x after each step (of unit variance), and the timesteps."""
    scheduler.set_timesteps(steps)
    x, xs = x * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **rest).prev_sample
        grown = isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
        xs.append(x / (1 + scheduler.sigmas[i + 1] ** 2) ** 0.5 if grown else x)
    return xs, scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 14, 15, 20, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers(draw, name, steps, prediction):
    x, toy = draw(2, 4, 8, 8), Toy()
    prompt, null = Prompt(draw(2, 3, 8)), Prompt(draw(2, 3, 8))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        null_output, output = toy(x, t, null), toy(x, t, prompt)
        return null_output + 3 * (output - null_output)

    with torch.no_grad():
        rest = {"generator": seeded(5, 2)} if name in RANDOM else {}
        wanted, asked = diffusers_run(diffusers_scheduler(name, prediction), model, x, steps, **rest)
    toy.asked.clear()
    found = list(SAMPLERS[name](guided(toy, prompt, null, 3, prediction), x, steps, seeded(5, 2)))
    assert [t.item() for _, t in toy.asked] == asked
    assert rel(toy.asked[0][0], torch.cat([x, x])) <= 1e-6  # the first call sees the noise itself
    assert len(found) == steps
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) <= 5e-6


@pytest.mark.parametrize("name, steps", [("euler", 333), ("euler-a", 333), ("dpm++", 150), ("unipc", 333), ("lcm", 33)])
def test_many_steps_equal_diffusers(draw, name, steps):
    """To fp32 rounding, which adds up."""
    x, rest = draw(2, 4, 4, 4), {"generator": seeded(5, 2)} if name in RANDOM else {}
    (*_, wanted), _ = diffusers_run(diffusers_scheduler(name), eps, x, steps, **rest)
    *_, found = SAMPLERS[name](lambda x, t: eps(x, t.round()), x, steps, seeded(5, 2))
    assert rel(found, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["euler", "euler-a", "dpm++", "unipc", "lcm"])
def test_timesteps_equal_diffusers_at_many_step_counts(draw, name):
    """Above 197 steps a noise level of Karras's may fall halfway between two timesteps, to within fp32 rounding."""
    x, scheduler = draw(1, 1, 1, 1), diffusers_scheduler(name)
    for steps in (*range(1, 51), *([] if name == "lcm" else [64, 99, 100, 150, 197])):
        asked = []
        list(SAMPLERS[name](lambda x, t, asked=asked: asked.append(t.round().item()) or x, x, steps))
        scheduler.set_timesteps(steps)
        assert asked == scheduler.timesteps.tolist()


def test_v_is_not_taken_for_eps(draw):
    x, prompt = draw(1, 4, 8, 8), Prompt(draw(1, 3, 8))
    *_, as_eps = ddim(guided(Toy(), prompt, prompt, 1), x, 4)
    *_, as_v = ddim(guided(Toy(), prompt, prompt, 1, "v"), x, 4)
    assert rel(as_eps, as_v) > 0.01


def test_samplers_are_called_alike():
    wanted = list(inspect.signature(ddim).parameters.values())[:4]
    for sampler in SAMPLERS.values():
        parameters = list(inspect.signature(sampler).parameters.values())
        assert parameters[:4] == wanted
        assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters[4:])
    assert SCHEDULERS.keys() == SAMPLERS.keys() == MAX_STEPS.keys()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_most_steps_that_there_can_be_and_none_more(draw, name):
    x = draw(1, 4, 2, 2)
    before = x.clone()
    *_, last = SAMPLERS[name](eps, x, MAX_STEPS[name])
    assert last.isfinite().all() and not last.requires_grad and torch.equal(x, before)
    for steps in (0, MAX_STEPS[name] + 1):
        with pytest.raises(ValueError, match=f"^steps: {steps} given, 1 to {MAX_STEPS[name]} allowed$"):
            next(SAMPLERS[name](eps, x, steps))


# Samplers that draw noise


@pytest.mark.parametrize("name", RANDOM)
def test_a_picture_does_not_depend_on_its_batch(name):
    x, generators = noise_and_generators(11, 3, 64, 64)
    *_, together = RANDOM[name](eps, x, 6, generators)
    for j in range(3):
        x_j, generators_j = noise_and_generators(11 + j, 1, 64, 64)
        *_, alone = RANDOM[name](eps, x_j, 6, generators_j)
        assert rel(together[j : j + 1], alone) <= 1e-6
    *_, others = RANDOM[name](eps, x, 6, seeded(99, 3))
    assert rel(others, together) > 0.01


@pytest.mark.parametrize("name", ["euler-a", "lcm"])
def test_start_noise_and_later_noise_are_those_of_diffusers_pipelines(name):
    """There one list of generators gives first the latents and then what the scheduler draws."""
    generators = seeded(7, 3)
    latents = randn_tensor((3, 4, 8, 12), generator=generators)
    (*_, wanted), _ = diffusers_run(diffusers_scheduler(name), eps, latents, 4, generator=generators)
    x, generators = noise_and_generators(7, 3, 64, 96)
    *_, found = SAMPLERS[name](eps, x, 4, generators)
    assert torch.equal(x, latents) and torch.equal(x, noise(7, 3, 64, 96))
    assert rel(found, wanted) <= 1e-6


@pytest.mark.parametrize("name", RANDOM)
def test_there_is_a_generator_for_each_picture(draw, name):
    with pytest.raises(ValueError):
        list(RANDOM[name](eps, draw(3, 4, 2, 2), 4, seeded(0, 2)))


@pytest.mark.parametrize("name", RANDOM)
def test_without_generators_the_noise_is_pytorchs(draw, name):
    x, results = draw(2, 4, 4, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        *_, last = RANDOM[name](eps, x, 4)
        results.append(last)
    assert torch.equal(results[0], results[1]) and rel(results[2], results[0]) > 0.01


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "unipc"])
def test_the_others_draw_nothing(draw, name):
    generators = seeded(0, 2)
    list(SAMPLERS[name](eps, draw(2, 4, 4, 4), 4, generators))
    for generator, fresh in zip(generators, seeded(0, 2), strict=True):
        assert torch.equal(generator.get_state(), fresh.get_state())


# v and noise levels


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_v_gives_the_noise_it_was_made_of(scheduler, draw, t):
    x_0, n, t = draw(1, 4, 4, 4), draw(1, 4, 4, 4), torch.tensor(t)
    v = scheduler.get_velocity(x_0, n, t)
    assert rel(eps_from_v(v, add_noise(x_0, n, t[None]), t), n) <= 1e-5


def test_timestep_is_the_inverse_of_sigma_also_between_timesteps(draw):
    table = sigmas()
    assert all(abs(timestep(sigma) - t) <= 1e-6 for t, sigma in enumerate(table))
    x_0, n = draw(1, 4, 4, 4), draw(1, 4, 4, 4)
    for t in (0, 3, 500, 998):
        sigma = (table[t] * table[t + 1]) ** 0.5
        assert abs(timestep(sigma) - (t + 0.5)) <= 1e-6
        alpha = 1 / (1 + sigma**2)
        v = alpha**0.5 * n - (1 - alpha) ** 0.5 * x_0
        x = alpha**0.5 * x_0 + (1 - alpha) ** 0.5 * n
        assert rel(eps_from_v(v, x, torch.tensor(timestep(sigma))), n) <= 1e-6


# Noise


def test_noise_of_picture_j_is_that_of_seed_plus_j():
    batch = noise(40, 3, 64, 96)
    assert batch.shape == (3, 4, 8, 12) and batch.dtype == torch.float32
    for j in range(3):
        wanted = torch.randn((1, 4, 8, 12), generator=torch.Generator("cpu").manual_seed(40 + j))
        assert torch.equal(batch[j : j + 1], wanted)
        assert torch.equal(batch[j : j + 1], noise(40 + j, 1, 64, 96))


def test_noise_is_diffusers_noise():
    generators = [torch.Generator().manual_seed(7 + j) for j in range(3)]
    assert torch.equal(noise(7, 3, 64, 64), randn_tensor((3, 4, 8, 8), generator=generators))


# Guidance


@pytest.mark.parametrize("guidance_scale", [0, 0.5, 3, 7.5])
def test_guidance_is_the_formula(unet, base_adapter, draw, guidance_scale):
    x, t = draw(1, 4, 8, 8), torch.tensor(500)
    prompt, null = (Prompt(draw(1, 77, 64), (base_adapter.prompt(draw(1, 4, 64), 0.7),)) for _ in range(2))
    e_prompt, e_null = (unet(x, t, p) for p in (prompt, null))
    found = guided(unet, prompt, null, guidance_scale)(x, t)
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


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_guidance_apart_is_the_same_in_half_the_batch(unet, draw, prediction):
    x, t, batches = draw(2, 4, 8, 8), torch.tensor(500), []
    prompt, null = Prompt(draw(2, 77, 64)), Prompt(draw(2, 77, 64))
    together = guided(unet, prompt, null, 7.5, prediction)(x, t)
    handle = unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    apart = guided(unet, prompt, null, 7.5, prediction, apart=True)(x, t)
    handle.remove()
    assert batches == [2, 2]
    assert rel(apart, together) < 1e-5


def test_guidance_answers_in_fp32_whatever_the_unet(unet, draw):
    half = copy.deepcopy(unet).bfloat16()
    prompt, null = Prompt(draw(1, 77, 64).bfloat16()), Prompt(draw(1, 77, 64).bfloat16())
    for guidance_scale in (1, 7.5):
        for prediction in PREDICTIONS:
            answer = guided(half, prompt, null, guidance_scale, prediction)(draw(1, 4, 8, 8), torch.tensor(9))
            assert answer.dtype == torch.float32


def test_a_prediction_that_does_not_exist_is_refused(unet, draw):
    prompt = Prompt(draw(1, 77, 64))
    with pytest.raises(ValueError, match="^prediction: 'v_prediction' given, 'eps' or 'v' allowed$"):
        guided(unet, prompt, prompt, 1, "v_prediction")
