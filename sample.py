"""Make pictures with image prompts.

  python sample.py                                    the bundled example, with the bundled tiny model
  python sample.py --image cat.png                    an image prompt
  python sample.py --image cat.png --prompt "a rocket"  an image prompt and text
  python sample.py --prompt "a red apple"             text alone

With published models, by name (python sample.py --list) or by file:
  python sample.py --adapter plus --image cat.png --prompt "in the snow"
  python sample.py --base model.safetensors --adapter ip-adapter_sd15.safetensors --image-encoder vit-h --image cat.png
  python sample.py --adapter faceid --face-embedding face.npy --prompt "portrait of an astronaut"
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from threading import Thread

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import cli
from clip import preprocess
from clip.tokenizer import cut
from files.errors import UserError
from files.faces import find_faces, read_embedding
from files.pictures import open_picture, save_png, to_pil
from files.sheets import sheet
from ipadapter import ImagePrompt, IPAdapter, Prompt
from sampler import MAX_STEPS, SAMPLERS, guided, noise_and_generators
from unet import UNet, size_vector
from vae import VAE
from weights import Base, WeightsError, check_fit, load_adapter, load_image_encoder, open_base
from weights.diffusers import model_sha256
from weights.hub import cached, fetch, table
from weights.lora import read_lora
from weights.presets import PRESETS, Preset, check_together, find, resolve
from weights.storage import STORAGES, store

TINY = Path(__file__).parent / "tiny"
EXAMPLE = TINY / "example.png"  # one of the unseen drawings
TINY_FILES = {kind: cached(found) for kind, found in resolve({}, image=True).items()}
MODELS = ("base", "adapter", "image_encoder", "vae")
BATCH = 4  # pictures that go through the UNet together
ROWS = 64  # of a picture that are decoded at once with --low-memory
STEPS = {"dpm++": 20, "unipc": 20, "lcm": 4}  # where fewer than DDIM's 50 are enough


def main() -> None:
    args = parse()
    hashes = start_hashing(args)
    began = time.time()

    base = open_base(args.base, args.loaded, args.device, args.prediction, args.loras, args.vae)
    args.height, args.width = args.height or args.side or base.side, args.width or args.side or base.side
    decoding = replace(base, dtype=args.dtype)  # --storage is not for the autoencoder
    adapter = open_adapter(args) if args.prompted else None
    tokens, null_tokens = image_prompt(args, base, adapter) if adapter else (None, None)
    text, null_text = text_prompt(args, base)

    unet = base.unet()
    if adapter:
        adapter.attach(unet, removable=False)
    stored(args, unet)
    latents = []
    with tqdm(total=args.steps * batches(args) * len(args.scale), desc="denoising", unit="step") as bar:
        for scale in args.scale:
            prompt, null = text, null_text
            if adapter:
                prompt = replace(text, images=(ImagePrompt(tokens, scale),))
                null = replace(null_text, images=(ImagePrompt(null_tokens, scale),))
            latents.append(denoise(args, unet, base.prediction, prompt, null, bar))
    del unet

    vae = decoding.vae()
    pictures = [decode(vae, x, args.strips) for x in latents]
    names = save(args, base, pictures, {name: future.result() for name, future in hashes.items()})
    report(args, names, time.time() - began)


def stored(args: argparse.Namespace, model: torch.nn.Module) -> torch.nn.Module:
    """Its large weights in the dtype of --storage, whatever it computes in."""
    return store(model, STORAGES[args.storage], args.dtype) if args.storage else model


def open_adapter(args: argparse.Namespace) -> IPAdapter:
    adapter = load_adapter(args.adapter, args.loaded, args.device)
    projection = adapter.image_proj.to(args.dtype)
    stored(args, adapter.ip_adapter)
    if args.faceid_v2 and not (projection.faces and projection.patches):
        raise UserError(f"--faceid-v2: for FaceID-plus adapters; {args.adapter} is another kind")
    if args.face_embedding and not projection.faces:
        raise UserError(f"--face-embedding: for FaceID adapters; {args.adapter} reads pictures (--image)")
    if args.structure_scale is not None and not args.faceid_v2:
        raise UserError(f"--structure-scale: for FaceID-plus version 2; {args.adapter} is another kind")
    if args.faceid_v2:
        projection.structure_scale = args.structure_scale
    return adapter


@torch.no_grad()
def image_prompt(args: argparse.Namespace, base: Base, adapter: IPAdapter) -> tuple[Tensor, Tensor]:
    """The image prompt's tokens and those of its absence; the image encoder is freed on return."""
    encoder = load_image_encoder(args.image_encoder, args.loaded, args.device) if adapter.reads_clip else None
    check_fit(adapter, args.adapter, base, encoder, args.image_encoder)
    images, faces = [open_picture(path) for path in args.image], None
    if adapter.image_proj.faces:
        if args.face_embedding and args.image and not encoder:
            raise UserError(f"--image: {args.adapter} reads the face alone, which --face-embedding gives")
        faces, images = face_prompt(args, images)
    pixels = None
    if encoder:
        if faces is not None and len(faces) != len(images):
            raise UserError(
                f"--face-embedding: {len(faces)} faces, --image: {len(images)} pictures of them; this adapter reads both"
            )
        stored(args, encoder)
        pixels = torch.cat([preprocess(image, encoder.config.image_size) for image in images])
        pixels = pixels.to(args.device, args.dtype)
    return adapter.tokens(encoder, pixels, faces), adapter.null_tokens(encoder, pixels, faces)


