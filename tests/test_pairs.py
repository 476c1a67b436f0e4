"""Pairs of pictures and captions: every form they come in, and every way that one can be broken."""

import csv
import gzip
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clip import tokenize
from files.faces import FaceError, read_embedding
from tiny import drawings
from training import tars
from training.captions import DataError
from training.data import identity, open_pairs
from training.pairs import BadSample, Pairs
from training.tars import unpack


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


def test_names_with_dots_are_pairs_where_they_are_no_fields_of_a_sample(tmp_path):
    """webdataset cuts at the first dot; what would vanish by that is cut at the last, behind the others."""
    files = {
        "22.05.png": png(1),
        "22.05.txt": b"one",
        "22.06.png": png(2),
        "22.06.txt": b"two",
        "v1.0/a.b.jpg": png(3),
        "v1.0/a.b.json": b'{"text": "three"}',
    }
    files |= {
        "ok.png": png(4),
        "ok.txt": b"four",
        "ok.mask.png": png(5),
        "ok.mask.txt": b"no pair",
        "7.x.png": png(6),
        "._a.b.png": b"",
        "._a.b.txt": b"",
    }
    pairs = open_pairs(write_tar(tmp_path / "a.tar", files))
    assert contents(pairs) == [("ok", 4, "four"), ("22.05", 1, "one"), ("22.06", 2, "two"), ("v1.0/a.b", 3, "three")]
    assert pairs.skipped == [f"{tmp_path}/a.tar: 7.x: no caption"]


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


def test_a_shard_that_would_fill_the_disk_is_refused_whole(tmp_path, monkeypatch):
    path, start = tmp_path / "a.tar.gz", b"of other shards"
    path.write_bytes(30 * gzip.compress(bytes(1 << 20)))
    unpacked = io.BytesIO(start)
    with pytest.raises(DataError, match=rf"{path}: its 3\d,\d+ bytes unpack to more than 19,\d+,\d+; .* 100 times"):
        unpack(str(path), unpacked)
    assert unpacked.getvalue() == start
    with pytest.raises(DataError, match="unpack to more than"):
        open_pairs(path)
    path = write_tar(tmp_path / "b.tar.gz", samples(3))
    assert len(open_pairs(path)) == 3
    monkeypatch.setattr(tars.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 0, 5000))
    with pytest.raises(DataError, match=r"unpack to more than 4,500; .* \(5,000 bytes\)"):
        open_pairs(path)


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


def test_kohyas_captions_and_suffixes_in_capitals(tmp_path):
    files = {
        "a.png": png(1),
        "a.caption": b"one",
        "b.PNG": png(2),
        "b.TXT": b"two",
        "c.Jpg": png(3),
        "c.JSON": b'{"text": "3"}',
    }
    files |= {"d.png": png(4), "d.caption": b"not this", "d.txt": b"four"}
    wanted = [("a", 1, "one"), ("b", 2, "two"), ("c", 3, "3"), ("d", 4, "four")]
    assert contents(open_pairs(write_files(tmp_path / "in", files))) == wanted
    assert contents(open_pairs(write_tar(tmp_path / "a.TAR", files))) == wanted


def test_links_to_folders_are_followed_once_and_behind_all_else(tmp_path):
    """Also where they lead in a circle, to each other, or to what lies in the folder itself."""
    write_files(tmp_path / "other", {"x.png": png(3), "x.txt": b"x", "deep/y.png": png(4), "deep/y.txt": b"y"})
    folder = write_files(tmp_path / "in", {"a.png": png(1), "a.txt": b"a", "z/b.png": png(2), "z/b.txt": b"b"})
    (folder / "first").symlink_to(tmp_path / "other")
    (folder / "again").symlink_to(tmp_path / "other/deep")
    (folder / "here").symlink_to(folder / "z")
    (folder / "z/up").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "gone")
    (tmp_path / "other/back").symlink_to(folder)
    found = contents(open_pairs(folder))
    assert found == [("a", 1, "a"), ("z/b", 2, "b"), ("again/y", 4, "y"), ("first/x", 3, "x")]
    (tmp_path / "link").symlink_to(folder)
    assert contents(open_pairs(tmp_path / "link")) == found


