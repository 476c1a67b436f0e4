"""Render the project's small data set (emoji drawings in seven styles) into webdataset shards.

    npm install @iconify-json/{noto,noto-v1,twemoji,openmoji,fluent-emoji,fluent-emoji-flat,emojione}
    pip install resvg-py
    python -m tiny.draw --icons node_modules/@iconify-json --output tiny/data

A drawing shows a thing ("red apple") in a style ("noto"); which are drawn, and what they are called, tells
`tiny/things.py`. The split is fixed by
h(s) = int(sha256(s.encode()).hexdigest()[:16], 16) / 2**64:

    h(thing) < 0.05             -> unseen-things    (train has the thing in no style)
    h("style/thing") < 0.10     -> unseen-drawings  (train has the thing in other styles, if it has others)
    otherwise                   -> train

A shard is a gzipped tar of `key.webp`, `key.json` pairs in hash order, so any prefix of it is a random sample. It is
gzipped because half of a plain tar of such small pictures would be headers and padding. The same package versions
give the same bytes again.
"""

import argparse
import gzip
import hashlib
import importlib.util
import io
import json
import multiprocessing
import re
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from files.whole import whole, write_text
from tiny.things import collect

STYLES = {
    "noto": "noto",
    "noto-v1": "noto classic",
    "twemoji": "twemoji",
    "openmoji": "openmoji",
    "fluent-emoji": "fluent 3d",
    "fluent-emoji-flat": "fluent flat",
    "emojione": "emojione",
}
SHARD = 2500  # pictures per shard, about
COLOURS = (None, 192, 128, 96, 64, 48, 32, 16)  # None: as drawn


