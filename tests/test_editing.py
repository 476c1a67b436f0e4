"""A picture to begin with: image to image, inpainting, instructions; equal to diffusers' pipelines."""

import copy
import hashlib
import io
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from counterparts import (
    Twin,
    assert_same_picture,
    diffusers_unet,
    listed_once,
    opened,
    prefixed,
    published,
    randomise,
    rel,
)
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from narrow import NARROW_UNET
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file, save_file
from test_sample import sample
from test_sampler import LEADING, config, eps, predicted
from test_structure import their_controlnet

from files.errors import UserError
from files.masks import open_mask
from files.pictures import from_pil, read_settings
from generate import Hint, open_models, pictures, prompts
from generate.again import unsound
from generate.canvas import Canvas, around, canvas_of, size_of
from generate.editing import posteriors, steps_that_run
from generate.picture import decode
from ipadapter import Prompt
from sampler import SAMPLERS, SD, inpainted
from unet import UNet
from weights import load_adapter, open_base
from weights.control import load_control

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers and numpy
]
TEXT, SEED, STEPS = "a red fox in the snow, 35mm", 7, 5
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "euler-a": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading"}),
    "dpm++": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"timestep_spacing": "linspace"}),
    "lcm": (LCMScheduler, {}),
}


@cache
def photo(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth, and of many colours."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@cache
def mask(width: int = 96, height: int = 64) -> Image.Image:
    """A disc on the left, whose edge lies off the latent's grid."""
    found = Image.new("L", (width, height))
    ImageDraw.Draw(found).ellipse((width * 0.12, height * 0.2, width * 0.6, height * 0.93), fill=255)
    return found


def with_channels(twin: Twin, channels: int, folder: Path) -> Twin:
    """The same base, but for a UNet that reads more."""
    unet, path = (
        randomise(UNet(replace(twin.parts[1].config, in_channels=channels)), 30 + channels),
        folder / "b.safetensors",
    )
    save_file(load_file(twin.base.path) | prefixed("model.diffusion_model.", unet), path)
    theirs = type(twin.pipeline)(**twin.pipeline.components | {"unet": diffusers_unet(unet)})
    theirs.set_progress_bar_config(disable=True)
    return Twin(open_base(path), theirs)


@pytest.fixture(scope="module")
def sd1_9(tmp_path_factory, sd1) -> Twin:
    return with_channels(sd1, 9, tmp_path_factory.mktemp("sd1_9"))


@pytest.fixture(scope="module")
def sd1_8(tmp_path_factory, sd1) -> Twin:
    return with_channels(sd1, 8, tmp_path_factory.mktemp("sd1_8"))


@pytest.fixture(scope="module")
def sdxl_9(tmp_path_factory, sdxl) -> Twin:
    return with_channels(sdxl, 9, tmp_path_factory.mktemp("sdxl_9"))


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory, base_adapter) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter.bin"
    torch.save(published(base_adapter), path)
    return path


@pytest.fixture(scope="module")
def prompted(adapter_file):
    """A twin's pipeline that has an adapter, made once for each."""
    made = {}

    def pipeline(twin: Twin) -> DiffusionPipeline:
        if id(twin) not in made:
            found = copy.copy(twin.pipeline)
            found = type(found)(**found.components | {"unet": copy.deepcopy(found.unet)})
            with listed_once(found.unet):
                file = {"subfolder": "", "weight_name": adapter_file.name, "image_encoder_folder": None}
                found.load_ip_adapter(str(adapter_file.parent), **file)
            found.set_ip_adapter_scale(0.7)
            made[id(twin)] = found
        return made[id(twin)]

    return pipeline


def ours(
    twin: Twin, adapter: Path | None = None, encoder=None, nets: tuple[Path, ...] = (), **how
) -> tuple[torch.Tensor, np.ndarray]:
    kinds = {net: load_control(net, twin.base, device="meta") for net in nets}
    models = replace(opened(twin, adapter and load_adapter(adapter), encoder), controls=nets, control_kinds=kinds)
    pair = prompts(models, TEXT, images=[photo(80, 80)] if adapter else [], scale=0.7 if adapter else None)
    latents = []
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or decode(models, x)):
        hints = [Hint(photo())] if nets else []
        (picture,) = pictures(models, *pair, SEED, controls=hints, **{"steps": STEPS} | how)
    return latents[0], np.asarray(picture)


