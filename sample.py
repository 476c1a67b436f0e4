"""Make pictures with image prompts.

  python sample.py                                    the bundled example, with the bundled tiny model
  python sample.py --image cat.png                    an image prompt
  python sample.py --image cat.png --prompt "a rocket"  an image prompt and text
  python sample.py --prompt "a red apple"             text alone

With Stable Diffusion 1.5 and a released adapter:
  python sample.py --base v1-5-pruned-emaonly.safetensors --adapter ip-adapter_sd15.safetensors \\
      --image-encoder model.safetensors --image cat.png
"""

import argparse
import math
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clip import PictureError, open_picture, preprocess, tokenize
from clip.tokenizer import cut
from ipadapter import ImagePrompt, IPAdapter, Prompt, flags
from ipadapter.pictures import save_png, sheet, to_pil
from sampler import ddim, guided, noise
from unet import UNet
from vae import VAE
from weights import Base, WeightsError, check_fit, load_adapter, load_image_encoder, load_vae, open_base
from weights.hashes import sha256

TINY = Path(__file__).parent / "tiny"
EXAMPLE = TINY / "example.png"  # one of the unseen drawings
TINY_FILES = {
    "base": TINY / "weights/sd-tiny.safetensors",
    "adapter": TINY / "weights/ip-adapter-tiny.safetensors",
    "image_encoder": TINY / "weights/clip-tiny.safetensors",
}
BATCH = 4  # pictures that go through the UNet together


def main() -> None:
    args = parse()
    output = first_name(args.output)
    hashes = start_hashing(args)
    began = time.time()

    base = open_base(args.base, args.dtype, args.device)
    vae = load_vae(args.vae, args.dtype, args.device) if args.vae else None
    adapter = load_adapter(args.adapter, args.dtype, args.device) if args.image else None
    tokens, null_tokens = image_prompt(args, base, adapter) if args.image else (None, None)
    text, null_text = text_prompt(args, base)

    unet = base.unet()
    if adapter:
        adapter.attach(unet)
    latents = []
    with tqdm(total=args.steps * batches(args) * len(args.scale), desc="denoising", unit="step") as bar:
        for scale in args.scale:
            images = (ImagePrompt(tokens, scale),) if args.image else ()
            null_images = (ImagePrompt(null_tokens, scale),) if args.image else ()
            latents.append(denoise(args, unet, Prompt(text, images), Prompt(null_text, null_images), bar))
    del unet

    vae = vae or base.vae()
    pictures = [decode(vae, x.to(args.dtype)) for x in latents]
    names = save(args, pictures, output, {name: future.result() for name, future in hashes.items()})
    report(args, names, time.time() - began)


@torch.no_grad()
def image_prompt(args: argparse.Namespace, base: Base, adapter: IPAdapter) -> tuple[Tensor, Tensor]:
    """The image prompt's tokens and those of its absence; the image encoder is freed on return."""
    encoder = load_image_encoder(args.image_encoder, args.dtype, args.device)
    check_fit(adapter, args.adapter, base, encoder, args.image_encoder)
    pixels = torch.cat([preprocess(open_picture(path), encoder.config.image_size) for path in args.image])
    pixels = pixels.to(args.device, args.dtype)
    return adapter.tokens(encoder, pixels), adapter.null_tokens(encoder, pixels)


