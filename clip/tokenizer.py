"""CLIP's byte-pair tokenizer (openai/CLIP, simple_tokenizer.py), with the vocabulary that open_clip_torch ships."""

import gzip
import html
import string
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

START, END = 49406, 49407
CONTEXT = 77
CHUNK = CONTEXT - 2  # tokens between start and end

WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenize(texts: str | list[str], pad: int = END) -> Tensor:
    """Texts to (batch, 77) int64: start, words, end, padding. Longer texts are cut to 75 tokens.

    SD 1.x pads with end-of-text; the OpenCLIP towers of SD 2.x and SDXL pad with 0.
    """
    rows = [encode(text)[:CHUNK] for text in ([texts] if isinstance(texts, str) else texts)]
    return torch.tensor([[START, *row, END] + [pad] * (CHUNK - len(row)) for row in rows])


def encode(text: str) -> list[int]:
    """Text to token numbers, without start and end."""
    if not text:  # as often: what follows takes a tenth of a second the first time
        return []
    import ftfy
    import regex

    numbers, _, _ = vocabulary()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    words = regex.findall(WORD, " ".join(text.split()).lower(), regex.IGNORECASE)
    return [numbers[part] for word in words for part in byte_pairs(word)]


def decode(tokens: list[int]) -> str:
    """Token numbers to text (lower case, single spaces)."""
    numbers, _, letters = vocabulary()
    parts, values = list(numbers), {letter: byte for byte, letter in letters.items()}
    text = "".join(parts[token] for token in tokens).replace("</w>", " ").strip()
    return b"".join(bytes([values[c]]) if c in values else c.encode() for c in text).decode("utf-8", errors="replace")


def words(row: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a row of tokens, each with the places of its tokens: start, end, padding, punctuation
    and embeddings left out.

    A row may be of several chunks, each with its start and end.
    """
    parts, found, inside, whole = list(vocabulary()[0]), [], False, True
    for place, token in enumerate(row):
        if token in (START, END):
            inside = token == START
        elif token < 0:  # of an embedding
            whole = True
        elif inside:
            if whole:
                found.append([])
            found[-1].append(place)
            whole = token >= len(parts) or parts[token].endswith("</w>")
    texts = [decode([row[place] for place in places]) for places in found]
    return [(text, places) for text, places in zip(texts, found, strict=True) if text.strip(string.punctuation)]


@cache
def byte_pairs(word: str) -> tuple[str, ...]:
    """Split a word by merging, again and again, the neighbours that the vocabulary learned to merge first."""
    _, ranks, letters = vocabulary()
    if word in ("<|startoftext|>", "<|endoftext|>"):
        return (word,)
    parts = [letters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(" ".join(pair), len(ranks)))
        if " ".join(best) not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if tuple(parts[i : i + 2]) == best:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return tuple(parts)


@cache
def vocabulary() -> tuple[dict[str, int], dict[str, int], dict[int, str]]:
    """Token numbers, the rank of each merge ("t h"), and the printable letter that stands for each byte.

    The file is found without importing open_clip, which would cost seconds.
    """
    spec = find_spec("open_clip")
    if spec is None:
        raise ModuleNotFoundError("the tokenizer's vocabulary is missing: pip install open_clip_torch")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]

    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    base = list(letters.values())
    words = [*base, *(c + "</w>" for c in base), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, {merge: i for i, merge in enumerate(merges)}, letters
