"""From prompts to pictures: the one loop. Whoever calls it owns the progress bar."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from control import attentions, controlled, joined
from files.errors import UserError
from files.pictures import Picture, to_pil
from generate.canvas import Canvas, canvas_of, size_of
from generate.control import Hint, follow
from generate.editing import IMAGE_GUIDANCE, ROWS, beginning, check_reads, steps_that_run
from generate.group import tell_effects
from generate.models import Models
from generate.prompt import sized
from ipadapter import Prompt, Scale, Seen, prepared, watched
from sampler import SAMPLERS, Level, Predict, Sampler, guided, noise_and_generators, numbered, widened
from vae import VAE
from weights.base import INSTRUCTED, Base

BATCH = 4  # pictures that go through the UNet together


@torch.no_grad()
def pictures(
    models: Models,
    prompt: Prompt | Sequence[Prompt],  # what to show; several: `count` of each; of `Prompt.cat`: a row for each seed
    null: Prompt | Sequence[Prompt],  # its absence, or the negative prompt; one for all, or one for each
    seed: int | Sequence[int] = 0,  # picture j is made from the noise of seed + j; several: one of each, and no `count`
    count: int = 1,  # how many pictures of each prompt
    steps: int | None = None,  # None: what suits the sampler (DDIM 50)
    guidance_scale: float | None = None,  # how far to follow the prompt; 1 or less: off; None: 7.5, or the base's own
    guidance_rescale: float = 0.0,  # how far to bring the guided prediction's spread back to the prompt's own, 0 to 1
    image_guidance_scale: float | None = None,  # likewise the image prompt by itself, in a third pass; None: alike
    sampler: str = "ddim",  # one of sampler.SAMPLERS
    height: int | None = None,  # pixels, a multiple of 8; None: what the base was made for, or as `init` (`size_of`)
    width: int | None = None,  # likewise
    init: Picture | Canvas | None = None,  # a picture to begin with, not pure noise; or with all of this (`canvas_of`)
    strength: float | None = None,  # how far from it: the last int(steps * strength) run; None: 0.8, with a mask 1
    inpaint: Picture | None = None,  # a mask over it: white is made anew, black stays; grey between, if the base can
    outpaint: Sequence[int] | None = None,  # pixels to add to it left, above, right and below; they are made anew
    only_masked: int | None = None,  # work around the mask alone, so many pixels more, and paste back: all else stays
    controls: Sequence[Hint] = (),  # what to follow besides, each with one of the nets that were opened as `controls`
    batch: int = BATCH,  # pictures that go through the UNet together
    on_step: Callable[[], object] = lambda: None,  # called after each step of each batch
    on_seen: Callable[[Seen], object] | None = None,  # told where a prompt acts, picture by picture (`attention_sheet`)
) -> Iterator[Image.Image]:
    """Make pictures, each handed out as soon as it is done: seeds in turn, prompts in turn.

    Raises:
        UserError: a setting out of its range; a UNet whose prediction is not finite.
    """
    canvas, edits = None, (init, inpaint, strength, outpaint, only_masked)
    if any(one is not None for one in edits):
        canvas = canvas_of(*edits)
    if models.base.channels != 4:
        check_reads(models.base, canvas)
    height, width = size_of(canvas, models.side, height, width)
    if height % 8 or width % 8:
        raise UserError(f"`height` and `width`: {height} and {width} given, multiples of 8 are wanted")
    if not 0 <= guidance_rescale <= 1:
        raise UserError(f"`guidance_rescale`: {guidance_rescale} given, 0 to 1 is wanted")
    levels, schedule = levels_of(models.base, sampler, steps, canvas), models.base.schedule
    guidance_scale = usual_guidance(models, sampler) if guidance_scale is None else max(1.0, guidance_scale)
    prompts = [prompt] if isinstance(prompt, Prompt) else list(prompt)
    nulls = [null] * len(prompts) if isinstance(null, Prompt) else list(null)
    if image_guidance_scale is not None or models.base.channels == INSTRUCTED:
        image_guidance_scale = half_guidance(models.base, prompts, image_guidance_scale)
    if any(image.mask is not None or isinstance(image.scale, Scale) for p in prompts for image in p.images):
        across, down = canvas.picture.size if canvas and canvas.padding is not None else (width, height)
        tell_effects(prompts, len(levels) - 1, down, across)
    if models.base.sinusoids:
        prompts, nulls = ([sized(p, models, height, width) for p in side] for side in (prompts, nulls))
    if canvas:
        prompts, nulls = ([canvas.framed(p, height, width) for p in side] for side in (prompts, nulls))
    seeds = range(seed, seed + count) if isinstance(seed, int) else seed
    size = 1 if models.low_memory else max(batch, *(len(p.text) for p in prompts), 1)
    pairs = zip(prompts, nulls, strict=True)
    parts = [(p, n, seeds[i : i + size]) for p, n in pairs for i in range(0, len(seeds), size)]
    begun = beginning(models, canvas, height, width) if canvas else None
    unet = models.unet(face=any(p.images for p in prompts))
    nets = follow(models, controls, height, width, canvas) if controls else []
    layers = list(attentions(unet, nets) if nets else unet.cross_attentions())
    model = controlled(unet, nets) if nets else unet
    model = model if models.base.channels == 4 else widened(model)
    for number, (p, n, some) in enumerate(parts, 1):
        p, n = rows(p, len(some)), rows(n, len(some))
        p, n = joined(p, n, nets) if nets else (p, n)
        if not models.low_memory:
            p, n = (prepared(one, layers) for one in (p, n))
        run, beside = SAMPLERS[sampler], None
        if begun:
            x, generators, run, beside = begun.drawn(run, schedule, levels, some)
        else:
            noise, generators = noise_and_generators(some, height, width)
            x = run.start(noise.to(models.device), schedule, levels[0])
        guidance = guidance_scale, schedule.prediction, models.low_memory, guidance_rescale
        if beside is not None or image_guidance_scale is not None:
            p, half, n = passes(p, n, beside, instructed=models.base.channels == INSTRUCTED)
            guidance += (half, image_guidance_scale) if image_guidance_scale is not None else ()
        predict = guided(model, p, n, *guidance)
        with watched(unet.cross_attentions(), p) if on_seen else nullcontext() as watch:
            x = denoise(run, predict, x, levels, generators, on_step)
        for seen in watch.seen() if watch else ():
            on_seen(replace(seen, box=canvas.part(height, width) if canvas else None))
        if number == len(parts):
            del unet, model, predict, layers, nets  # unless it is kept, before the autoencoder takes its place
        if not x.isfinite().all():
            raise UserError(f"the UNet's prediction is not finite in {models.dtype}; try another `dtype`")
        yield from (canvas.finished(made) if canvas else made for made in decode(models, x))


def levels_of(base: Base, sampler: str, steps: int | None, canvas: Canvas | None) -> list[Level]:
    """The noise levels of a run. Raises UserError: no such sampler, or not so many steps."""
    if sampler not in SAMPLERS:
        raise UserError(f"`sampler`: {sampler!r} given, one of {', '.join(SAMPLERS)} is wanted")
    row = SAMPLERS[sampler]
    steps = row.steps if steps is None else steps
    if not 1 <= steps <= row.max_steps:
        raise UserError(f"`steps` {steps}: 1 to {row.max_steps} with {sampler}")
    return numbered(row.visit(base.schedule, steps)[-1 - steps_that_run(base, canvas, steps) :])


def usual_guidance(models: Models, sampler: str) -> float:
    """What a distilled base wants, or else what the sampler is used to."""
    return models.base.guidance_scale or SAMPLERS[sampler].guidance_scale


def half_guidance(base: Base, prompts: Sequence[Prompt], asked: float | None) -> float | None:
    """How far to follow a half of the prompt by itself (see `passes`); None: no further than the whole.

    Raises:
        UserError: there is none.
    """
    if base.config.guidance_dim:
        raise UserError("`image_guidance_scale`: this base is told one guidance scale, and runs one pass")
    if base.channels == INSTRUCTED:
        return IMAGE_GUIDANCE if asked is None else asked
    if asked is not None and not all(p.images for p in prompts):
        raise UserError("`image_guidance_scale`: there is no image prompt to follow by itself; it goes with `image`")
    return asked


def passes(p: Prompt, n: Prompt, beside: Tensor | None, instructed: bool) -> tuple[Prompt, Prompt, Prompt]:
    """The whole prompt, a half of it, and its absence, with what the UNet reads beside x.

    The half is the image prompt without the text, or, of a base that is `instructed`, the picture without instruction; of
    its absence that picture is 0.
    """
    p, n = (replace(one, beside=beside) for one in (p, n))
    return (p, n, replace(n, beside=torch.zeros_like(beside))) if instructed else (p, replace(n, images=p.images), n)


def denoise(
    sampler: Sampler,
    predict: Predict,
    noise: Tensor,
    levels: Sequence[Level],
    generators: Sequence[torch.Generator] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """From noise to latents, both (batch, 4, height/8, width/8)."""
    for latents in sampler.run(predict, noise, levels, generators):
        on_step()
    return latents


def rows(prompt: Prompt, count: int) -> Prompt:
    """A prompt for so many pictures: one that all share, or one row for each as it is."""
    return prompt if len(prompt.text) == count else Prompt.cat([prompt] * count)


@torch.no_grad()
def decode(models: Models, latents: Tensor) -> Iterator[Image.Image]:
    """Latents (batch, 4, height/8, width/8) to pictures, one at a time: nothing needs more memory per pixel.

    An autoencoder that overflows in half precision is taken again in fp32: that gives a picture, not a black one.
    """
    rows, vae = ROWS if models.low_memory else None, models.vae()
    for x in latents.split(1):
        pixels = decoded(vae, x, rows)
        if not pixels.isfinite().all() and next(vae.parameters()).dtype != torch.float32:
            vae = models.vae(torch.float32)
            pixels = decoded(vae, x, rows)
        if not pixels.isfinite().all():
            raise UserError("the autoencoder's picture is not finite: a damaged base, or settings far out of range")
        yield to_pil(pixels)[0]


def decoded(vae: VAE, x: Tensor, rows: int | None) -> Tensor:
    return vae.decode(x.to(next(vae.parameters()).dtype), rows)