def test_a_folder_of_shards(tmp_path):
    """What img2dataset leaves: tars, and beside each what it did."""
    for i in range(3):
        write_tar(
            write_files(tmp_path / f"in/{i // 2}", {f"{i:05d}_stats.json": b"{}", f"{i:05d}.parquet": b"PAR1"})
            / f"{i:05d}.tar",
            samples(2, 2 * i),
        )
    pairs = open_pairs(tmp_path / "in")
    assert contents(pairs) == expected(6) and pairs.told() == ""
    write_files(tmp_path / "in", {"a.png": png(7), "a.txt": b"seven"})
    pairs = open_pairs(tmp_path / "in")  # an archive of the pictures beside it, perhaps
    assert contents(pairs) == [("a", 7, "seven")]
    assert (
        pairs.told()
        == f"3 left out of the data; the first: {tmp_path}/in/0/00000.tar: a shard among pictures; it is read when it is named itself"
    )


def test_pictures_that_cannot_be_read_and_folders_without_any_are_told(tmp_path):
    files = samples(1) | {"0000.NEF": b"", "x.svg": b"", "x.txt": b"x", "y.NEF": b""}  # a raw file lies beside its JPEG
    folder, tar = write_files(tmp_path / "in", files), write_tar(tmp_path / "a.tar", files)
    for data, names in ((folder, (f"{folder}/x.svg", f"{folder}/y.NEF")), (tar, (f"{tar}: x", f"{tar}: y"))):
        pairs = open_pairs(data)
        assert contents(pairs) == expected(1) and pairs.skipped_count == 2
        for line, name in zip(pairs.skipped, names, strict=True):
            assert line.startswith(f"{name}: a picture of a kind that cannot be read (jpg, jpeg, png, ")
    write_files(tmp_path, {"bare/a.parquet": b"", "bare/b.parquet": b"", "bare/README.md": b""})
    with pytest.raises(
        DataError, match=r"no pair to use: no pictures \(.*\) and no shards \(.*\) in it, but 2 \.parquet"
    ):
        open_pairs(tmp_path / "bare")


def test_other_suffixes_of_pictures(tmp_path):
    """A JPEG by its other names; HEIC where pillow-heif reads it, and else told when it is used."""
    files = {"a.jfif": png(1), "a.txt": b"one", "b.HEIC": b"....ftypheic" + b"\0" * 99, "b.txt": b"two"}
    pairs = open_pairs(write_files(tmp_path / "in", files))
    assert len(pairs) == 2 and shade(pairs[0].image) == 1
    with pytest.raises(BadSample, match=r"b\.HEIC: "):
        pairs[1]


def test_names_with_line_breaks_do_not_break_lines(tmp_path):
    write_files(tmp_path / "in", {"a\nb.png": b"", "c\nd.png": b"", "c\nd.txt": b"x"})
    pairs = open_pairs(tmp_path / "in")
    assert pairs.told() == f"1 left out of the data; the first: {tmp_path}/in/a\\nb.png: no caption"
    with pytest.raises(BadSample) as error:
        pairs[0]
    assert "\n" not in str(error.value) and "d.png: the file is empty" in str(error.value)


def test_imagefolder(tmp_path):
    """metadata.jsonl or .csv speaks of the pictures beside it and below; a caption of the picture's own goes before."""
    files = {name: png(i) for i, name in enumerate(("a.png", "b.png", "sub/c.png", "sub/d.png"))}
    folder = write_files(tmp_path / "in", files | {"b.txt": b"own"})
    texts = {"sub/c.png": ["c"], "a.png": ["one", "two"], "b.png": "b", "gone.png": "x", "sub/d.png": None}
    lines = [{"file_name": name, "text": text, "width": 4} for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    wanted = [("a", 0, "one"), ("b", 1, "own"), ("sub/c", 2, "c")]
    for path in (folder, os.path.relpath(folder), f"{folder}/../in/"):
        pairs = open_pairs(path)
        assert contents(pairs) == wanted and pairs[0].texts == ("one", "two")
        assert [line.rpartition("/")[2] for line in pairs.skipped] == [
            "d.png: no caption",
            "gone.png: no such picture, though it has a caption",
        ]
    pairs = open_pairs(folder / "metadata.jsonl")
    assert [(pairs.names[i], pairs.texts(i)) for i in range(len(pairs))] == [
        ("sub/c.png", ("c",)),
        ("a.png", ("one", "two")),
        ("b.png", ("b",)),
        ("gone.png", ("x",)),
    ]
    (folder / "metadata.jsonl").unlink()
    for delimiter in ",;\t":
        rows = [
            ["width", "file_name", "caption"],
            [4, "sub/c.png", f'with "{delimiter}"'],
            [4, "a.png", "two\nlines"],
            [4, "sub/d.png", ""],
        ]
        with (folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        assert contents(open_pairs(folder)) == [
            ("a", 0, "two\nlines"),
            ("b", 1, "own"),
            ("sub/c", 2, f'with "{delimiter}"'),
        ]
        pairs = open_pairs(folder / "metadata.csv")
        assert contents(pairs) == [("sub/c.png", 2, f'with "{delimiter}"'), ("a.png", 0, "two\nlines")]
        assert pairs.skipped == [f"{folder}/metadata.csv: line 5: no caption"]
    (folder / "metadata.csv").write_text("name,text\na.png,x\n")
    pairs = open_pairs(folder)
    assert contents(pairs) == [("b", 1, "own")] and "the first line is wanted to name the columns" in pairs.skipped[0]


def coco(folder: Path, split: str, count: int, start: int) -> Path:
    """As it is downloaded: the pictures in no order of theirs, their captions in another."""
    numbers = list(range(start + count - 1, start - 1, -1))
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 3} for i in numbers]
    notes = [
        {"id": 7 * i + k, "image_id": i, "caption": f"caption {k} of {i}"} for k in range(2) for i in sorted(numbers)
    ]
    content = {"info": {}, "licenses": [], "images": images, "annotations": notes}
    write_files(folder / split, {f"{i:012d}.jpg": png(i) for i in numbers})
    return (
        write_files(folder, {f"annotations/captions_{split}.json": json.dumps(content).encode()})
        / f"annotations/captions_{split}.json"
    )