def theirs(kind, pipeline: DiffusionPipeline, sampler: str = "ddim", **how) -> tuple[torch.Tensor, np.ndarray]:
    scheduler, settings = SCHEDULERS[sampler]
    scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
    found = kind.from_pipe(pipeline, scheduler=scheduler) if kind else pipeline
    found.set_progress_bar_config(disable=True)
    if getattr(pipeline.unet, "encoder_hid_proj", None) is not None:
        how["ip_adapter_image"] = [photo(80, 80)]
    latents = []
    picture = found(
        TEXT,
        generator=torch.Generator().manual_seed(SEED),
        num_inference_steps=how.pop("steps", STEPS),
        callback_on_step_end=lambda pipeline, i, t, tensors: latents.append(tensors["latents"]) or {},
        **{"guidance_scale": SAMPLERS[sampler].guidance_scale} | how,
    ).images[0]
    return latents[-1], np.asarray(picture)


# Image to image


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_equals_diffusers(sd1, sampler):
    how = {"strength": 0.6, "sampler": sampler}
    wanted = theirs(StableDiffusionImg2ImgPipeline, sd1.pipeline, image=photo(), **how)
    assert_same_picture(ours(sd1, init=photo(), **how), wanted)


SOME = [
    sampler if sampler in ("ddim", "euler-a") else pytest.param(sampler, marks=pytest.mark.slow) for sampler in SAMPLERS
]


@pytest.mark.parametrize("sampler", SOME)
def test_image_to_image_with_an_image_prompt_equals_diffusers(sd1, adapter_file, image_tower, prompted, sampler):
    """From the noised picture at strength 1 too."""
    how = {"strength": 0.8 if sampler == "ddim" else 1.0, "sampler": sampler, "steps": 3}
    found = ours(sd1, adapter_file, image_tower, init=photo(), **how)
    assert_same_picture(found, theirs(StableDiffusionImg2ImgPipeline, prompted(sd1), image=photo(), **how))


@pytest.mark.slow
def test_image_to_image_with_sdxl_equals_diffusers(sdxl):
    how = {"strength": 0.6, "sampler": "euler"}
    wanted = theirs(StableDiffusionXLImg2ImgPipeline, sdxl.pipeline, image=photo(), **how)
    assert_same_picture(ours(sdxl, init=photo(), **how), wanted)


def test_a_picture_of_another_size_is_brought_to_the_one_asked_for_as_diffusers_does(sd1):
    how = {"strength": 0.4, "init": photo(150, 100), "height": 64, "width": 96}
    wanted = theirs(
        StableDiffusionImg2ImgPipeline, sd1.pipeline, image=photo(150, 100).resize((96, 64), 1), strength=0.4
    )
    assert_same_picture(ours(sd1, **how), wanted)


@pytest.mark.parametrize("steps, strength, run", [(50, 0.58, 28), (100, 0.29, 28), (50, 1, 50), (4, 0.8, 3), (1, 1, 1)])
def test_the_steps_that_run_are_those_of_diffusers(sd1, steps, strength, run):
    """`int` cuts floating-point numbers off: 50 * 0.58 is 28.999..."""
    assert steps_that_run(sd1.base, Canvas(photo(), strength=strength), steps) == run
    pipeline = StableDiffusionImg2ImgPipeline.from_pipe(sd1.pipeline)
    pipeline.scheduler.set_timesteps(steps)
    assert len(pipeline.get_timesteps(steps, strength, "cpu")[0]) == run


# Inpainting


def inpainting(twin: Twin, kind=StableDiffusionInpaintPipeline, pipeline=None, sampler: str = "ddim", **how):
    """By diffusers, which in a base of 4 channels draws for the masked picture, too, without use for it."""
    if twin.base.channels == 4 and "padding_mask_crop" not in how:
        how["masked_image_latents"] = torch.zeros(1, 4, 8, 12)
    where = {"image": photo(), "mask_image": mask(), "height": 64, "width": 96}
    return theirs(kind, pipeline or twin.pipeline, sampler, **where | how)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_equals_diffusers(sd1, sampler):
    found = ours(sd1, init=photo(), inpaint=mask(), sampler=sampler, steps=3)
    assert_same_picture(found, inpainting(sd1, sampler=sampler, steps=3))


