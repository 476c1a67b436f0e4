"""Captions as they are written down: beside a picture, or in a list that names pictures; in any usual encoding.

photo.txt, photo.json, photo.caption       beside photo.jpg; kohya's trainers know the last, img2dataset the others
data.json, data.jsonl                      {"image_file": ..., "text": ..., "reference": ...}, the first two as the
                                           trainers of IP-Adapter have them
metadata.jsonl, metadata.csv               "file_name" and "text", of Hugging Face's imagefolder
annotations/captions_val2017.json          COCO's, with "images" and "annotations"
"""

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from files.errors import UserError

BESIDE = ("txt", "json", "caption")  # where several stand beside a picture, the first of these is read
LISTS = (".json", ".jsonl", ".csv", ".tsv")
PICTURE_KEYS = ("image_file", "file_name", "image")
FACE_KEY = "id_embed_file"
TEXT_KEYS = ("text", "caption", "captions")
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
    if suffix != "json":
        return (sound(text.strip()),)
    try:
        found = texts_of(json.loads(text))
    except (ValueError, RecursionError):
        raise ValueError("the caption is not JSON") from None
    return tuple(text.strip() for text in found)


def texts_of(entry: object) -> tuple[str, ...]:
    """The captions in an object of JSON: those of the first key that holds any, one or several."""
    return tuple(map(sound, strings_of(entry, TEXT_KEYS)))


def strings_of(entry: object, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The string, or the strings of the list, under the first of these keys that holds any."""
    for key in keys if isinstance(entry, dict) else ():
        value = entry.get(key)
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if texts:
            return tuple(texts)
    return ()


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
                keys = PICTURE_KEYS if isinstance(entry, dict) else ()
                name = next((entry[key] for key in keys if isinstance(entry.get(key), str) and entry[key]), None)
                if name is None:
                    raise DataError(f"{where} is not {WANTED}")
                face = entry.get(FACE_KEY)
                face = face if isinstance(face, str) and face else None
                yield Entry(where, name, texts_of(entry), strings_of(entry, REFERENCE_KEYS), face)
    except DataError:
        raise
    except csv.Error as error:
        raise DataError(f"{where}: not a table ({error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None


def objects(path: str, file: io.TextIOBase) -> Iterator[tuple[int, object]]:
    """The entries of a .json: a list, or COCO's annotations, whose pictures have several captions each."""
    content = json.load(file)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        content = gathered(path, content)
    if not isinstance(content, list):
        raise DataError(f"{path}: not a list of {WANTED}; one of these on each line is a .jsonl")
    yield from enumerate(content, 1)


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
    """The entries of a .jsonl, one on each line that is not empty."""
    return ((number, line) for number, line in enumerate(file, 1) if line.strip())


def rows(path: str, file: io.TextIOBase) -> Iterator[tuple[int, dict]]:
    """The rows of a table, by the names in its first line; an empty caption is none."""
    first = file.readline()
    for delimiter in ",;\t":
        columns = next(csv.reader([first], delimiter=delimiter), [])
        if set(columns) & set(PICTURE_KEYS):
            break
    else:
        raise DataError(
            f"{path}: the first line is wanted to name the columns file_name and text; it is {first[:80]!r}"
        )
    reader = csv.reader(file, delimiter=delimiter)
    for row in filter(None, reader):
        entry = dict(zip(columns, row, strict=False))
        yield reader.line_num + 1, {key: value for key, value in entry.items() if value}


READERS = {".json": objects, ".jsonl": lines, ".csv": rows, ".tsv": rows}
