"""Files that are whole or absent, and hashes that are remembered."""

import errno
import hashlib
import json
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from files.errors import UserError
from files.hashes import SMALL, sha256
from files.outputs import reserved
from files.whole import checksum, read_checked, write, write_text
from weights import WeightsError

STATE = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([True, False]),
    "c": torch.tensor(3, dtype=torch.bfloat16),
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, STATE, {"step": 3})
    state, notes = read_checked(path)
    assert notes == {"step": 3} and state.keys() == STATE.keys()
    assert all(torch.equal(state[key], STATE[key]) and state[key].dtype == STATE[key].dtype for key in STATE)
    assert load_file(path).keys() == STATE.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("place", range(8))
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, place):
    path = tmp_path / "x.safetensors"
    write(path, STATE, {"step": 3})
    content = bytearray(path.read_bytes())
    tensors = len(content) - sum(value.nbytes for value in STATE.values())
    content[tensors + place * (len(content) - tensors - 1) // 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        read_checked(path)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_cut_short_is_noticed(tmp_path, length):
    path = tmp_path / "x.safetensors"
    write(path, STATE, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="damaged or cut short"):
        read_checked(path)


def test_a_file_without_notes_is_no_checkpoint(tmp_path):
    write(tmp_path / "x.safetensors", STATE)
    with pytest.raises(WeightsError, match="not a checkpoint"):
        read_checked(tmp_path / "x.safetensors")


def test_the_checksum_knows_names_shapes_and_types():
    one = torch.zeros(4)
    states = [{"a": one}, {"b": one}, {"a": one.view(2, 2)}, {"a": one.to(torch.int32)}, {"a": one, "b": one[:0]}]
    assert len({checksum(state) for state in states}) == len(states)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(os, "fsync", full), pytest.raises(OSError, match="No space left") as error:
        write_text(path, "new")
    assert error.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    for name in ("x" * 251 + ".txt", "猫" * 83 + ".txt"):
        write_text(tmp_path / name, "long")
        assert (tmp_path / name).read_text() == "long"
    assert len(list(tmp_path.iterdir())) == 2


# Names of outputs


def names(*args: object, **more: object) -> list[str]:
    """The names that a run is given, and writes to."""
    with reserved(*args, **more) as found:
        for path in found:
            assert path.stat().st_size == 0
            write_text(path, "picture")
    return [path.name for path in found]


def test_in_a_folder_names_are_the_next_free_number(tmp_path):
    folder = tmp_path / "new/results.v2"
    assert names(folder) == ["00000.png"]
    assert names(folder, 2, grid=True) == ["00001_0.png", "00001_1.png", "00001_grid.png"]
    for name in ("00007_0.jpg", "cat.png", "9.txt", "²3.png", "9" * 200 + ".webp"):
        (folder / name).touch()
    assert names(folder) == ["00008.png"]


def test_a_file_gives_the_names_of_several(tmp_path):
    assert names(tmp_path / "a.png") == ["a.png"]
    assert names(tmp_path / "b.jpg", 2, True) == ["b_0.jpg", "b_1.jpg", "b_grid.jpg"]
    assert names(tmp_path / "new/c.webp", 1, True) == ["c.webp", "c_grid.webp"]


def test_a_run_that_fails_keeps_what_it_has_written(tmp_path):
    def fail() -> None:
        with reserved(tmp_path / "a.png", 3) as paths:
            paths[0].write_text("picture")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a_0.png"]


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path):
    (tmp_path / "old").mkdir()
    for output in ("new/deeper", "new/a.png", "old", "old/new"):
        with reserved(tmp_path / output):
            pass
    with reserved(tmp_path / "kept/deeper") as paths:
        paths[0].write_text("picture")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "kept",
        "kept/deeper",
        "kept/deeper/00000.png",
        "old",
    ]


def run_at_once(folder: Path, i: int) -> list[str]:
    return names(folder, 1 + i % 3, i % 2 == 0)


def test_runs_into_one_folder_never_share_a_name(tmp_path):
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        found = list(pool.map(run_at_once, [tmp_path] * 40, range(40)))
    assert len(set(chain(*found))) == sum(map(len, found)) == len(list(tmp_path.iterdir()))
    assert len({run[0][:5] for run in found}) == 40


