"""Pictures as they are: sizes near their own proportions, batches of one size each, crops and flips by place."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import environment, free_port, started
from test_pairs import write_tar
from test_train import QUICK, SCRIPT, log, same, state, train

from training.buckets import Buckets, fitting, groups_of, sizes_for
from training.data import open_pairs
from training.features import Crop, Prepared, to_size
from training.order import Places


def squares_and_wide(folder: Path) -> Path:
    """Seven squares, six wide pictures, and a tall one."""
    folder.mkdir()
    sizes = [*[(90, 90)] * 7, *[(160, 80)] * 6, (50, 100)]
    for i, size in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    return folder


def test_sizes_for_a_resolution():
    assert sizes_for(512) == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    for resolution in (64, 128, 256, 512, 768, 1024):
        for height, width in sizes_for(resolution):
            assert height * width <= resolution**2 and height % 8 == width % 8 == 0
            assert max(height, width) <= 2 * min(height, width) and height * width > 0.7 * resolution**2


def test_a_picture_goes_to_the_nearest_proportions_and_is_enlarged_only_where_it_must():
    groups = groups_of([512, 768], 64)
    assert fitting(1000, 1000, groups) == (768, 768) and fitting(600, 600, groups) == (512, 512)
    assert fitting(100, 100, groups) == (512, 512) and fitting(0, 0, groups) == (512, 512)
    assert fitting(600, 760, groups) == (448, 576)
    assert groups_of([(64, 128), 64], 8) == [sizes_for(64), [(64, 128)]] and groups_of([], 64) == [sizes_for(64)]
    assert groups_of([[64, 128]], 8) == [[(64, 128)]]  # as a run's settings hold it


def test_an_epoch_has_each_pair_and_each_batch_one_size():
    shown = np.array([[64, 64]] * 11 + [[64, 128]] * 7 + [[128, 64]] * 2 + [[0, 0]])
    buckets = Buckets(shown, [[(64, 64), (64, 128), (96, 64), (128, 64)]], 4)
    assert buckets.moved == [(2, (64, 128), (64, 64))] and {buckets.sizes[i]: n for i, n in buckets.counts.items()} == {
        (64, 64): 14,
        (128, 64): 7,
    }
    epochs = [[buckets.pair_at(0, epoch * buckets.length + i) for i in range(buckets.length)] for epoch in range(3)]
    assert buckets.length == sum(4 * -(-count // 4) for count in buckets.counts.values())
    for epoch in epochs:
        assert set(epoch) == set(range(len(shown)))
        for i in range(0, len(epoch), 4):
            assert len({buckets.size(number) for number in epoch[i : i + 4]}) == 1 == len({*epoch[i : i + 4]}) - 3
        assert max(Counter(epoch).values()) <= 2
    assert epochs[0] != epochs[1] != epochs[2]
    again = Buckets(shown, [[(64, 64), (64, 128), (96, 64), (128, 64)]], 4)
    run = [number for epoch in epochs for number in epoch]
    assert [again.pair_at(0, place) for place in range(60, 20, -1)] == run[60:20:-1]
    assert buckets.pair_at(1, 0) != epochs[0][0] or buckets.pair_at(1, 1) != epochs[0][1]
    assert [buckets.whole(place) for place in (0, 1, 4, 5)] == [0, 4, 4, 8]
    tries = [buckets.pair_at(0, 0, retry) for retry in range(20)]
    assert len({buckets.size(number) for number in tries}) == 1 and len({*tries[:7]}) == 7


def test_sizes_with_fewer_pictures_than_a_batch_are_told():
    shown = np.array([[64, 64]] * 5 + [[128, 64]] * 2)
    buckets = Buckets(shown, [[(64, 64), (64, 128)]], 4)
    assert buckets.told() == (
        "sizes (width x height) of the pictures: 64x64 (7)\n"
        "sizes with fewer pictures than a batch of 4 go to the next one: 2 of 128x64 to 64x64"
    )
    few = Buckets(shown[:3], [[(64, 64), (64, 128)]], 4)
    assert few.told().endswith("\nfewer pictures than a batch of 4: some come in it more than once")
    assert sorted(Counter(few.pair_at(0, i) for i in range(4)).values()) == [1, 1, 2]


def test_what_is_cropped_lies_where_it_is_said_to_lie():
    """Against the same picture brought to size and cut by hand; the middle of a square is what it always was."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8))
    for crop, size in (
        (Crop(), (32, 32)),
        (Crop(0.9, 0.1), (32, 48)),
        (Crop(0.2, 0.99), (64, 32)),
        (Crop(0.99, 0.0), (16, 64)),
    ):
        pixels, (top, left) = to_size(image, size, crop)
        assert tuple(pixels.shape) == (3, *size)
        scale = max(size[0] / 40, size[1] / 100)
        whole = image.resize(
            (max(size[1], int(100 * scale + 1e-9)), max(size[0], int(40 * scale + 1e-9))), Image.Resampling.BILINEAR
        )
        wanted = np.asarray(whole)[top : top + size[0], left : left + size[1]]
        assert torch.equal(pixels, torch.tensor(wanted).permute(2, 0, 1) / 127.5 - 1)
    assert to_size(image, (32, 32))[1] == (0, 24)