def test_coco(tmp_path):
    note = coco(tmp_path / "coco", "val2017", 3, 100)
    coco(tmp_path / "coco", "train2017", 2, 200)
    (tmp_path / "coco/annotations/instances_val2017.json").write_text("{}")
    wanted = [(f"{i:012d}", i, (f"caption 0 of {i}", f"caption 1 of {i}")) for i in (100, 101, 102)]
    found = open_pairs(tmp_path / "coco/val2017")
    assert [(pair.name, shade(pair.image), pair.texts) for pair in found] == wanted and found.told() == ""
    found = open_pairs(note)
    assert [(pair.name, shade(pair.image), pair.texts) for pair in found] == [
        (f"{name}.jpg", *rest) for name, *rest in wanted[::-1]
    ]
    found = open_pairs(tmp_path / "coco")
    assert [pair.name for pair in found] == [f"train2017/{i:012d}" for i in (200, 201)] + [
        f"val2017/{name}" for name, *_ in wanted
    ]
    shutil.rmtree(tmp_path / "coco/train2017")  # its captions come in one archive with the others
    found = open_pairs(tmp_path / "coco")
    assert [pair.texts for pair in found] == [texts for *_, texts in wanted] and found.told() == ""
    (tmp_path / "coco/images").mkdir()
    (tmp_path / "coco/val2017").rename(tmp_path / "coco/images/val2017")
    for data in (tmp_path / "coco", note):
        assert {pair.texts for pair in open_pairs(data)} == {texts for *_, texts in wanted}
    note.write_text(
        json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]})
    )
    with pytest.raises(DataError, match="not annotations with captions, as COCO's"):
        open_pairs(note)


# Several captions, or none


def test_several_captions_of_a_picture(tmp_path):
    files = {
        "a.png": png(1),
        "a.json": b'{"caption": [" one", "two", 3, null]}',
        "b.png": png(2),
        "b.json": b'{"text": [], "captions": ["three"]}',
    }
    (tmp_path / "list.json").write_text(
        json.dumps([{"image": "in/a.png", "caption": ["one", "two"]}, {"image": "in/b.png", "caption": "three"}])
    )
    for data in (write_files(tmp_path / "in", files), write_tar(tmp_path / "a.tar", files), tmp_path / "list.json"):
        pairs = open_pairs(data)
        assert [pair.texts for pair in pairs] == [pairs.texts(0), pairs.texts(1)] == [("one", "two"), ("three",)]
        assert pairs[0].text == "one"


def test_a_picture_that_a_list_names_again_is_passed_over_when_wanted_once(tmp_path):
    write_files(tmp_path, {"a.png": png(1), "b.png": png(2)})
    entries = [{"image_file": name, "text": text} for name, text in (("a.png", "1"), ("b.png", "2"), ("a.png", "3"))]
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(entries))
    lists = [tmp_path / "one.json", tmp_path / "two.json"]
    assert [pair.text for pair in open_pairs(lists)] == ["1", "2", "3"] * 2
    pairs = open_pairs(lists[0], once=True)
    assert [pair.text for pair in pairs] == ["1", "2"] and pairs.told() == ""


