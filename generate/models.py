"""Opens the models of a run: names or files in, what follows from them brought along, what does not fit refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from clip import CLIPImage, TextEncoder, TwoTowerEncoder
from control import StyleAdapter
from files.errors import UserError
from generate import threads
from generate.fit import Adapter, Reader, check_base, check_named
from generate.group import ImageGroup
from generate.memory import check_adapters
from generate.named import Named, base_named, check_opened, inversions_of, lora_of, net_of, row_of, together
from ipadapter import IPAdapter
from unet import UNet
from vae import VAE
from weights import Base, check_fit, load_adapter, load_image_encoder, open_base
from weights.control import Net, load_control
from weights.hub import cached, fetch
from weights.inversion import Embedding, check_embeddings
from weights.lora import LoRA, read_lora
from weights.names import find
from weights.presets import PRESETS, Preset
from weights.storage import STORAGES, store

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Models:
    """All that pictures are made with. A part is built when it is asked for; with `keep` it is then held."""

    files: dict[str, Path]  # what they are read from, by role: "base", "adapter" (the first), "image_encoder", "vae"
    base: Base
    loras: tuple[tuple[LoRA, float], ...]  # merged into the base, each with its weight
    adapters: tuple[Adapter, ...]
    bundled: bool  # the tiny model that lies in the tree
    side: int  # pixels along the side of a picture where none is asked for
    dtype: torch.dtype  # what is computed in
    storage: str | None  # what large weights lie in, if not in `dtype`
    low_memory: bool  # one picture and one half of the guidance at a time, decoded in strips
    device: torch.device
    keep: bool
    embeddings: tuple[Embedding, ...] = ()  # textual inversions, which prompts call by name
    controls: tuple[Path, ...] = ()  # ControlNets and T2I-Adapters
    control_kinds: Mapping[Path, Net] = field(default_factory=dict)  # likewise without their weights (on `meta`)
    held: dict[str, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    @property
    def adapter_kind(self) -> IPAdapter | None:
        """The first adapter without its weights (on `meta`): what it reads."""
        return self.adapters[0].kind if self.adapters else None

    def adapter(self, number: int = 0) -> IPAdapter:
        """With its image projection in `dtype` (a Resampler is small), its keys and values as they are stored."""
        file = self.adapters[number].file

        def build() -> IPAdapter:
            adapter = load_adapter(file, self.loaded, self.device)
            adapter.image_proj.to(self.dtype)
            self.stored(adapter.ip_adapter)
            return adapter

        return self.part(f"adapter {number}" if number else "adapter", build)

    def image_encoder(self, number: int = 0) -> CLIPImage | None:
        """What an adapter reads; None where that is face embeddings alone."""
        file = self.adapters[number].image_encoder if self.adapters else self.files.get("image_encoder")
        if file is None:
            return None
        return self.tower(file)

    def text_encoder(self) -> TextEncoder | TwoTowerEncoder:
        return self.part("text encoder", lambda: self.stored(self.base.text_encoder()))

    def unet(self, face: bool = False) -> UNet:
        """`face`: with the changes to its own attention that FaceID adapters bring, which are merged for good."""
        changing = [adapter.file for adapter in self.adapters if face and adapter.kind.lora_rank]
        name, other = ("unet for a face", "unet") if changing else ("unet", "unet for a face")
        self.held.pop(other, None)  # one of the two is enough
        return self.part(name, lambda: self.stored(self.changed_unet(changing) if changing else self.base.unet()))

    def changed_unet(self, changing: Sequence[Path]) -> UNet:
        """With what these adapters change in it."""
        unet = self.base.unet()
        for file in dict.fromkeys(changing):
            load_adapter(file, self.loaded, self.device).merge(unet, keep=False)
        return unet

    def control(self, file: Path) -> Net:
        """One of `controls`."""
        return self.part(
            f"control {file}", lambda: self.stored(load_control(file, self.base, self.loaded, self.device))
        )

    def style_encoder(self) -> CLIPImage:
        """What T2I-Adapter's style adapters read."""
        return self.tower(self.files["style_encoder"])

    def tower(self, file: Path) -> CLIPImage:
        return self.part(
            f"image encoder {file}", lambda: self.stored(load_image_encoder(file, self.loaded, self.device))
        )

    def vae(self, dtype: torch.dtype | None = None) -> VAE:
        """`dtype`: another than the usual one, where that has overflowed; such a one is not held."""
        build = replace(self.base, dtype=dtype or self.dtype).vae  # the storage is not for the autoencoder
        return build() if dtype else self.part("vae", build)

    def part(self, name: str, build: Callable[[], nn.Module]) -> nn.Module:
        found = self.held.get(name) or build()
        if self.keep:
            self.held[name] = found
        return found

    @property
    def loaded(self) -> torch.dtype:
        return read_in(self.dtype, self.storage)

    def stored(self, model: nn.Module) -> nn.Module:
        return store(model, STORAGES[self.storage], self.dtype) if self.storage else model