def test_crops_and_flips_are_drawn_by_place(tmp_path):
    pairs = open_pairs(squares_and_wide(tmp_path / "in"))
    prepared = Prepared(pairs, len(pairs), 64, 32)
    plain, cropped, flipped = Places(prepared, 0), Places(prepared, 0, random_crop=True), Places(prepared, 0, flip=True)
    corners, turned = [], 0
    for place in range(14):
        _, own, _ = plain[place]
        _, part, _ = cropped[place]
        _, mirrored, _ = flipped[place]
        assert torch.equal(own["clip"], part["clip"]) and torch.equal(own["tokens"], mirrored["tokens"])
        corners.append((own["sizes"].tolist()[2:4], part["sizes"].tolist()[2:4]))
        is_turned = torch.allclose(mirrored["pixels"], own["pixels"].flip(-1), atol=0.02)
        assert is_turned or torch.equal(mirrored["pixels"], own["pixels"])
        assert is_turned == torch.allclose(mirrored["clip"], own["clip"].flip(-1), atol=0.1)  # the prompt with it
        turned += is_turned
    assert 2 <= turned <= 12 and len({tuple(part) for _, part in corners}) > 4
    assert all(part == own == [0, 0] or own in ([0, 32], [32, 0]) for own, part in corners)
    assert torch.equal(cropped[5][1]["pixels"], Places(prepared, 0, random_crop=True)[5][1]["pixels"])


def test_the_size_of_a_picture_is_told_by_its_first_bytes(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8))
    noise.save(tmp_path / "turned.jpg", exif=exif)
    noise.save(tmp_path / "late.tif")  # what it is stands at its end
    (tmp_path / "bad.png").write_bytes(b"no picture")
    names = ("turned.jpg", "late.tif", "bad.png")
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text("x")
    shard = write_tar(tmp_path / "a.tar", {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())})
    for data in (shard, tmp_path):
        pairs = open_pairs(data)
        found = {pairs.names[i]: pairs.picture_size(i) for i in range(len(pairs))}
        assert found == {"turned": (300, 200), "late": (200, 300), "bad": (0, 0)}


@pytest.mark.slow
def test_a_run_in_buckets_resumed_cached_and_in_two_processes(tmp_path):
    data = squares_and_wide(tmp_path / "in")
    flags = [*QUICK, "--data", data, "--buckets", "64x64", "96x48", "40x80", "--save-every", 2, "--output"]
    done = train(*flags, tmp_path / "one", "--steps", 4)
    assert done.returncode == 0, done.stderr
    assert "sizes (width x height) of the pictures: 64x64 (8), 96x48 (6)" in done.stderr
    assert "fewer pictures than a batch of 2 go to the next one: 1 of 40x80 to 64x64" in done.stderr
    assert train(*flags, tmp_path / "two", "--steps", 2).returncode == 0
    assert train("--output", tmp_path / "two", "--steps", 4, "--resume").returncode == 0
    assert same(tmp_path / "one", tmp_path / "two")
    done = train(*flags, tmp_path / "cached", "--steps", 4, "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("one", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    flags, port = [*flags, tmp_path / "both", "--steps", 4, "--batch-size", 1], free_port()
    for process in [started(SCRIPT, *flags, env=environment(rank, port)) for rank in range(2)]:
        assert (done := process.ended()).returncode == 0, done.stderr[-2000:]
    assert [line["loss"] for line in log(tmp_path / "both")] == pytest.approx(losses[0], rel=1e-3)
    assert state(tmp_path / "both").keys() == state(tmp_path / "one").keys()


@pytest.mark.slow
def test_crops_and_sizes_that_cannot_be_are_one_line(tmp_path):
    for flags, wanted in (
        (["--buckets", "100"], "--buckets: 100 given, a multiple of 8 is wanted (the nearest is 96)"),
        (["--buckets", "64x64x64"], "--buckets: '64x64x64' given, a side or WIDTHxHEIGHT is wanted"),
        (["--random-crop", "--cache", tmp_path / "c"], "--random-crop and --cache: one of them; a cache holds"),
        (["--flip", "--cache", tmp_path / "c"], "--flip and --cache: one of them"),
    ):
        done = train("--output", tmp_path / "run", *flags)
        assert done.returncode == 2 and wanted in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()