@pytest.mark.parametrize("form", ["folder", "shard", "list"])
def test_pictures_alone_where_none_has_a_caption(tmp_path, form):
    def data(captions: dict[str, bytes]) -> Path:
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        files = {f"{i}.png": png(i) for i in range(3)} | captions
        folder = write_files(tmp_path / "in", files)
        texts = [
            {"image_file": f"{i}.png", "text": (captions.get(f"{i}.txt") or b"").decode() or None} for i in range(3)
        ]
        (folder / "list.json").write_text(json.dumps(texts))
        return {"folder": folder, "list": folder / "list.json", "shard": write_tar(tmp_path / "a.tar", files)}[form]

    with pytest.raises(DataError, match="no caption, and 2 more"):
        open_pairs(data({}))
    pairs = open_pairs(data({}), uncaptioned=True)
    assert [(shade(pair.image), pair.text, pair.texts) for pair in pairs] == [(i, "", ()) for i in range(3)]
    assert pairs.told().startswith("3 pictures have no caption; their text is empty; the first: ") and not pairs.skipped
    pairs = open_pairs(data({"1.txt": b"one"}), uncaptioned=True)  # where some have one, the others were forgotten
    assert [pair.text for pair in pairs] == ["one"]
    assert pairs.told().startswith("2 left out of the data; the first: ")
    good = write_tar(tmp_path / "b.tar", samples(1))
    assert [pair.text for pair in open_pairs([good, data({})], uncaptioned=True)] == ["caption 0", "", "", ""]


@pytest.mark.parametrize("form", ["folder", "shard"])
def test_json_without_captions_beside_all_pictures(tmp_path, form):
    """As img2dataset writes it where there are none: pictures alone; where only some lack theirs, these are bad."""

    def data(captions: list[str | None]) -> Path:
        files = {}
        for i, text in enumerate(captions):
            note = {"width": 4, "caption": text} if text else {"width": 4}
            files |= {f"{i:03d}.png": png(i), f"{i:03d}.json": json.dumps(note).encode()}
        return write_files(tmp_path / "in", files) if form == "folder" else write_tar(tmp_path / "a.tar", files)

    pairs = open_pairs([write_tar(tmp_path / "b.tar", samples(1)), data([None] * 40)], uncaptioned=True)
    assert [pair.texts for pair in pairs] == [("caption 0",), *[()] * 40]
    assert pairs.told().startswith("40 pictures have no caption")
    for captions, uncaptioned in (([None] * 40, False), (["x", *[None] * 39], True)):
        pairs = open_pairs(data(captions), uncaptioned=uncaptioned)
        assert len(pairs) == 40 and pairs.told() == ""
        with pytest.raises(BadSample, match='the JSON has no "text" or "caption"'):
            pairs[1]


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


@pytest.mark.parametrize("given", [str, Path])
def test_a_root_for_the_relative_paths_of_lists(tmp_path, given):
    write_files(
        tmp_path, {"pictures/a.png": png(1), "pictures/sub/b.png": png(2), "c.png": png(3), "meta/a.png": png(9)}
    )
    entries = [{"image_file": name, "text": name} for name in ("a.png", "sub\\b.png", str(tmp_path / "c.png"))]
    (tmp_path / "meta/list.json").write_text(json.dumps(entries))
    pairs = open_pairs(tmp_path / "meta/list.json", data_root=given(tmp_path / "pictures"))
    assert [shade(pair.image) for pair in pairs] == [1, 2, 3]
    with pytest.raises(DataError, match="`data_root` .*/nowhere: no such folder"):
        open_pairs(tmp_path / "meta/list.json", data_root=given(tmp_path / "nowhere"))


