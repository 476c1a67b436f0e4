"""Captions as they are written down: beside a picture, or in a list that names pictures; in any usual encoding.

photo.txt, photo.json, photo.caption       beside photo.jpg; kohya's trainers know the last, img2dataset the others
data.json, data.jsonl                      {"image_file": ..., "text": ..., "reference": ...}, the first two as the
                                           trainers of IP-Adapter have them
meta_cap.json                              {"a.jpg": "text"} or {"a": {"caption": "text"}}, as kohya's have it
metadata.jsonl, metadata.csv               "file_name" and "text", of Hugging Face's imagefolder
annotations/captions_val2017.json          COCO's, with "images" and "annotations"

Other people's words for the picture and its caption serve as well, in any case and with any mark between their parts.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from files.errors import UserError

BESIDE = ("txt", "json", "caption")  # where several stand beside a picture, the first of these is read
LISTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
# As `plain` has them; of several the first counts.
PICTURE_KEYS = (
    "imagefile",
    "filename",
    "image",
    "filepath",
    "imagepath",
    "imagename",
    "path",
    "img",
    "imgpath",
    "file",
)
FACE_KEY = "idembedfile"
TEXT_KEYS = ("text", "caption", "captions", "prompt", "description", "comment", "sentence", "sentences", "title")
REFERENCE_KEYS = ("reference", "references")
WANTED = '{"image_file": ..., "text": ...}'
MARKS = {  # the longer ones first: that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
GUESS = "cp1252"  # what is neither UTF-8 nor marked was most likely written on an old Windows


class DataError(UserError):
    """Data that cannot be used at all; the message is one line that names what was given."""


class Entry(NamedTuple):
    """Of a list."""

    where: str  # it stands
    name: str  # of the picture
    texts: tuple[str, ...]  # its captions; () without any
    references: tuple[str, ...] = ()  # other pictures of the same subject
    face: str | None = None  # the file of its face embedding


def encoding_of(file: BinaryIO) -> str:
    """By its byte order mark; else UTF-8, if all of it is; else the guess. Reads the file to its end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    chunk = file.read(1 << 16)
    for mark, encoding in MARKS.items():
        if chunk.startswith(mark):
            return encoding
    try:
        while chunk:
            decoder.decode(chunk)
            chunk = file.read(1 << 16)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return GUESS
    return "utf-8"


def caption(content: bytes, suffix: str) -> tuple[str, ...]:
    """The captions in a .txt, .json or .caption file; () in JSON without any. Raises ValueError that says what is wrong."""
    encoding = encoding_of(io.BytesIO(content))
    try:
        text = content.decode(encoding, "replace" if encoding == GUESS else "strict")
    except UnicodeDecodeError:
        raise ValueError(f"the caption is not the {encoding.removesuffix('-sig').upper()} that it begins as") from None
    if encoding == GUESS and any(c < " " and c not in "\t\n\r\f" for c in text):
        raise ValueError("the caption is not text")
    if suffix.rpartition(".")[2] != "json":
        return (sound(text.strip()),)
    try:
        found = texts_of(json.loads(text))
    except (ValueError, RecursionError):
        raise ValueError("the caption is not JSON") from None
    return tuple(text.strip() for text in found)


def texts_of(entry: object) -> tuple[str, ...]:
    """The captions in what JSON holds: those of the first key that holds any, one or several; or a bare string or list."""
    return tuple(map(sound, strings_of(entry if isinstance(entry, dict) else {"text": entry}, TEXT_KEYS)))


