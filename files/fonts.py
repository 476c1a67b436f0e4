"""Lettering in any script: a font of the system that has the letters, and plain ASCII for what no font has."""

import os
import unicodedata
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

PLACES = ("$XDG_DATA_HOME/fonts", "~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts")
PLACES += ("~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts")
PLACES += ("$WINDIR/Fonts", "$LOCALAPPDATA/Microsoft/Windows/Fonts")
UNUSUAL = ("bold", "italic", "oblique", "mono", "serif", "light", "thin", "black", "condensed", "math")  # taken last
NO_LETTERS = ("lastresort", "adobeblank")  # fonts that show a box for every character there is
NOWHERE = "\U0010ffff"  # not a character: what a font shows for it, it shows for all that it lacks


def lettering(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A text on one line, and a font that can show all of it.

    Pillow's own font, or else the system's font that has most of the letters. What that lacks is written without its
    accents if that helps, and else as Python escapes it: \\u732b.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    font = font_for("".join(sorted(set(text))), size)
    return "".join(char if shows(font, char) else plain(font, char) for char in text), font


@lru_cache(maxsize=256)
def font_for(chars: str, size: int) -> ImageFont.FreeTypeFont:
    best = ImageFont.load_default(size)
    lacks = lacking(best, chars)
    for path in font_files() if lacks else ():
        with suppress(OSError):  # damaged, or of pictures in a size of their own
            font = ImageFont.truetype(str(path), size)
            if (less := lacking(font, chars)) < lacks:
                best, lacks = font, less
            if not lacks:
                break
    return best


@lru_cache(maxsize=1)
def font_files() -> list[Path]:
    """The system's fonts, those for running text first."""
    found = set()
    for place in PLACES:
        for folder, _, files in os.walk(os.path.expanduser(os.path.expandvars(place))):
            found |= {Path(folder, file) for file in files if file.lower().endswith((".ttf", ".otf", ".ttc"))}
    found = {path for path in found if not path.stem.lower().startswith(NO_LETTERS)}
    return sorted(found, key=lambda path: (any(word in path.stem.lower() for word in UNUSUAL), path.name, path))


def lacking(font: ImageFont.FreeTypeFont, chars: str) -> int:
    return sum(not shows(font, char) for char in chars)


def shows(font: ImageFont.FreeTypeFont, char: str) -> bool:
    """Whether the font has the character, or it is one that is not seen by itself: a space, an accent, a joiner."""
    if char == " " or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return True
    mask, box = font.getmask(char), font.getmask(NOWHERE)
    return (mask.size, bytes(mask)) != (box.size, bytes(box))


def plain(font: ImageFont.FreeTypeFont, char: str) -> str:
    bare = "".join(part for part in unicodedata.normalize("NFKD", char) if not unicodedata.combining(part))
    return (
        bare if bare and all(shows(font, part) for part in bare) else char.encode("ascii", "backslashreplace").decode()
    )


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, most: int = 3) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces where there are any; what is over ends in three dots."""
    lines, rest = [], text
    while rest and len(lines) < most - 1:
        line, rest = fitting(rest, font, width)
        lines.append(line)
    if rest and font.getlength(rest) > width:
        rest = fitting(rest, font, width - font.getlength("..."), words=False)[0].rstrip() + "..."
    return [*lines, rest] if rest else lines


def fitting(text: str, font: ImageFont.FreeTypeFont, width: float, words: bool = True) -> tuple[str, str]:
    """As much of the text as is no wider than `width`, a character at least, and the rest."""
    count = 1
    while count < len(text) and font.getlength(text[: count + 1]) <= width:
        count += 1
    space = text.rfind(" ", 0, count + 1)
    if words and count < len(text) and space > 0:
        count = space
    return text[:count].rstrip(), text[count:].lstrip()