BROKEN_LISTS = {
    "dict.json": ('{"image_file": "a.png", "text": "x"}', r"dict\.json: not a list of .* is a \.jsonl$"),
    "lines.json": (
        '{"image_file": "a.png"}\n{"image_file": "b.png"}',
        r"no pair to use: .*entry 1: no caption, and 1 more$",
    ),
    "empty.json": ("", r"empty\.json: not JSON"),
    "none.json": ("[]", r"none\.json: no pair to use"),
    "strings.json": ('["a.png"]', r"strings\.json: entry 1 is not \{\"image_file\": "),
    "other.jsonl": ('{"image_file": "a.png", "text": "x"}\n{"thing": "b.png"}', r"other\.jsonl: line 2 is not "),
    "cut.jsonl": ('{"image_file": "a.png", "text": "x"}\n{"image_fi', r"cut\.jsonl: line 2: not JSON"),
    "digits.json": ('[{"image_file": "a.png", "text": ' + "9" * 5000 + "}]", r"digits\.json: not JSON \(Exceeds"),
    "deep.json": ("[" * 100_000, r"deep\.json: not JSON \("),
    "latin.json": ('[{"image_file": "\xfc"', r"latin\.json: not JSON \("),
    "none.csv": ("", r"none\.csv: the first line is wanted to name the columns file_name and text; it is ''$"),
    "other.csv": ("a.png,x\n", r"other\.csv: the first line is wanted to name the columns"),
    "nul.csv": ("file_name,text\nb.png,y\n" + "a" * 200_000, r"nul\.csv: line 2: not a table \(field larger"),
    "numbers.jsonl": ('{"image_file": 5, "text": "x"}', r"numbers\.jsonl: line 1 is not "),
    "bare.jsonl": (
        '{"image_file": "a.png"}\n{"image_file": "b.png"}',
        r"no pair to use: .*line 1: no caption, and 1 more$",
    ),
}


AS_OTHERS_WRITE = {  # the same two pictures with the same two captions
    "open_clip.csv": "filepath\ttitle\na.png\tx\nb.png\ty\n",
    "spaced.csv": "Image Path, Prompt\na.png, x\nb.png, y\n",
    "flickr.txt": "image_name| comment_number| comment\na.png| 0| x\nb.png| 0| y\n",
    "kohya.json": '{"a.png": {"caption": "x", "tags": "1girl"}, "b": {"caption": "y"}}',
    "named.json": '{"a.png": "x", "b.png": ["y"]}',
    "inside.json": '{"version": 1, "data": [{"img": "a.png", "text": "x"}, {"img": "b.png", "text": "y"}]}',
    "lines.json": '{"image": "a.png", "text": "x"}\n{"image": "b.png", "text": "y"}\n',
    "list.jsonl": '[{"image": "a.png", "text": "x"}, {"image": "b.png", "text": "y"}]',
    "commas.jsonl": '{"image": "a.png", "text": "x"},\n{"image": "b.png", "text": "y"},\n',
    "stems.csv": "file_name,text\na,x\n/b.png,y\n",
}


@pytest.mark.parametrize("name", AS_OTHERS_WRITE)
def test_lists_as_others_write_them(tmp_path, name):
    folder = write_files(tmp_path, {"a.png": png(1), "b.png": png(2), name: AS_OTHERS_WRITE[name].encode()})
    assert [row[1:] for row in contents(open_pairs(folder / name))] == [(1, "x"), (2, "y")]


def test_quotation_marks_that_nothing_closes(tmp_path):
    files = {"a.png": png(1), "b.png": png(2), "c.png": png(3)}
    table = b'file_name\ttext\na.png\t"x\nb.png\t5" y\nc.png\t"two\nlines"\n'
    folder = write_files(tmp_path, files | {"t.tsv": table, "c.csv": b'file_name,text\na.png,"x\nb.png,y\n'})
    assert [row[2] for row in contents(open_pairs(folder / "t.tsv"))] == ['"x', '5" y', "two\nlines"]
    with pytest.raises(DataError, match=r"c\.csv: line 2: a quotation mark is opened there, and never closed"):
        open_pairs(folder / "c.csv")


def test_a_list_of_which_no_picture_is_there_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("file_name,text\n" + "https://a.b/c.png,x\n" * 3)
    with pytest.raises(DataError, match=r"x\.csv: none of its 3 pictures is there .*`data_root`; what lies at URLs"):
        open_pairs(tmp_path / "x.csv")


def test_captions_beside_as_others_write_them(tmp_path):
    """photo.png.txt; JSON that is a string or a list; Flickr's captions.txt beside a folder; what systems put there besides."""
    files = {
        "a.png": png(1),
        "a.png.txt": b"x",
        "b.png": png(2),
        "b.json": b'["y", "z"]',
        "c.png": png(3),
        "c.json": b'"w"',
    }
    junk = {"@eaDir/a.png": png(9), "__MACOSX/b.png": png(9), "._a.png": b"", "Thumbs.db": b""}
    pairs = open_pairs(write_files(tmp_path / "in", files | junk), uncaptioned=True)
    assert [pair.texts for pair in pairs] == [("x",), ("y", "z"), ("w",)] and not pairs.told()
    table = b"image,caption\na.png,x\na.png,y\n"
    assert [
        pair.texts for pair in open_pairs(write_files(tmp_path / "f", {"Images/a.png": png(1), "captions.txt": table}))
    ] == [("x", "y")]


