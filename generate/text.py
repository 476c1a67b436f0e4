"""The text's half of a prompt: what is written, as what the UNet reads of it."""

import re
import warnings
from collections.abc import Sequence
from itertools import accumulate
from math import lcm

import torch
from torch import Tensor

from clip.encode import Text, Weigh, from_empty, times_weight
from clip.tokenizer import CHUNK, decode, encode
from files.errors import Notice, UserError
from generate.models import Models
from generate.syntax import EMBEDDING, SYNTAXES, parts, told
from weights.inversion import Embedding

WEIGH: dict[str, Weigh | None] = {"plain": None, "a1111": times_weight, "comfy": from_empty}
COMMA = 267
NEAR = 20  # tokens at the end of a chunk among which a comma may end it
LARGE = 8  # tokens of a word from which on it may be divided between chunks
# Tokens, each with its weight, that belong together; None: here a chunk begins.
Pieces = list[list[tuple[int, float]] | None]


def encoded(
    models: Models,
    # The prompt and the negative prompt.
    text: str,
    negative: str,
    # How weights are written: one of `generate.syntax.SYNTAXES`.
    syntax: str = "plain",
    # Longer texts than 75 tokens in chunks, instead of cut; in other syntaxes than plain they always are.
    long: bool = False,
    # How many of the last layers of the text towers are left out.
    clip_skip: int = 0,
) -> list[tuple[Tensor, Tensor | None]]:
    """Features (1, 77 * chunks, context_dim) and pooled embedding of the prompt and of the negative one, equally long.

    As in diffusers, `clip_skip` is for the prompt alone; in the syntaxes of A1111 and ComfyUI for both, as there.

    Raises:
        UserError: what cannot be read, with its place; an embedding that is not there.
    """
    if syntax not in SYNTAXES:
        raise UserError(f"`prompt_syntax`: {syntax!r} given, one of {', '.join(SYNTAXES)} is wanted")
    most = min(config.layers for config in models.base.texts) - len(models.base.texts)
    if not 0 <= clip_skip <= most:
        raise UserError(f"`clip_skip`: {clip_skip} given, 0 to {most} is wanted with this base")
    given = {"prompt": text, "negative_prompt": negative}
    found = {name: pieces(words, syntax, name, models.embeddings) for name, words in given.items()}
    tell_unused(
        models.embeddings, syntax, [token for one in found.values() for piece in one for token, _ in piece or ()]
    )
    towers = zip(*(embedding.vectors for embedding in models.embeddings), strict=True)
    vectors = [torch.cat(of_tower).to(models.device) for of_tower in towers]
    texts = [Text(chunks(one, syntax, name, long), WEIGH[syntax], vectors) for name, one in found.items()]
    encoder = models.text_encoder()
    halves = encoder(texts[0], clip_skip), encoder.null(texts[1], clip_skip if syntax != "plain" else 0)
    features, pooled = zip(*halves, strict=True)
    return list(zip(even(features), pooled, strict=True))


