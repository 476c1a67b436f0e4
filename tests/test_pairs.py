"""Pairs of pictures and captions: every form they come in, and every way that one can be broken."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tiny import drawings
from training.pairs import BadSample, DataError, Pairs, open_pairs


def png(shade: int) -> bytes:
    """A picture that can be told from others."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade % 256, shade // 256, 7)).save(file, format="PNG")
    return file.getvalue()


def shade(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))
    assert image.mode == "RGB" and image.size == (4, 3) and blue == 7
    return red + 256 * green


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], layout: int = tarfile.GNU_FORMAT) -> Path:
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode, format=layout) as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(count: int, start: int = 0) -> dict[str, bytes]:
    """Members of a shard: sample i is a picture of shade i with the caption 'caption i'."""
    files = {}
    for i in range(start, start + count):
        files |= {f"{i:04d}.png": png(i), f"{i:04d}.txt": b"caption %d\n" % i}
    return files


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(pairs: Pairs) -> list[tuple[str, int, str]]:
    return [(pair.name, shade(pair.image), pair.text) for pair in pairs]


def expected(count: int, start: int = 0) -> list[tuple[str, int, str]]:
    return [(f"{i:04d}", i, f"caption {i}") for i in range(start, start + count)]


# Shards


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_a_shard_gives_its_samples_in_its_order(tmp_path, name):
    pairs = open_pairs(write_tar(tmp_path / name, samples(300)))
    assert contents(pairs) == expected(300)
    assert (pairs[-1].name, pairs[np.int64(299)].text) == ("0299", "caption 299")
    assert (pairs.skipped, pairs.skipped_count) == ([], 0)
    with pytest.raises(IndexError):
        pairs[300]


def test_gzip_is_told_from_the_bytes_and_not_from_the_name(tmp_path):
    packed = write_tar(tmp_path / "a.tar.gz", samples(3)).rename(tmp_path / "a.tar")
    plain = write_tar(tmp_path / "b.tar", samples(3, 3)).rename(tmp_path / "b.tgz")
    assert contents(open_pairs([packed, plain])) == expected(6)


def test_the_bundled_drawings():
    pairs, split = open_pairs(drawings.DATA / "unseen-things-*.tar.gz"), drawings.load("unseen-things")
    assert len(pairs) == len(split) > 500
    assert [pairs.names[i] for i in range(len(pairs))] == split.keys
    for i in (0, 321, len(split) - 1):
        assert pairs[i].text == split.captions[i]
        assert np.array_equal(np.asarray(pairs[i].image), split.pixels[i].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, layout):
    keys = [f"{'d' * 90}/{'n' * 90}", "plain"]
    if layout != tarfile.USTAR_FORMAT:
        keys += [f"{'long/' * 60}{'x' * 200}", "жук/猫" * 30]
    files = {f"{key}.{kind}": content for key in keys for kind, content in (("png", png(5)), ("txt", key.encode()))}
    assert contents(open_pairs(write_tar(tmp_path / "a.tar", files, layout))) == [(key, 5, key) for key in keys]


def test_a_shard_that_gnu_tar_made_of_a_folder(tmp_path):
    """Folders, links and owners among the members, and a name over 100 letters."""
    write_files(tmp_path / "in", samples(3) | {f"{'s' * 120}.png": png(3), f"{'s' * 120}.txt": b"three"})
    os.link(tmp_path / "in/0000.png", tmp_path / "in/again.png")
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "a.tar", "-C", tmp_path, "in"], check=True)
    found = contents(open_pairs(tmp_path / "a.tar"))
    assert found == [(f"in/{name}", *rest) for name, *rest in expected(3)] + [(f"in/{'s' * 120}", 3, "three")]


def test_a_key_ends_at_the_first_dot_of_the_name(tmp_path):
    files = {
        "v1.5/a.mask.png": png(1),
        "v1.5/a.png": png(2),
        "v1.5/a.txt": b"two",
        "._b.png": png(3),  # what some archivers leave beside b.png
        "._b.txt": b"three",
        "c.PNG": png(4),
        "c.json": b'{"caption": "four", "text": null, "width": 4}',
    }
    assert contents(open_pairs(write_tar(tmp_path / "a.tar", files))) == [("v1.5/a", 2, "two"), ("c", 4, "four")]