def test_named_fields_of_a_sample_in_a_shard(tmp_path):
    files = {"1.image.png": png(1), "1.caption.txt": b"x", "2.image.png": png(2), "2.json": b'{"caption": "y"}'}
    assert contents(open_pairs(write_tar(tmp_path / "s.tar", files))) == [("1", 1, "x"), ("2", 2, "y")]


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_a_list_that_is_none_is_refused(tmp_path, name):
    content, message = BROKEN_LISTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        open_pairs(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


ENCODINGS = {"utf-8": False, "utf-8-sig": False, "utf-16": False, "utf-16-be": False, "utf-32": False, "cp1252": True}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_captions_and_lists_in_other_encodings(tmp_path, encoding):
    """With a byte order mark, or in UTF-8, they are known; what is neither was written on an old Windows, which is said."""

    def encoded(text: str) -> bytes:
        return ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)

    files = {"a.png": png(1), "a.txt": encoded("Käse\n"), "b.png": png(2), "b.json": encoded('{"text": "Käse"}')}
    folder, shard = write_files(tmp_path / "in", files), write_tar(tmp_path / "a.tar", files)
    write_files(tmp_path, {"c.jsonl": encoded('{"image_file": "in/a.png", "text": "Käse"}\n')})
    write_files(tmp_path, {"c.csv": encoded("file_name,text\r\nin/b.png,Käse\r\n")})
    for data, first in ((folder, f"{folder}/a.png"), (shard, f"{shard}: a")):
        pairs = open_pairs(data)
        assert contents(pairs) == [("a", 1, "Käse"), ("b", 2, "Käse")]
        pairs.digest()
        wanted = f"2 captions are not UTF-8 and read as Windows-1252; the first: {first}"
        assert pairs.told() == (wanted if ENCODINGS[encoding] else "")
    pairs = open_pairs([tmp_path / "c.jsonl", tmp_path / "c.csv"])
    assert [pair.text for pair in pairs] == ["Käse", "Käse"]
    assert pairs.told().startswith("2 captions are not UTF-8") == ENCODINGS[encoding]


# What cannot be used


