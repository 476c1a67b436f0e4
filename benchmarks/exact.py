"""How exactly our models and whole runs agree with diffusers, transformers and open_clip, on random weights in fp32.

    python -m benchmarks.exact              full size: SD 1.5 and ViT-H/14; minutes, 14 GB of memory
    python -m benchmarks.exact --narrow     the same at small widths, whole runs at 128x128; seconds
    python -m benchmarks.exact --only "ControlNet" "T2I-Adapter"      these whole runs, a side at a time: 12 GB

Needs diffusers, transformers, accelerate and open_clip_torch; downloads nothing. Both sides read the same files
through their own loaders. Prints what was found and what is allowed; the exit code is 1 if anything is out of bounds.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import controlled, reference
from benchmarks import structured as structures
from benchmarks.controlled import HEARD
from benchmarks.reference import FULL, NARROW, Files, Sizes, distance
from benchmarks.structured import EDITING, STRUCTURE, Asked
from clip import CLIPImage, CLIPText, preprocess, tokenize
from files.pictures import open_picture, to_pil
from generate import open_models
from generate.picture import denoise
from ipadapter import ImagePrompt, IPAdapter, Prompt
from sampler import SAMPLERS, guided, noise
from unet import UNet
from vae import VAE
from weights import load_adapter, load_image_encoder, open_base

MODULE, LATENTS, PIXELS = 1e-5, 1e-4, 1.0  # allowed: relative L2 of a module, of final latents; 1/255 in any pixel
SEED, STEPS, GUIDANCE, SIDE = 7, 4, 7.5, 256  # a side of what single modules are given
TEXT, NEGATIVE = "A red fox's photo, 35mm; café in the snow!", "blurry, low quality"
TEXTS = [TEXT, NEGATIVE, "", "don't  STOP & 1234, 🙂 日本 naïve", "word " * 100]
RUNS = [  # name, adapter, scale, prompt, negative prompt
    ("text only", None, 0.0, TEXT, ""),
    ("image only", "base", 1.0, "", ""),
    ("image, text, negative", "base", 0.6, TEXT, NEGATIVE),
    ("plus, image, text", "plus", 0.8, TEXT, ""),
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    item: str
    found: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed  # and so False for NaN


def run(narrow: bool = False, folder: Path | None = None, only: Sequence[str] = ()) -> list[Row]:
    """All comparisons, or some whole runs. Weights stay in the folder; without one they are thrown away."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return run(narrow, Path(temporary), only)
    sizes = NARROW if narrow else FULL
    rows = []
    with torch.no_grad():
        files = reference.write(folder, sizes)
        whole = chain(open_clip_layout(files, sizes), against_diffusers(files))
        for row in some(files, only) if only else whole:
            print(
                f"{row.item:42} {row.found:9.2e}  allowed {row.allowed:7.0e}  {'ok' if row.ok else 'OUT OF BOUNDS'}",
                flush=True,
            )
            rows.append(row)
    return rows


def some(files: Files, only: Sequence[str]) -> Iterator[Row]:
    """Whole runs of these names, in the order of the tables: the last of them alters the UNet."""
    if names := tuple(name for name in HEARD if name in only):
        yield from heard(reference.pipeline(files), files, names)
    if names := tuple(name for name in STRUCTURE + EDITING if name in only):
        yield from structured(files, names)


def open_clip_layout(files: Files, sizes: Sizes) -> Iterator[Row]:
    """An image encoder in OpenCLIP's own layout against open_clip itself."""
    from open_clip.transformer import VisionTransformer

    shape = sizes.image
    with torch.device("meta"):
        theirs = VisionTransformer(
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            width=shape.width,
            layers=shape.layers,
            heads=shape.heads,
            mlp_ratio=shape.mlp / shape.width,
            output_dim=shape.projection,
        ).eval()
    state = reference.randomize(theirs.state_dict(), seed=10, dtype=torch.float32)
    theirs.load_state_dict(state, assign=True)
    path = files.folder / "open_clip.safetensors"
    save_file({f"visual.{key}": value for key, value in state.items()}, path)
    ours = load_image_encoder(path)
    path.unlink()
    hidden = []
    theirs.transformer.resblocks[-1].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    pixels = preprocess(open_picture(files.picture))
    yield module("open_clip: image embedding", ours(pixels), theirs(pixels))
    yield module("open_clip: penultimate", ours.penultimate(pixels), hidden[0])


