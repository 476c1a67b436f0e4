"""Files that are whole or absent, and hashes that are remembered."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from files.hashes import SMALL, sha256
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
