"""The noise schedule, the samplers, guidance and noise: equal to diffusers step by step."""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
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
from sampler import (
    SAMPLERS,
    SD,
    Level,
    Predict,
    Schedule,
    add_noise,
    ddim,
    ddim_levels,
    guided,
    noise,
    noise_and_generators,
    v_weight,
)
from sampler.guidance import eps_and_x_0
from sampler.schedule import timesteps

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


LEADING = Schedule(spacing="leading")
W = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2


def eps(x: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """Some function of x and t, bent and mixing channels."""
    return torch.einsum("oc,bchw->bohw", W.to(x), torch.tanh(x)) + torch.sin(x + t / 300)


def predicted(output: Callable[[torch.Tensor, float], torch.Tensor] = eps) -> Predict:
    """What a model believes that predicts the noise."""
    return lambda x, level: eps_and_x_0(output(x, level.t), x, level, "eps")


def run(name: str, x: torch.Tensor, steps: int, schedule: Schedule = LEADING, **rest) -> list[torch.Tensor]:
    """x after each step, from the level where pictures begin."""
    levels = SAMPLERS[name].levels(schedule, steps)
    return list(SAMPLERS[name].run(predicted(), SAMPLERS[name].start(x, schedule, levels[0]), levels, **rest))


def seeded(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + j) for j in range(count)]


# DDIM


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
    assert timesteps(LEADING, steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps, allowed", [(1, 1e-6), (4, 1e-6), (7, 1e-6), (30, 1e-6), (50, 1e-6), (999, 1e-5)])
def test_every_step_of_ddim_equals_diffusers(scheduler, draw, steps, allowed, eta):
    """To fp32 rounding, which adds up over 999 steps."""
    x = draw(2, 4, 8, 8)
    wanted = theirs(scheduler, x, steps, eta, seed=3)
    found = run("ddim", x, steps, generators=seeded(3, 2), eta=eta)
    assert len(found) == steps
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) <= allowed


def test_x_is_not_changed_in_place(draw):
    x = draw(1, 4, 8, 8)
    before = x.clone()
    *_, last = run("ddim", x, 4)
    assert torch.equal(x, before) and not torch.equal(last, before)


def test_a_thousand_steps_visit_every_timestep_that_exists(draw):
    visited = timesteps(SD, 1000)
    assert len(visited) == 1000 and visited[0] == 999 and visited[-1] == 1 and set(visited) == set(range(1, 1000))
    *_, last = run("ddim", draw(1, 4, 4, 4), 1000)
    assert last.isfinite().all()


def test_the_unet_is_told_the_timestep_as_a_tensor(draw):
    seen, prompt = [], Prompt(draw(1, 3, 8))
    list(
        ddim(guided(lambda x, t, prompt: seen.append(t) or x, prompt, prompt, 1), draw(1, 4, 4, 4), ddim_levels(SD, 4))
    )
    assert [t.item() for t in seen] == [751, 501, 251, 1] and all(t.dtype == torch.int64 for t in seen)


def test_the_last_step_ends_at_the_first_alpha_and_not_at_one(scheduler, draw):
    """From t = 1 a noise prediction of x / sqrt(1 - alpha) leaves nothing but the noise of alphas_cumprod[0]."""
    x = draw(1, 4, 4, 4)
    spread = (1 - scheduler.alphas_cumprod[1]).sqrt()
    (last,) = ddim(predicted(lambda x, t: x / spread), x, ddim_levels(LEADING, 1))
    assert rel(last, x / spread * (1 - scheduler.final_alpha_cumprod).sqrt()) <= 1e-5
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


# The schedule


def config(schedule: Schedule) -> dict[str, object]:
    """In the words of diffusers."""
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": PREDICTIONS[schedule.prediction],
        "rescale_betas_zero_snr": schedule.zero_snr,
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "timestep_spacing": schedule.spacing,
        "clip_sample": False,
    }


