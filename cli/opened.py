"""What the groups of sample.py's flags come to once their files are opened: what is made, of what, and what is said of it."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from cli.flags import check_writable, weighted
from cli.groups import Group, hints_of
from cli.terminal import picture
from files.errors import UserError, brief
from files.faces import read_embedding
from files.features import Features, is_features, read_features
from files.masks import open_mask
from files.pictures import open_picture
from generate import Hint, ImageGroup, Models, save_features
from generate.canvas import Canvas, canvas_of, size_of
from generate.editing import check_reads
from generate.group import mask_tensor
from generate.picture import BATCH, usual_guidance
from generate.sweep import Sweep, sweep_sheet

READING = ("prompt_syntax", "long_prompt", "clip_skip")  # how texts are read
# How an image prompt is heard and seen, as it was typed
HEARD = (
    "layers",
    "start",
    "until",
    "curve",
    "weights",
    "framing",
    "crop_position",
    "negative_noise",
    "structure_scale",
)
# The picture to begin with, and what is done with it
BEGINNING = ("init", "inpaint", "strength", "outpaint", "only_masked")


def opening(asked: Mapping[str, object], images: Sequence[ImageGroup]) -> dict[str, object]:
    """What `open_models` takes, of all that was asked for; `images` are the image prompts of all `variants`."""
    groups = asked["images"]
    names = ("base", "vae", "style_encoder", "text_encoder", "prediction", "spacing", "device", "storage", "low_memory")
    adapters, given = adapters_of(groups), asked["image_encoder"]
    encoder = given[0] if given and len(given) == 1 else given  # one for all, or one for each in turn
    return {name: asked[name] for name in names} | {
        "dtype": asked["dtype_name"],
        "loras": asked["lora"],
        "embeddings": asked["embedding"],
        "controls": [net.control for net in asked["nets"]],
        "image": bool(groups),
        "groups": images,
        "adapter": [file for file, *_ in adapters] or None,
        "image_encoder": encoder or [known for *_, known in adapters] or None,
        "encode": [any(image.encodes for image in images if image.adapter == i) for i in range(len(adapters))] or True,
        "faceid_v2": [version_2 for _, version_2, _ in adapters] or False,
        "keep": any(group.each for group in groups),
    }


def image_groups(groups: Sequence[Group]) -> list[ImageGroup]:
    """As `prompts` takes them, their files opened. Raises UserError."""
    adapters = adapters_of(groups)
    return [image_group(group, adapters.index(*adapters_of([group]))) for group in groups]


def adapters_of(groups: Iterable[Group]) -> list[tuple[str | None, bool, str | None]]:
    """The adapters of image prompts, each once: its file, whether that is version 2, its image encoder where it is known."""
    return list(dict.fromkeys((one.adapter, one.faceid_v2, vars(one).get("image_encoder")) for one in groups))


def image_group(group: Group, adapter: int) -> ImageGroup:
    """One of them; `adapter` is the place of its adapter among those that are opened."""
    for name in group.face_embedding:
        read_embedding(name)
    if group.each:  # the pictures of a folder are looked at, and not all held
        for name in group.image:
            prompting(name)
    return ImageGroup(
        images=group.image[:1] if group.each else [prompting(name) for name in group.image],
        adapter=adapter,
        scale=group.scale[0],
        mask=None if group.mask is None else mask_tensor(picture(group.mask, open_mask)),
        negative_image=tuple(prompting(name) for name in group.negative_image),
        less=None if group.less is None else less(group.less),
        faces=tuple(group.face_embedding),
        **{name: vars(group)[name] for name in HEARD},
    )


def prompting(name: str) -> Image.Image | Features:
    """A picture, or an embedding of pictures. Raises UserError."""
    if os.path.isdir(os.path.expanduser(name)):
        raise UserError(f"{name}: a folder, not a picture; with `each` there is a result for each picture in it")
    return read_features(name) if is_features(name) else picture(name)


def less(text: str) -> tuple[str, float]:
    """A text and its weight. Raises UserError."""
    if not text:
        raise UserError("`less`: a text is wanted, which is taken off the picture's embedding")
    try:
        return weighted(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"`less`: {error}") from None


def hint(group: Group, net: int) -> Hint:
    """As `pictures` takes it, its files opened; `net` is its place among those that are. Raises UserError."""
    mask = group.mask and picture(group.mask, open_mask)
    how = {name: vars(group)[name] for name in ("scale", "start", "until", "guess", "edges", "control_type")}
    shown = [name and picture(name) for name in hints_of(group)]
    return Hint(shown if len(shown) > 1 else shown[0], net, mask=mask, **how)


def canvas(asked: Mapping[str, object]) -> Canvas | None:
    """The picture to begin with, of all that was asked for, its files opened. Raises UserError."""
    given = {name: asked[name] for name in BEGINNING if asked[name] is not None}
    return begun(given, asked["steps"]) if given else None


def begun(given: dict[str, object], steps: int) -> Canvas | None:
    for name, read in (("init", open_picture), ("inpaint", open_mask)):
        given |= {name: picture(given[name], read)} if name in given else {}
    found = canvas_of(**given)
    if "strength" in given:
        found.count(steps)
    return found


def reading(asked: Mapping[str, object]) -> dict[str, object]:
    """What `prompts` takes of the texts."""
    return {"text": asked["prompt"], "negative": asked["negative_prompt"]} | {name: asked[name] for name in READING}


def drawing(asked: Mapping[str, object], models: Models, canvas: Canvas | None) -> dict[str, object]:
    """What `pictures` takes, of all that was asked for, and what is usual with these models where nothing was.

    Raises:
        UserError: a base that reads more than was brought.
    """
    names = ("sampler", "steps", "guidance_rescale", "image_guidance_scale")
    if models.base.channels != 4:  # before a text is read
        check_reads(models.base, canvas)
    height, width = size_of(canvas, models.side, asked["height"], asked["width"])
    guidance = asked["guidance_scale"]
    guidance = usual_guidance(models, asked["sampler"]) if guidance is None else guidance
    return {name: asked[name] for name in names} | {"guidance_scale": guidance, "height": height, "width": width}


def recorded(asked: Mapping[str, object], folder: Sequence[str]) -> dict[str, object]:
    """What `record` is told of a run, beside how it is drawn; `folder` are the pictures of which each has a result."""
    told = {name: asked[name] for name in ("prompt", "negative_prompt", *READING, *BEGINNING)}
    return told | {"controls": [vars(net) for net in asked["nets"]], "others": folder}


def sweep(asked: Mapping[str, object]) -> Sweep:
    """What is made: of a prompt for each picture of a folder, at each of several scales, so many pictures."""
    groups, count = asked["images"], asked["num_images"]
    group = next((i for i, one in enumerate(groups) if len(one.scale) > 1), 0)
    spread = next((one for one in groups if one.each), None)
    # Prompts that differ in a picture go through the UNet together; of tiles there may be more in one than in another.
    alike = spread and count == 1 and not asked["low_memory"] and spread.framing != "tile"
    return Sweep(
        prompts=len(spread.image) if spread else 1,
        scales=groups[group].scale if groups else [1.0],
        group=group,
        seed=asked["seed"],
        count=count,
        together=BATCH if alike else 1,
    )


def variants(groups: Sequence[Group], images: Sequence[ImageGroup]) -> list[tuple[list[dict], list[ImageGroup]]]:
    """The image prompts of each prompt of a run: as `record` is told of them, and as `prompts` takes them."""
    told = [vars(group) | {"adapter": image.adapter} for group, image in zip(groups, images, strict=True)]
    each = next((i for i, group in enumerate(groups) if group.each), None)
    return [(told, list(images))] if each is None else [one_of(told, images, each, n) for n in groups[each].image]


def one_of(told: list[dict], images: Sequence[ImageGroup], each: int, name: str) -> tuple[list[dict], list[ImageGroup]]:
    """A variant: with one picture of the folder in the group of this number."""
    return (
        [*told[:each], told[each] | {"image": [name]}, *told[each + 1 :]],
        [*images[:each], replace(images[each], images=(name,)), *images[each + 1 :]],
    )


def folder(groups: Iterable[Group]) -> list[str]:
    """The pictures of which each has a result."""
    return [name for group in groups if group.each for name in group.image]


def stems(names: Sequence[str]) -> list[str]:
    """What results are called after pictures: their names without the ending, unless two are alike."""
    short = [Path(name).stem for name in names]
    return short if len(set(short)) == len(short) else [Path(name).name.replace(".", "-") for name in names]


def check_saves(groups: Iterable[Group], overwrite: bool) -> None:
    """Raises UserError: an embedding is to be written where there is a file already, or where another one will be."""
    for group in (group for group in groups if group.save_embedding):
        if (group.save_embedding.suffix == ".safetensors") == group.each:
            wanted = (
                "a folder is wanted, for one of each picture"
                if group.each
                else "a name that ends in .safetensors is wanted"
            )
            raise UserError(f"`save_embedding` {group.save_embedding}: {wanted}")
    for path, count in Counter(path for group in groups for path in saves(group)).items():
        if os.path.exists(path) and not overwrite:
            raise UserError(f"`save_embedding` {path}: exists; another name is wanted, or `overwrite`")
        if count > 1:
            raise UserError(f"`save_embedding` {path}: given for {count} image prompts; it belongs behind one")
        check_writable("--save-embedding", path, path.absolute().parent)


def saves(group: Group) -> list[Path]:
    """Where embeddings are written: of its pictures together, or of each."""
    if not (group.save_embedding and group.each):
        return [group.save_embedding] if group.save_embedding else []
    return [group.save_embedding / f"{stem}.safetensors" for stem in stems(group.image)]


def saved(
    models: Models, groups: Sequence[Group], prompts: Iterable[Sequence[ImageGroup]]
) -> Iterator[list[ImageGroup]]:
    """Of each prompt its image prompts; those that are to be kept are written as embeddings, which then stand for them."""
    kept, paths = {}, list(map(saves, groups))
    for number, images in enumerate(prompts):
        for i, group in enumerate(groups):
            if group.save_embedding and (group.each or i not in kept):
                kept[i] = save_features(models, images[i], paths[i][number if group.each else 0])
        yield [kept.get(i, image) for i, image in enumerate(images)]


def shown(group: Mapping[str, object]) -> list[str]:
    """The names of an image prompt's pictures, for a sheet; those of weight 0 are left out."""
    each = zip_longest(group["image"] or group["face_embedding"], group["weights"], fillvalue=1.0)
    return [Path(name).name for name, weight in each if weight]


