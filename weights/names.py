"""What the values of arguments mean (`--base sd15`, `--adapter plus-face`, a file), and what follows from them."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from files.tensors import WeightsError
from weights.presets import BUNDLED, PRESETS, ROWS, Preset

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
Found = Path | Preset | None


def find(kind: str, value: str) -> Path | Preset:
    """What an argument's value means: a file or folder that exists, else the published file of that name.

    A value with a separator or a suffix of weights is a path. `Plus-Face` and `plus_face` are `plus-face`; a folder
    that happens to have a preset's name is meant by `./tiny`.

    Raises:
        WeightsError: no such file; a name that is unknown, with those near it.
    """
    is_path = "/" in value or os.sep in value or value.lower().endswith(SUFFIXES)
    name = value.lower().replace("_", "-")
    if os.path.isfile(value) or (os.path.exists(value) and (is_path or (kind, name) not in PRESETS)):
        return Path(value)
    if is_path:
        same = [row.name for row in ROWS if row.kind == kind and row.repo and Path(row.file).name == Path(value).name]
        hint = f" (`{kind}` {same[0]} is the published one)" if len(same) == 1 else ""
        raise WeightsError(f"`{kind}` {value}: no such file{hint}")
    if (kind, name) in PRESETS:
        return PRESETS[kind, name]
    near = difflib.get_close_matches(name, names(kind), n=4, cutoff=0.5)
    hint = f", near it {', '.join(near)}" if near else ""
    raise WeightsError(f"`{kind}` {value}: neither a file nor a name{hint} (all names: python sample.py --list)")


def names(kind: str, family: str | None = None) -> list[str]:
    """All names that an argument takes, or those that go with a family of bases."""
    presets = [preset for preset in PRESETS.values() if preset.kind == kind]
    return [preset.name for preset in presets if family is None or preset.goes_with(family)]


def resolve(
    given: dict[str, str | None],  # the values by kind ("base", "adapter", "image_encoder", "vae"); None is not given
    image: bool,  # whether there is an image prompt
    new_adapter: bool = False,  # one is to be made: none is brought, but the image encoder that it would read
    faces_alone: Callable[[Path], bool] = lambda adapter: False,  # whether a file reads faces alone, no pictures
) -> dict[str, Found]:
    """What each argument of a run stands for, with what follows from the others where one is not given.

    - Neither a base nor an adapter's name: the bundled model, also around an adapter's file (what train.py made of it).
    - An adapter's name alone brings its base and its image encoder.
    - A base's name with an image prompt and no adapter brings the base adapter of its family, and that its encoder.
    - Of files nothing follows: their names do not tell what they are.
    - Without an image prompt there is no adapter and no image encoder. An autoencoder is never brought.

    Returns:
        The same by kind; None is not wanted. Nothing is fetched yet: `weights.hub.fetch` does that.

    Raises:
        WeightsError: as `find` does; names that do not go together; one that is wanted and follows from nothing.
    """
    found: dict[str, Found] = {kind: find(kind, value) if value else None for kind, value in given.items()}
    base, adapter, image_encoder = (found.get(kind) for kind in ("base", "adapter", "image_encoder"))
    base = base or (brings(adapter, "base") if isinstance(adapter, Preset) else BUNDLED)
    if image:
        adapter = adapter or (None if new_adapter else brings(base, "adapter"))
        ours = base == BUNDLED and isinstance(adapter, Path)
        if not image_encoder and not (isinstance(adapter, Path) and faces_alone(adapter)):
            image_encoder = brings(base if ours else adapter or base, "image_encoder")
    else:
        adapter = image_encoder = None
    found |= {"base": base, "adapter": adapter, "image_encoder": image_encoder}
    check_together(found)
    return found


def brings(found: Path | Preset, kind: str) -> Preset | None:
    """What a preset needs beside it: a base its usual adapter, and what that reads; None for nothing (FaceID).

    Raises:
        WeightsError: a file, of which nothing follows; a base for which no adapter is published.
    """
    if isinstance(found, Path):
        raise WeightsError(f"`{kind}` is wanted beside {found}: a file, or a name (python sample.py --list)")
    usual = PRESETS.get(("adapter", found.adapter)) if found.kind == "base" else found
    if usual is None:
        raise WeightsError(f"`base` {found.name}: no adapter is published for {found.families[0].name}: `{kind}` FILE")
    name = usual.name if kind == "adapter" else getattr(usual, kind)
    return PRESETS[kind, name] if name else None


def check_together(found: dict[str, Found]) -> None:
    """Refuse two names that do not go together; what a file is, its tensors will tell.

    Raises:
        WeightsError: names both, and what would go.
    """
    base, adapter, image_encoder = (found.get(kind) for kind in ("base", "adapter", "image_encoder"))
    if isinstance(base, Preset):
        family = base.families[0].name
        for other in found.values():
            if isinstance(other, Preset) and other.families and not other.goes_with(family):
                raise WeightsError(of_another_family(other, base))
    read = isinstance(adapter, Preset) and isinstance(image_encoder, Preset) and adapter.image_encoder
    if read and read != image_encoder.name:
        raise WeightsError(f"`adapter` {adapter.name} reads `image_encoder` {read}; {image_encoder.name} is given")


def of_another_family(other: Preset, base: Preset) -> str:
    family = base.families[0].name
    return (
        f"`{other.kind}` {other.name} is for {' and '.join(row.name for row in other.families)}, "
        f"`base` {base.name} is {family}; for that: {', '.join(names(other.kind, family)) or 'none is published'}"
    )