def even(features: Sequence[Tensor]) -> list[Tensor]:
    """Features (1, tokens, width) of several texts, each repeated until all are equally long.

    A softmax over keys that are all repeated gives what it gave without: as if each text ran by itself.
    """
    length = lcm(*(x.shape[1] for x in features))
    return [x.repeat(1, length // x.shape[1], 1) for x in features]


def pieces(text: str, syntax: str, name: str, embeddings: Sequence[Embedding]) -> Pieces:
    """A prompt in tokens: words for ComfyUI, single tokens else; and what calls an embedding.

    Embeddings stand in it as tokens -1, -2, ..., numbered through all that are opened.
    """
    names, found = names_of(embeddings), []
    call = calls(names, syntax)
    ends = [*accumulate(len(embedding.vectors[0]) for embedding in embeddings)]
    if line := told(name, call.sub("", text), syntax):
        warnings.warn(Notice(line), stacklevel=4)
    for part in parts(text, syntax, name):
        if part is None:
            found.append(None)
            continue
        (words, weight), at = part, 0
        for match in [*call.finditer(words), None]:
            between = words[at : match.start() if match else None]
            if syntax == "comfy" and (unknown := re.search(EMBEDDING, between)):
                place, opened = text.find(unknown[0]) + 1, ", ".join(one for one, _ in names) or "none"
                raise UserError(f"`{name}`, character {place}: {unknown[0]} is not opened by `embedding` ({opened})")
            tokens = [encode(word) for word in between.split()] if syntax == "comfy" else [[t] for t in encode(between)]
            if match:
                number, at = names[match.lastindex - 1][1], match.end()
                tokens.append([-1 - i for i in range(ends[number] - len(embeddings[number].vectors[0]), ends[number])])
            found += [[(token, weight) for token in piece] for piece in tokens]
    return found


def names_of(embeddings: Sequence[Embedding]) -> list[tuple[str, int]]:
    """What embeddings are called, and their numbers, the longest name first."""
    names = [(name, i) for i, embedding in enumerate(embeddings) for name in embedding.names]
    return sorted(names, key=lambda pair: -len(pair[0]))


def calls(names: Sequence[tuple[str, int]], syntax: str) -> re.Pattern:
    """Where a text calls embeddings, by their bare names or as embedding:NAME, the only way in ComfyUI.

    Of a match, `lastindex` is the number of the name, from 1. No letter or digit that adjoins is cut off from its word.
    """
    before = r"(?<!\w)embedding:" + r"|(?<![^\W_])|(?=[\W_])" * (syntax != "comfy")
    spelt = "|".join("(" + r"\s+".join(map(re.escape, name.split())) + ")" for name, _ in names)
    return re.compile(rf"(?:{before})(?:{spelt})(?:(?<=[\W_])|(?![^\W_]))" if names else r"(?!)", re.IGNORECASE)


def tell_unused(embeddings: Sequence[Embedding], syntax: str, tokens: Sequence[int]) -> None:
    end = 0
    for embedding in embeddings:
        begin, end = end, end + len(embedding.vectors[0])
        if -1 - begin not in tokens:
            called = " or ".join("embedding:" * (syntax == "comfy") + name for name in embedding.names)
            told = f"`embedding` {embedding.path} is not used: no prompt calls it, as {called}"
            warnings.warn(Notice(told), stacklevel=4)


def chunks(found: Pieces, syntax: str, name: str, long: bool) -> list[list[tuple[int, float]]]:
    """Of at most 75 tokens."""
    if syntax == "comfy":
        return by_words(found)
    if syntax == "a1111" or long:
        return by_commas(found)
    tokens = [token for piece in found for token in piece]
    if len(tokens) > CHUNK:
        rest = decode([token for token, _ in tokens[CHUNK:] if token >= 0])
        line = f"`{name}` is longer than 75 tokens; cut off: {rest!r}; `long_prompt` reads it in chunks"
        warnings.warn(Notice(line), stacklevel=4)
    return [tokens[:CHUNK]]


def by_commas(found: Pieces) -> list[list[tuple[int, float]]]:
    """As A1111 divides: a full chunk ends at its last comma, if that is near its end."""
    done, chunk, comma = [], [], None
    for piece in found:
        if piece is None:
            done, chunk, comma = [*done, chunk], [], None
            continue
        if piece[0][0] == COMMA:
            comma = len(chunk)
        elif len(chunk) == CHUNK and comma is not None and CHUNK - comma <= NEAR:
            done, chunk, comma = [*done, chunk[: comma + 1]], chunk[comma + 1 :], None
        if len(chunk) + len(piece) > CHUNK:
            done, chunk, comma = [*done, chunk], [], None
        chunk = chunk + piece
    return [*done, chunk] if chunk or not done else done


def by_words(found: Pieces) -> list[list[tuple[int, float]]]:
    """As ComfyUI divides: words of fewer than 8 tokens stay whole."""
    done = [[]]
    for piece in found:
        while len(piece) > (room := CHUNK - len(done[-1])):
            if len(piece) >= LARGE:
                done[-1], piece = done[-1] + piece[:room], piece[room:]
            done.append([])
        done[-1] = done[-1] + piece
    return done