def test_members_of_a_key_may_lie_apart_and_a_text_file_goes_before_json(tmp_path):
    files = {"a.png": png(1), "b.json": b'{"text": "from json"}', "b.png": png(2), "b.txt": b"from text"}
    files |= {"d.txt": b"four", "a.txt": b"one", "d.png": png(4)}
    pairs = open_pairs(write_tar(tmp_path / "a.tar", files))
    assert sorted(contents(pairs)) == [("a", 1, "one"), ("b", 2, "from text"), ("d", 4, "four")]
    assert pairs.skipped == []


def test_what_a_shard_lacks_or_has_twice_is_named(tmp_path):
    files = [("a.png", png(1)), ("b.png", png(2)), ("b.txt", b"two"), ("b.jpg", png(3)), ("c.txt", b"no picture")]
    path = write_tar(tmp_path / "a.tar", files)
    pairs = open_pairs(path)
    assert contents(pairs) == [("b", 2, "two")]
    assert pairs.skipped == [f"{path}: b.jpg: the key has such a member already", f"{path}: a: no caption"]


def spans(path: Path) -> list[tuple[int, int]]:
    """Of every member, where its data starts and ends."""
    with tarfile.open(path) as tar:
        return [(member.offset_data, member.offset_data + member.size) for member in tar]


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_keeps_the_samples_before_a_cut_anywhere(tmp_path, layout):
    names = {f"{'d' * 120}/{name}": content for name, content in samples(4).items()}  # headers of several blocks
    path = write_tar(tmp_path / "a.tar", names, layout)
    content, ends = path.read_bytes(), [end for _, end in spans(path)][1::2]
    for cut in (*range(300, ends[-1] + 1024, 211), *ends, *(end - 1 for end in ends)):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        if whole == 0:
            with pytest.raises(
                DataError, match=r"no pair to use: .*a\.tar: (cut short or damaged|no tar header) after 0 samples$"
            ):
                open_pairs(path)
            continue
        pairs = open_pairs(path)
        assert [pair.text for pair in pairs] == [f"caption {i}" for i in range(whole)], cut
        assert pairs.skipped == [f"{path}: cut short or damaged after {whole} samples"], cut


def test_a_packed_shard_keeps_what_can_be_unpacked_before_a_cut(tmp_path):
    noise = np.random.default_rng(0).bytes  # does not shrink
    files = {}
    for i in range(50):
        files |= {f"{i}.png": png(i) + noise(5000), f"{i}.txt": b"x"}
    path = write_tar(tmp_path / "a.tar.gz", files)
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "plain.tar").write_bytes(plain[: len(plain) // 2])
    after = write_tar(tmp_path / "b.tar.gz", samples(3))  # what follows is not taken for the rest
    pairs, whole = open_pairs([path, after]), len(open_pairs(tmp_path / "plain.tar"))
    assert 20 <= whole and abs(len(pairs) - 3 - whole) <= 1
    assert pairs.skipped == [f"{path}: cut short or damaged after {len(pairs) - 3} samples"]
    assert [pairs[i].text for i in (0, -4, -3, -2, -1)] == ["x", "x", "caption 0", "caption 1", "caption 2"]


def test_a_damaged_header_ends_a_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(4))
    content = bytearray(path.read_bytes())
    start = spans(path)[4][0] - 512
    content[start : start + 512] = b"\xff" * 512
    path.write_bytes(content)
    pairs = open_pairs(path)
    assert contents(pairs) == expected(2)
    assert pairs.skipped == [f"{path}: cut short or damaged after 2 samples"]


def test_braces_and_globs(tmp_path):
    for i in range(8, 12):
        write_tar(tmp_path / f"{i:05d}.tar", samples(2, 2 * i))
        write_tar(tmp_path / f"n{i}.tar", samples(2, 2 * i))
    assert contents(open_pairs(f"{tmp_path}/{{00008..00011}}.tar")) == expected(8, 16)
    assert contents(open_pairs(f"{tmp_path}/n{{8..11}}.tar")) == expected(8, 16)
    assert contents(open_pairs(f"{tmp_path}/0{{0,1}}{{009..010}}.tar".replace("{0,1}", "{0,0}"))) == expected(4, 18) * 2
    assert contents(open_pairs(f"{tmp_path}/{{00010,n8}}.tar")) == expected(2, 20) + expected(2, 16)
    assert contents(open_pairs(tmp_path / "0*.tar")) == expected(8, 16)
    assert contents(open_pairs(tmp_path / "n*.tar")) == expected(4, 20) + expected(4, 16)  # n10 sorts before n8
    (tmp_path / "{a,b}[c].tar").write_bytes((tmp_path / "n8.tar").read_bytes())
    assert contents(open_pairs(tmp_path / "{a,b}[c].tar")) == expected(2, 16)  # a file of this very name


def test_a_gap_in_a_range_is_an_error_before_anything_is_read(tmp_path):
    (tmp_path / "00.tar").write_bytes(b"never read")
    write_tar(tmp_path / "02.tar", samples(1))
    with pytest.raises(DataError, match=r"/01\.tar: no such file or folder$"):
        open_pairs(f"{tmp_path}/{{00..02}}.tar")


def test_many_shards_need_few_descriptors(tmp_path):
    for i in range(400):
        write_tar(tmp_path / f"{i:03d}.tar{'.gz' if i % 4 == 0 else ''}", samples(1, i))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 90, limits[1]))
    try:
        pairs = open_pairs(tmp_path / "*.tar*")
        assert contents(pairs) == expected(400)
        assert contents(pickle.loads(pickle.dumps(pairs))) == expected(400)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_index_is_small_and_so_is_what_it_takes_to_make_it(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(2000))
    tracemalloc.start()
    pairs = open_pairs(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pickle.dumps(pairs)) < 2000 * 70
    assert peak < 2000 * 250