@pytest.mark.parametrize("base, sampler", [("sd1", "dpm++"), ("sd1_9", "ddim"), ("sd1_9", "euler-a")])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_with_an_image_prompt_equals_diffusers(
    request, adapter_file, image_tower, prompted, base, sampler, strength
):
    twin, how = request.getfixturevalue(base), {"strength": strength, "sampler": sampler, "steps": 3}
    found = ours(twin, adapter_file, image_tower, init=photo(), inpaint=mask(), **how)
    assert_same_picture(found, inpainting(twin, pipeline=prompted(twin), **how))


def test_a_base_for_inpainting_equals_diffusers(sd1_9):
    """Its samplers draw on behind the masked picture."""
    assert_same_picture(
        ours(sd1_9, init=photo(), inpaint=mask(), sampler="lcm", guidance_scale=3.0),
        inpainting(sd1_9, sampler="lcm", guidance_scale=3.0),
    )


@pytest.mark.slow
def test_a_base_for_inpainting_may_be_a_folder(sd1_9, tmp_path):
    sd1_9.pipeline.save_pretrained(tmp_path)
    twin = Twin(open_base(tmp_path), sd1_9.pipeline)
    found = [ours(one, init=photo(), inpaint=mask(), steps=2)[0] for one in (twin, sd1_9)]
    assert twin.base.channels == 9 and rel(*found) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_with_sdxl_equals_diffusers(request, sdxl, channels):
    twin = sdxl if channels == 4 else request.getfixturevalue("sdxl_9")
    found = ours(twin, init=photo(), inpaint=mask(), strength=1.0)
    assert_same_picture(found, inpainting(twin, StableDiffusionXLInpaintPipeline, strength=1.0))


def test_a_mask_of_another_size_is_brought_to_the_pictures_as_diffusers_does(sd1):
    found = ours(sd1, init=photo(), inpaint=mask(150, 100), steps=2)
    assert_same_picture(found, inpainting(sd1, mask_image=mask(150, 100), steps=2))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_soft_mask_blends_after_each_step(draw, sampler):
    """As diffusers' loop would, whose masks are never soft: each scheduler goes on from what was blended."""
    x_0, noise, soft = draw(1, 4, 4, 4), draw(1, 4, 4, 4), torch.rand(1, 1, 4, 4, generator=torch.Generator())
    kind, settings = SCHEDULERS[sampler]
    scheduler = kind.from_config(config(LEADING), **settings)
    scheduler.set_timesteps(STEPS)
    x, generator = noise * scheduler.init_noise_sigma, torch.Generator().manual_seed(SEED)
    for i, t in enumerate(scheduler.timesteps):
        output = eps(scheduler.scale_model_input(x, t), t)
        random = {"generator": generator} if sampler in ("euler-a", "lcm") else {}
        x = scheduler.step(output, t, x, **random).prev_sample
        kept = x_0 if i == STEPS - 1 else scheduler.add_noise(x_0, noise, scheduler.timesteps[i + 1][None])
        x = (1 - soft) * kept + soft * x
    row = SAMPLERS[sampler]
    run, levels = inpainted(row.run, x_0, noise, soft), row.levels(SD, STEPS)
    *_, last = run(predicted(), noise, levels, [torch.Generator().manual_seed(SEED)])
    assert rel(last, x) <= 1e-5


def test_a_soft_mask_stays_soft_where_the_base_has_4_channels(sd1, sd1_9):
    hard = mask().point(lambda v: 255 if v >= 128 else 0)
    soft = mask().filter(ImageFilter.GaussianBlur(8))
    cut = soft.point(lambda v: 255 if v >= 128 else 0)
    made = [ours(sd1, init=photo(), inpaint=m, steps=2)[0] for m in (hard, soft, cut)]
    assert rel(made[1], made[2]) > 0.01
    made = [ours(sd1_9, init=photo(), inpaint=m, steps=2)[0] for m in (soft, cut)]
    assert torch.equal(*made)


# A part alone