def test_what_exists_is_not_replaced_unless_asked_for(tmp_path):
    (tmp_path / "a.png").write_text("old")
    (tmp_path / "b_1.png").write_text("old")
    for output, count, taken in ((tmp_path / "a.png", 1, "a.png"), (tmp_path / "b.png", 2, "b_1.png")):
        with pytest.raises(UserError, match=f"{taken}: exists; another name is wanted, or `overwrite`$"):
            names(output, count)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b_1.png"]
    with reserved(tmp_path / "a.png", overwrite=True):
        assert (tmp_path / "a.png").read_text() == "old"
    assert (tmp_path / "a.png").read_text() == "old"
    with reserved(tmp_path / "b.png", 2, overwrite=True) as paths:
        write_text(paths[1], "new")
    assert (tmp_path / "b_1.png").read_text() == "new" and not (tmp_path / "b_0.png").exists()


def test_inputs_are_never_replaced(tmp_path):
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "b.png").symlink_to("a.png")
    for name in ("a.png", "b.png"):
        with pytest.raises(UserError, match=f"{name}: the file that is read as input"):
            names(tmp_path / name, overwrite=True, inputs=["-", tmp_path / "none", tmp_path / "a.png"])
    assert (tmp_path / "a.png").read_text() == "mine"


BAD = {
    "too long": ("x" * 252 + ".png", "cannot write there (File name too long)"),
    "too long with its number": ("x" * 251 + ".png", "cannot write there (File name too long)"),
    "a folder that is a file": ("file/x.png", "cannot write there ({}/file is not a folder)"),
    "a folder in a file": ("file/folder/x.png", "cannot write there ({}/file is not a folder)"),
    "a file for a folder": ("file", "cannot write there ({}/file is not a folder)"),
    "a folder with a picture's name": ("folder.png", "a folder; folders whose names end in .png are not taken"),
    "another kind of picture": ("x.gif", "a name that ends in .png, .jpg, .jpeg, .webp, or a folder, is wanted"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_name_that_cannot_be_is_told_at_the_start(tmp_path, fault):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    name, told = BAD[fault]
    with pytest.raises(UserError) as error:
        names(tmp_path / name, 2)
    assert str(error.value) == f"`output` {tmp_path / name}: {told.format(tmp_path)}"
    assert len(list(tmp_path.iterdir())) == 2


# Hashes


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home/ipadapter/sha256.json"


@pytest.mark.parametrize("size", [0, 10, SMALL, SMALL + 1])
def test_the_hash_is_sha256(tmp_path, home, size):
    path = tmp_path / "x"
    path.write_bytes(b"x" * size)
    for _ in range(2):
        assert sha256(path) == hashlib.sha256(b"x" * size).hexdigest()
    assert home.exists() == (size > SMALL)


def test_a_large_file_is_read_once_and_again_when_it_has_changed(tmp_path, home):
    path = tmp_path / "x"
    path.write_bytes(b"x" * (SMALL + 1))
    first = sha256(path)
    with patch("files.hashes.digest", side_effect=AssertionError("read again")):
        assert sha256(path) == first
    path.write_bytes(b"y" * (SMALL + 1))
    assert sha256(path) == hashlib.sha256(b"y" * (SMALL + 1)).hexdigest() != first


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"x": 1})])
def test_a_damaged_memory_costs_time_alone(tmp_path, home, content):
    home.parent.mkdir(parents=True)
    home.write_text(content)
    path = tmp_path / "x"
    path.write_bytes(b"x" * (SMALL + 1))
    assert sha256(path) == hashlib.sha256(b"x" * (SMALL + 1)).hexdigest()


def test_without_a_home_files_are_hashed_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "x"
    path.write_bytes(b"x" * (SMALL + 1))
    assert sha256(path) == hashlib.sha256(b"x" * (SMALL + 1)).hexdigest()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="nope: cannot be read"):
        sha256(tmp_path / "nope")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="pipe: a pipe, which can be read once"):
        sha256(tmp_path / "pipe")