def test_a_sample_that_cannot_be_read_is_named_when_it_is_asked_for(tmp_path):
    bad = {
        "cut": (png(1)[:-30], "txt", b"x", "the picture is damaged or cut short"),
        "empty": (b"", "txt", b"x", "the file is empty"),
        "latin": (png(1), "txt", png(1), "the caption is not text"),
        "marked": (png(1), "txt", b"\xff\xfea", "the caption is not the UTF-16 that it begins as"),
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
    with pytest.raises(DataError, match="only local shards can be read here; train.py fetches remote ones$") as error:
        open_pairs(url)
    assert str(error.value).startswith(url)


REFUSED = {
    "missing": r"missing: no such file or folder$",
    "missing.tar": r"missing\.tar: no such file or folder$",
    "*.parquet": r"\*\.parquet: matches nothing$",
    "{0..3}.tar": r"0\.tar: no such file or folder$",
    "{3..0}.tar": r"\{3\.\.0\}\.tar: ",
    "a.zip": r"a\.zip: an archive; give the folder that was in it, unpacked$",
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


# What the data are


def everywhere(tmp_path: Path, name: str) -> Path:
    """One set of data in every form."""
    folder = write_files(tmp_path / name, {f"in/{key}": content for key, content in samples(3).items()})
    write_tar(folder / "a.tar", samples(3))
    write_tar(folder / "b.tgz", samples(3))
    (folder / "list.json").write_text(json.dumps([{"image_file": f"in/{i:04d}.png", "text": f"{i}"} for i in range(3)]))
    return folder


@pytest.mark.parametrize("form", ["in", "a.tar", "b.tgz", "list.json"])
def test_the_digest_is_of_the_data_and_not_of_their_place(tmp_path, monkeypatch, form):
    folder = everywhere(tmp_path, "data")
    digest = open_pairs(folder / form).digest()
    everywhere(tmp_path, "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert digest == open_pairs(form).digest() == open_pairs(f"../data/./{form}{'/' * (form == 'in')}").digest()
    assert digest == pickle.loads(pickle.dumps(open_pairs(form))).digest()
    assert open_pairs(form).digest(2) == open_pairs(form).digest(2) != digest
    assert open_pairs(form).digest(99) == digest


def test_the_digest_tells_another_name_size_caption_or_order(tmp_path):
    found = set()
    for i, files in enumerate(
        [
            {"a.png": png(1), "a.txt": b"cat", "b.png": png(2), "b.txt": b"dog"},
            {"a.png": png(1), "a.txt": b"cow", "b.png": png(2), "b.txt": b"dog"},
            {"A.png": png(1), "A.txt": b"cat", "b.png": png(2), "b.txt": b"dog"},
            {"a.png": png(1) + b"x", "a.txt": b"cat", "b.png": png(2), "b.txt": b"dog"},
            {"a.png": png(1), "a.txt": b"cat"},
            {"b.png": png(2), "b.txt": b"dog", "a.png": png(1), "a.txt": b"cat"},
        ]
    ):
        found.add(open_pairs(write_tar(tmp_path / f"{i}.tar", files)).digest())
        found.add(open_pairs(write_files(tmp_path / f"{i}", files)).digest())
    assert len(found) == 6  # in a folder, the last has the order of the first; shard or folder is no difference


def test_the_digest_is_of_face_embeddings_too(tmp_path):
    """Those that a list names, by what is in them; one that is not there is told when it is used."""
    entry = {"image_file": "a.png", "text": "x", "id_embed_file": "a.npy"}
    write_files(tmp_path, {"a.png": png(1), "list.json": json.dumps([entry]).encode()})
    found = set()
    for content in (None, b"one", b"two"):
        if content:
            (tmp_path / "a.npy").write_bytes(content)
        found.add(open_pairs(tmp_path / "list.json").digest())
    assert len(found) == 3


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_face_embeddings_as_the_official_trainer_reads_them(tmp_path, new):
    """What torch.save makes of an array of NumPy's, and of a tensor; nothing in it is run."""
    face = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    for content in (face, face[None].astype(np.float64), torch.from_numpy(face), {"face": torch.from_numpy(face)}):
        torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=new)
        found = read_embedding(tmp_path / "x.bin")
        assert torch.allclose(found, torch.from_numpy(face / np.linalg.norm(face))[None], atol=1e-6)
    for content, wanted in (
        (np.arange(512), "a tensor made of other things than numbers"),
        (np.zeros((2, 512), order="F"), "a tensor made of other things"),
        (face[:511], r"of shape \(511,\)"),
        (os.getcwd, "refused, the pickle asks to run code"),
    ):
        torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=new)
        with pytest.raises(FaceError, match=rf"x\.bin: .*{wanted}") as error:
            read_embedding(tmp_path / "x.bin")
        assert "\n" not in str(error.value)


def test_pairs_that_only_their_pictures_tell_apart_have_an_identity_each(tmp_path):
    """Pictures of one size under one name in two folders, with one caption; the same folder given twice is the same."""
    for i, name in enumerate("ab"):
        write_files(tmp_path / name, {"x.png": png(i), "x.txt": b"x", "y.png": png(i + 2), "y.txt": b"y" * (i + 1)})
    assert len(png(0)) == len(png(1))
    a, b = (open_pairs(tmp_path / name).identities() for name in "ab")
    assert a[0] == b[0] and a[1] != b[1]
    both = open_pairs([tmp_path / "a", tmp_path / "b"]).identities()
    assert len(set(both.tolist())) == 4 and (both[1], both[3]) == (a[1], b[1])
    assert open_pairs([tmp_path / "a", tmp_path / "a"]).identities().tolist() == [*a, *a]


def test_processes_that_see_different_data_stop(tmp_path):
    a, b = (open_pairs(write_tar(tmp_path / f"{n}.tar", samples(n))) for n in (2, 3))

    class Ranks:
        def gather(self, lines: list[str]) -> list[str]:
            return [*lines, a.digest(2)]

    with pytest.raises(DataError, match="`data`: not the same on all processes"):
        identity(b, Ranks())
    b.cut(2)
    assert identity(a, Ranks()) == {"data (pairs)": 2, "data (sha256)": a.digest()} == identity(b, Ranks())


def test_the_digest_of_data_with_holes(tmp_path):
    """What is missing is told when it is used, not before."""
    (tmp_path / "list.json").write_text(
        '[{"image_file": "gone.png", "text": "x"}, {"image_file": "a\\u0000", "text": "y"}]'
    )
    assert len(open_pairs(tmp_path / "list.json").digest()) == 64


# Damage


def damaged(content: bytes, random: Random) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by what readers stumble over."""
    content = bytearray(content)
    for _ in range(random.randrange(1, 5)):
        at, size = random.randrange(len(content) + 1), random.choice((1, 8, 100, 512))
        tokens = (
            b"\0",
            b"\xff" * 12,
            b"{",
            b"]",
            b'"',
            b"9" * 30,
            b"\\ud800",
            b"\r",
            b"NaN",
            b"\xff\xfe",
            b"77777777777",
        )
        token = random.choice((*tokens, random.randbytes(1), bytes(content[at : at + size]), b"21 size=-1024\n"))
        content[at : at + random.choice((0, len(token), size))] = token
    return bytes(content)


def with_sound_checksums(tar: bytes) -> bytes:
    """So that a reader goes on to what a damaged header says."""
    tar = bytearray(tar)
    for start in range(0, len(tar) - 511, 512):
        if tar[start + 257 : start + 262] == b"ustar":
            tar[start + 148 : start + 156] = b" " * 8
            tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])
    return bytes(tar)


@pytest.mark.parametrize(
    "size", [b"\x7f" + b"\xff" * 11, b"\xff" * 12, b"\xff" * 10 + b"\xfc\0", b"\x80" + b"\xff" * 11]
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S", b"5"])
def test_sizes_that_no_file_has_end_a_shard(tmp_path, kind, size):
    """Beyond any address, and below zero, which would lead a reader back to where it was."""
    path = write_tar(tmp_path / "a.tar", samples(3))
    content, start = bytearray(path.read_bytes()), spans(path)[2][0] - 512
    content[start + 124 : start + 136], content[start + 156 : start + 157] = size, kind
    path.write_bytes(with_sound_checksums(content))
    pairs = open_pairs(path)
    assert contents(pairs)[:1] == expected(1) and len(pairs) < 3


@pytest.mark.parametrize("form", ["a.tar", "a.tgz", "a.json", "a.jsonl", "a.csv", "captions_in.json", "in"])
def test_damaged_data_give_what_is_left_or_an_error_of_ours(tmp_path, form):
    random = Random(form)
    texts = {
        "txt": "Käse\n".encode(),
        "json": b'{"caption": ["a", "\\ud83d", null]}',
        "caption": "Käse".encode("utf-16"),
    }
    entries = [{"image_file": f"{i}.png", "text": ["x", "Käse"]} for i in range(2)]
    coco = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    lists = {
        "a.json": json.dumps(entries).encode(),
        "a.jsonl": "\n".join(map(json.dumps, entries)).encode("utf-16"),
        "a.csv": b'file_name,text\n0.png,"x, y"\n1.png,"two\nlines"\n',
        "captions_in.json": json.dumps(coco).encode(),
    }
    files = samples(1) | {
        f"{'n' * 120}/{kind}.{suffix}": content
        for kind, text in texts.items()
        for suffix, content in ((kind, text), ("png", png(1)))
    }
    layouts = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    tars = [write_tar(tmp_path / f"whole{form[1:]}", files, layout).read_bytes() for layout in layouts if "t" in form]
    for i in range(150):
        if form == "in":
            write_files(tmp_path / "in", {f"{kind}.{kind}": damaged(text, random) for kind, text in texts.items()})
            write_files(tmp_path / "in", {f"{kind}.png": damaged(png(1), random) for kind in texts} | {"0.png": png(0)})
            write_files(tmp_path / "in", {"metadata.jsonl": damaged(lists["a.jsonl"], random)})
            write_files(tmp_path / "in", {"metadata.csv": damaged(lists["a.csv"], random)})
        elif form in lists:
            write_files(tmp_path, {form: damaged(lists[form], random)})
        else:
            content = damaged(random.choice(tars), random)
            write_files(tmp_path, {form: with_sound_checksums(content) if i % 2 else content})
        try:
            pairs = open_pairs(tmp_path / form, uncaptioned=bool(i % 3), once=bool(i % 5))
        except DataError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
            continue
        assert len(pairs.digest()) == 64 and pairs.told().count("\n") <= 2
        for number in range(len(pairs)):
            try:
                tokenize([*pairs[number].texts])
            except BadSample as error:
                assert "\n" not in str(error)


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


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_main_process_reads(mixed, start):
    """With files open in the parent: forked workers share them, and must not move each other's place."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist() * (4 if start == "fork" else 1)
    assert mixed[0].text == "caption 0" and mixed[150].text == "caption 150"
    loader = DataLoader(
        Rows(mixed),
        batch_size=10,
        sampler=order,
        num_workers=2 if start == "fork" else 1,  # what is spawned imports torch anew
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