def test_working_on_the_mask_alone_equals_diffusers(sd1_9):
    """And outside of the mask no bit of the picture changes, whatever its size."""
    large, where = photo(203, 133), Image.new("L", (203, 133))
    ImageDraw.Draw(where).ellipse((90, 40, 130, 80), fill=255)
    where = where.filter(ImageFilter.GaussianBlur(2))
    how = {"height": 64, "width": 64, "strength": 0.6}
    found = ours(sd1_9, init=large, inpaint=where, only_masked=10, **how)
    wanted = inpainting(sd1_9, image=large, mask_image=where, padding_mask_crop=10, **how)
    assert_same_picture(found, wanted)
    kept = np.asarray(where) == 0
    assert found[1].shape == (133, 203, 3) and np.array_equal(found[1][kept], np.asarray(large)[kept])
    assert not np.array_equal(found[1][~kept], np.asarray(large)[~kept])


def test_an_image_prompts_mask_speaks_of_the_whole_picture(sd1, base_adapter, draw):
    """Of which only a part is worked on."""
    where = Image.new("L", (96, 64))
    where.paste(255, (64, 0, 96, 32))
    said = base_adapter.prompt(draw(1, 4, 64), mask=from_pil(photo())[:, :1])
    canvas = canvas_of(photo(), where, only_masked=0)
    found = canvas.framed(Prompt(draw(1, 77, 64), (said, replace(said, mask=None))), 64, 64)
    assert torch.equal(found.images[0].mask, said.mask[:, :, :32, 64:]) and found.images[1].mask is None
    whole = canvas_of(photo(), where).framed(Prompt(draw(1, 77, 64), (said,)), 64, 64)
    assert whole.images[0].mask is said.mask


@pytest.mark.parametrize("box", [(0, 0, 30, 30), (90, 40, 130, 80), (170, 2, 203, 133), (0, 50, 203, 60), (4, 4, 9, 5)])
@pytest.mark.parametrize("padding, size", [(0, (64, 64)), (32, (64, 96)), (7, (128, 64))])
def test_the_part_around_a_mask_is_that_of_diffusers(box, padding, size):
    where = Image.new("L", (203, 133))
    where.paste(9, box)
    wanted = VaeImageProcessor.get_crop_region(where, size[1], size[0], padding)
    assert around(where, padding, *size) == wanted


def test_outpainting_makes_the_added_pixels_anew(sd1):
    canvas = canvas_of(photo(50, 42), outpaint=(16, 0, 20, 8))
    assert canvas.picture.size == canvas.mask.size == (86, 50) and size_of(canvas, 64) == (48, 80)
    kept = canvas.mask.point(lambda v: 255 - v).getbbox()
    assert kept == (16, 0, 64, 40)  # in whole positions of the latent
    assert canvas.picture.crop((16, 0, 66, 42)).tobytes() == photo(50, 42).tobytes()
    assert canvas.picture.getpixel((0, 49)) == photo(50, 42).getpixel((0, 41))
    _, made = ours(sd1, init=photo(50, 42), outpaint=(16, 0, 20, 8), steps=2)
    assert made.shape == (48, 80, 3)
    _, made = ours(sd1, init=photo(50, 42), outpaint=(16, 0, 20, 8), only_masked=0, steps=2)
    assert made.shape == (50, 86, 3) and np.array_equal(made[0:40, 16:64], np.asarray(photo(50, 42))[:40, :48])


# Instructions


@pytest.mark.parametrize("adapter", [False, True])
def test_following_an_instruction_equals_diffusers(sd1_8, adapter_file, image_tower, prompted, adapter):
    given = (adapter_file, image_tower) if adapter else ()
    pipeline = prompted(sd1_8) if adapter else sd1_8.pipeline
    wanted = theirs(StableDiffusionInstructPix2PixPipeline, pipeline, image=photo(), image_guidance_scale=1.5)
    assert_same_picture(ours(sd1_8, *given, init=photo()), wanted)


# Under control


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> tuple[ControlNetModel, Path]:
    made, path = their_controlnet(NARROW_UNET, 50), tmp_path_factory.mktemp("net") / "net.safetensors"
    save_file({key: w.contiguous() for key, w in made.state_dict().items()}, path)
    return made, path