# Folders


def test_a_folder_is_searched_through_in_order(tmp_path):
    files = {"b.png": png(2), "b.txt": "zwei ü\n".encode("utf-8-sig"), "a.x.PNG": png(1), "a.x.txt": b"one"}
    files |= {"sub/dir/b.png": png(3), "sub/dir/b.json": b'{"text": "three"}', "sub/c.png": png(4), "sub/c.txt": b""}
    files |= {"._b.png": b"", ".hidden/d.png": png(5), ".hidden/d.txt": b"five", "notes.txt": b"no picture"}
    pairs = open_pairs(write_files(tmp_path, files))
    assert contents(pairs) == [("a.x", 1, "one"), ("b", 2, "zwei ü"), ("sub/c", 4, ""), ("sub/dir/b", 3, "three")]
    assert pairs.skipped == []


def test_what_a_folder_lacks_or_has_twice_is_named(tmp_path):
    files = {"a.png": png(1), "a.txt": b"one", "a.webp": png(2), "b.png": png(2)}
    pairs = open_pairs(write_files(tmp_path, files))
    assert contents(pairs) == [("a", 1, "one")]
    assert pairs.skipped == [f"{tmp_path}/a.webp: a.png has the same name", f"{tmp_path}/b.png: no caption"]


def test_only_the_first_thousand_lines_are_kept_and_all_are_counted(tmp_path):
    write_files(tmp_path, {f"{i:04d}.png": b"" for i in range(1200)} | {"0000.txt": b"zero"})
    pairs = open_pairs(tmp_path)
    assert (len(pairs), len(pairs.skipped), pairs.skipped_count) == (1, 1000, 1199)
    assert pairs.skipped[-1] == f"{tmp_path}/1000.png: no caption"


def test_the_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    files = {f"{folder}/{i}.{kind}": b"" for folder in "cab" for i in range(5) for kind in ("txt", "png")}
    first = open_pairs(write_files(tmp_path, files))
    walk = os.walk

    def backwards(top, **options):
        for folder, folders, names in walk(top, **options):
            folders.sort(reverse=True)
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    second = open_pairs(tmp_path)
    names = [[pairs.names[i] for i in range(len(pairs))] for pairs in (first, second)]
    assert names[0] == names[1] == sorted(names[0]) and len(names[0]) == 15


def test_pictures_of_every_mode_come_as_rgb_upright_and_on_white(tmp_path):
    write_files(tmp_path, {f"{name}.txt": b"x" for name in ("clear", "deep", "palette", "turned")})
    Image.new("RGBA", (4, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((3, 4), 32896, np.uint16)).save(tmp_path / "deep.png")
    Image.new("P", (4, 3), 0).save(tmp_path / "palette.gif")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "turned.png", exif=exif)
    shard = write_tar(tmp_path / "a.tar", {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())})
    for pairs in (open_pairs(tmp_path), open_pairs(shard)):
        clear, deep, palette, turned = (pair.image for pair in pairs)
        assert {image.mode for image in (clear, deep, palette, turned)} == {"RGB"}
        assert (clear.getpixel((0, 0)), deep.getpixel((0, 0)), turned.size) == ((255,) * 3, (128,) * 3, (3, 4))