def open_models(
    base: Named | None = None,  # SD 1.x, SD 2.x or SDXL; nothing named: the tiny model of the tree
    adapter: Named | Sequence[Named | None] | None = None,  # the IP-Adapter, or several; a published base has its own
    image_encoder: Named | Sequence[Named | None] | None = None,  # what they read, or one for each; brought likewise
    vae: Named | None = None,  # another autoencoder than the base's own
    loras: Sequence[Named | tuple[Named, float]] = (),  # for the base, each alone or with its weight
    embeddings: Sequence[str | Path | tuple[str | Path, str | None]] = (),  # textual inversions, or each with its name
    controls: Sequence[Named] = (),  # ControlNets and T2I-Adapters, for the hints that `pictures` takes
    style_encoder: Named | None = None,  # the CLIP image tower of T2I-Adapter's style adapters; None: vit-l
    text_encoder: Sequence[str | Path] = (),  # text towers for a base that has none, files or folders
    image: bool = True,  # whether there will be image prompts; without, no adapter and no image encoder is wanted
    encode: bool | Sequence[bool] = True,  # whether pictures are, or for each adapter: embeddings want no image encoder
    groups: Sequence[ImageGroup] = (),  # the image prompts: what does not fit is refused before anything is fetched
    new_adapter: bool = False,  # one is to be made: none is brought, only the image encoder that it will read
    faceid_v2: bool | Sequence[bool] = False,  # whether it is FaceID-plus v2, or whether each is: no tensor tells
    prediction: str | None = None,  # what the UNet predicts, "eps" or "v", where the file tells it wrongly or not
    spacing: str | None = None,  # which timesteps are visited, "leading", "trailing" or "linspace", likewise
    device: torch.device | str | None = None,  # where to compute; None: on the fastest here
    dtype: torch.dtype | str | None = None,  # what to compute in, or its name; None: fp16 on cuda, fp32 elsewhere
    storage: str | None = None,  # "float16", "bfloat16" or "float8": what large weights lie in until they are used
    low_memory: bool = False,  # fp16 storage, one picture at a time, guidance in two passes, decoded in strips: slower
    keep: bool = True,  # hold the parts once they are built, for the next picture; else each goes when its work is done
    tell: Callable[[str], object] = lambda line: None,  # told in a line what is about to be downloaded
) -> Models:
    """Find, fetch and check the models of a run. Large weights are not read yet.

    Raises:
        UserError: a name that is unknown, a file that is missing, damaged or of another kind, parts that do not fit
            together, what cannot be downloaded; the message says what would fit.
    """
    device = torch.device(device or default_device())
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype or default_dtype(device)
    storage = storage or ("float16" if low_memory else None)
    # What names stand for; what does not go together is refused before anything is fetched.
    each = together(adapter, image_encoder, faceid_v2, encode)
    base = base or (base_named(each) if len(each) > 1 else None)
    rows = [row_of(one, base, vae, image, new_adapter) for one in each]
    found = rows[0]
    wanted = [lora_of(one, found["base"]) for one in loras]
    nets = [net_of(one, found["base"]) for one in controls]
    inversions = tuple(chain.from_iterable(map(inversions_of, embeddings)))
    readers = [Reader(row["adapter"], row["image_encoder"], one.faceid_v2) for row, one in zip(rows, each, strict=True)]
    special = [group for group in groups if not group.plain]
    known = check_named(special, readers, found["base"]) if special else []
    # From here on files are fetched, and opened.
    files = {role: file(found[role], tell) for role in ("base", "vae")}
    merged = tuple((x if isinstance(x, LoRA) else read_lora(file(x, tell)), weight) for x, weight in wanted)
    read_as = read_in(dtype, storage)
    opened = open_base(files["base"], read_as, device, prediction, merged, files["vae"], text_encoder, spacing)
    if new_adapter and opened.channels != 4:
        told = f"its UNet reads {opened.channels} channels; adapters are trained on those of 4"
        raise UserError(f"{files['base']}: {told}")
    for group in special:  # what its name did not tell
        check_base(group, known[group.adapter], opened)
    if isinstance(found["base"], Path):
        check_opened(opened, [*(row["adapter"] for row in rows), *nets])
    if inversions:
        check_embeddings(inversions, [text.width for text in opened.texts])
    followed = tuple(file(net, tell) for net in nets)
    kinds = {net: load_control(net, opened, device="meta") for net in dict.fromkeys(followed)}
    if kinds:
        files |= style_files(kinds, style_encoder, tell)
    threads.suit(max(dim for dim, _ in opened.layers), device)
    read = tuple(open_adapter(reader, opened, tell) for reader in readers if reader.adapter)
    files |= {"adapter": read[0].file} if read else {}
    files |= {"image_encoder": read[0].image_encoder if read else file(found["image_encoder"], tell)}
    if keep and len(read) > 1:  # else they are read in turn, each in the place of the one before
        check_adapters({adapter.file: adapter.kind for adapter in read}.values(), read_as, device)
    return Models(
        files={role: path for role, path in files.items() if path},
        base=opened,
        loras=merged,
        adapters=read,
        bundled=found["base"] == PRESETS["base", "tiny"],
        side=(found["base"].side if isinstance(found["base"], Preset) else None) or opened.side,
        dtype=dtype,
        storage=storage,
        low_memory=low_memory,
        device=device,
        keep=keep,
        embeddings=inversions,
        controls=followed,
        control_kinds=kinds,
    )