@pytest.mark.slow
@pytest.mark.parametrize("base, anew", [("sd1", False), ("sd1", True), ("sd1_9", True)])
def test_beginning_with_a_picture_under_control_equals_diffusers(
    request, adapter_file, image_tower, prompted, net, base, anew
):
    """The ControlNet reads the latent alone, also beside a base that reads more."""
    twin = request.getfixturevalue(base)
    how = {"init": photo(), "strength": 0.6} | ({"inpaint": mask()} if anew else {})
    found = ours(twin, adapter_file, image_tower, (net[1],), **how)
    kind = StableDiffusionControlNetInpaintPipeline if anew else StableDiffusionControlNetImg2ImgPipeline
    pipeline = kind(**prompted(twin).components, controlnet=net[0])
    wanted = {"image": photo(), "control_image": photo(), "strength": 0.6, "controlnet_conditioning_scale": 1.0}
    wanted |= {"mask_image": mask()} if anew else {}
    wanted |= {"height": 64, "width": 96}
    assert_same_picture(found, theirs(None, pipeline, **wanted))


# Seeds, memory


@pytest.mark.parametrize("base", ["sd1", "sd1_9", "sd1_8"])
def test_picture_j_is_that_of_seed_plus_j_whatever_the_batch_and_the_memory(request, base):
    models, latents = opened(request.getfixturevalue(base)), []
    how = {"init": photo(), "steps": 2} | ({} if base == "sd1_8" else {"inpaint": mask(), "sampler": "euler-a"})
    with patch("generate.picture.decode", lambda models, x: latents.append(x) or []):
        pair = prompts(models, TEXT)
        list(pictures(models, *pair, seed=3, count=3, **how))
        list(pictures(models, *pair, seed=5, **how))
        list(pictures(replace(models, low_memory=True), *pair, seed=5, **how))
    together, alone, less = latents
    assert rel(together[2:], alone) <= 1e-5 and rel(less, alone) <= 1e-5 and rel(together[:1], alone) > 0.1


def test_an_autoencoder_that_overflows_is_taken_in_fp32(sd1):
    models = opened(sd1)
    vae = copy.deepcopy(models.vae()).half()
    vae.encoder.conv_out.weight.data *= torch.inf
    models.held["vae"] = vae
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator()) * 2 - 1
    assert not vae.posterior(pixels.half())[0].isfinite().all()
    assert posteriors(models, pixels)[0][0].isfinite().all()


# Sizes


@pytest.mark.parametrize(
    "own, asked, wanted, told",
    [
        ((96, 64), {}, (64, 96), None),
        ((103, 65), {}, (64, 96), None),
        ((5, 5), {}, (8, 8), None),
        ((96, 64), {"height": 128}, (128, 192), None),
        ((96, 64), {"width": 48}, (32, 48), None),
        ((96, 64), {"height": 64, "width": 64}, (64, 64), "another aspect"),
        ((103, 65), {"height": 64, "width": 104}, (64, 104), None),
        ((400, 300), {}, (56, 72), "brought to 72x56"),
    ],
)
def test_the_size_is_the_pictures_own_unless_asked_for(recwarn, own, asked, wanted, told):
    assert size_of(canvas_of(photo(*own)), 64, **asked) == wanted
    assert [str(w.message) for w in recwarn] == [] if told is None else told in str(recwarn.pop().message)


# Bad input


def red(picture: Image.Image) -> Image.Image:
    return Image.merge("RGB", (picture, *(Image.new("L", picture.size),) * 2))