def h(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


def fail(message: str) -> None:
    print(f"tiny.draw: {message}", file=sys.stderr)
    sys.exit(2)


def load(folder: Path) -> dict[str, dict]:
    """The seven sets as {set: {"icons", "aliases", "info", "category", ...}}."""
    if not folder.is_dir():
        fail(f"--icons {folder}: no such folder; it must be the node_modules/@iconify-json that npm install made")
    sets = {}
    for name in STYLES:
        # fluent-emoji has no categories of its own, but the names of fluent-emoji-flat
        listed = folder / ("fluent-emoji-flat" if name == "fluent-emoji" else name) / "metadata.json"
        try:
            sets[name] = json.loads((folder / name / "icons.json").read_text())
            sets[name]["info"] = json.loads((folder / name / "info.json").read_text())
            categories = json.loads(listed.read_text())["categories"]
        except (OSError, ValueError, KeyError) as error:
            found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            fail(f"--icons {folder}: cannot read {name} ({error!r}; found {found}): npm install @iconify-json/{name}")
        sets[name]["category"] = {icon: category for category, icons in categories.items() for icon in icons}
    return sets


def encode(job: dict) -> tuple[bytes, float] | None:
    """The WebP and its mean squared error, or None for a drawing that is blank or doesn't render."""
    import resvg_py  # here, so that importing this module doesn't need it

    size = job["size"]
    width = round((size - size // 16) * min(1, job["aspect"]))
    try:
        png = resvg_py.svg_to_bytes(svg_string=job["svg"], width=width, skip_system_fonts=True, background="white")
    except ValueError:
        return None
    drawing = Image.open(io.BytesIO(png)).convert("RGB")
    picture = Image.new("RGB", (size, size), "white")
    picture.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    if all(high - low < 16 for low, high in picture.getextrema()):
        return None
    # Lossless with fewer colours is 10 dB better than lossy at the same size: drawings are flat, with sharp edges.
    for colours in COLOURS:
        reduced = picture.quantize(colours, kmeans=2, dither=Image.Dither.NONE).convert("RGB") if colours else picture
        buffer = io.BytesIO()
        # quality is the effort here; 100 would take twenty times as long for 1 % less
        reduced.save(buffer, "webp", lossless=True, quality=75, method=6)
        if buffer.tell() <= job["bytes"]:
            break
    return buffer.getvalue(), float(((np.asarray(picture, np.float32) - np.asarray(reduced, np.float32)) ** 2).mean())


def shard(samples: list[tuple[str, bytes, dict]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, webp, about in samples:
            for ending, data in (("webp", webp), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{key}.{ending}")  # its mtime, uid and gid are 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), 9, mtime=0)


# The MIT licence of the Fluent sets wants its text beside the pictures.
MIT = """## Fluent Emoji: MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def attribution(sets: dict[str, dict], counts: Counter, size: int) -> str:
    rows = ["| style | set | author | licence | project | pictures |", "|---|---|---|---|---|---|"]
    for name, style in STYLES.items():
        info, pictures = sets[name]["info"], sum(n for (_, s), n in counts.items() if s == style)
        licence, author = info["license"], info["author"]
        licence = f"[{licence['title']}]({licence['url']}) (`{licence['spdx']}`)"
        rows.append(f"| {style} | {info['name']} | {author['name']} | {licence} | {author['url']} | {pictures} |")
    changes = (
        f"Changes: the drawings were rendered to {size}x{size} pixels on white and compressed (WebP, the larger ones "
        "with a reduced number of colours); their names were made into captions."
    )
    stay = (
        "The OpenMoji pictures stay under CC BY-SA 4.0, the others under the licences in the table. Each sample's "
        "`source` names its set and drawing."
    )
    return "\n".join(["# Where the pictures come from", "", *rows, "", changes, "", stay, "", MIT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="the folder node_modules/@iconify-json")
    parser.add_argument("--output", type=Path, default=Path("tiny/data"))
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--bytes", type=int, default=2600, help="a larger picture gets fewer colours, down to 16")
    args = parser.parse_args()
    if importlib.util.find_spec("resvg_py") is None:
        fail("the package resvg_py is missing: pip install resvg-py")
    if not 16 <= args.size <= 1024:
        fail(f"--size {args.size}: must be from 16 to 1024")
    sets = load(args.icons)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {args.output}: cannot make this folder ({error.strerror})")

    jobs = [job | {"size": args.size, "bytes": args.bytes} for job in collect(sets)]
    with multiprocessing.Pool() as pool:
        encoded = list(tqdm(pool.imap(encode, jobs, chunksize=16), total=len(jobs), unit=" drawings"))

    splits, counts, errors, things = defaultdict(list), Counter(), [], set()
    for job, result in zip(jobs, encoded, strict=True):
        if result is None:
            continue
        style, thing = STYLES[job["set"]], job["thing"]
        seen_thing = "unseen-drawings" if h(f"{style}/{thing}") < 0.10 else "train"
        split = "unseen-things" if h(thing) < 0.05 else seen_thing
        about = {"caption": thing, "style": style, "source": f"{job['set']}:{job['name']}"}
        splits[split].append((f"{job['set']}_{job['name']}", result[0], about))
        counts[split, style] += 1
        errors.append(result[1])
        things.add(thing)

    total, old = 0, set(args.output.glob("*.tar.gz"))
    for split, samples in sorted(splits.items()):
        samples.sort(key=lambda sample: h(sample[0]))
        shards = max(1, round(len(samples) / SHARD))
        for i in range(shards):
            path = args.output / f"{split}-{i:05d}.tar.gz"
            data = shard(samples[i * len(samples) // shards : (i + 1) * len(samples) // shards])
            with whole(path) as part:
                part.write_bytes(data)
            old.discard(path)
            total += len(data)
        print(f"{split}: {len(samples)}", {style: counts[split, style] for style in STYLES.values()})
    for path in old:  # else a shard of an earlier run could bring its pictures into another split
        if re.fullmatch(r"(train|unseen-drawings|unseen-things)-\d{5}\.tar\.gz", path.name):
            path.unlink()
    write_text(args.output / "ATTRIBUTION.md", attribution(sets, counts, args.size))

    reduced = [10 * np.log10(255**2 / error) for error in errors if error > 0]
    print(f"{len(errors)} pictures of {len(things)} things, {len(jobs) - len(errors)} skipped, {total / 1e6:.2f} MB")
    if reduced:
        print(f"{len(reduced)} with reduced colours: PSNR {np.mean(reduced):.1f} dB, lowest {min(reduced):.1f} dB")


if __name__ == "__main__":
    main()