PIXART = Schedule(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
ZERO = Schedule(zero_snr=True, prediction="v", spacing="trailing")
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


@pytest.mark.parametrize("schedule", [SD, PIXART, ZERO, replace(ZERO, beta_schedule="linear")])
def test_alphas_equal_diffusers(schedule):
    found, wanted = schedule.alphas_cumprod, DDIMScheduler.from_config(config(schedule)).alphas_cumprod
    assert found.dtype == torch.float32 and found.shape == (1000,) and schedule.alphas_cumprod is found
    assert rel(found, wanted) <= 1e-6 and ((found.sqrt() - wanted.sqrt()).abs() <= 1e-6).all()
    assert schedule.zero_snr or ((found / wanted - 1).abs() <= 1e-5).all()
    assert (found[-1] == 0) == schedule.zero_snr


def test_a_schedule_is_a_value():
    assert SD == Schedule() and hash(SD) == hash(Schedule()) and {SD: 1}[Schedule()] == 1
    assert replace(SD, spacing="trailing") != SD
    assert SD.sigmas[0] == pytest.approx(0.0292, abs=1e-4) and SD.sigmas[-1] == pytest.approx(14.61, abs=0.01)
    assert ZERO.sigmas[-1] == math.inf and ZERO.level(999).alpha == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prediction": "v_prediction"}, "prediction: 'v_prediction' given, 'eps' or 'v' allowed"),
        ({"spacing": "karras"}, "spacing: 'karras' given, None, 'leading', 'trailing' or 'linspace' allowed"),
        (
            {"beta_schedule": "exp"},
            "beta_schedule: 'exp' given, 'scaled_linear' or 'linear' allowed",
        ),
        (
            {"zero_snr": True},
            "prediction: 'eps' given, 'v' wanted with zero_snr: where all is noise, eps tells nothing",
        ),
    ],
)
def test_schedules_that_do_not_exist_are_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        Schedule(**wrong)
    assert str(error.value) == message


@pytest.mark.parametrize("schedule, allowed", [(SD, 1e-6), (PIXART, 2e-6), (ZERO, 1e-6)])
def test_add_noise_equals_diffusers(schedule, allowed, draw):
    """PixArt's first alpha is 0.9999: in fp32 what is left of 1 has few digits."""
    scheduler = DDIMScheduler.from_config(config(schedule))
    x, n, t = draw(5, 4, 4, 4), draw(5, 4, 4, 4), torch.tensor([0, 1, 300, 998, 999])
    assert rel(add_noise(x, n, t, schedule), scheduler.add_noise(x, n, t)) <= allowed


def test_training_takes_the_schedule_that_it_is_given():
    t = torch.arange(1000)
    assert torch.equal(v_weight(t), (1 / SD.alphas_cumprod).clamp(max=16))
    assert torch.equal(v_weight(t, PIXART), (1 / PIXART.alphas_cumprod).clamp(max=16))
    assert v_weight(t, ZERO).max() == 16


def test_timestep_is_the_inverse_of_sigma_also_between_timesteps():
    assert all(abs(SD.timestep(sigma) - t) <= 1e-6 for t, sigma in enumerate(SD.sigmas))
    for t in (0, 3, 500, 998):
        assert abs(SD.timestep((SD.sigmas[t] * SD.sigmas[t + 1]) ** 0.5) - (t + 0.5)) <= 1e-6


# Which timesteps


@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a"])
def test_nothing_asked_for_is_leading_but_where_that_would_lose_a_whole_stride(name):
    """600 steps in whole strides of 1 start at t = 600, where pictures have their composition: so they do not."""

    def visited(spacing: str | None, steps: int) -> list[tuple[float, float]]:
        return [(level.t, level.sigma) for level in SAMPLERS[name].levels(Schedule(spacing=spacing), steps)]

    for steps in (*range(2, 36), 40, 45, 50, 100, 125, 200, 250, 333, 500, 1000):
        assert visited(None, steps) == visited("leading", steps)
    for steps in (1, 48, 60, 64, 70, 75, 80, 120, 150, 300, 400, 501, 600, 750, 999):
        assert visited(None, steps) == visited("trailing", steps)
    assert SAMPLERS[name].levels(replace(ZERO, spacing=None), 20)[0].t == 999
    for steps in range(1, 1001, 7):
        (first, _), (second, _), *_ = visited(None, steps)
        assert first + 2 * (first - second) >= 999


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
def test_levels_go_down_from_noise_to_picture(name, spacing):
    sampler = SAMPLERS[name]
    for schedule in (Schedule(spacing=spacing), replace(ZERO, spacing=spacing)):
        for steps in (1, 2, 7, 20, 50, sampler.max_steps):
            levels = sampler.levels(schedule, steps)
            assert len(levels) == steps + 1 and all(0 <= level.t <= 999 for level in levels)
            assert all(level.sigma >= after.sigma for level, after in pairwise(levels))
            assert levels[-1] == (schedule.level(0) if name == "ddim" else Level(0, 0.0))