def strings_of(entry: object, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The string, or the strings of the list, under the first of these keys that holds any."""
    entry = {plain(key): value for key, value in entry.items()} if isinstance(entry, dict) else {}
    for key in keys:
        value = entry.get(key)
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if texts:
            return tuple(texts)
    return ()


def plain(key: str) -> str:
    """`Image File`, `image-file` and `image_file` are one."""
    return re.sub(r"[\s_-]", "", key).lower()


def sound(text: str) -> str:
    """Without halves of letters, which JSON can hold ("\\ud800") and no tokenizer can read."""
    return text.encode("utf-8", "replace").decode()


def listed(path: str, encoding: str) -> Iterator[Entry]:
    """The entries of a list.

    Raises:
        DataError: the file is no list of pictures, or an entry of it names none.
    """
    errors = "replace" if encoding == GUESS else "strict"
    where = path
    try:
        with open(path, encoding=encoding, errors=errors, newline="") as file:
            suffix = os.path.splitext(path)[1].lower()
            for number, entry in READERS[suffix](path, file):
                where = f"{path}: {'entry' if suffix == '.json' else 'line'} {number}"
                entry = json.loads(entry) if suffix == ".jsonl" else entry
                name, *_ = (*strings_of(entry, PICTURE_KEYS), "")
                if not name:
                    raise DataError(f"{where} is not {WANTED}")
                face, *_ = (*strings_of(entry, (FACE_KEY,)), "")
                yield Entry(where, name, texts_of(entry), strings_of(entry, REFERENCE_KEYS), face or None)
    except DataError:
        raise
    except csv.Error as error:
        raise DataError(f"{where}: not a table ({error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def objects(path: str, file: io.TextIOBase) -> Iterator[tuple[int, object]]:
    """The entries of a .json: a list, alone or under a name; pictures by their names; lines, as in a .jsonl.

    Or COCO's annotations, whose pictures have several captions each.
    """
    text = file.read()
    try:
        content = json.loads(text)
    except ValueError as error:
        if not str(error).startswith("Extra data"):
            raise
        content = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(content, dict) and isinstance(content.get("images"), list) and "annotations" in content:
        content = gathered(path, content)
    if isinstance(content, dict):
        lists = (
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        )
        content = next(lists, None) or by_name(content)
    if not isinstance(content, list):
        raise DataError(f"{path}: not a list of {WANTED}; one of these on each line is a .jsonl")
    yield from enumerate(content, 1)


def by_name(content: dict) -> list[dict] | None:
    """Captions under the names of pictures, bare ones or in objects; none of other things."""
    texts = {name: texts_of(value) for name, value in content.items() if isinstance(value, dict) or "." in name}
    return [{"image": name, "text": list(found)} for name, found in texts.items() if found] or None


def gathered(path: str, coco: dict) -> list[dict]:
    """COCO's pictures in their order, each with its captions in theirs."""
    try:
        texts = {image["id"]: [] for image in coco["images"]}
        for note in coco["annotations"]:
            texts[note["image_id"]].append(note["caption"])
        return [{"file_name": image["file_name"], "captions": texts[image["id"]]} for image in coco["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not annotations with captions, as COCO's ({error!r})") from None


def lines(path: str, file: io.TextIOBase) -> Iterator[tuple[int, str]]:
    """The entries of a .jsonl, one on each line that is not empty; or a list, as of a .json."""
    first = file.read(1)
    file.seek(0)
    if first == "[":
        return ((number, json.dumps(entry)) for number, entry in objects(path, file))
    return ((number, line.rstrip().removesuffix(",")) for number, line in enumerate(file, 1) if line.strip())


def rows(path: str, file: io.TextIOBase) -> Iterator[tuple[int, dict]]:
    """The rows of a table, by the names in its first line; an empty caption is none."""
    first = file.readline()
    for delimiter in ",;\t|":
        columns = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        if set(map(plain, columns)) & set(PICTURE_KEYS):
            break
    else:
        raise DataError(
            f"{path}: the first line is wanted to name the columns file_name and text; it is {first[:80]!r}"
        )
    for number, row in filter(lambda found: found[1], cells(path, file, delimiter, len(columns))):
        entry = dict(zip(columns, row, strict=False))
        yield number, {key: value for key, value in entry.items() if value}


def cells(path: str, file: Iterable[str], delimiter: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """The rows behind the first line, each with the number of its last line."""
    if delimiter == "\t":
        yield from between_tabs(file, width)
        return
    marks = last = height = 0

    def counted() -> Iterator[str]:
        nonlocal marks
        for line in file:
            marks += line.count('"')
            yield line

    table = csv.reader(counted(), delimiter=delimiter, skipinitialspace=True)
    for row in table:
        last, height = table.line_num, table.line_num - last
        yield last + 1, row
    if height > 1 and marks % 2:
        raise DataError(f"{path}: line {last - height + 2}: a quotation mark is opened there, and never closed")


def between_tabs(file: Iterable[str], width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows of so many columns. Captions with an inch in them are common there: a mark that nothing closes is a mark."""
    held = ""
    for number, line in enumerate(file, 2):
        if held and line.count("\t") + 1 >= width:  # a row of its own
            yield number - 1, held.rstrip("\r\n").split("\t")
            held = ""
        held += line
        if held.count('"') % 2 == 0 or not re.search('(^|\t)"', held):
            yield number, next(csv.reader(held.splitlines(keepends=True), delimiter="\t"), [])
            held = ""
    if held:
        yield number, held.rstrip("\r\n").split("\t")


READERS = {".json": objects, ".jsonl": lines, ".csv": rows, ".tsv": rows, ".txt": rows}
