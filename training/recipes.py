"""What is trained, and how: the kinds of adapters as the official ones are, the paper's recipe, and the tiny model's."""

from importlib.util import find_spec
from pathlib import Path

from clip import CLIPImageConfig
from files.errors import UserError
from files.faces import FACE_DIM
from generate import Models
from generate.named import faces_alone
from ipadapter import FacePlusProjection, FaceProjection, ImageProjection, IPAdapter, PatchProjection, Resampler
from training.captions import DataError
from training.pairs import Pairs
from unet import UNet
from weights.base import EMBEDDED
from weights.names import resolve
from weights.presets import FACEID, Preset

KINDS = {
    "base": ImageProjection,
    "plus": Resampler,
    "full-face": PatchProjection,
    "faceid": FaceProjection,
    "faceid-plus": FacePlusProjection,
    "faceid-plusv2": FacePlusProjection,
    "faceid-portrait": FaceProjection,
}
RANK = 128  # of the LoRA that is trained along with FaceID adapters
FACES = "a FaceID adapter, it reads faces; one that reads pictures is wanted here"
TINY = Path(__file__).parent.parent / "tiny"
# What stands for a setting that is not given: the paper's recipe; and what suits the tiny model and a laptop.
PAPER = {
    "kind": "base",
    "steps": 1_000_000,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "warmup": 0,
    "ema": 0.0,
    "drop_text": 0.05,
    "least_t": 0,
    "save_every": 1000,
    "validate_every": 1000,
}
TINY_RUN = {
    "data": [str(TINY / "data/train-*.tar.gz")],
    "validation": [str(TINY / "data/unseen-drawings-*.tar.gz")],
    "limit": 1024,  # of 9,142: to encode them all takes longer than to train
    "kind": "full-face",
    "steps": 400,  # less than a quarter of an hour on two cores, features and all
    "batch_size": 16,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "warmup": 20,
    "ema": 0.98,
    "loss": "v",
    "drop_text": 0.85,  # a drawing's name tells nearly everything: beside it little is left for the image to tell
    "least_t": 400,  # what a drawing shows is decided above
    "save_every": 50,
    "validate_every": 200,
}


def new_adapter(kind: str, unet: UNet, encoder: CLIPImageConfig | None) -> IPAdapter:
    """An adapter as the official ones are, for any base.

    4 tokens of an embedding or of a face, 16 by a Resampler of depth 4 or of a portrait, or every patch a token.

    Args:
        encoder: None for kinds that read faces alone.
    """
    context = unet.config.context_dim
    if kind == "base":
        projection = ImageProjection(encoder.projection, context, num_tokens=4)
    elif kind == "plus":
        dim = min(context, 1280)  # SDXL's are narrower than its texts
        projection = Resampler(encoder.width, dim, depth=4, heads=dim // 64, num_tokens=16, context_dim=context)
    elif kind == "full-face":
        projection = PatchProjection(encoder.width, context)
    elif "plus" in kind:
        heads = context // 64
        projection = FacePlusProjection(FACE_DIM, encoder.width, 4, heads, num_tokens=4, context_dim=context)
    else:
        projection = FaceProjection(FACE_DIM, context, num_tokens=16 if kind == "faceid-portrait" else 4)
    return IPAdapter.for_unet(unet, projection, RANK if projection.faces and kind != "faceid-portrait" else 0)


# What cannot be trained, or scored: told by the names alone where these tell it, before anything is fetched


def resolve_pictures(given: dict[str, str | None]) -> dict[str, Path | Preset | None]:
    """What the arguments of a run stand for (`weights.names.resolve`), if the adapter reads pictures."""
    found = resolve(given, image=True)
    if isinstance(found["adapter"], Preset) and found["adapter"].repo == FACEID:
        raise UserError(f"`adapter` {found['adapter'].name}: {FACES}")
    return found


def check_reads_pictures(models: Models) -> None:
    if models.adapter_kind and models.adapter_kind.image_proj.faces:
        raise UserError(f"`adapter` {models.files['adapter']}: {FACES}")


def resolve_trainable(given: dict[str, str | None], encoder: bool) -> dict[str, Path | Preset | None]:
    """What the arguments of a run stand for; `encoder`: whether an image encoder is wanted."""
    return resolve(given, image=encoder, new_adapter=True, faces_alone=faces_alone)


def kind_named(given: dict[str, str | None], kind: str | None) -> str | None:
    """The kind of adapter, as far as names tell it before anything is fetched."""
    name = (given["adapter"] or "").lower().replace("_", "-").removeprefix("sdxl-").removesuffix("-v11")
    return kind or (name if name in KINDS else None)


def wants_encoder(given: dict[str, str | None], kind: str | None) -> bool:
    """Whether an image encoder is to be brought: a new adapter that reads faces alone wants none. Raises UserError."""
    alone = bool(kind) and KINDS[kind].faces and not KINDS[kind].patches
    if alone and given["image_encoder"]:
        raise UserError(f"`image_encoder`: an adapter of the kind {kind} reads faces alone")
    return not alone or bool(given["adapter"])


def trainable_kind(models: Models, kind: str | None) -> str:
    """The kind of adapter that is trained. Raises UserError for what cannot be."""
    if models.base.guidance_scale == EMBEDDED:
        raise UserError(
            f"`base` {models.base.path}: distilled to be told the guidance scale; train on the base that it was made of"
        )
    if not models.adapter_kind:
        return kind
    found = kind_of(models.adapter_kind, models.adapters[0].faceid_v2 or kind == "faceid-plusv2")
    if kind and kind != found:
        raise UserError(f"`kind` {kind}: the adapter given ({models.files['adapter']}) is of the kind {found}")
    return found


def kind_of(adapter: IPAdapter, version_2: bool = False) -> str:
    if isinstance(adapter.image_proj, FacePlusProjection):
        return "faceid-plusv2" if version_2 else "faceid-plus"
    if isinstance(adapter.image_proj, FaceProjection):
        return "faceid" if adapter.lora_rank else "faceid-portrait"
    return next(kind for kind, projection in KINDS.items() if isinstance(adapter.image_proj, projection))


def check_faces(kind: str | None, data: list[str], pairs: Pairs) -> None:
    """Refuse data without any face for an adapter that reads faces. Raises DataError."""
    known = find_spec("insightface") and find_spec("onnxruntime")
    if kind and KINDS[kind].faces and not known and not any(pairs.face(i) for i in range(len(pairs))):
        raise DataError(
            f"{' '.join(data)}: no face embeddings, which an adapter of the kind {kind} reads: a list names one for each "
            "picture as id_embed_file (.npy, .safetensors or .bin), or insightface is installed, and they are read off the pictures"
        )