@torch.no_grad()
def text_prompt(args: argparse.Namespace, base: Base) -> tuple[Tensor, Tensor]:
    """Text features of the prompt and of the negative prompt; the text tower is freed on return."""
    for flag, text in (("--prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
        if rest := cut(text):
            print(f"warning: {flag} is longer than 75 tokens; cut off: {rest!r}", file=sys.stderr)
    text, null = base.text()(tokenize([args.prompt, args.negative_prompt]).to(args.device)).split(1)
    return text, null


def denoise(args: argparse.Namespace, unet: UNet, prompt: Prompt, null: Prompt, bar: tqdm) -> Tensor:
    """From noise to latents (num_images, 4, height/8, width/8), a batch of pictures at a time."""
    done = []
    for start in noise(args.seed, args.num_images, args.height, args.width).to(args.device).split(BATCH):
        n = len(start)
        eps = guided(unet, Prompt.cat([prompt] * n), Prompt.cat([null] * n), args.guidance_scale)
        for x in ddim(eps, start, args.steps):
            bar.update()
        done.append(x)
    return torch.cat(done)


def batches(args: argparse.Namespace) -> int:
    return math.ceil(args.num_images / BATCH)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> list[Image.Image]:
    """One picture at a time: the autoencoder is what needs the most memory per pixel."""
    return [to_pil(vae.decode(x))[0] for x in latents.split(1)]


def save(
    args: argparse.Namespace, pictures: list[list[Image.Image]], output: Path, hashes: dict[str, str]
) -> list[Path]:
    """Write the pictures, and the sheet, each with all that is needed to make it again; pictures[scale][seed]."""
    shared = ("image", "prompt", "negative_prompt", "steps", "guidance_scale", "height", "width")
    settings = {name: getattr(args, name) for name in shared} | {
        "sampler": "ddim",
        "dtype": args.dtype_name,
        "device": str(args.device),
        "torch": torch.__version__,
        "sha256": hashes,
    }
    one = len(args.scale) * args.num_images == 1
    names = []
    for row, scale in zip(pictures, args.scale, strict=True):
        for j, picture in enumerate(row):
            names.append(output if one else output.with_stem(f"{output.stem}_{len(names)}"))
            save_png(picture, names[-1], settings | {"scale": scale, "seed": args.seed + j})
    if args.grid:
        names.append(output.with_stem(output.stem + "_grid"))
        save_png(grid(args, pictures), names[-1], settings | {"scale": args.scale, "seed": args.seed})
    return names


def grid(args: argparse.Namespace, pictures: list[list[Image.Image]]) -> Image.Image:
    """Image prompts on the left, then a column for each scale; a row for each seed."""
    columns = [*pictures]
    titles = [f"scale {scale:g}" for scale in args.scale] if args.image else [args.prompt[:32]]
    if args.image:
        columns.insert(0, [open_picture(path) for path in args.image])
        titles.insert(0, "image prompt")
    return sheet(list(zip_longest(*columns)), titles, side=min(args.width, 256))


def report(args: argparse.Namespace, names: list[Path], seconds: float) -> None:
    parts = [f"text {args.prompt!r}"] if args.prompt else []
    if args.image:
        scales = ", ".join(f"{scale:g}" for scale in args.scale)
        parts.insert(0, f"image prompt {', '.join(args.image)} (scale {scales})")
    print(f"{' and '.join(parts)}: {args.steps} steps, seed {args.seed}, {seconds:.1f} s", file=sys.stderr)
    print(*names, sep="\n")
    if args.bundled:
        print(
            "That was a bundled drawing as image prompt, and the bundled tiny model. Now with a picture of yours:\n"
            '  python sample.py --image FILE --prompt "a rocket" --scale 0 0.5 1 --grid\n'
            "With Stable Diffusion 1.5 and a released adapter: see python sample.py --help",
            file=sys.stderr,
        )


def parse() -> argparse.Namespace:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", nargs="+", default=[], metavar="FILE", help="image prompt; several pictures prompt together")
    add("--prompt", default="", help="text prompt")
    add("--negative-prompt", default="", help="what the picture should not be")
    add(
        "--scale",
        nargs="+",
        type=flags.number(0),
        metavar="S",
        help="weight of the image prompt; several: one picture for each (default: 1.0, with text 0.6)",
    )
    add("--steps", type=flags.whole(1, 1000), default=50, help="DDIM steps (default: %(default)s)")
    add(
        "--guidance-scale",
        type=flags.number(0),
        default=7.5,
        metavar="G",
        help="how far to follow the prompts; 1 is off (default: %(default)s)",
    )
    add(
        "--seed",
        type=flags.whole(0, 2**63 - 1),
        default=0,
        help="picture j is made from the noise of seed + j (default: %(default)s)",
    )
    add("--num-images", type=flags.whole(1), default=1, metavar="N", help="pictures to make (default: %(default)s)")
    add("--height", type=flags.side, help="pixels, a multiple of 8 (default: 512, tiny 128)")
    add("--width", type=flags.side, help="pixels, a multiple of 8 (default: 512, tiny 128)")
    add(
        "--base",
        metavar="FILE",
        help="Stable Diffusion 1.x, original layout, .safetensors or .ckpt (default: the tiny model)",
    )
    add("--adapter", metavar="FILE", help="IP-Adapter (base, light, plus or full-face), .safetensors or .bin")
    add("--image-encoder", metavar="FILE", help="CLIP image encoder, transformers or OpenCLIP layout")
    add("--vae", metavar="FILE", help="another autoencoder, original layout")
    add("--output", type=Path, default=Path("outputs"), help="a .png, or a folder (default: %(default)s)")
    add("--grid", action="store_true", help="also write a sheet: prompts beside results, a column per scale")
    add(
        "--device",
        type=flags.device,
        default=flags.default_device(),
        help="cpu, cuda, cuda:1, mps (default: the fastest here)",
    )
    add("--dtype", choices=flags.DTYPES, dest="dtype_name", help="default: float16 on cuda, float32 elsewhere")
    args = parser.parse_args()

    args.bundled = not args.image and not args.prompt and not args.base
    if args.bundled:
        args.image = [str(EXAMPLE)]
    if not args.image and not args.prompt:
        raise flags.UserError("--image or --prompt is wanted beside --base: what should the picture show?")
    if args.scale and not args.image:
        raise flags.UserError("--scale is the weight of an image prompt: it goes with --image")
    if args.base and args.image:
        for name in ("adapter", "image_encoder"):
            if getattr(args, name) is None:
                flag = f"--{name.replace('_', '-')}"
                raise flags.UserError(f"{flag} FILE is wanted beside --base and --image")
    args.scale = args.scale or [0.6 if args.prompt else 1.0]
    default_side = 512 if args.base else 128
    args.height, args.width = args.height or default_side, args.width or default_side
    args.dtype_name = args.dtype_name or ("float16" if args.device.type == "cuda" else "float32")
    args.dtype = flags.DTYPES[args.dtype_name]
    for name, path in TINY_FILES.items():
        setattr(args, name, getattr(args, name) or str(path))
    for path in args.image:
        open_picture(path)  # before anything slow
    return args


def first_name(output: Path) -> Path:
    """Where the first picture goes: a .png as given, in a folder the next free number. Refuses early what cannot be."""
    numbered = output.suffix.lower() != ".png"
    if numbered and output.suffix and not output.is_dir():
        raise flags.UserError(f"--output {output}: a name that ends in .png, or a folder, is wanted")
    folder = output if numbered else output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise flags.UserError(f"--output {output}: cannot write there ({error.strerror})") from None
    if not numbered:
        return output
    taken = [int(number) for path in folder.glob("*.png") if (number := path.stem.split("_")[0]).isdigit()]
    return folder / f"{max(taken, default=-1) + 1:05d}.png"


def start_hashing(args: argparse.Namespace) -> dict[str, Future]:
    """SHA-256 of every file that the picture depends on, on a thread of its own while the models work."""
    files = [args.base, *([args.adapter, args.image_encoder, *args.image] if args.image else [])]
    pool = ThreadPoolExecutor(max_workers=1)
    return {path: pool.submit(sha256, path) for path in files + ([args.vae] if args.vae else [])}


if __name__ == "__main__":
    flags.run(main, (WeightsError, PictureError))
