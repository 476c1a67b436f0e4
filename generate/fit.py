"""Whether an image prompt fits the adapter and the base that it is for: told by their names or files, before they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from files.errors import UserError
from files.faces import FACE_DIM, read_embedding
from files.features import Features, is_features, read_features
from generate.group import ImageGroup, check_weights
from generate.layers import check_layers, factors
from ipadapter import IPAdapter
from ipadapter.adapter import Projection
from unet import layer_names
from weights import Base, load_adapter
from weights.diffusers import model_sha256, read_part
from weights.families import ENCODERS, drawn_by
from weights.hub import cached
from weights.presets import PRESETS, Preset


class Reader(NamedTuple):
    """An adapter of a run before it is opened: what it is, and what it reads."""

    adapter: Path | Preset | None
    image_encoder: Path | Preset | None
    faceid_v2: bool  # said to be FaceID-plus version 2

    @property
    def version_2(self) -> bool:
        """Whether it is, as was said or by its name."""
        return self.faceid_v2 or (isinstance(self.adapter, Preset) and self.adapter.faceid_v2)


@dataclass(frozen=True)
class Adapter:
    """An adapter of a run: what it is read from, and what it reads; before it is fetched, what its name tells of that."""

    file: Path | Preset
    kind: IPAdapter | Preset  # without its weights (on `meta`)
    image_encoder: Path | Preset | None  # None: it reads face embeddings alone, or no picture is to be encoded
    faceid_v2: bool = False

    @property
    def projection(self) -> Projection | Preset:
        """Both tell `patches`, `faces` and `feature_dim`."""
        return self.kind if isinstance(self.kind, Preset) else self.kind.image_proj

    @property
    def clip(self) -> str | None:
        """What it reads of CLIP; None: the face alone."""
        return "patches" if self.projection.patches else None if self.projection.faces else "embeddings"

    def __str__(self) -> str:
        return str(self.file)


def check_named(groups: Sequence[ImageGroup], readers: Sequence[Reader], base: Path | Preset) -> list[Adapter]:
    """Refuse what does not fit before anything is fetched. What is known of the adapters."""
    found = []
    for reader in readers:
        if file := reader.adapter:
            here = cached(file) if isinstance(file, Preset) else file
            kind = load_adapter(here, device="meta") if here else file
            found.append(Adapter(here or file, kind, reader.image_encoder, reader.version_2))
    for group in groups:
        check_group(group, found, base)
    return found


def check_group(group: ImageGroup, adapters: Sequence[Adapter], base: Base | Preset | Path) -> None:
    """Refuse what does not fit the adapter that is to read it, or the base; of a base that is not opened, what its name tells.

    Raises:
        UserError: names the argument; embeddings that are not for this adapter, or damaged.
    """
    if not adapters:
        raise UserError("`image`: no adapter was opened, which an image prompt wants")
    if not 0 <= group.adapter < len(adapters):
        raise UserError(f"`adapter` {group.adapter}: {len(adapters)} adapters were opened, the first is 0")
    if not (group.images or group.faces):
        raise UserError("`image`: a group without a picture; a file or a face embedding is wanted")
    if not group.plain:  # all adapters read pictures, and so do all bases what these make of them
        check_read(group, adapters[group.adapter])
        if not isinstance(base, Path):
            check_base(group, adapters[group.adapter], base)


def check_read(group: ImageGroup, reader: Adapter) -> None:
    """Refuse what an adapter does not read. Raises UserError."""
    if group.faces and not reader.projection.faces:
        raise UserError(f"`face_embedding`: for FaceID adapters; {reader} reads pictures (`image`)")
    if group.structure_scale is not None and not reader.faceid_v2:
        raise UserError(f"`structure_scale`: for FaceID-plus version 2; {reader} is another kind")
    for name in ("negative_image", "negative_noise", "less"):
        if getattr(group, name) and (not reader.clip or (name == "less" and reader.clip == "patches")):
            what = f"{reader.clip} of the picture, from which no text can be taken" if reader.clip else "faces"
            raise UserError(f"`{name}`: {reader} reads {what}")
    seen, against = ([known(one) for one in side] for side in (group.images, group.negative_image))
    embeddings = [one for one in seen if isinstance(one, Features)]
    for one in (*embeddings, *(one for one in against if isinstance(one, Features))):
        check_embedding(one, reader)
    if len(seen) > 1 and any(one.masks is not None for one in embeddings):
        raise UserError("`image`: an embedding of tiles is an image prompt by itself; others want a group of their own")
    pictures, opposed = (sum(map(count, side)) for side in (seen, against))
    shown = check_faces(group, reader, embeddings, pictures) if reader.projection.faces else pictures
    check_weights(group.weights, shown)
    if opposed not in (0, 1, pictures) and group.framing != "tile":
        raise UserError(f"`negative_image`: {opposed} given for {pictures} pictures: one for all, or one for each")


def check_faces(group: ImageGroup, reader: Adapter, embeddings: list[Features], pictures: int) -> int:
    """Likewise of an adapter that reads faces. How many there are."""
    if group.framing == "tile":
        raise UserError(f"`framing` tile: {reader} reads faces")
    lone = next((one for one in embeddings if one.faces is None), None)
    if group.faces:
        if group.images and not reader.clip:
            raise UserError(f"`image`: {reader} reads the face alone, which `face_embedding` gives")
        faces = sum(len(read_embedding(x) if isinstance(x, (str, Path)) else x) for x in group.faces)
        if reader.clip and faces != pictures:
            raise UserError(
                f"`face_embedding`: {faces} faces, `image`: {pictures} pictures of them; this adapter reads both"
            )
        return faces
    if lone:
        raise UserError(f"{lone.name}: holds no faces, which {reader} reads; `face_embedding` gives them")
    if 0 < len(embeddings) < len(group.images):
        raise UserError("`image`: embeddings of faces and pictures in one group; give each a group of its own")
    return pictures


def check_base(group: ImageGroup, reader: Adapter, base: Base | Preset) -> None:
    """Refuse what a base has not, as far as its name tells. Raises UserError."""
    if isinstance(base, Preset):
        family, config = base.families[0], base.families[0].unet
        # SDXL's second tower is that of ViT-bigG.
        second = ENCODERS[1].projection if len(family.text) == 2 else None
    else:
        family, config = drawn_by(base.family, base.config.channels), base.config
        second = base.texts[-1].projection if len(base.texts) == 2 else None
    factors(group.layers, layer_names(config), family) if config else check_layers(group.layers)
    if group.less and second != reader.projection.feature_dim:
        check_text_tower(reader.image_encoder)


def check_text_tower(encoder: Path | Preset | None) -> None:
    """Refuse an image encoder without the text tower of the same CLIP, which `less` wants; SDXL may have it in the base."""
    if encoder is None:
        raise UserError("`less`: the text tower of the image encoder's CLIP is wanted; no image encoder was opened")
    named = isinstance(encoder, Preset)
    if encoder.alone if named else not any("text_projection" in key for key in read_part(encoder)):
        raise UserError(
            f"`less`: {encoder} has no text tower beside the image encoder; a whole CLIP as `image_encoder` has one"
        )


def known(image: object) -> object:
    """Embeddings as what they hold; pictures are not opened."""
    return read_features(image) if not isinstance(image, Features) and is_features(image) else image


def count(seen: object) -> int:
    """How many pictures one is; the tiles of an embedding are those of one."""
    return len(seen) if isinstance(seen, Features) and seen.masks is None else 1


def check_embedding(found: Features, reader: Adapter) -> None:
    """Refuse an embedding that the adapter does not read, or that another image encoder has made."""
    projection, has = reader.projection, found.image
    holds = None if has is None else ("embeddings", "patches")[has.ndim - 2]
    if holds != reader.clip or (has is not None and has.shape[-1] != projection.feature_dim):
        it, wants = f"{holds} of {has.shape[-1]}" if holds else "faces alone", "faces alone"
        wants = f"{reader.clip} of {projection.feature_dim}" if reader.clip else wants
        raise UserError(f"{found.name}: holds {it}; {reader} reads {wants}")
    width = getattr(projection, "face_dim", FACE_DIM)
    if found.faces is not None and (not projection.faces or found.faces.shape[-1] != width):
        raise UserError(f"{found.name}: holds faces of {found.faces.shape[-1]}; {reader} reads others, or none")
    made, here = encoders(found, reader)
    if made and here and made != here:
        raise UserError(
            f"{found.name}: made by the image encoder with SHA-256 {made[:10]}... for another adapter; "
            f"{reader} reads that with {here[:10]}..."
        )


def encoders(found: Features, reader: Adapter) -> tuple[str | None, str | None]:
    """The SHA-256 of the image encoder that made an embedding, and of that which the adapter reads; None: nobody tells.

    Of an embedding of the very adapter they are alike.
    """
    adapter = digest(reader.file) if found.sha256 else None
    if found.sha256.get("adapter") == adapter:
        return "", ""
    named = reader.file if isinstance(reader.file, Preset) else None
    published = named or next((p for p in PRESETS.values() if p.kind == "adapter" and p.sha256 == adapter), None)
    brought = published and published.image_encoder and PRESETS["image_encoder", published.image_encoder]
    return found.sha256.get("image_encoder"), digest(reader.image_encoder or brought)


def digest(file: Path | Preset | None) -> str | None:
    return file.sha256 if isinstance(file, Preset) else file and model_sha256(file)