def clear(picture: Image.Image) -> Image.Image:
    return Image.merge("LA", (picture, picture))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"inpaint": mask()}, "`inpaint`: goes with `init`"),
        ({"strength": 0.5}, "`strength`: goes with `init`"),
        ({"outpaint": (8, 0, 0, 0)}, "`outpaint`: goes with `init`"),
        ({"init": photo(), "only_masked": 8}, "`only_masked`: goes with `inpaint`"),
        ({"init": photo(), "strength": 1.5}, "`strength`: 1.5 given, a number from 0 to 1 is wanted"),
        ({"init": photo(), "strength": -0.5}, "`strength`: -0.5 given"),
        ({"init": photo(), "strength": float("nan")}, "`strength`: nan given"),
        ({"init": photo(), "strength": 0.1}, "`strength` 0.1: leaves none of 5 `steps`"),
        ({"init": photo(), "strength": 0.0}, "`strength` 0: leaves none of 5 `steps`"),
        ({"init": photo(), "inpaint": mask(), "only_masked": -1}, "`only_masked`: -1 given"),
        ({"init": photo(), "outpaint": (0, 0, 0, 0)}, "`outpaint`: 0 0 0 0 given"),
        ({"init": photo(), "outpaint": (-8, 0, 0, 8)}, "`outpaint`: -8 0 0 8 given"),
        ({"init": photo(), "outpaint": (10**5, 0, 0, 10**5)}, "`outpaint`: 100096x100064 pixels in all, 67 million"),
        ({"init": photo(), "inpaint": Image.new("L", (96, 64))}, "the mask is all black"),
        ({"init": photo(), "inpaint": Image.new("RGB", (96, 64), "white")}, "the mask is all white"),
        ({"init": photo(), "inpaint": red(mask())}, "`inpaint`: has colours"),
        ({"init": photo(), "inpaint": clear(mask())}, "`inpaint`: has a transparent part"),
        ({"init": "nowhere.png"}, "nowhere.png: no such picture"),
        ({"init": photo(), "inpaint": "nowhere.png"}, "nowhere.png: no such picture"),
    ],
)
def test_what_does_not_go_is_said_in_a_line(sd1, given, said):
    models = opened(sd1)
    with pytest.raises(UserError) as error:
        list(pictures(models, *prompts(models, TEXT), steps=5, **given))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mask_too_thin_for_the_latent_is_refused(sd1):
    thin, models = Image.new("L", (96, 64)), opened(sd1)
    thin.paste(255, (41, 0, 44, 64))
    with pytest.raises(UserError, match="too thin"):
        list(pictures(models, *prompts(models, TEXT), init=photo(), inpaint=thin))


@pytest.mark.parametrize(
    "base, given, said",
    [
        ("sd1_9", {}, "an inpainting base; it wants `init`, a picture, and `inpaint`, a mask"),
        ("sd1_9", {"init": photo()}, "an inpainting base; it wants"),
        ("sd1_8", {}, "an instruction-editing base; it wants `init`"),
        ("sd1_8", {"init": photo(), "inpaint": mask()}, "`inpaint`: not with an instruction-editing base"),
        ("sd1_8", {"init": photo(), "strength": 0.5}, "`strength`: not with an instruction-editing base"),
    ],
)
def test_a_base_that_reads_more_says_what_it_wants(request, base, given, said):
    models = opened(request.getfixturevalue(base))
    with pytest.raises(UserError, match=said):
        list(pictures(models, *prompts(models, TEXT), **given))


def test_at_the_command_line_it_says_so_in_a_line_before_a_text_is_read(sd1_9, tmp_path):
    with patch("generate.models.Models.text_encoder", side_effect=AssertionError):
        made = sample(
            "--base",
            sd1_9.base.path,
            "--prompt",
            "x",
            "--init",
            ROOT / "tiny/example.png",
            "--output",
            tmp_path / "x.png",
        )
    assert made.returncode == 2 and made.stderr.count("\n") == 1 and "it wants --init, a picture, and" in made.stderr


def test_adapters_are_not_trained_on_a_base_that_reads_more(sd1_9):
    with pytest.raises(UserError, match="its UNet reads 9 channels; adapters are trained on those of 4"):
        open_models(base=sd1_9.base.path, image_encoder=ROOT / "tiny/weights/clip-tiny.safetensors", new_adapter=True)


# At the command line


@pytest.fixture(scope="module")
def brought(tmp_path_factory) -> tuple[Path, Path]:
    """A picture and a mask, in files."""
    folder = tmp_path_factory.mktemp("brought")
    photo(100, 72).save(folder / "init.png")
    mask(100, 72).save(folder / "mask.png")
    return folder / "init.png", folder / "mask.png"


def test_the_steps_that_run_are_told(brought, tmp_path):
    made = sample(
        "--init", brought[0], "--prompt", "x", "--steps", 3, "--strength", 0.7, "--output", tmp_path / "a.png"
    )
    assert made.returncode == 0 and "the last 2 of 3 steps of ddim" in made.stderr and "2/2" in made.stderr, made.stderr
    assert Image.open(tmp_path / "a.png").size == (96, 72)


