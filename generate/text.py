"""The text's half of a prompt: what is written, as what the UNet reads of it."""

import re
import warnings
from collections.abc import Container, Sequence
from itertools import accumulate, chain, pairwise
from math import lcm
from operator import itemgetter

import torch
from torch import Tensor

from clip.encode import Text, Weigh, from_empty, times_weight
from clip.tokenizer import CHUNK, END, decode, encode, words
from files.errors import Notice, UserError, brief
from generate.models import Models
from generate.syntax import EMBEDDING, SYNTAXES, parts, told
from weights.inversion import Embedding

WEIGH: dict[str, Weigh | None] = {"plain": None, "a1111": times_weight, "comfy": from_empty}
COMMA = 267
NEAR = 20  # tokens at the end of a chunk among which a comma may end it
LARGE = 8  # tokens of a word from which on it may be divided between chunks
Token = tuple[int, float]  # and its weight
Pieces = list[list[Token] | None]  # tokens that belong together; None: here a chunk begins


def encoded(
    models: Models,
    text: str,  # the prompt
    negative: str,  # and the negative one
    syntax: str = "plain",  # how weights are written: one of `generate.syntax.SYNTAXES`
    long: bool = False,  # texts beyond 75 tokens in chunks, not cut; in other syntaxes than plain they always are
    clip_skip: int = 0,  # how many of the last layers of the text towers are left out
) -> list[tuple[Tensor, Tensor | None]]:
    """Features (1, 77 * chunks, context_dim) and pooled embedding of the prompt and of the negative one, equally long.

    "plain" is as diffusers has it: `clip_skip` is for the prompt alone, and no negative prompt is zeros to SDXL. In the
    other syntaxes it is as there: both skip, and no negative prompt is the empty text.

    Raises:
        UserError: what cannot be read, with its place; an embedding that is not there.
    """
    if syntax not in SYNTAXES:
        raise UserError(f"`prompt_syntax`: {syntax!r} given, one of {', '.join(SYNTAXES)} is wanted")
    if clip_skip:
        check_skip(models, clip_skip)
    given, opened = {"prompt": text, "negative_prompt": negative}, models.embeddings
    for name, said in given.items():
        if line := told(name, calls(names_of(opened), syntax).sub("", said) if opened else said, syntax, long):
            warnings.warn(Notice(line), stacklevel=3)
    if opened or long or syntax != "plain":
        texts = composed(models, given, syntax, long)
    else:
        texts = [plain(name, said) for name, said in given.items()]
    encoder = models.text_encoder()
    negative_half = encoder.null(texts[1]) if syntax == "plain" else encoder(texts[1], clip_skip)
    features, pooled = zip(encoder(texts[0], clip_skip), negative_half, strict=True)
    if len({x.shape[1] for x in features}) > 1:
        features = even(features)
    return list(zip(features, pooled, strict=True))


def plain(name: str, said: str) -> Text:
    """In one chunk, every token as loud as all others."""
    tokens = encode(said)
    if len(tokens) > CHUNK:
        tell_cut(name, tokens)
    return Text([[(token, 1.0) for token in tokens[:CHUNK]]])


def check_skip(models: Models, clip_skip: int) -> None:
    most = min(config.layers for config in models.base.texts) - len(models.base.texts)
    if not 0 <= clip_skip <= most:
        raise UserError(f"`clip_skip`: {clip_skip} given, 0 to {most} is wanted with this base")


def composed(models: Models, given: dict[str, str], syntax: str, long: bool) -> list[Text]:
    """Texts with weights, in chunks, with embeddings."""
    opened = models.embeddings
    found = {name: pieces(said, syntax, name, opened, long) for name, said in given.items()}
    for name, one in found.items():
        if syntax == "plain" and not long and len(row := [token for piece in one for token, _ in piece]) > CHUNK:
            tell_cut(name, row)
    tell_unused(opened, syntax, {token for one in found.values() for piece in one for token, _ in piece or ()})
    vectors = [torch.cat(tower) for tower in zip(*(embedding.vectors for embedding in opened), strict=True)]
    vectors = [x.to(models.device) for x in vectors]
    return [Text(chunks(one, syntax, long), WEIGH[syntax], vectors) for one in found.values()]