def face_prompt(args: argparse.Namespace, images: list[Image.Image]) -> tuple[Tensor, list[Image.Image]]:
    """Face embeddings (faces, 512), and the pictures of the faces for those adapters that look at them too."""
    if not args.face_embedding:
        faces, images = find_faces(images, args.image)
    else:
        faces = torch.cat([read_embedding(path) for path in args.face_embedding])
    return faces.to(args.device, args.dtype), images


@torch.no_grad()
def text_prompt(args: argparse.Namespace, base: Base) -> tuple[Prompt, Prompt]:
    """The prompt and the negative prompt, still without images; the text towers are freed on return."""
    for flag, text in (("--prompt", args.prompt), ("--negative-prompt", args.negative_prompt)):
        if rest := cut(text):
            print(f"warning: {flag} is longer than 75 tokens; cut off: {rest!r}", file=sys.stderr)
    encode = stored(args, base.text_encoder())
    prompts = []
    for text, pooled in (encode(args.prompt), encode.null(args.negative_prompt)):
        vector = None if pooled is None else size_vector(pooled, args.height, args.width, base.sinusoids)
        prompts.append(Prompt(text, vector=vector))
    return tuple(prompts)


def denoise(args: argparse.Namespace, unet: UNet, prediction: str, prompt: Prompt, null: Prompt, bar: tqdm) -> Tensor:
    """From noise to latents (num_images, 4, height/8, width/8), a batch of pictures at a time."""
    done = []
    noise, generators = noise_and_generators(args.seed, args.num_images, args.height, args.width)
    for first, start in zip(
        range(0, args.num_images, args.batch), noise.to(args.device).split(args.batch), strict=True
    ):
        n = len(start)
        prompts, nulls = Prompt.cat([prompt] * n), Prompt.cat([null] * n)
        eps = guided(unet, prompts, nulls, args.guidance_scale, prediction, args.apart)
        for x in SAMPLERS[args.sampler](eps, start, args.steps, generators[first : first + n]):
            bar.update()
        done.append(x)
    return torch.cat(done)