# Lists

ENTRIES = [
    {"image_file": "sub/a.png", "text": "one"},
    {"image_file": "b.png", "caption": "two ü"},
    {"image_file": "b.png", "text": "two again", "caption": "not this"},
]


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
def test_lists_take_paths_from_their_own_folder(tmp_path, monkeypatch, name):
    write_files(tmp_path, {"in/sub/a.png": png(1), "in/b.png": png(2), "c.png": png(3)})
    entries = [*ENTRIES, {"image_file": str(tmp_path / "c.png"), "text": "three"}, {"image_file": "b.png"}]
    lines = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (tmp_path / "in" / name).write_text(json.dumps(entries) if name == "list.json" else lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "in")
    for path in (tmp_path / "in" / name, name):
        pairs = open_pairs(path)
        found = [(shade(pair.image), pair.text) for pair in pairs]
        assert found == [(1, "one"), (2, "two ü"), (2, "two again"), (3, "three")]
        assert [pair.name for pair in pairs] == ["sub/a.png", "b.png", "b.png", str(tmp_path / "c.png")]
        assert pairs.skipped == [f"{path}: {'entry 5' if name == 'list.json' else 'line 9'}: no caption"]


BROKEN_LISTS = {
    "dict.json": ('{"image_file": "a.png", "text": "x"}', r"dict\.json: not a list of .* is a \.jsonl$"),
    "lines.json": ('{"image_file": "a.png"}\n{"image_file": "b.png"}', r"lines\.json: not JSON \(Extra data"),
    "empty.json": ("", r"empty\.json: not JSON"),
    "none.json": ("[]", r"none\.json: no pair to use"),
    "strings.json": ('["a.png"]', r"strings\.json: entry 1 is not \{\"image_file\": "),
    "other.jsonl": ('{"image_file": "a.png", "text": "x"}\n{"file": "b.png"}', r"other\.jsonl: line 2 is not "),
    "cut.jsonl": ('{"image_file": "a.png", "text": "x"}\n{"image_fi', r"cut\.jsonl: line 2: not JSON"),
    "numbers.jsonl": ('{"image_file": 5, "text": "x"}', r"numbers\.jsonl: line 1 is not "),
    "bare.jsonl": (
        '{"image_file": "a.png"}\n{"image_file": "b.png"}',
        r"no pair to use: .*line 1: no caption, and 1 more$",
    ),
}


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_a_list_that_is_none_is_refused(tmp_path, name):
    content, message = BROKEN_LISTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        open_pairs(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_list_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.json").write_bytes('[{"image_file": "ü"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.json: not JSON \('utf-8' codec"):
        open_pairs(tmp_path / "a.json")


# What cannot be used


def test_a_sample_that_cannot_be_read_is_named_when_it_is_asked_for(tmp_path):
    bad = {
        "cut": (png(1)[:-30], "txt", b"x", "the picture is damaged or cut short"),
        "empty": (b"", "txt", b"x", "not a picture"),
        "latin": (png(1), "txt", "ü".encode("latin-1"), "the caption is not UTF-8 text"),
        "mute": (png(1), "json", b'{"style": "x"}', 'the JSON has no "text" or "caption"'),
        "prose": (png(1), "json", b"a cat", "the caption is not JSON"),
        "text": (b"no picture", "txt", b"x", "not a picture"),
    }
    files = {}
    for name, (picture, kind, text, _) in bad.items():
        files |= {f"{name}.png": picture, f"{name}.{kind}": text}
    folder = write_files(tmp_path / "in", files)
    shard, packed = (write_tar(tmp_path / name, files) for name in ("a.tar", "a.tar.gz"))
    for data, label in ((folder, f"{folder}/{{}}.png: "), (shard, f"{shard}: {{}}: "), (packed, f"{packed}: {{}}: ")):
        pairs = open_pairs(data)
        assert len(pairs) == len(bad)
        for i, name in enumerate(bad):
            with pytest.raises(BadSample) as error:
                pairs[i]
            message = str(error.value)
            assert message.startswith(label.format(name)) and bad[name][3] in message and "\n" not in message


