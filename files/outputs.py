"""The names of a run's pictures, its own from the start: no other run takes them, nothing that was there is replaced."""

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from files.errors import UserError
from files.pictures import WRITTEN


class Taken(UserError):
    """A name that is there already, and may not be replaced."""


@contextmanager
def reserved(
    # `cat.png` (.jpg, .jpeg, .webp), of several cat_0.png, cat_1.png, ...; or a folder, made if need be: the next free
    # number, 00000.png, of several 00000_0.png, ...
    output: Path,
    count: int = 1,
    grid: bool = False,  # one more name at the end of the list, cat_grid.png, of several stems grid.png
    overwrite: bool = False,  # an existing file may be replaced, once its successor is whole
    inputs: Sequence[str | Path] = (),  # files that are never replaced
    attention: bool = False,  # as many names more, behind the pictures' own: cat_attention.png, cat_0_attention.png, ...
    stems: Sequence[str] = (),  # what the pictures are called instead of by numbers, `count` of each, in the folder
) -> Iterator[list[Path]]:
    """Names for the pictures of a run, made as empty files at its start; those never written to are removed at its end.

        with reserved(Path("outputs"), count=2) as names:
            for picture, name in zip(pictures, names): save_picture(picture, name)

    So two runs into one folder never share a name, and a name that cannot be is told before the work. What has been
    written stays, however the run ends; a run that wrote nothing leaves no folder that was not there.

    Raises:
        UserError: a name that exists, that the file system does not take, or that ends as no picture we write.
    """
    kind = output.suffix.lower()
    named = kind in WRITTEN
    if named and stems:
        raise UserError(f"`output` {output}: a folder is wanted, in which results are named after pictures")
    if named and os.path.isdir(output):
        raise UserError(f"`output` {output}: a folder; folders whose names end in {kind} are not taken")
    if not named and (kind in Image.registered_extensions() or str(output) == "-") and not os.path.isdir(output):
        raise UserError(f"`output` {output}: a name that ends in {', '.join(WRITTEN)}, or a folder, is wanted")
    folder = output.parent if named else output
    try:
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if stems or named:
            firsts = [folder / f"{stem}.png" for stem in stems] or [output]
            made = take(names := spread(firsts, count, grid, attention), overwrite, inputs)
        else:
            made = names = take_number(folder, count, grid, attention)
    except OSError as error:
        raise UserError(f"`output` {output}: cannot write there ({hindrance(folder, error)})") from None
    try:
        yield names
    finally:
        release(made)
        with suppress(OSError):  # one that is not empty stays, and so do those above it
            for place in new:
                place.rmdir()


def hindrance(folder: Path, error: OSError) -> str:
    """What is in the way of a folder, in words."""
    file = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)
    return f"{file} is not a folder" if file else str(error.strerror)


def spread(firsts: list[Path], count: int, grid: bool, attention: bool = False) -> list[Path]:
    one = firsts[0].with_stem("grid" if len(firsts) > 1 else f"{firsts[0].stem}_grid")
    names = [name.with_stem(f"{name.stem}_{i}") for name in firsts for i in range(count)] if count > 1 else firsts
    names = names + [name.with_stem(f"{name.stem}_attention") for name in names] * attention
    return names + [one] * grid


def take_number(folder: Path, count: int, grid: bool, attention: bool = False) -> list[Path]:
    """The names under the first number that is free, and higher than all that were used."""
    for number in itertools.count(max(used(folder), default=-1) + 1):
        names = spread([folder / f"{number:05d}.png"], count, grid, attention)
        with suppress(Taken):
            made = take(names)
            if used(folder).count(number) == len(names):
                return names
            release(made)  # another run began at the same time, under other names of this number


def used(folder: Path) -> list[int]:
    """The number of every picture in the folder whose name begins with one: 00012.png, 00013_0.png, ..."""
    numbers = (path.stem.partition("_")[0] for path in folder.iterdir() if path.suffix.lower() in WRITTEN)
    return [int(number) for number in numbers if number.isdecimal() and len(number) < 20]


def take(names: list[Path], overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> list[Path]:
    """Make empty files, all or none, and return those that were made. Raises Taken for what may not be replaced."""
    made = []
    try:
        for name in names:
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                made.append(name)
            except FileExistsError:
                check_replaced(name, overwrite, inputs)
    except BaseException:
        release(made)
        raise
    return made


def check_replaced(name: Path, overwrite: bool, inputs: Sequence[str | Path]) -> None:
    """Raises Taken for a file that may not be replaced."""
    if any(same(name, one) for one in inputs):
        raise Taken(f"`output` {name}: the file that is read as input; another name is wanted") from None
    if not overwrite or not os.path.isfile(name):
        raise Taken(f"`output` {name}: exists; another name is wanted, or `overwrite`") from None


def release(made: list[Path]) -> None:
    """Remove the files that are still empty."""
    for name in made:
        with suppress(OSError):
            if name.stat().st_size == 0:
                name.unlink()


def same(one: str | Path, other: str | Path) -> bool:
    with suppress(OSError, ValueError):
        return os.path.samefile(one, other)
    return False