def open_adapter(reader: Reader, base: Base, tell: Callable[[str], object]) -> Adapter:
    """Fetch and check one adapter and the image encoder that it reads."""
    path, encoder_path = file(reader.adapter, tell), file(reader.image_encoder, tell)
    kind = load_adapter(path, device="meta")
    encoder = load_image_encoder(encoder_path, device="meta") if encoder_path and kind.reads_clip else None
    check_fit(kind, path, base, encoder, encoder_path)
    if reader.faceid_v2 and not (kind.image_proj.faces and kind.image_proj.patches):
        raise UserError(f"`faceid_v2`: for FaceID-plus adapters; {path} is another kind")
    return Adapter(path, kind, encoder_path if kind.reads_clip else None, reader.version_2)


def style_files(kinds: Mapping[Path, Net], named: Named | None, tell: Callable[[str], object]) -> dict[str, Path]:
    """Fetch and check what style adapters read, if there are any among the nets. Raises UserError."""
    widths = {net: len(kind.proj) for net, kind in kinds.items() if isinstance(kind, StyleAdapter)}
    if not widths:
        return {}
    path = file(find("image_encoder", str(named or "vit-l")), tell)
    found = load_image_encoder(path, device="meta").config.width
    for net, width in widths.items():
        if found != width:
            raise UserError(f"`style_encoder` {path}: its features are {found} wide; {net} reads {width} wide ones")
    return {"style_encoder": path}


def read_in(dtype: torch.dtype, storage: str | None) -> torch.dtype:
    """What weights are read in: stored in fewer bits, they are never held in more."""
    return {None: dtype, "bfloat16": torch.bfloat16}.get(storage, torch.float16)


def file(found: Path | Preset | None, tell: Callable[[str], object]) -> Path | None:
    if not isinstance(found, Preset):
        return found
    if not cached(found):
        tell(f"fetching {found.name} ({found.megabytes:g} MB) from {found.repo}")
    return fetch(found)


def default_device() -> str:
    """The fastest here."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32
