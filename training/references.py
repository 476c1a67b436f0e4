"""Image prompts that are not the target: other pictures of the same subject.

A picture that is its own prompt teaches to copy; another one of the same subject teaches what the two have in common.
Which pictures are of one subject, a list's `reference` field tells, or their names do.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from files.errors import UserError
from training.captions import DataError
from training.pairs import LISTED, PICTURES, WHOLE, Pairs, Row

RULES = ("field", "same-prefix", "same-folder")
SHARE = 0.8  # of the places, where there is another picture; at the others the prompt is the target, as in the paper
NOWHERE = "references point nowhere and are left out"
ALONE = "pictures have no other of their subject and are their own prompt"


@dataclass(frozen=True)
class References:
    """Of each of n targets the numbers of the pairs whose pictures may be its prompt, itself among them perhaps."""

    begins: np.ndarray  # (n,): where those of a target begin in `numbers`
    counts: np.ndarray  # (n,)
    numbers: np.ndarray  # those from n on are of pictures that are prompts alone
    pictures: np.ndarray  # of each pair, which picture file it is: several pairs may have one
    rule: str
    share: float

    def of(self, target: int) -> np.ndarray:
        """All other pictures of the subject of a target."""
        begin = self.begins[target]
        found = self.numbers[begin : begin + self.counts[target]]
        return found[self.pictures[found] != self.pictures[target]]

    def drawn(self, target: int, share: float, which: int) -> int | None:
        """The pair whose picture is the prompt, for a number in [0, 1) and a whole one; None: the target's own."""
        if share >= self.share or not len(found := self.of(target)):
            return None
        return int(found[which % len(found)])

    def alone(self) -> np.ndarray:
        """Whether a target has no other picture, (n,) bool."""
        if not len(self.numbers):
            return np.ones(len(self.begins), dtype=bool)
        starts = np.unique(self.begins[self.counts > 0])
        shown = self.pictures[self.numbers]
        least, most = (extreme.reduceat(shown, starts) for extreme in (np.minimum, np.maximum))
        group, own = np.searchsorted(starts, self.begins).clip(max=len(starts) - 1), self.pictures[: len(self.begins)]
        return (self.counts == 0) | ((least[group] == own) & (most[group] == own))

    def told(self) -> str:
        """What the screen should say of them."""
        some = int((~self.alone()).sum())
        return (
            f"{some:,} of {len(self.begins):,} pairs have another picture of their subject as image prompt "
            f"({self.rule}), at {self.share:.0%} of their places"
        )

    def digest(self) -> str:
        """SHA-256 of who may prompt for whom."""
        parts = (self.begins, self.counts, self.numbers)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def open_references(pairs: Pairs, rule: str | None = None, share: float | None = None) -> References | None:
    """Find the other pictures of each pair's subject; those that are not among the pairs go behind them.

    What points nowhere is left out and remarked in `pairs`, as are pictures that are alone.

    Args:
        rule: "field": those that a list names under "reference", which is the default where a list names any;
            "same-prefix": pictures in one folder or shard whose names are alike but for their last word or number;
            "same-folder".
        share: of the places at which another picture is the prompt; None: `SHARE`.

    Raises:
        DataError: no pair has another picture by this rule.
        UserError: a share of none.
    """
    rule = rule or ("field" if pairs.references else None)
    if rule is None:
        if share is not None:
            raise UserError("`reference_share`: no list names references; `reference` with a rule is wanted beside it")
        return None
    if rule == "field":
        begins, counts, numbers = named(pairs)
    else:
        begins, counts, numbers = grouped(pairs, prefix if rule == "same-prefix" else folder)
    pictures = np.array([hashed(picture(pairs, i)) for i in range(len(pairs))], dtype=np.int64)
    found = References(begins, counts, numbers, pictures, rule, SHARE if share is None else share)
    alone = found.alone()
    if alone.all():
        reason = f"; the first: {pairs.remarks[NOWHERE][1]}" if NOWHERE in pairs.remarks else ""
        wanted = {"field": 'no entry of a list names another picture under "reference"'}
        raise DataError(
            f"`reference` {rule}: {wanted.get(rule, 'no two pictures of the data are of one group')}{reason}"
        )
    for i in np.flatnonzero(alone):
        pairs.remark(ALONE, pairs.label(int(i)))
    return found


def named(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By the lists' own words; pictures that are no pairs are added behind these."""
    count, numbers = len(pairs), []
    begins, counts = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    table = np.array(pairs.references, dtype=np.int64).reshape(-1, 3)
    table = table[table[:, 0] < count]
    known = np.array([hashed(picture(pairs, i)) for i in range(count if len(table) else 0)], dtype=np.int64)
    order = np.argsort(known, kind="stable")
    added: dict[str, int] = {}
    for target, first, several in table.tolist():
        begins[target] = len(numbers)
        for path in (pairs.strings[first + i] for i in range(several)):
            key = os.path.normpath(path)
            at = np.searchsorted(known, hashed(key), sorter=order)
            if at < count and known[order[at]] == hashed(key):
                numbers.append(int(order[at]))
            elif key in added or os.path.isfile(path):
                if key not in added:
                    added[key] = len(pairs)
                    row = Row(pairs.strings.append(path), 0, WHOLE, 0, 0, pairs.suffix(LISTED))
                    pairs.add(os.path.basename(path), row)
                numbers.append(added[key])
            else:
                pairs.remark(NOWHERE, f"{path}, of {pairs.label(target)}")
        counts[target] = len(numbers) - begins[target]
    return begins, counts, np.array(numbers, dtype=np.int64)


def grouped(pairs: Pairs, key: Callable[[Pairs, int], str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By what their names have in common."""
    keys = np.array([hashed(key(pairs, i)) for i in range(len(pairs))], dtype=np.int64)
    numbers = np.argsort(keys, kind="stable")
    _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts)[group], counts[group], numbers


def picture(pairs: Pairs, i: int) -> str:
    """What tells a picture from others: its file, or where it lies in a shard."""
    row = pairs.row(i)
    path = pairs.strings[row.path]
    return os.path.normpath(path) if row.size == WHOLE else f"{path}\0{row.offset}"


def folder(pairs: Pairs, i: int) -> str:
    """The folder that a picture lies in, within its shard if it is in one; alone in none."""
    row = pairs.row(i)
    path = pairs.strings[row.path]
    if row.size == WHOLE:
        return os.path.dirname(os.path.normpath(path))
    inside = os.path.dirname(pairs.names[i])
    return f"{path}\0{inside}" if inside else picture(pairs, i)


def prefix(pairs: Pairs, i: int) -> str:
    """The place and name of a picture without the name's last word or number: `cat_01`, `cat 2` and `cat-front` are cats."""
    row = pairs.row(i)
    path, name = pairs.strings[row.path], os.path.basename(pairs.names[i])
    stem, suffix = os.path.splitext(name)
    name = stem if suffix[1:].lower() in PICTURES else name
    start = re.sub(r"[\W_]*(\d+|[^\W\d_]+)[\W_]*$", "", name)
    place = (
        os.path.dirname(os.path.normpath(path)) if row.size == WHOLE else f"{path}\0{os.path.dirname(pairs.names[i])}"
    )
    return f"{place}\0{start}" if start else picture(pairs, i)


def hashed(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
