"""An index of any size: columns that lie in files, an index that is kept, an order without a list."""

import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from test_pairs import contents, expected, png, samples, write_tar

from training import buckets, chance, columns, index, shards
from training.captions import DataError
from training.chance import shuffled_at
from training.columns import Column, Strings
from training.data import open_pairs
from training.order import pair_at
from training.pairs import Pairs
from training.ranks import Ranks


@pytest.fixture
def small(monkeypatch):
    """Everything is large."""
    monkeypatch.setattr(columns, "LOT", 6)
    monkeypatch.setattr(index, "SMALL", 0)
    for module in (columns, buckets):
        monkeypatch.setattr(module, "BLOCK", 5)


@pytest.mark.parametrize("kind", ["q", "B"])
def test_a_column_is_a_list_that_takes_no_memory(small, kind):
    random, column, wanted = Random(0), Column(kind), []
    for _ in range(300):
        numbers = [random.randrange(256) for _ in range(random.randrange(4))]
        column.extend(bytes(numbers) if kind == "B" else numbers)
        wanted += numbers
        if random.random() < 0.1:
            column.cut(count := random.randrange(len(wanted) // 2, len(wanted) + 1))
            del wanted[count:]
        begin, end = sorted(random.randrange(len(wanted) + 1) for _ in range(2))
        assert (column.read(begin, end).tolist(), len(column)) == (wanted[begin:end], len(wanted))
        assert len(column.tail) < 6 + 4
    assert np.concatenate([*column.blocks(len(wanted))]).tolist() == wanted
    assert pickle.loads(pickle.dumps(column)).read(0, len(wanted)).tolist() == wanted


def test_strings_of_any_length(small):
    strings, wanted = Strings(), [f"{'ü' * (i % 7)}{i}" for i in range(50)] + ["\ud800", ""]
    assert [strings.append(string) for string in wanted] == [*range(52)]
    assert [strings[i] for i in range(52)] == wanted
    strings.cut(20)
    strings.append("x")
    assert (len(strings), strings[19], strings[20]) == (21, wanted[19], "x")


def shards_of(folder: Path) -> str:
    for i in range(3):
        write_tar(folder / f"{i}.tar{'.gz' if i == 1 else ''}", samples(6, 6 * i) | {f"bare{i}.png": png(1)})
    return f"{folder}/*.tar*"


def test_an_index_is_made_once_and_read_by_all(small, tmp_path, monkeypatch):
    data, kept = shards_of(tmp_path), tmp_path / "index"
    fresh, first = open_pairs(data), open_pairs(data, index=kept)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "members", None)  # nothing is read again
        again = open_pairs(data, index=kept)
        assert again.digest() == first.digest() == fresh.digest()
    for pairs in (first, again, pickle.loads(pickle.dumps(again))):
        assert contents(pairs) == expected(18) and pairs.told() == fresh.told()
        assert pairs.skipped == fresh.skipped and pairs.folder == first.folder
    fresh.cut(7)
    again.cut(7)
    assert again.digest() == fresh.digest() and contents(again) == expected(7)
    assert contents(open_pairs(data, index=kept)) == expected(18)  # what was cut is still there for others


def test_an_index_is_made_anew_where_a_shard_is_another(small, tmp_path):
    data, kept = shards_of(tmp_path), tmp_path / "index"
    digest = open_pairs(data, index=kept).digest()
    write_tar(tmp_path / "0.tar", samples(6, 60))
    found = open_pairs(data, index=kept)
    assert contents(found)[:6] == expected(6, 60) and found.digest() != digest and len([*kept.iterdir()]) == 2
    (found.folder / "rows").write_bytes(b"x" * 80)
    with pytest.raises(DataError, match=rf"{found.folder}: damaged; delete it, and it is made anew$"):
        open_pairs(data, index=kept)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="the index of the data cannot be kept there"):
        open_pairs(data, index=tmp_path / "file")


def test_no_index_of_a_few_shards_or_of_folders(tmp_path, monkeypatch):
    data = shards_of(tmp_path)
    open_pairs(data, index=tmp_path / "index")
    monkeypatch.setattr(index, "SMALL", 0)
    assert contents(open_pairs([data, tmp_path], index=tmp_path / "index"))[:18] == expected(18)
    assert not (tmp_path / "index").exists()


def test_pictures_alone_are_kept_as_such(small, tmp_path):
    files = {f"{i}.{kind}": png(i) if kind == "png" else b'{"width": 4}' for i in range(20) for kind in ("png", "json")}
    write_tar(tmp_path / "a.tar", files)
    for _ in range(2):
        pairs = open_pairs(tmp_path / "a.tar", uncaptioned=True, index=tmp_path / "index")
        assert [pair.texts for pair in pairs] == [()] * 20 and pairs.told().startswith("20 pictures have no caption")


def test_sizes_of_pictures_are_read_once(small, tmp_path, monkeypatch):
    data, ranks = shards_of(tmp_path), Ranks(torch.device("cpu"))
    made = [(8, 8), (16, 8)]
    found = []
    for _ in range(2):
        pairs = open_pairs(data, index=tmp_path / "index")
        found.append(buckets.open_buckets(pairs, len(pairs), made, 8, 4, ranks))
        monkeypatch.setattr(Pairs, "picture_size", None)
    assert [found[0].pair_at(0, i) for i in range(60)] == [found[1].pair_at(0, i) for i in range(60)]
    assert found[0].told() == found[1].told() == "sizes (width x height) of the pictures: 8x8 (18)"


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64, 65, 1000])
def test_an_order_without_a_list_has_each_once_and_is_mixed(monkeypatch, count):
    listed = [pair_at(3, place, count) for place in range(2 * count)]
    monkeypatch.setattr(chance, "LISTED", 0)
    epochs = [[pair_at(3, epoch * count + i, count) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == [*range(count)] == sorted(listed[:count]) for epoch in epochs)
    assert pair_at(3, count // 2, count, retry=1) == epochs[0][(count // 2 + 1) % count]
    if count == 1000:  # as mixed as a list that was shuffled: neighbours are no neighbours
        assert epochs[0] != epochs[1] != epochs[2] and [pair_at(4, i, count) for i in range(count)] != epochs[0]
        for order in (*epochs, listed[:count]):
            moved, steps = np.corrcoef(order, range(count))[0, 1], np.abs(np.diff(order))
            assert abs(moved) < 0.1 and steps.mean() == pytest.approx(count / 3, rel=0.1)


def test_ten_million_in_no_memory():
    found = {shuffled_at(0, 0, place, 10_000_000) for place in range(0, 10_000_000, 40_000)}
    assert len(found) == 250 and max(found) > 9_500_000 and min(found) < 500_000