def batches(args: argparse.Namespace) -> int:
    return math.ceil(args.num_images / args.batch)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor, rows: int | None = None) -> list[Image.Image]:
    """One picture at a time: the autoencoder is what needs the most memory per pixel. `rows`: as in `VAE.decode`."""
    latents = latents.to(next(vae.parameters()).dtype)
    return [to_pil(vae.decode(x, rows))[0] for x in latents.split(1)]


def save(args: argparse.Namespace, base: Base, pictures: list[list[Image.Image]], hashes: dict[str, str]) -> list[Path]:
    """Write the pictures, and the sheet, each with all that is needed to make it again; pictures[scale][seed]."""
    shared = (
        "image",
        "face_embedding",
        "prompt",
        "negative_prompt",
        "sampler",
        "steps",
        "guidance_scale",
        "height",
        "width",
    )
    settings = {name: getattr(args, name) for name in shared} | {
        "prediction": base.prediction,
        "structure_scale": args.structure_scale,
        "lora": [[str(lora.path), weight] for lora, weight in args.loras],
        "dtype": args.dtype_name,
        "storage": args.storage,
        "device": str(args.device),
        "torch": torch.__version__,
        "sha256": hashes,
    }
    one = len(args.scale) * args.num_images == 1
    names, output = [], args.first
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
    titles = [f"scale {scale:g}" for scale in args.scale] if args.prompted else [args.prompt[:32]]
    if args.image:
        columns.insert(0, [open_picture(path) for path in args.image])
        titles.insert(0, "image prompt")
    return sheet(list(zip_longest(*columns)), titles, side=min(args.width, 256))


def report(args: argparse.Namespace, names: list[Path], seconds: float) -> None:
    parts = [f"text {args.prompt!r}"] if args.prompt else []
    if args.prompted:
        scales = ", ".join(f"{scale:g}" for scale in args.scale)
        parts.insert(0, f"image prompt {', '.join(args.image + args.face_embedding)} (scale {scales})")
    how = f"{args.steps} steps of {args.sampler}, seed {args.seed}"
    print(f"{' and '.join(parts)}: {how}, {seconds:.1f} s", file=sys.stderr)
    print(*names, sep="\n")
    if args.bundled:
        print(
            "That was a bundled drawing as image prompt, and the bundled tiny model. Now with a picture of yours:\n"
            '  python sample.py --image FILE --prompt "a rocket" --scale 0 0.5 1 --grid\n'
            "With Stable Diffusion and a released adapter: see python sample.py --help, and --list",
            file=sys.stderr,
        )