def even(features: Sequence[Tensor]) -> list[Tensor]:
    """Features (1, tokens, width) of several texts, each repeated until all are equally long.

    A softmax over keys that are all repeated gives what it gave without: as if each text ran by itself.
    """
    length = lcm(*(x.shape[1] for x in features))
    return [x.repeat(1, length // x.shape[1], 1) for x in features]


def pieces(text: str, syntax: str, name: str, embeddings: Sequence[Embedding], long: bool = False) -> Pieces:
    """A prompt in tokens: words for ComfyUI, single tokens else; and embeddings where they are called."""
    names, numbers, found = names_of(embeddings), numbers_of(embeddings), []
    call = calls(names, syntax)
    for part in parts(text, syntax, name, long):
        if part is None:
            found.append(None)
            continue
        (said, weight), at = part, 0
        for match in [*call.finditer(said), None]:
            between = said[at : match.start() if match else None]
            if syntax == "comfy" and (unknown := re.search(EMBEDDING, between)):
                place, opened = text.find(unknown[0]) + 1, ", ".join(one for one, _ in names) or "none"
                raise UserError(f"`{name}`, character {place}: {unknown[0]} is not opened by `embedding` ({opened})")
            tokens = [encode(word) for word in between.split()] if syntax == "comfy" else [[t] for t in encode(between)]
            if match:
                tokens.append(numbers[names[match.lastindex - 1][1]])
                at = match.end()
            found += [[(token, weight) for token in piece] for piece in tokens]
    return found


def numbers_of(embeddings: Sequence[Embedding]) -> list[list[int]]:
    """The tokens of each: -1, -2, ..., counted through all that are opened."""
    ends = [0, *accumulate(len(embedding.vectors[0]) for embedding in embeddings)]
    return [[-1 - i for i in range(begin, end)] for begin, end in pairwise(ends)]


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


def words_of(
    models: Models, text: str, negative: str = "", syntax: str = "plain", long: bool = False
) -> list[tuple[str, list[int]]]:
    """The words of a prompt and the embeddings that it calls, each with the places of its tokens in the features."""
    read = [pieces(one, syntax, "prompt", models.embeddings, long) for one in (text, negative)]
    rows = [[*chain(*Text(chunks(one, syntax, long)).rows(END))] for one in read]
    found = words(rows[0])
    for embedding, numbers in zip(models.embeddings, numbers_of(models.embeddings), strict=True):
        if places := [place for place, token in enumerate(rows[0]) if token in numbers]:
            found.append((embedding.names[0], places))
    starts = range(0, lcm(*map(len, rows)), len(rows[0]))  # of the text, which may be repeated
    return [
        (word, [start + place for start in starts for place in places])
        for word, places in sorted(found, key=itemgetter(1))
    ]


def tell_cut(name: str, tokens: Sequence[int]) -> None:
    rest = decode([token for token in tokens[CHUNK:] if token >= 0])
    line = f"`{name}` is longer than 75 tokens; cut off: {brief(rest)!r}; `long_prompt` reads it in chunks"
    warnings.warn(Notice(line), stacklevel=5)


def tell_unused(embeddings: Sequence[Embedding], syntax: str, tokens: Container[int]) -> None:
    for embedding, numbers in zip(embeddings, numbers_of(embeddings), strict=True):
        if numbers[0] not in tokens:
            called = "embedding:" * (syntax == "comfy") + embedding.names[0]
            line = f"`embedding` {embedding.path} is not used: no prompt calls it, as {called}"
            warnings.warn(Notice(line), stacklevel=4)


def chunks(found: Pieces, syntax: str, long: bool) -> list[list[Token]]:
    """Of at most 75 tokens; what is too long, and not to be divided, is cut."""
    if syntax == "comfy":
        return by_words(found)
    if syntax == "a1111" or long:
        return by_commas(found)
    return [[token for piece in found for token in piece][:CHUNK]]


def by_commas(found: Pieces) -> list[list[Token]]:
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


def by_words(found: Pieces) -> list[list[Token]]:
    """As ComfyUI divides: words of fewer than 8 tokens stay whole."""
    done = [[]]
    for piece in found:
        while len(piece) > (room := CHUNK - len(done[-1])):
            if len(piece) >= LARGE:
                done[-1], piece = done[-1] + piece[:room], piece[room:]
            done.append([])
        done[-1] = done[-1] + piece
    return done
