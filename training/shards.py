"""Indexing tar shards of pictures and captions, as webdataset has them."""

import os
import tarfile
from collections.abc import Iterable

from training.captions import BESIDE
from training.pairs import BARE, LISTED, PICTURES, UNREAD, Pairs, Row
from training.tars import members, unpack

SHARDS = (".tar", ".tar.gz", ".tgz")


def add_shard(pairs: Pairs, path: str, bare: bool) -> None:
    """Pictures and captions whose names are alike up to the first dot, as webdataset has it.

    Files with more dots are further fields of such a sample; of no sample, as 22.05.png and 22.05.txt, they are pairs by
    all but their last suffix, behind the others.
    """
    string, before, last, flaw = pairs.strings.append(path), len(pairs), "", None
    waiting: dict[str, dict[str, tuple[int, int]]] = {}  # members of keys that are not whole yet
    dotted: dict[str, dict[str, tuple[int, int]]] = {}

    def settle(keys: dict[str, dict[str, tuple[int, int]]], key: str) -> None:
        group = keys.get(key, {})
        kind = next((kind for kind in BESIDE if kind in group), None)
        if kind and "picture" in group:
            pairs.add(key, Row(string, *group["picture"], *group[kind], pairs.suffix(kind)))
            del keys[key]

    with open(path, "rb") as file:
        where = file, 0, os.fstat(file.fileno()).st_size
        if file.read(2) == b"\x1f\x8b":  # gzip, whatever its name
            if path not in pairs.packed:
                pairs.packed[path] = unpack(path, pairs.unpacked)
            where = pairs.unpacked, *pairs.packed[path]
        try:
            for member in members(*where):
                folder, slash, base = member.name.rpartition("/")
                key, kind = folder + slash + base.partition(".")[0], role(base.partition(".")[2])
                if key != last:
                    settle(waiting, last)
                    last = key
                keys = waiting
                if not kind:
                    keys, key, kind = dotted, folder + slash + base.rpartition(".")[0], role(base.rpartition(".")[2])
                if not kind or base.startswith("."):
                    continue
                group, span = keys.setdefault(key, {}), (member.offset_data, member.size)
                if group.setdefault(kind, span) != span:
                    pairs.skip(f"{path}: {member.name}: the key has such a member already")
        except tarfile.TarError as error:
            flaw = error
    settle(waiting, last)
    if flaw:
        waiting.pop(last, None)  # its caption may have been behind the cut
    samples = {pairs.names[i] for i in range(before, len(pairs))} if dotted else set()
    for key in list(dotted):
        sample = sample_of(key)
        if sample in samples or "picture" in waiting.get(sample, {}) or (flaw and sample == last):
            del dotted[key]
        settle(dotted, key)
    if flaw:
        pairs.skip(f"{path}: {flaw} after {len(pairs) - before} samples")
    for sample, keys in by_sample(dotted).items():  # 0001.image.jpg and 0001.caption.txt: named fields of one sample
        if sum("picture" in dotted[key] for key in keys) == 1:
            fields = {kind: span for key in keys for kind, span in dotted[key].items()} | waiting.get(sample, {})
            settle(whole := {sample: fields}, sample)
            for key in keys if not whole else ():
                del dotted[key]
            if not whole:
                waiting.pop(sample, None)
    for key, group in [*waiting.items(), *dotted.items()]:
        if "picture" in group and bare:
            pairs.add(key, Row(string, *group["picture"], 0, 0, pairs.suffix(LISTED)))
            pairs.remark(BARE, f"{path}: {key}")
        elif "picture" in group:
            pairs.skip(f"{path}: {key}: no caption")
        elif "unread" in group:
            pairs.skip(f"{path}: {key}: a picture of a kind that cannot be read ({', '.join(PICTURES)} can)")


def sample_of(name: str) -> str:
    """All up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def by_sample(keys: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(sample_of(key), []).append(key)
    return found


def role(suffix: str) -> str | None:
    """What a file is in a sample: "picture", "unread", or by its own suffix, a caption."""
    suffix = suffix.lower()
    if suffix in PICTURES:
        return "picture"
    return "unread" if suffix in UNREAD else suffix if suffix in BESIDE else None