def parse() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", nargs="+", default=[], metavar="FILE", help="image prompt; several pictures prompt together")
    add("--prompt", default="", help="text prompt")
    add("--negative-prompt", default="", help="what the picture should not be")
    add(
        "--scale",
        nargs="+",
        type=cli.number(0),
        metavar="S",
        help="weight of the image prompt; several: one picture for each (default: 1.0, with text 0.6)",
    )
    add(
        "--sampler",
        choices=SAMPLERS,
        default="ddim",
        help="(default: %(default)s; dpm++ is the 2M one with Karras steps)",
    )
    add("--steps", type=cli.whole(1, 1000), help="(default: 50; dpm++ and unipc 20, lcm 4)")
    add(
        "--guidance-scale",
        type=cli.number(0),
        metavar="G",
        help="how far to follow the prompts; 1 is off (default: 7.5, lcm 1)",
    )
    add(
        "--seed",
        type=cli.whole(0, 2**63 - 1),
        default=0,
        help="picture j is made from the noise of seed + j (default: %(default)s)",
    )
    add("--num-images", type=cli.whole(1), default=1, metavar="N", help="pictures to make (default: %(default)s)")
    add("--height", type=cli.side, help="pixels, a multiple of 8 (default: what the base was made for)")
    add("--width", type=cli.side, help="pixels, a multiple of 8 (default: what the base was made for)")

    files = parser.add_argument_group("models, each a file or a published name")
    add = files.add_argument
    add("--list", action="store_true", help="print all names, and what of them is already here")
    add(
        "--base",
        metavar="FILE",
        help="SD 1.x, SD 2.x or SDXL: a checkpoint (.safetensors, .ckpt) or a diffusers folder (default: the tiny model)",
    )
    add("--adapter", metavar="FILE", help="IP-Adapter of any kind, .safetensors or .bin")
    add("--image-encoder", metavar="FILE", help="CLIP image encoder, transformers or OpenCLIP layout")
    add("--vae", metavar="FILE", help="another autoencoder")
    add("--lora", nargs="+", default=[], metavar="FILE[:W]", help="LoRAs for the base, each with a weight (default: 1)")
    add("--prediction", choices=("eps", "v"), help="what the UNet predicts (default: as the base's file tells)")

    faces = parser.add_argument_group("FaceID adapters")
    add = faces.add_argument
    add(
        "--face-embedding",
        nargs="+",
        default=[],
        metavar="FILE",
        help="512 numbers, .npy or .safetensors: insightface's normed_embedding (default: of the faces in --image)",
    )
    add("--faceid-v2", action="store_true", help="the file is FaceID-plus version 2; no tensor tells")
    add(
        "--structure-scale",
        type=cli.number(0),
        metavar="S",
        help="version 2: how far to follow the picture of the face, beside the embedding (default: 1.0)",
    )

    add = parser.add_argument_group("where and how").add_argument
    add("--output", type=Path, default=Path("outputs"), help="a .png, or a folder (default: %(default)s)")
    add("--grid", action="store_true", help="also write a sheet: prompts beside results, a column per scale")
    add(
        "--device",
        type=cli.device,
        default=cli.default_device(),
        help="cpu, cuda, cuda:1, mps (default: the fastest here)",
    )
    add("--dtype", choices=cli.DTYPES, dest="dtype_name", help="default: float16 on cuda, float32 elsewhere")
    add("--storage", choices=STORAGES, help="keep large weights in it, and bring each up to --dtype when it is used")
    add(
        "--low-memory",
        action="store_true",
        help="--storage float16, one picture at a time, the halves of the guidance one by one, decoded in strips: slower",
    )
    args = parser.parse_args()
    if args.list:
        print(table())
        sys.exit(0)

    args.bundled = not any((args.image, args.face_embedding, args.prompt, args.base))
    if args.bundled:
        args.image = [str(EXAMPLE)]
    args.prompted = bool(args.image or args.face_embedding)
    if not args.prompted and not args.prompt:
        raise UserError("--image or --prompt is wanted: what should the picture show?")
    if args.scale and not args.prompted:
        raise UserError("--scale is the weight of an image prompt: it goes with --image")
    args.scale = args.scale or [0.6 if args.prompt else 1.0]
    args.steps = args.steps or STEPS.get(args.sampler, 50)
    if args.steps > MAX_STEPS[args.sampler]:
        raise UserError(f"--steps {args.steps}: 1 to {MAX_STEPS[args.sampler]} with --sampler {args.sampler}")
    if args.guidance_scale is None:
        args.guidance_scale = 1.0 if args.sampler == "lcm" else 7.5
    args.dtype_name = args.dtype_name or ("float16" if args.device.type == "cuda" else "float32")
    args.dtype = cli.DTYPES[args.dtype_name]
    args.storage = args.storage or ("float16" if args.low_memory else None)
    # Stored in fewer bits, weights are never held in more.
    args.loaded = {None: args.dtype, "bfloat16": torch.bfloat16}.get(args.storage, torch.float16)
    args.batch, args.strips, args.apart = (1, ROWS, True) if args.low_memory else (BATCH, None, False)
    if args.negative_prompt and args.guidance_scale == 1:
        print("warning: --negative-prompt has no effect at --guidance-scale 1", file=sys.stderr)
    if args.adapter and not args.prompted:
        print("warning: --adapter has no effect without --image or --face-embedding", file=sys.stderr)
    for path in args.image:
        open_picture(path)  # before anything slow
    for path in args.face_embedding:
        read_embedding(path)
    loras = [lora_and_weight(value) for value in args.lora]
    local = {found: read_lora(found) for found, _ in loras if isinstance(found, Path)}
    args.first = first_name(args.output)
    find_models(args, args.prompted, [found for found, _ in loras])  # the only thing here that takes long: it downloads
    args.loras = [(local[found] if found in local else read_lora(file(found)), weight) for found, weight in loras]
    return args


