"""One step of every kind of adapter on every family of bases, against diffusers' modules and the official objective."""

import copy
from dataclasses import replace

import pytest
import torch
from counterparts import diffusers_unet_with, randomise, rel
from diffusers import DDPMScheduler
from narrow import NARROW_IMAGE, NARROW_XL
from torch.nn.functional import mse_loss

from ipadapter.objective import drops
from training.chance import draws
from training.ranks import Ranks
from training.recipes import KINDS, new_adapter
from training.trainer import Trainer
from unet import UNet

pytestmark = pytest.mark.slow

XL = ("epsilon", 96)
BASES = {"sd1": ("epsilon", 64), "sd2": ("v_prediction", 64), "sdxl": XL}
DISTILLED = {  # of SDXL: no attention in the middle, fewer layers, in SSD-1B not as many in each block
    "SSD-1B": replace(NARROW_XL, middle=(0,), up=((2, 3, 4), (2, 1, 1), (0, 0, 0))),
    "Segmind-Vega": replace(NARROW_XL, down=((0, 0), (1, 1), (2, 2)), middle=(0,), up=((2,) * 3, (1,) * 3, (0,) * 3)),
}
CASES = [(family, kind) for family in BASES for kind in KINDS]
CASES += [("SSD-1B", "base"), ("SSD-1B", "faceid"), ("Segmind-Vega", "plus")]
LEARNED = ("_ip.", "encoder_hid_proj", "lora_")  # parts of diffusers' names
PLACES = [0, 1, 2]


def features(kind: str, context: int, sized: bool) -> dict[str, torch.Tensor]:
    """Of three pairs."""
    generator = torch.Generator().manual_seed(0)
    encoder, reads = NARROW_IMAGE, KINDS[kind]
    shapes = {"mean": (4, 8, 8), "std": (4, 8, 8), "text": (77, context)}
    if reads.patches or not reads.faces:
        shapes["image"] = (17, encoder.width) if reads.patches else (encoder.projection,)
    shapes |= {"face": (512,)} if reads.faces else {}
    shapes |= {"pooled": (32,)} if sized else {}
    found = {key: torch.randn(3, *shape, generator=generator) for key, shape in shapes.items()}
    sizes = torch.tensor([[600, 400, 25, 0, 64, 64], [64, 64, 0, 0, 64, 64], [90, 200, 0, 50, 64, 64]])
    return found | ({"sizes": sizes} if sized else {})


@pytest.mark.parametrize("family, kind", CASES)
def test_loss_and_gradients_equal_diffusers_and_the_official_objective(request, tmp_path, family, kind):
    twin, (prediction, context) = request.getfixturevalue(family if family in BASES else "sdxl"), BASES.get(family, XL)
    base, sized = twin.base, bool(twin.base.sinusoids)
    torch.manual_seed(0)
    unet = randomise(UNet(DISTILLED[family]), 1) if family in DISTILLED else twin.parts[1]
    adapter = new_adapter(kind, unet, NARROW_IMAGE)
    for layer in adapter.ip_adapter.values():
        for lora in layer.loras().values() if adapter.lora_rank else ():
            torch.nn.init.normal_(lora.up.weight, std=0.05)  # else nothing reaches the way down
    batch = features(kind, context, sized)
    null = {key: torch.zeros_like(value[0]) for key, value in batch.items() if key not in ("mean", "std", "sizes")}
    version_2 = kind == "faceid-plusv2"
    ours = Trainer(
        adapter.requires_grad_(),
        unet,
        null,
        Ranks(torch.device("cpu")),
        seed=0,
        dtype=torch.float32,
        learning_rate=1e-3,
        weight_decay=0.01,
        loss=None,
        drop=(0.3, 0.3, 0.0),
        warmup=0,
        clip_grad=0.0,
        ema=0.0,
        noise_schedule=base.schedule,
        sinusoids=base.sinusoids,
        structure_scale=1.0 if version_2 else None,
    )
    detach = adapter.attach(unet)
    loss = ours.objective(**ours.noised(PLACES, batch))
    loss.backward()
    detach()

    theirs = diffusers_unet_with(unet, adapter).requires_grad_()
    u, t, posterior, noise = draws(0, PLACES, (4, 8, 8))
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    x, told = batch["mean"] + batch["std"] * posterior, {key: value.clone() for key, value in batch.items()}
    for i, (no_text, no_image) in enumerate(zip(*drops(u, 0.3, 0.3, 0.0), strict=True)):
        for key in ("text", "pooled") * bool(no_text) + ("image", "face") * bool(no_image):
            if key in told:
                told[key][i] = 0
    added = {"image_embeds": [told["face" if "face" in told else "image"][:, None]]}
    if "face" in told and "image" in told:
        projection = theirs.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds = told["image"][:, None]
        projection.shortcut, projection.shortcut_scale = version_2, 1.0
    if sized:
        added |= {"text_embeds": told["pooled"], "time_ids": told["sizes"]}
    found = theirs(scheduler.add_noise(x, noise, t), t, told["text"], added_cond_kwargs=added).sample
    wanted = mse_loss(found, noise if prediction == "epsilon" else scheduler.get_velocity(x, noise, t))
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)

    gradients = copy.deepcopy(adapter).requires_grad_(False)  # through the same loader, as if they were weights
    for p, q in zip(gradients.parameters(), adapter.parameters(), strict=True):
        p.copy_(q.grad)
    there = dict(diffusers_unet_with(unet, gradients).named_parameters())
    learned = {name: p for name, p in theirs.named_parameters() if any(part in name for part in LEARNED)}
    assert sum(p.numel() for p in learned.values()) == sum(p.numel() for p in adapter.parameters())
    for part in LEARNED if adapter.lora_rank else LEARNED[:2]:
        pairs = [(there[name].flatten(), p.grad.flatten()) for name, p in learned.items() if part in name]
        assert rel(*(torch.cat(side).detach() for side in zip(*pairs, strict=True))) < 1e-5, part