@pytest.mark.parametrize("spacing, elsewhere", [(None, 0), ("leading", 0), ("trailing", 19), ("linspace", 27)])
def test_a_step_of_ddim_ends_where_the_next_one_starts_unless_diffusers_is_asked_for(spacing, elsewhere):
    levels = ddim_levels(Schedule(spacing=spacing), 28)
    assert sum(level.end is not None and level.end.t != after.t for level, after in pairwise(levels)) == elsewhere
    assert not any(level.end for level in ddim_levels(SD, 60))


def test_ddim_may_end_at_the_picture_itself():
    assert ddim_levels(Schedule(set_alpha_to_one=True), 4)[-1] == Level(0, 0.0)


@pytest.mark.parametrize("name", ["dpm++", "lcm"])
def test_spacing_is_of_no_effect_where_levels_are_chosen_otherwise(name):
    sampler = SAMPLERS[name]
    wanted = sampler.levels(SD, 4)
    assert all(
        sampler.levels(Schedule(spacing=spacing), 4) == wanted for spacing in ("leading", "trailing", "linspace")
    )


def test_one_step_begins_with_noise_however_spaced():
    """numpy's evenly spaced numbers from 0 to 999, if there is but one, are 0: no place to begin at."""
    for name in ("ddim", "euler", "euler-a", "unipc"):
        for spacing in ("trailing", "linspace"):
            assert SAMPLERS[name].levels(Schedule(spacing=spacing), 1)[0].t == 999


# All samplers

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
RANDOM = {"euler-a": SAMPLERS["euler-a"].run, "lcm": SAMPLERS["lcm"].run, "ddim, eta 0.7": partial(ddim, eta=0.7)}
RANDOM_LEVELS = {name: SAMPLERS[name.split(",")[0]].levels(SD, 6) for name in RANDOM}


class Toy(torch.nn.Module):
    """In the UNet's place, and told the prompt; what it was asked is kept."""

    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(0.3))
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        self.asked.append((x, t))
        return eps(x, t) + self.strength * prompt.text.mean(dim=(1, 2))[:, None, None, None]


def diffusers_scheduler(name: str, schedule: Schedule = LEADING):
    own = {"dpm++": {"use_karras_sigmas": True}}.get(name, {})
    return SCHEDULERS[name].from_config(config(schedule) | own)


def diffusers_run(
    scheduler, model, x: torch.Tensor, steps: int, first: int = 0, **rest
) -> tuple[list[torch.Tensor], list[int]]:
    """As the pipelines call a scheduler: x after each step (of unit variance), and the timesteps."""
    scheduler.set_timesteps(steps)
    visit = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):  # else it takes the second of two equal timesteps for the first
        scheduler.set_begin_index(first)
    xs, x = [], x if first else x * scheduler.init_noise_sigma
    for i, t in enumerate(visit):
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **rest).prev_sample
        grown = isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
        xs.append(x / (1 + scheduler.sigmas[first + i + 1] ** 2) ** 0.5 if grown else x)
    return xs, visit.tolist()