def find_models(args: argparse.Namespace, image: bool, loras: Sequence[Path | Preset] = ()) -> None:
    """Put files in the place of names, and of what was not given but follows; what is not here is downloaded."""
    found = resolve({kind: getattr(args, kind) for kind in MODELS}, image)
    for lora in loras:
        check_together({"base": found["base"], "lora": lora})
    base, adapter = found["base"], found["adapter"]
    args.bundled &= base == PRESETS["base", "tiny"]
    args.side = base.side if isinstance(base, Preset) else None
    args.faceid_v2 = args.faceid_v2 or (isinstance(adapter, Preset) and adapter.faceid_v2)
    if args.faceid_v2 and args.structure_scale is None:
        args.structure_scale = 1.0
    for kind in MODELS:
        value = found.get(kind)
        setattr(args, kind, str(file(value)) if value else None)


def resolve_names(args: argparse.Namespace) -> None:
    """Put files in the place of names, each flag by itself; for scripts where nothing follows from another flag."""
    for kind in MODELS:
        if value := getattr(args, kind):
            setattr(args, kind, str(file(find(kind, value))))


def file(found: Path | Preset) -> Path:
    if isinstance(found, Path):
        return found
    if not cached(found):
        print(f"fetching {found.name} ({found.megabytes:g} MB) from {found.repo}", file=sys.stderr)
    return fetch(found)


def lora_and_weight(value: str) -> tuple[Path | Preset, float]:
    """`FILE` or `NAME`, or one of them with its weight behind a colon."""
    name, _, weight = value.rpartition(":")
    try:
        found, number = find("lora", name), float(weight)
    except (ValueError, WeightsError):  # the colon, if there is one, is part of a path
        return find("lora", value), 1.0
    if not math.isfinite(number):
        raise UserError(f"--lora {value}: the weight is {weight}, a finite number is wanted")
    return found, number


def first_name(output: Path) -> Path:
    """Where the first picture goes: a .png as given, in a folder the next free number. Refuses early what cannot be."""
    numbered = output.suffix.lower() != ".png"
    if not numbered and output.is_dir():
        raise UserError(f"--output {output}: a folder; folders whose names end in .png are not taken")
    if numbered and output.suffix and not output.is_dir():
        raise UserError(f"--output {output}: a name that ends in .png, or a folder, is wanted")
    folder = output if numbered else output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there ({error.strerror})") from None
    if not numbered:
        return output
    taken = [int(number) for path in folder.glob("*.png") if (number := path.stem.split("_")[0]).isdigit()]
    return folder / f"{max(taken, default=-1) + 1:05d}.png"


def start_hashing(args: argparse.Namespace) -> dict[str, Future]:
    """SHA-256 of every file that the picture depends on, on a thread of its own while the models work."""
    files = [args.base, args.adapter, args.image_encoder, args.vae, *args.image, *args.face_embedding]
    files += [str(lora.path) for lora, _ in args.loras]
    hashes = {path: Future() for path in filter(None, files)}

    def work() -> None:
        for path, future in hashes.items():
            try:
                future.set_result(model_sha256(path))
            except Exception as error:  # noqa: BLE001, raised where the hash is asked for; else that would wait for ever
                future.set_exception(error)

    Thread(target=work, daemon=True).start()  # a daemon: nobody waits for it when the run ends early
    return hashes


if __name__ == "__main__":
    cli.run(main)
