"""Indexing pictures that are files: in folders, with captions beside them or in lists of the folder's own, or in lists."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from training.captions import BESIDE, GUESS, DataError, Entry, encoding_of, listed
from training.pairs import BARE, GUESSED, LISTED, PICTURES, UNREAD, WHOLE, Pairs, Row
from training.shards import SHARDS, add_shard

# Lists in a folder, of its pictures and those of the folders in it: Hugging Face's, Flickr's, kohya's.
METADATA = re.compile(r"(metadata|captions?|meta_cap)\.(jsonl|json|csv|tsv|txt)")
JUNK = ("@eaDir", "__MACOSX", "lost+found")  # folders that systems make: of thumbnails, of what zip files had besides
FEW, FIRST = 3, 100  # entries of a list: of so many one picture at least is to be there


def add_folder(pairs: Pairs, root: str, bare: bool) -> None:
    """Pictures with captions beside them or in lists of the folder's own; or else tar shards."""
    pictures, shards, others, told = 0, [], Counter(), {}
    for path in coco_captions(root):
        told |= captions_in(pairs, path, coco_pictures(path))
    for folder, files in walk(root, onerror=lambda error: pairs.skip(str(error))):
        here, beside, taken, unread = os.path.abspath(folder), {}, {}, []
        for stem, suffix in map(os.path.splitext, files):
            beside.setdefault((stem, suffix[1:].lower()), suffix[1:])
        for file in filter(METADATA.fullmatch, files):
            if not any((os.path.splitext(file)[0], kind) in beside for kind in PICTURES):
                told |= captions_in(pairs, os.path.join(folder, file), here)
        for file in files:
            path, (stem, suffix) = os.path.join(folder, file), os.path.splitext(file)
            texts, references = told.pop(os.path.join(here, file), (None, None))
            if file.lower().endswith(SHARDS):
                shards.append(path)
            elif suffix[1:].lower() not in PICTURES and not texts:
                others[suffix.lower()] += 1
                unread += [(stem, path)] if suffix[1:].lower() in UNREAD else []
            else:
                pictures += 1
                name = os.path.relpath(os.path.join(folder, stem), root)
                written = next((beside[stem, kind] for kind in BESIDE if (stem, kind) in beside), None)
                if not written:  # photo.jpg.txt
                    kind = next((beside[file, kind] for kind in BESIDE if (file, kind) in beside), None)
                    written = kind and f"{suffix[1:]}.{kind}"
                if taken.setdefault(stem, file) != file:
                    pairs.skip(f"{path}: {taken[stem]} has the same name")
                else:
                    add_picture(pairs, name, path, path, written, texts, bare, references)
        for stem, path in unread:
            if stem not in taken:
                pairs.skip(f"{path}: a picture of a kind that cannot be read ({', '.join(PICTURES)} can)")
    for path in told:
        pairs.skip(f"{path}: no such picture, though it has a caption")
    for path in shards:
        if pictures:
            pairs.skip(f"{path}: a shard among pictures; it is read when it is named itself")
        else:
            add_shard(pairs, path, bare)
    if not pictures and not shards and others:
        found = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in others.most_common(3))
        pairs.skip(f"no pictures ({', '.join(PICTURES)}) and no shards ({', '.join(SHARDS)}) in it, but {found}")


def walk(root: str, onerror: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
    """Each folder with the names of its files, sorted; what links lead to, behind all others, and no folder twice."""
    seen, tops = set(), [root]
    for top in tops:  # it grows on the way
        for folder, folders, files in os.walk(top, onerror=onerror):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = sorted(name for name in folders if not name.startswith(".") and name not in JUNK)
            links = [name for name in inside if os.path.islink(os.path.join(folder, name))]
            tops += [os.path.join(folder, name) for name in links]
            folders[:] = [name for name in inside if name not in links]
            yield folder, sorted(name for name in files if not name.startswith("."))


def captions_in(pairs: Pairs, path: str, root: str) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """What a list in a folder tells of the pictures there: by their whole paths, where captions and references are kept."""
    found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    try:
        for _, name, texts, references, _ in entries(pairs, path):
            if texts:
                if not found and not os.path.exists(
                    os.path.join(root, name)
                ):  # perhaps they lie one folder further down
                    inner = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
                    root = next((place for place in inner if os.path.exists(os.path.join(place, name))), root)
                picture = os.path.normpath(os.path.join(root, name))
                before = found.get(picture, ((), ()))
                found[picture] = before[0] + texts, before[1] + tuple(os.path.join(root, one) for one in references)
    except DataError as error:  # it may be about something else
        pairs.skip(str(error))
    return {picture: (pairs.keep(texts), pairs.keep(references)) for picture, (texts, references) in found.items()}


def coco_captions(root: str) -> list[str]:
    """COCO's files of captions for the pictures in a folder: in its `annotations`, or in those beside it."""
    folder = os.path.abspath(root)
    parent, split = os.path.split(folder)
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "annotations", "captions_*.json")))
    found += glob.glob(os.path.join(glob.escape(parent), "annotations", f"captions_{glob.escape(split)}.json"))
    return [path for path in found if coco_pictures(path)]


