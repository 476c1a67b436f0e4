"""What an adapter sees of an image prompt's pictures, by flags; and a result for each picture of a folder."""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

import cli
from clip import POSITIONS
from files.errors import UserError
from files.faces import read_embedding
from files.features import SUFFIXES, Features, is_features, read_features
from files.masks import open_mask
from generate import ImageGroup
from generate.framing import FRAMINGS
from generate.group import mask_tensor


def seen(parser: argparse.ArgumentParser) -> None:
    """--framing, --crop-position, --negative-image, --negative-noise, --less, --save-embedding, --each."""
    of_image = {"action": cli.Belongs, "groups": ("image",)}
    add = parser.add_argument_group("what an adapter sees; behind an --image, as above").add_argument
    framing = "crop a square, pad to one, squash, or tile: squares of a long picture, which act where they lie (default: crop)"
    add("--framing", choices=FRAMINGS, help=framing, **of_image)
    add("--crop-position", choices=POSITIONS, metavar="WHERE", help=f"{', '.join(POSITIONS)}", **of_image)
    against = "pictures in the place of no image on the unconditional side: one for all, or one for each"
    add("--negative-image", nargs="+", metavar="FILE", help=against, **of_image)
    noise = "how much of a picture of noise is blended in there, 0 to 1"
    add("--negative-noise", type=cli.share, metavar="X", help=noise, **of_image)
    off = "take a text off the picture's embedding, so much of it (default: 1)"
    add("--less", type=cli.text, metavar="TEXT[:W]", help=off, **of_image)
    keep = "write what the adapter reads of the pictures; as --image it gives what they give"
    add("--save-embedding", type=cli.path, metavar="FILE.safetensors", help=keep, **of_image)
    each = "a result for each picture of the folder (or of the files), named after it"
    add("--each", nargs=0, const=True, help=each, **of_image)


def picture(name: str) -> Image.Image | Features:
    """A picture, or an embedding of pictures. Raises UserError."""
    return read_features(name) if is_features(name) else cli.picture(name)


def spread(group: argparse.Namespace) -> list[str]:
    """With --each: the pictures of the group's folder, in order of name.

    Raises:
        UserError: no folder of pictures; face embeddings, which would be of all of them.
    """
    if group.face_embedding or group.save_embedding or group.weights:
        raise UserError(
            "`each`: is for pictures; with `face_embedding`, `weights` or `save_embedding` give them one by one"
        )
    if len(group.image) != 1 or not os.path.isdir(os.path.expanduser(group.image[0])):
        return group.image
    folder = Path(os.path.expanduser(group.image[0]))
    known = Image.registered_extensions().keys() | set(SUFFIXES)
    found = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in known and path.is_file())
    if not found:
        raise UserError(f"`image` {folder}: no pictures in this folder")
    return found


def check_saves(groups: Iterable[argparse.Namespace], overwrite: bool) -> None:
    """Raises UserError: an embedding is to be written where there is a file already, or where another one will be."""
    paths = [group.save_embedding for group in groups if group.save_embedding]
    for path in paths:
        if os.path.exists(path) and not overwrite:
            raise UserError(f"`save_embedding` {path}: exists; another name is wanted, or `overwrite`")
        if paths.count(path) > 1:
            raise UserError(
                f"`save_embedding` {path}: given for {paths.count(path)} image prompts; it belongs behind one"
            )
        cli.check_writable("--save-embedding", path, path.absolute().parent)


def variants(groups: Sequence[ImageGroup], each: int, names: Sequence[str]) -> list[list[ImageGroup]]:
    """The groups for each picture in one of them."""
    return [
        [replace(group, images=(name,)) if i == each else group for i, group in enumerate(groups)] for name in names
    ]


def stems(names: Sequence[str]) -> list[str]:
    """What results are called after pictures: their names without the ending, unless two are alike."""
    short = [Path(name).stem for name in names]
    return short if len(set(short)) == len(short) else [Path(name).name.replace(".", "-") for name in names]


def image_group(group: argparse.Namespace, adapter: int) -> ImageGroup:
    """As `prompts` takes it, its files opened; `adapter` is its place among those that are. Raises UserError."""
    for name in group.face_embedding:
        read_embedding(name)
    if group.save_embedding and group.save_embedding.suffix != ".safetensors":
        raise UserError(f"`save_embedding` {group.save_embedding}: a name that ends in .safetensors is wanted")
    try:
        less = cli.weighted(group.less) if group.less else None
    except argparse.ArgumentTypeError as error:
        raise UserError(f"`less`: {error}") from None
    seen = list(map(picture, group.image)) if not group.each else []
    for name in group.image if group.each else ():  # of a folder they are looked at, and not all held
        picture(name)
    return ImageGroup(
        images=seen or group.image[:1],
        adapter=adapter,
        scale=group.scale[0],
        layers=group.layers,
        start=group.start,
        until=group.until,
        curve=group.curve,
        weights=group.weights,
        mask=None if group.mask is None else mask_tensor(cli.picture(group.mask, open_mask)),
        framing=group.framing,
        crop_position=group.crop_position,
        negative_image=[picture(name) for name in group.negative_image],
        negative_noise=group.negative_noise,
        less=less,
        faces=group.face_embedding,
        structure_scale=group.structure_scale,
    )