@pytest.mark.parametrize(
    "how",
    [
        [
            "--inpaint",
            "MASK",
            "--only-masked",
            "8",
            "--image",
            ROOT / "tiny/example.png",
            "--low-memory",
            "--steps",
            "1",
        ],
        ["--outpaint", "8", "0", "0", "16", "--strength", "0.6", "--sampler", "euler-a", "--steps", "2"],
    ],
)
@pytest.mark.slow
def test_a_picture_says_what_it_began_with_and_is_made_again(brought, tmp_path, how):
    """Also where the files have other names now."""
    init, where = (tmp_path / path.name for path in brought)
    for old, new in zip(brought, (init, where), strict=True):
        new.write_bytes(old.read_bytes())
    how = [where if flag == "MASK" else flag for flag in how]
    first = sample("--init", init, *how, "--prompt", "x", "--output", tmp_path / "a.png")
    assert first.returncode == 0, first.stderr
    settings = read_settings(tmp_path / "a.png")
    assert settings["sha256"][str(init)] == hashlib.sha256(init.read_bytes()).hexdigest()
    init, where = init.rename(tmp_path / "moved.png"), where.rename(tmp_path / "moved-mask.png")
    second = sample("--again", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert second.returncode == 0, second.stderr
    one, other = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert one.tobytes() == other.tobytes() and one.size == ((100, 72) if "--only-masked" in how else (104, 88))
    for name, wrong in {"outpaint": 3, "strength": "much", "only_masked": [1], "init": 5}.items():
        assert unsound(settings) is None and unsound(settings | {name: wrong}) == name


@pytest.mark.parametrize("number", [0, 1])
def test_what_was_brought_is_never_replaced(brought, number):
    before = brought[number].read_bytes()
    how = ["--init", brought[0], "--inpaint", brought[1], "--prompt", "x", "--overwrite", "--output", brought[number]]
    made = sample(*how)
    assert made.returncode == 2 and "the file that is read as input" in made.stderr
    assert brought[number].read_bytes() == before


@pytest.mark.parametrize(
    "given, said",
    [
        (["--inpaint", "MASK"], "--inpaint: goes with --init, the picture to begin with"),
        (["--strength", "0.5"], "--strength: goes with --init"),
        (
            ["--init", "INIT", "--strength", "0.01"],
            "--strength 0.01: leaves none of 50 --steps; more of either is wanted",
        ),
        (["--init", "INIT", "--strength", "1.5"], "--strength: '1.5' given, a number from 0 to 1 is wanted"),
        (["--init", "INIT", "--inpaint", "INIT"], "init.png: has colours; a mask is grey"),
        (["--init", "INIT", "--only-masked"], "--only-masked: goes with --inpaint"),
        (["--init", "INIT", "--outpaint", "8", "8"], "--outpaint: expected 4 arguments"),
        (["--init", "nowhere.png"], "nowhere.png: no such picture"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_opened(brought, tmp_path, given, said):
    given = [{"INIT": brought[0], "MASK": brought[1]}.get(flag, flag) for flag in given]
    with patch("generate.models.open_base", side_effect=AssertionError):
        made = sample(*given, "--prompt", "x", "--output", tmp_path / "out")
    assert made.returncode == 2 and said in made.stderr and made.stderr.count("\n") == 1, made.stderr
    assert not (tmp_path / "out").exists()


# Masks in files


@pytest.mark.parametrize("kind", ["L", "1", "RGB", "P", "RGBA", "I;16", "jpeg"])
def test_a_grey_mask_is_read_from_any_kind_of_file(tmp_path, kind):
    path = tmp_path / ("m.jpg" if kind == "jpeg" else "m.png")
    wanted = mask().point(lambda v: 255 if v >= 128 else 0)
    if kind == "I;16":
        Image.fromarray(np.asarray(wanted).astype(np.uint16) * 257).save(path)
    else:
        wanted.convert("RGB" if kind in ("jpeg", "RGBA") else kind).convert("RGBA" if kind == "RGBA" else None).save(
            path
        )
    found = open_mask(path)
    assert found.mode == "L" and np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).max() <= 40 * (
        kind == "jpeg"
    )
    assert open_mask(io.BytesIO(path.read_bytes())).tobytes() == found.tobytes()


@pytest.mark.parametrize("make, said", [(red, "m.png: has colours"), (clear, "m.png: has a transparent part")])
def test_a_mask_with_other_channels_is_refused(tmp_path, make, said):
    make(mask()).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=said):
        open_mask(tmp_path / "m.png")