def coco_pictures(path: str) -> str | None:
    """Where the pictures of COCO's captions_val2017.json lie: in val2017 or images/val2017, beside its own folder."""
    folder, name = os.path.split(os.path.abspath(path))
    split = re.fullmatch(r"captions_(.+)\.json", name)
    places = [os.path.join(folder, "..", *parts, split[1]) for parts in ((), ("images",))] if split else []
    return next((os.path.normpath(place) for place in places if os.path.isdir(place)), None)


def entries(pairs: Pairs, path: str) -> Iterator[Entry]:
    """What `listed` gives of a list, in the encoding that it is found to be in."""
    with open(path, "rb") as file:
        encoding = encoding_of(file)
    if encoding == GUESS:
        pairs.remark(GUESSED, path)
    return listed(path, encoding)


def add_list(pairs: Pairs, path: str, data_root: str | Path | None, seen: set[str] | None, bare: bool) -> None:
    root = data_root or coco_pictures(path) or os.path.dirname(path)
    absent: list[str] = []
    number = 0
    for number, (where, name, texts, references, face) in enumerate(entries(pairs, path), 1):
        picture = os.path.join(root, name)
        if (number <= FIRST or "\\" in name or "." not in name[-6:]) and not os.path.exists(picture):
            name = renamed(root, name)
            picture = os.path.join(root, name)
            absent += [] if os.path.exists(picture) else [picture]
        if number == FIRST == len(absent):
            break
        if seen is not None and (texts or bare):
            if picture in seen:
                continue
            seen.add(picture)
        before, others = len(pairs), pairs.keep([os.path.join(root, one) for one in references])
        add_picture(pairs, name, picture, where, None, pairs.keep(texts), bare, others)
        if face and len(pairs) > before:
            pairs.faces[before] = pairs.strings.append(os.path.join(root, face))
    if number == len(absent) >= FEW:
        remote = "; what lies at URLs is downloaded first, by img2dataset say" * ("://" in absent[0])
        few = f"none of its {'first ' * (number == FIRST)}{number} pictures is there ({absent[0]})"
        raise DataError(f"{path}: {few}; paths start at the list's own folder, or at `data_root`{remote}")


def renamed(root: str, name: str) -> str:
    """What may be meant by a name that is not there: a path of Windows, one from the root, one without suffix."""
    name = name.replace("\\", "/")
    meant = (name, name.lstrip("/"), *(f"{name}.{suffix}" for suffix in PICTURES))
    return next((one for one in meant if os.path.exists(os.path.join(root, one))), name)


def add_picture(
    pairs: Pairs,
    name: str,
    path: str,
    label: str,
    written: str | None,
    texts: tuple[int, int] | None,
    bare: bool,
    references: tuple[int, int] | None = None,
) -> None:
    """A picture file with its captions: in a file beside it, by its suffix; or kept here; or, with `bare`, none."""
    place, count = texts or (0, 0)
    if written:
        place, count = 0, WHOLE
    elif not count and not bare:
        pairs.skip(f"{label}: no caption")
        return
    elif not count:
        pairs.remark(BARE, label)
    if references and references[1]:
        pairs.references.extend((len(pairs), *references))
    string = pairs.strings.append(path)
    pairs.add(name, Row(string, 0, WHOLE, place, count, pairs.suffix(written or LISTED)))