def compare(draw, name: str, steps: int, schedule: Schedule, prediction: str = "eps", allowed: float = 5e-6) -> None:
    """Every x, and every t that the UNet is told, with guidance."""
    schedule = replace(schedule, prediction=prediction)
    x, toy = draw(2, 4, 8, 8), Toy()
    prompt, null = Prompt(draw(2, 3, 8)), Prompt(draw(2, 3, 8))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        null_output, output = toy(x, t, null), toy(x, t, prompt)
        return null_output + 3 * (output - null_output)

    with torch.no_grad():
        rest = {"generator": seeded(5, 2)} if name in RANDOM else {}
        wanted, asked = diffusers_run(diffusers_scheduler(name, schedule), model, x, steps, **rest)
    toy.asked.clear()
    sampler = SAMPLERS[name]
    levels = sampler.levels(schedule, steps)
    start = sampler.start(x, schedule, levels[0])
    found = list(sampler.run(guided(toy, prompt, null, 3, prediction), start, levels, seeded(5, 2)))
    assert [t.item() for _, t in toy.asked] == pytest.approx(asked)
    assert rel(toy.asked[0][0], torch.cat([start, start])) <= 1e-6  # the first call sees the noise itself
    assert rel(start, x) <= 3e-3
    assert len(found) == steps
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) <= allowed


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 14, 15, 20, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_equals_diffusers(draw, name, steps, prediction):
    """Given what each is used to: "leading", and "linspace" for unipc. (A single "leading" step, from t = 1, is not used.)"""
    ours = replace(SD, prediction=prediction, spacing="linspace" if name == "unipc" else "leading")
    assert steps == 1 or SAMPLERS[name].levels(SD, steps) == SAMPLERS[name].levels(ours, steps)
    compare(draw, name, steps, ours, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 30, 48])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a", "unipc"])
def test_every_spacing_equals_diffusers(draw, name, spacing, steps, prediction):
    if spacing == "linspace" and steps == 1 and name != "unipc":
        spacing = "trailing"
    compare(draw, name, steps, Schedule(spacing=spacing), prediction)


@pytest.mark.parametrize("steps", [3, 20, 28])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_new_noise_in_every_spacing_equals_diffusers(draw, spacing, steps):
    schedule, x = Schedule(spacing=spacing), draw(2, 4, 8, 8)
    wanted, _ = diffusers_run(diffusers_scheduler("ddim", schedule), eps, x, steps, eta=0.6, generator=seeded(3, 2))
    found = run("ddim", x, steps, schedule, generators=seeded(3, 2), eta=0.6)
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) <= 5e-6


@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a", "dpm++", "unipc"])
def test_other_betas_and_offsets_equal_diffusers(draw, name):
    compare(draw, name, 10, replace(PIXART, spacing="leading", steps_offset=0, set_alpha_to_one=True))
    compare(draw, name, 10, replace(PIXART, spacing="trailing", set_alpha_to_one=True))


@pytest.fixture
def fp64(monkeypatch):
    """diffusers computes in fp64: in fp32 its x_0 + 4096 eps has an error that is larger than ours may be."""
    for scheduler in SCHEDULERS.values():
        for name, module in {"torch": torch, "np": np}.items():
            double = SimpleNamespace(**(vars(module) | {"float32": module.float64}))
            monkeypatch.setattr(f"{scheduler.__module__}.{name}", double)


@pytest.mark.parametrize("spacing, steps", [("trailing", 1), ("trailing", 4), ("trailing", 28), ("linspace", 10)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_equals_diffusers(draw, fp64, name, spacing, steps):
    """NoobAI-XL's: rescaled betas, v, trailing. At t = 999 there is nothing but noise."""
    compare(draw, name, steps, replace(ZERO, spacing=spacing), "v")


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_from_pure_noise_v_tells_the_picture(draw, name):
    """One step from t = 999: what is left is x_0 = -v, but for the lowest noise level that DDIM ends at."""
    x, v, prompt = draw(1, 4, 4, 4), draw(1, 4, 4, 4), Prompt(draw(1, 3, 8))
    levels = SAMPLERS[name].levels(ZERO, 1)
    (found,) = SAMPLERS[name].run(guided(lambda x, t, prompt: v, prompt, prompt, 1, "v"), x, levels)
    end = levels[-1]
    assert rel(found, -(end.alpha**0.5) * v + (1 - end.alpha) ** 0.5 * x) <= 3e-4  # 4096 is not infinity


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["ddim", "euler", "euler-a", "lcm"])
def test_few_steps_of_distilled_models_equal_diffusers(draw, name, steps):
    """SD-Turbo, SDXL-Turbo and SDXL-Lightning: trailing, no guidance."""
    schedule, (x, prompt), toy = Schedule(spacing="trailing"), (draw(1, 4, 8, 8), Prompt(draw(1, 3, 8))), Toy()
    rest = {"generator": seeded(5, 1)} if name in RANDOM else {}
    with torch.no_grad():
        model = partial(toy, prompt=prompt)
        wanted, asked = diffusers_run(diffusers_scheduler(name, schedule), model, x, steps, **rest)
    sampler = SAMPLERS[name]
    levels = sampler.levels(schedule, steps)
    start = sampler.start(x, schedule, levels[0])
    found = list(sampler.run(guided(toy, prompt, prompt, 1), start, levels, seeded(5, 1)))
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) <= 5e-6
    assert asked[0] == 999 and asked == [level.t for level in levels[:-1]]


