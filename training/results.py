"""The pictures that were made of pairs: what they are called, where they lie, how they were made."""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from files.errors import UserError
from files.pictures import PictureError, open_picture
from files.whole import write_text
from training.pairs import PICTURES, BadSample, Pair, Pairs

NOTE = "pictures.json"  # beside pictures of our own: how they were made


def result_names(pairs: Pairs, limit: int | None) -> list[str]:
    """What each pair's results are called: a path without suffix that cannot leave the folder, each pair its own."""
    names: dict[str, None] = {}
    for i in range(min(len(pairs), limit or len(pairs))):
        path = Path(*(part for part in Path(pairs.names[i]).parts if part not in ("/", "..")))
        name = str(path.with_suffix("") if path.suffix[1:].lower() in PICTURES else path)
        if name in names:
            raise UserError(f"`data`: two pairs are called {name!r}; results go by name, each pair needs its own")
        names[name] = None
    return list(names)


# Made elsewhere

# Behind the name of a pair, a number: cat_0, cat-0, cat 0, cat (1), cat/0; or cat_seed42, cat_sample_3.
NUMBERED = tuple(
    re.compile(rf"(.+?)(?:[ _-]|/| ?\(){word}([0-9]{{1,18}})\)?") for word in ("", "(?:seed|sample|image|img)[ _-]?")
)


def find_results(
    folder: Path, names: Sequence[str], most: int | None = None
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Pictures by the name of their pair, in the order of their numbers, no more than `most`; and those that are left.

    A pair's are name.png; or name_0.png, name_1.png, ...; or name/0.png, name/1.png, ...; or as `NUMBERED` has it.
    Another suffix of a picture will do, also behind the pair's own (name.jpg.png), and numbers may have zeros before
    them, gaps between them, and any beginning.

    Raises:
        UserError: two files that stand for the same.
    """
    here = listed(folder, names)
    known = {plain(name): name for name in names}

    def numbered(stem: str) -> tuple[str, int] | None:
        found = (pattern.fullmatch(plain(stem)) for pattern in NUMBERED)
        return next(((known[match[1]], int(match[2])) for match in found if match and match[1] in known), None)

    with_numbers = {of[0] for stem in here if (of := numbered(stem))}
    owned: dict[str, dict[int, Path]] = {}
    left = []
    for stem, paths in here.items():
        of = numbered(stem)
        name = known.get(plain(stem))
        if name and not (of and name in with_numbers):  # 3_1.png is the pair 3_1's, unless that has 3_1_0.png
            of = name, -1
        group = owned.setdefault(of[0], {}) if of else {}
        for path in paths:
            if of and group.setdefault(of[1], path) != path:
                raise UserError(f"`results` {folder}: both {group[of[1]].name} and {path.name} are there; which is it?")
        left += [] if of else paths
    for name, group in owned.items():
        if -1 in group and len(group) > 1:
            first = group[min(number for number in group if number >= 0)]
            raise UserError(f"`results` {folder}: both {group[-1].name} and {first.name} are there; which is it?")
        owned[name] = [group[number] for number in sorted(group)]
        left += owned[name][most:] if most else []
    return {name: paths[:most] for name, paths in owned.items()}, left


def plain(stem: str) -> str:
    """A name in composed letters (macOS takes them apart), without the suffix of the pair's own picture."""
    stem = unicodedata.normalize("NFC", stem)
    return re.sub(rf"\.({'|'.join(PICTURES)})(?=$|[ _/(-])", "", stem, flags=re.IGNORECASE)


def listed(folder: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """The pictures in the folder and where the names lead, by their paths in it without suffix."""
    found: dict[str, list[Path]] = {}
    for place in dict.fromkeys(place for name in names for place in (os.path.dirname(name), name)):
        with suppress(FileNotFoundError, NotADirectoryError):
            for file in sorted(os.listdir(folder / place)):
                stem, suffix = os.path.splitext(file)
                if suffix[1:].lower() in PICTURES and not file.startswith("."):
                    found.setdefault(os.path.join(place, stem), []).append(folder / place / file)
    return found


def readable(
    pairs: Pairs, names: Iterable[str], found: Mapping[str, Sequence[Path]], folder: Path, skipped: dict[str, None]
) -> Iterator[tuple[int, str, Pair, list[Image.Image]]]:
    """Pairs with the pictures made of them; what cannot be read, or has no result, is noted as skipped."""
    for i, name in enumerate(names):
        try:
            pair = pairs[i]
            if name not in found:
                wanted = f"nor {name}_0.png, nor {name}/0.png; .jpg, .webp and others will do"
                raise PictureError(f"{folder / name}.png: no such picture, {wanted}")
            yield i, name, pair, [open_picture(path) for path in found[name]]
        except (BadSample, PictureError) as error:
            skipped[str(error)] = None


# Made here


def open_folder(folder: Path, settings: dict) -> None:
    """A folder for pictures, with all that they depend on as pictures.json; pictures made otherwise are refused."""
    before = made_with(folder)
    if before is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"`pictures` {folder}: holds other files; a new or empty folder is wanted")
    if before and any(folder.rglob("*.png")):  # without any, a run that failed at its start is in nobody's way
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"`pictures` {folder}: made with `{name.removesuffix('_name')}` {before.get(name)}, now it is {value}; "
                    "go on with the same settings, or name a new folder"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NOTE, json.dumps(settings, indent=1))


def made_with(folder: Path) -> dict | None:
    """The settings that lie beside the pictures; None for pictures made elsewhere."""
    path = folder / NOTE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; name a new folder, or remove this one") from None


def made_results(folder: Path, names: Sequence[str], samples: int) -> dict[str, list[Path]]:
    """Those of our own: the pictures of each name that are there."""
    paths = {name: [folder / f"{name}_{j}.png" for j in range(samples)] for name in names}
    found = {name: [path for path in row if os.path.isfile(path)] for name, row in paths.items()}
    return {name: row for name, row in found.items() if row}


def to_make(
    pairs: Pairs,
    names: Sequence[str],
    folder: Path,
    samples: int,
    seed: int,
    skipped: dict[str, None],
    done: Callable[[int], object],
) -> Iterator[tuple[Pair, list[tuple[int, Path]]]]:
    """Pairs whose pictures are not all there yet, with the seeds and the paths of those that are missing."""
    for i, name in enumerate(names):
        paths = [(seed + j, folder / f"{name}_{j}.png") for j in range(samples)]
        todo = [(seed, path) for seed, path in paths if not os.path.isfile(path)]
        done(len(paths) - len(todo))
        try:
            if todo:
                yield pairs[i], todo
        except BadSample as error:
            skipped[str(error)] = None
            done(len(todo))