def sheet(
    asked: Mapping[str, object],
    sweep: Sweep,
    made: Mapping[int, Image.Image],
    images: Sequence[ImageGroup],
    canvas: Canvas | None,
) -> Image.Image:
    """All that was made, beside what it was made of."""
    titles = [f"scale {scale:g}" for scale in sweep.scales] if images else [asked["prompt"]]
    shown = beside(asked["images"], images, asked["num_images"])
    return sweep_sheet(sweep, made, titles, shown, canvas and canvas.picture)


def beside(groups: Sequence[Group], images: Sequence[ImageGroup], count: int) -> list[Image.Image | None]:
    """What stands on a sheet beside the results: the pictures that prompt, or of a folder each in the first of its rows."""
    found = [picture for image in images for picture in image.images]
    if names := folder(groups):
        found = [one for name in names for one in (prompting(name), *[None] * (count - 1))]
    return [one if isinstance(one, Image.Image) else None for one in found if names or isinstance(one, Image.Image)]


def said(asked: Mapping[str, object], run: int, seconds: float) -> str:
    """What pictures are made of, and how, in a line; `run` of the steps ran."""
    found = [f"picture {asked['init']}"] if asked["init"] else []
    for group in asked["images"]:
        strengths = ", ".join(f"{scale:g}" for scale in group.scale)
        names = f"each of {len(group.image)} pictures" if group.each else ", ".join(group.image + group.face_embedding)
        found.append(f"image prompt {names} (scale {strengths})")
    for net in asked["nets"]:
        found.append(f"structure of {', '.join(name or asked['init'] for name in hints_of(net))} by {net.control}")
    found += [f"text {brief(asked['prompt'])!r}"] if asked["prompt"] else []
    steps = asked["steps"] if run == asked["steps"] else f"the last {run} of {asked['steps']}"
    how = f"{steps} steps of {asked['sampler']}, seed {asked['seed']}, {seconds:.1f} s"
    return f"{' and '.join(found)}: {how}"
