"""Weights in a prompt, in the ways of A1111 and of ComfyUI: a text in, its parts with their weights out.

    A1111      (word) times 1.1, [word] through 1.1, (word:1.2) times 1.2; nested, they multiply;
               BREAK begins a chunk, as it does in plain texts that may be long
    ComfyUI    (word) times 1.1, (word:1.2) is 1.2, whatever stands around it

A bracket with a backslash before it is a bracket as such.
"""

import math
import re
from collections.abc import Sequence

from files.errors import UserError

SYNTAXES = ("plain", "a1111", "comfy")
LOUDER = 1.1  # what a pair of brackets means
DEPTH = 100  # of brackets in brackets
Parts = list[tuple[str, float] | None]  # None: here a chunk begins

WEIGHT = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?\s*", re.IGNORECASE)
# What is meant for a weight, and is none: 1,2 or 1.2.3.
NEARLY = re.compile(r"\s*[-+]*([.,]*\d[-+.,\de]*|nan|inf)\s*", re.IGNORECASE)
BEHIND = re.compile(r":([^:()\[\]\\]*)\)")
EMBEDDING = r"\bembedding:[^\s,()<>]+"
BREAK = re.compile(r"\bBREAK\b")
RUN = re.compile(r"[^\\()\[\]:]+|.", re.DOTALL)  # text in which no character means anything, or one that may

MARKS = (  # of other ways to write; where they are plain text; what else does it
    (
        r"\([^()]*:\s*[-+]?\d[\d.]*\s*\)|\(\([^()]*\)\)",
        ("plain",),
        "weights are read with `prompt_syntax` a1111 or comfy",
    ),
    (r"\[[^\[\]]+\]", ("plain", "comfy"), "[ ] is read with `prompt_syntax` a1111"),
    (r"\bBREAK\b", ("plain",), "BREAK is read with `long_prompt`"),
    (r"\bBREAK\b", ("comfy",), "BREAK is read with `prompt_syntax` a1111"),
    (r"\[[^\[\]:|]*[:|][^\[\]]*\]|\bAND\b", ("a1111",), "prompts that change over the steps are not read"),
    (r"<(?:lora|lyco|hypernet):[^>]*>", SYNTAXES, "LoRAs are given by `lora`"),
    (EMBEDDING, ("plain", "a1111"), "embeddings are given by `embedding`"),
)


def told(name: str, text: str, syntax: str, long: bool = False) -> str:
    """A line on what other tools would read as more than text, and nothing here does; or ''.

    Args:
        long: as in `parts`.
    """
    text = BREAK.sub(" ", text) if syntax == "plain" and long else text
    found = [(marks, hint) for mark, where, hint in MARKS if syntax in where and (marks := re.findall(mark, text))]
    if not found:
        return ""
    marks = ", ".join(dict.fromkeys(mark for marks, _ in found for mark in marks))
    return f"`{name}`: {marks}: taken as plain text; {', '.join(hint for _, hint in found)}"


def parts(text: str, syntax: str, name: str, long: bool = False) -> Parts:
    """A text in its parts, each with its weight.

    Args:
        syntax: one of SYNTAXES.
        long: whether a plain text is divided where it says BREAK.
        name: whose text it is, for errors: "prompt" or "negative_prompt".

    Raises:
        UserError: a weight that is no number; a bracket without its other half, where that means nothing.
    """
    if syntax == "plain":
        return divided([(text, 1.0)]) if long else [(text, 1.0)]
    found = {"a1111": a1111, "comfy": comfy}[syntax](text, name)
    if not all(math.isfinite(part[1]) for part in found if part):
        raise UserError(f"`{name}`: the weights of brackets in brackets multiply without end")
    return found


def a1111(text: str, name: str) -> Parts:
    """Unclosed brackets act to the end; a closing one that closes nothing is text."""
    found: list[list] = [["", 1.0]]
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        for part in found[opened[kind].pop() :]:
            part[1] *= factor
        found.append(["", 1.0])

    i = 0
    while i < len(text):
        c = RUN.match(text, i)[0]
        width = len(c)
        weight = BEHIND.match(text, i) if opened["("] else None
        if c == "\\":
            after = text[i + 1 : i + 2]
            if after and after in "()[]\\":
                found[-1][0], width = found[-1][0] + after, 2
        elif c in opened:
            found.append(["", 1.0])
            opened[c].append(len(found) - 1)
            check_depth(opened[c], name, i)
        elif weight and (factor := number(weight[1], name, weight.start(1))) is not None:
            close("(", factor)
            width = len(weight[0])
        elif c == ")" and opened["("]:
            close("(", LOUDER)
        elif c == "]" and opened["["]:
            close("[", 1 / LOUDER)
        else:
            found[-1][0] += c
        i += width
    for kind, factor in (("(", LOUDER), ("[", 1 / LOUDER)):
        while opened[kind]:
            close(kind, factor)
    return divided(found)


def divided(found: Sequence[tuple[str, float]]) -> Parts:
    """Parts, divided at BREAK; those of one weight that adjoin are one."""
    joined: Parts = []
    for words, weight in found:
        for j, piece in enumerate(BREAK.split(words)):
            if j:
                joined.append(None)
            if joined and joined[-1] and joined[-1][1] == weight:
                joined[-1] = (joined[-1][0] + piece, weight)
            elif piece:
                joined.append((piece, weight))
    return joined


def comfy(text: str, name: str) -> Parts:
    """A bracket without its other half is an error: there the rest would be plain text without a word."""
    closing, opened = {}, []
    for match in re.finditer(r"\\[()]|[()]", text):
        if match[0] == "(":
            opened.append(match.start())
            check_depth(opened, name, match.start())
        elif match[0] == ")" and not opened:
            raise UserError(f"`{name}`, character {match.start() + 1}: this ) closes nothing; a bracket as such is \\)")
        elif match[0] == ")":
            closing[opened.pop()] = match.start()
    if opened:
        raise UserError(f"`{name}`, character {opened[-1] + 1}: this ( is not closed; a bracket as such is \\(")

    found: Parts = []
    todo = [(0, len(text), 1.0)]
    while todo:
        begin, end, weight = todo.pop()
        first = next((i for i in range(begin, end) if i in closing), end)
        found.append((re.sub(r"\\([()])", r"\1", text[begin:first]), weight))
        if first < end:
            inner, louder = closing[first], weight * LOUDER
            colon = text.rfind(":", first + 2, inner)
            own = number(text[colon + 1 : inner], name, colon + 1) if colon > 0 else None
            within = (first + 1, inner, louder) if own is None else (first + 1, colon, own)
            todo += [(inner + 1, end, weight), within]
    return [part for part in found if part[0]]


def check_depth(opened: list[int], name: str, place: int) -> None:
    if len(opened) > DEPTH:
        raise UserError(f"`{name}`, character {place + 1}: more than {DEPTH} brackets in brackets")


def number(text: str, name: str, place: int) -> float | None:
    """A weight as it is written, behind its colon; None for what is no weight, as in (embedding:name).

    Args:
        place: of the text in the prompt.
    """
    if WEIGHT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if NEARLY.fullmatch(text):
        found = text.strip()
        place += text.index(found)
        raise UserError(f"`{name}`, character {place + 1}: {found!r} is no weight; one is written as in (red:1.2)")
    return None