@pytest.mark.parametrize("name, steps", [("euler", 333), ("euler-a", 333), ("dpm++", 150), ("unipc", 333), ("lcm", 33)])
def test_many_steps_equal_diffusers(draw, name, steps):
    """To fp32 rounding, which adds up."""
    x, rest = draw(2, 4, 4, 4), {"generator": seeded(5, 2)} if name in RANDOM else {}
    schedule = Schedule(spacing="linspace" if name == "unipc" else "leading")
    (*_, wanted), _ = diffusers_run(diffusers_scheduler(name, schedule), eps, x, steps, **rest)
    *_, found = run(name, x, steps, schedule, generators=seeded(5, 2))
    assert rel(found, wanted) <= 1e-5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_equal_diffusers_at_many_step_counts(name, spacing):
    """Above 197 steps a noise level of Karras's may fall halfway between two timesteps, to within fp32 rounding."""
    schedule = Schedule(spacing=spacing)
    scheduler = diffusers_scheduler(name, schedule)
    more = {"lcm": [], "dpm++": [64, 99, 100, 150, 197]}.get(name, [64, 96, 99, 100, 150, 197, 240, 333, 480, 560])
    for steps in (*range(2, 51), *more):
        scheduler.set_timesteps(steps)
        visited = torch.tensor([level.t for level in SAMPLERS[name].levels(schedule, steps)[:-1]])
        assert torch.equal(visited.to(scheduler.timesteps), scheduler.timesteps)


@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "leading"), ("euler", "linspace")])
def test_a_part_of_the_levels_is_image_to_image(draw, name, spacing):
    """As diffusers' pipeline cuts its timesteps: of 10 steps at strength 0.6 the last 6, from the picture with noise."""
    x_0, n, schedule = draw(2, 4, 8, 8), draw(2, 4, 8, 8), Schedule(spacing=spacing)
    scheduler = diffusers_scheduler(name, schedule)
    pipeline = SimpleNamespace(scheduler=scheduler)
    scheduler.set_timesteps(10)
    cut, count = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, 10, 0.6, "cpu")
    theirs = scheduler.add_noise(x_0, n, cut[:1].repeat(2))
    wanted, _ = diffusers_run(scheduler, eps, theirs, 10, first=4)

    levels = SAMPLERS[name].levels(schedule, 10)[4:]
    assert [level.t for level in levels[:-1]] == pytest.approx(cut.tolist()) and count == 6
    x = levels[0].alpha ** 0.5 * x_0 + (1 - levels[0].alpha) ** 0.5 * n
    found = list(SAMPLERS[name].run(predicted(), x, levels))
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) <= 5e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_levels_alone_go_on_where_the_first_stopped(draw, name):
    """But for what a multistep method remembers: to it the first step behind the cut is a first step."""
    x, levels = draw(2, 4, 8, 8), SAMPLERS[name].levels(SD, 12)
    generators = seeded(5, 2)
    *_, half = SAMPLERS[name].run(predicted(), x, levels[:7], generators)
    *_, last = SAMPLERS[name].run(predicted(), half, levels[6:], generators)
    *_, whole = SAMPLERS[name].run(predicted(), x, levels, seeded(5, 2))
    assert rel(last, whole) <= (0.1 if name in ("dpm++", "unipc") else 1e-6)


def test_v_is_not_taken_for_eps(draw):
    x, prompt = draw(1, 4, 8, 8), Prompt(draw(1, 3, 8))
    *_, as_eps = ddim(guided(Toy(), prompt, prompt, 1), x, ddim_levels(SD, 4))
    *_, as_v = ddim(guided(Toy(), prompt, prompt, 1, "v"), x, ddim_levels(SD, 4))
    assert rel(as_eps, as_v) > 0.01