def test_what_vanishes_after_the_index_is_a_bad_sample(tmp_path):
    write_files(tmp_path / "in", {"a.png": png(1), "a.txt": b"one", "b.png": png(2), "b.txt": b"two"})
    (tmp_path / "list.json").write_text('[{"image_file": "gone.png", "text": "x"}]')
    shards = [write_tar(tmp_path / f"{i}.tar", samples(1)) for i in range(2)]
    pairs = open_pairs([tmp_path / "in", tmp_path / "list.json", *shards])
    (tmp_path / "in/a.png").unlink()
    (tmp_path / "in/b.txt").unlink()
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:600])
    said = ["in/a.png", "in/b.png", "gone.png", "0.tar: 0000", "1.tar: 0000"]
    for i, name in enumerate(said):
        with pytest.raises(BadSample, match=f"{tmp_path}/{name}: cannot be read"):
            pairs[i]


@pytest.mark.parametrize("url", ["https://x.org/{00..99}.tar", "s3://bucket/a.tar", "pipe:aws s3 cp s3://a/b.tar -"])
def test_remote_shards_are_refused(url):
    with pytest.raises(DataError, match="only local shards can be read; download them") as error:
        open_pairs(url)
    assert str(error.value).startswith(url)


REFUSED = {
    "missing": r"missing: no such file or folder$",
    "missing.tar": r"missing\.tar: no such file or folder$",
    "*.parquet": r"\*\.parquet: matches nothing$",
    "{0..3}.tar": r"0\.tar: no such file or folder$",
    "{3..0}.tar": r"\{3\.\.0\}\.tar: ",
    "a.zip": r"a\.zip: a file of an unknown kind; a folder of pictures .* is wanted$",
    "empty": r"empty: no pair to use: no pictures \(jpg, .*\) in it$",
    "bare": r"bare: no pair to use: .*bare/a\.png: no caption, and 1 more$",
    "bare.tar": r"bare\.tar: no pair to use: .*bare\.tar: a: no caption$",
    "texts.tar": r"texts\.tar: no pair to use: no pictures",
    "text.tar": r"text\.tar: no pair to use: .*text\.tar: no tar header after 0 samples$",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_data_is_refused(tmp_path, name):
    write_files(tmp_path, {"a.zip": b"PK", "bare/a.png": b"", "bare/b.png": b"", "text.tar": b"no tar" * 500})
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "bare.tar", {"a.png": png(1)})
    write_tar(tmp_path / "texts.tar", {"a.txt": b"one"})
    good = write_tar(tmp_path / "good.tar", samples(2))
    for data in (tmp_path / name, [good, tmp_path / name]):
        with pytest.raises(DataError, match=REFUSED[name]) as error:
            open_pairs(data)
        assert "\n" not in str(error.value)


def test_no_data_at_all_is_refused():
    with pytest.raises(DataError, match="no data given"):
        open_pairs([])


# Processes


class Rows(Dataset):
    """What a trainer hands to its workers, in small."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[int, str]:
        pair = self.pairs[i]
        return shade(pair.image), pair.text


@pytest.fixture
def mixed(tmp_path) -> Pairs:
    """400 samples: a plain shard, a packed one, a folder, a list."""
    plain, packed = write_tar(tmp_path / "a.tar", samples(100)), write_tar(tmp_path / "b.tgz", samples(100, 100))
    folder = write_files(tmp_path / "in", samples(200, 200))
    entries = [{"image_file": f"in/{i:04d}.png", "text": f"caption {i}"} for i in range(300, 400)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    for i in range(300, 400):
        (folder / f"{i:04d}.txt").unlink()
    return open_pairs([plain, packed, folder, tmp_path / "list.json"])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_main_process_reads(mixed, start):
    """With files open in the parent: forked workers share them, and must not move each other's place."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist() * (4 if start == "fork" else 1)
    assert mixed[0].text == "caption 0" and mixed[150].text == "caption 150"
    loader = DataLoader(
        Rows(mixed),
        batch_size=10,
        sampler=order,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(start),
        collate_fn=list,
    )
    assert [row for batch in loader for row in batch] == [(i, f"caption {i}") for i in order]


def test_a_pickled_index_is_whole(mixed):
    mixed[150]
    copy = pickle.loads(pickle.dumps(mixed))
    assert [(shade(pair.image), pair.text) for pair in copy] == [(i, f"caption {i}") for i in range(400)]
    assert (copy.skipped, copy.skipped_count) == (mixed.skipped, mixed.skipped_count) == (mixed.skipped, 100)


def test_threads_read_what_one_reads(mixed):
    order = list(range(400)) * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: mixed[i].text, order)) == [f"caption {i}" for i in order]