def against_diffusers(files: Files) -> Iterator[Row]:
    """Everything else, against one diffusers pipeline on the same files."""
    theirs = reference.pipeline(files)
    base = open_base(files.base)
    picture, side = open_picture(files.picture), files.side
    encoder, text_tower = load_image_encoder(files.image_encoder / "model.safetensors"), base.text()
    yield from clip_towers(theirs, text_tower, encoder, files)
    pixels = preprocess(picture)
    features = {"base": encoder(pixels), "plus": encoder.penultimate(pixels)}
    paths = {"base": files.adapter, "plus": files.plus}
    adapters = {name: load_adapter(path) for name, path in paths.items()}
    tokens = {
        name: (adapter.tokens(encoder, pixels), adapter.null_tokens(encoder, pixels))
        for name, adapter in adapters.items()
    }
    del encoder
    vae, unet = base.vae().to(memory_format=torch.channels_last), base.unet().to(memory_format=torch.channels_last)
    yield from autoencoder(theirs.vae, vae)
    yield module("UNet", *unet_outputs(theirs.unet, unet))

    attached = None
    for name, kind, scale, text, negative in RUNS:
        if kind != attached:
            reference.attach(theirs, paths[kind])
            yield from adapted(theirs.unet, unet, adapters[kind], features[kind], kind)
            attached = kind
        texts = text_tower(tokenize([text, negative])).split(1)
        images = [(adapters[kind].prompt(t, scale),) for t in tokens[kind]] if kind else [(), ()]
        prompt, null = (Prompt(*parts) for parts in zip(texts, images, strict=True))
        predict = guided(unet, prompt, null, GUIDANCE)
        x = denoise(
            SAMPLERS["ddim"], predict, noise(SEED, 1, side, side), SAMPLERS["ddim"].levels(base.schedule, STEPS)
        )

        if kind:
            theirs.set_ip_adapter_scale(scale)
        latents = []
        kept = {"callback_on_step_end": lambda pipe, i, t, now, latents=latents: latents.append(now["latents"]) or {}}
        size = {"height": side, "width": side}
        seen = picture if kind else None
        found = reference.drawn(theirs, text, negative, seen, STEPS, GUIDANCE, SEED, **size, **kept)
        yield Row(f"run, {name}: latents", distance(x, latents[-1]), LATENTS)
        yield Row(f"run, {name}: pixels", steps_apart(to_pil(vae.decode(x))[0], found), PIXELS)
    del vae, unet, text_tower
    yield from heard(theirs, files)
    yield from structured(files, STRUCTURE + EDITING, theirs)


def heard(theirs: nn.Module, files: Files, names: Sequence[str] = HEARD) -> Iterator[Row]:
    """Whole runs with two adapters, in some layers, in parts of the picture, in some steps; the plus adapter stays."""
    named = files.base, [files.adapter, files.plus], files.image_encoder
    models = open_models(*named, device="cpu", dtype="float32", keep=False)
    how = {"text": TEXT, "negative": NEGATIVE, "seed": SEED, "side": files.side, "steps": STEPS, "guidance": GUIDANCE}
    for name, ours, found in controlled.runs(models, theirs, open_picture(files.picture), names, **how):
        yield Row(f"run, {name}: pixels", steps_apart(ours, found), PIXELS)