def test_samplers_are_called_alike():
    wanted = list(inspect.signature(ddim).parameters.values())[:4]
    for sampler in SAMPLERS.values():
        parameters = list(inspect.signature(sampler.run).parameters.values())
        assert parameters[:4] == wanted
        assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters[4:])
    assert SCHEDULERS.keys() == SAMPLERS.keys()
    assert [sampler.steps for sampler in SAMPLERS.values()] == [50, 50, 50, 20, 20, 4]
    assert [sampler.guidance_scale for sampler in SAMPLERS.values()] == [7.5, 7.5, 7.5, 7.5, 7.5, 1]


@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_most_steps_that_there_can_be_and_none_more(draw, name, spacing):
    x, sampler = draw(1, 4, 2, 2), SAMPLERS[name]
    before = x.clone()
    *_, last = run(name, x, sampler.max_steps, Schedule(spacing=spacing))
    assert last.isfinite().all() and not last.requires_grad and torch.equal(x, before)
    for steps in (-1, 0, sampler.max_steps + 1):
        with pytest.raises(ValueError, match=f"^`steps`: {steps} given, 1 to {sampler.max_steps} allowed$"):
            sampler.levels(SD, steps)


# Samplers that draw noise


@pytest.mark.parametrize("name", RANDOM)
def test_a_picture_does_not_depend_on_its_batch(name):
    levels = RANDOM_LEVELS[name]
    x, generators = noise_and_generators(range(11, 14), 64, 64)
    *_, together = RANDOM[name](predicted(), x, levels, generators)
    for j in range(3):
        x_j, generators_j = noise_and_generators([11 + j], 64, 64)
        *_, alone = RANDOM[name](predicted(), x_j, levels, generators_j)
        assert rel(together[j : j + 1], alone) <= 1e-6
    *_, others = RANDOM[name](predicted(), x, levels, seeded(99, 3))
    assert rel(others, together) > 0.01


@pytest.mark.parametrize("name", ["euler-a", "lcm"])
def test_start_noise_and_later_noise_are_those_of_diffusers_pipelines(name):
    """There one list of generators gives first the latents and then what the scheduler draws."""
    generators = seeded(7, 3)
    latents = randn_tensor((3, 4, 8, 12), generator=generators)
    (*_, wanted), _ = diffusers_run(diffusers_scheduler(name), eps, latents, 4, generator=generators)
    x, generators = noise_and_generators(range(7, 10), 64, 96)
    *_, found = run(name, x, 4, generators=generators)
    assert torch.equal(x, latents) and torch.equal(x, noise(7, 3, 64, 96))
    assert rel(found, wanted) <= 1e-6


@pytest.mark.parametrize("name", RANDOM)
def test_there_is_a_generator_for_each_picture(draw, name):
    with pytest.raises(ValueError):
        list(RANDOM[name](predicted(), draw(3, 4, 2, 2), RANDOM_LEVELS[name], seeded(0, 2)))


@pytest.mark.parametrize("name", RANDOM)
def test_without_generators_the_noise_is_pytorchs(draw, name):
    x, results = draw(2, 4, 4, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        *_, last = RANDOM[name](predicted(), x, RANDOM_LEVELS[name])
        results.append(last)
    assert torch.equal(results[0], results[1]) and rel(results[2], results[0]) > 0.01


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "unipc"])
def test_the_others_draw_nothing(draw, name):
    generators = seeded(0, 2)
    run(name, draw(2, 4, 4, 4), 4, generators=generators)
    for generator, fresh in zip(generators, seeded(0, 2), strict=True):
        assert torch.equal(generator.get_state(), fresh.get_state())


# eps, v and x_0


@pytest.mark.parametrize("schedule", [SD, ZERO])
@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_v_gives_the_noise_and_the_picture_it_was_made_of(draw, t, schedule):
    x_0, n, scheduler = draw(1, 4, 4, 4), draw(1, 4, 4, 4), DDIMScheduler.from_config(config(schedule))
    v = scheduler.get_velocity(x_0, n, torch.tensor(t))
    x = add_noise(x_0, n, torch.tensor([t]), schedule)
    found_n, found_x_0 = eps_and_x_0(v, x, schedule.level(t), "v")
    assert rel(found_n, n) <= 1e-6 and rel(found_x_0, x_0) <= 1e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.03, 1.0, 4.321, 157.0])
def test_eps_and_x_0_make_x_at_any_noise_level(draw, sigma, prediction):
    output, x, level = draw(1, 4, 4, 4), draw(1, 4, 4, 4), Level(1, sigma)
    eps, x_0 = eps_and_x_0(output, x, level, prediction)
    assert rel(level.alpha**0.5 * x_0 + (1 - level.alpha) ** 0.5 * eps, x) <= 1e-6
    v = level.alpha**0.5 * eps - (1 - level.alpha) ** 0.5 * x_0
    assert rel(eps if prediction == "eps" else v, output) <= 1e-6


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

AT_500 = SD.level(500)


@pytest.mark.parametrize("guidance_scale", [0, 0.5, 3, 7.5])
def test_guidance_is_the_formula(unet, base_adapter, draw, guidance_scale):
    x, t = draw(1, 4, 8, 8), torch.tensor(500)
    prompt, null = (Prompt(draw(1, 77, 64), (base_adapter.prompt(draw(1, 4, 64), 0.7),)) for _ in range(2))
    e_prompt, e_null = (unet(x, t, p) for p in (prompt, null))
    found, x_0 = guided(unet, prompt, null, guidance_scale)(x, AT_500)
    assert rel(found, e_null + guidance_scale * (e_prompt - e_null)) <= 1e-5
    assert rel(AT_500.alpha**0.5 * x_0 + (1 - AT_500.alpha) ** 0.5 * found, x) <= 1e-6
    assert rel(e_prompt, e_null) > 0.01


def test_guidance_of_one_is_the_prompt_alone_and_runs_it_alone(unet, draw):
    x, t = draw(2, 4, 8, 8), torch.tensor(500)
    prompt, null = Prompt(draw(2, 77, 64)), Prompt(draw(2, 77, 64))
    batches = []
    handle = unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    assert torch.equal(guided(unet, prompt, null, 1)(x, AT_500)[0], unet(x, t, prompt))
    guided(unet, prompt, null, 2)(x, AT_500)
    handle.remove()
    assert batches == [2, 2, 4]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_guidance_apart_is_the_same_in_half_the_batch(unet, draw, prediction):
    x, batches = draw(2, 4, 8, 8), []
    prompt, null = Prompt(draw(2, 77, 64)), Prompt(draw(2, 77, 64))
    together = guided(unet, prompt, null, 7.5, prediction)(x, AT_500)
    handle = unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    apart = guided(unet, prompt, null, 7.5, prediction, apart=True)(x, AT_500)
    handle.remove()
    assert batches == [2, 2]
    assert all(rel(a, b) < 1e-5 for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("guidance_scale", [1, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_answers_in_fp32_whatever_the_unet(unet, draw, guidance_scale, prediction):
    half = copy.deepcopy(unet).bfloat16()
    prompt, null = Prompt(draw(1, 77, 64).bfloat16()), Prompt(draw(1, 77, 64).bfloat16())
    answer = guided(half, prompt, null, guidance_scale, prediction)(draw(1, 4, 8, 8), AT_500)
    assert [part.dtype for part in answer] == [torch.float32, torch.float32]


def test_guidance_takes_any_function_of_x_t_and_prompt(unet, draw):
    """What stands between the sampler and the UNet need not be a module."""
    x, prompt, null = draw(1, 4, 8, 8), Prompt(draw(1, 77, 64)), Prompt(draw(1, 77, 64))
    closure = guided(lambda x, t, prompt: unet(x, t, prompt), prompt, null, 7.5)
    assert torch.equal(closure(x, AT_500)[0], guided(unet, prompt, null, 7.5)(x, AT_500)[0])


def test_a_prediction_that_does_not_exist_is_refused(unet, draw):
    prompt = Prompt(draw(1, 77, 64))
    with pytest.raises(ValueError, match="^prediction: 'v_prediction' given, 'eps' or 'v' allowed$"):
        guided(unet, prompt, prompt, 1, "v_prediction")