def structured(files: Files, names: tuple[str, ...], theirs: nn.Module | None = None) -> Iterator[Row]:
    """Whole runs beside the plus adapter; without a pipeline that has it, ours are over before theirs are begun."""
    asked = Asked(TEXT, NEGATIVE, SEED, files.side, STEPS, GUIDANCE)
    ours = dict(structures.ours(files, asked, names))
    if theirs is None:
        theirs = reference.pipeline(files)
        reference.attach(theirs, files.plus)
    for name, found in structures.theirs(theirs, files, asked, names):
        yield Row(f"run, {name}, plus: pixels", steps_apart(ours[name], found), PIXELS)


def clip_towers(theirs: nn.Module, text_tower: CLIPText, encoder: CLIPImage, files: Files) -> Iterator[Row]:
    tokens = tokenize(TEXTS)
    other = theirs.tokenizer(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    yield Row("tokens that differ", (tokens != other).sum().item(), 0)
    yield module("text tower", text_tower(tokens), theirs.text_encoder(tokens).last_hidden_state)
    picture = open_picture(files.picture)
    pixels = preprocess(picture)
    other = theirs.feature_extractor(picture, return_tensors="pt").pixel_values
    yield module("preprocessing", pixels, other)
    out = theirs.image_encoder(pixels, output_hidden_states=True)
    yield module("image tower: embedding", encoder(pixels), out.image_embeds)
    yield module("image tower: penultimate", encoder.penultimate(pixels), out.hidden_states[-2])


def autoencoder(theirs: nn.Module, vae: VAE) -> Iterator[Row]:
    pixels, latents = random(1, 3, SIDE, SIDE).clamp(-1, 1), random(1, 4, SIDE // 8, SIDE // 8)
    factor = theirs.config.scaling_factor
    yield module("VAE: encode, mean", vae.encode(pixels), theirs.encode(pixels).latent_dist.mean * factor)
    yield module("VAE: decode", vae.decode(latents), theirs.decode(latents / factor).sample)


def adapted(theirs: nn.Module, unet: UNet, adapter: IPAdapter, features: Tensor, kind: str) -> Iterator[Row]:
    """The image projection, and the UNet with the adapter; the second of two pictures is one of zeros."""
    features = torch.cat([features, torch.zeros_like(features)])
    reference.set_scale(theirs, 0.7)
    tokens = adapter.image_proj(features)
    yield module(f"{kind}: image projection", tokens, theirs.encoder_hid_proj([features[:, None]])[0].flatten(1, 2))
    bare, _ = unet_outputs(None, unet)
    ours, other = unet_outputs(theirs, unet, (adapter.prompt(tokens, 0.7),), {"image_embeds": [features[:, None]]})
    yield module(f"{kind}: UNet with the adapter", ours, other)
    # A comparison of adapters that change nothing would prove nothing.
    yield Row(f"{kind}: inverse of the adapter's effect", 1 / distance(ours, bare), 100)


def unet_outputs(
    theirs: nn.Module | None, unet: UNet, images: tuple[ImagePrompt, ...] = (), added: dict | None = None
) -> tuple[Tensor, Tensor | None]:
    x, text, t = random(2, 4, SIDE // 8, SIDE // 8), random(2, 77, unet.config.context_dim), torch.tensor(481)
    other = None if theirs is None else theirs(x, t, text, added_cond_kwargs=added).sample
    return unet(x, t, Prompt(text, images)), other


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def module(item: str, ours: Tensor, theirs: Tensor) -> Row:
    return Row(item, distance(ours, theirs), MODULE)


def steps_apart(ours: object, theirs: object) -> float:
    """The largest difference of any pixel, in steps of 1/255."""
    return float(np.abs(np.asarray(ours, dtype=np.int32) - np.asarray(theirs, dtype=np.int32)).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--narrow", action="store_true", help="small widths")
    parser.add_argument("--folder", type=Path, help="keep the weight files here (4 GB at full size)")
    parser.add_argument(
        "--only", nargs="+", choices=HEARD + STRUCTURE + EDITING, default=(), help="these whole runs alone"
    )
    args = parser.parse_args()
    return 0 if all(row.ok for row in run(args.narrow, args.folder, args.only)) else 1


if __name__ == "__main__":
    sys.exit(main())
