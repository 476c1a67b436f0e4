"""Image prompts that are other pictures of the same subject: who may prompt for whom, and who does."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pairs import png, write_files, write_tar
from test_train import QUICK, WEIGHTS, log, same, train

from files.errors import UserError
from training.cache import Cache
from training.captions import DataError
from training.data import identity, open_pairs
from training.features import Encoders, Prepared
from training.order import Places
from training.pairs import BadSample, Pairs
from training.references import References, open_references
from weights import load_image_encoder, open_base


def others(pairs: Pairs, found: References) -> dict[str, list[str]]:
    return {pairs.names[i]: sorted(pairs.names[int(j)] for j in found.of(i)) for i in range(len(found.begins))}


def listed(folder: Path, entries: list[dict], name: str = "list.json") -> Path:
    (folder / name).write_text(json.dumps(entries))
    return folder / name


def cats(folder: Path) -> Path:
    """Three targets, of which two name references: each other, a picture that is no target, and nothing."""
    write_files(folder, {f"{name}.png": png(i) for i, name in enumerate("abcd")})
    return listed(
        folder,
        [
            {"image_file": "a.png", "text": ["one", "uno"], "reference": ["b.png", "./d.png", "gone.png", "a.png"]},
            {"image_file": "b.png", "text": "two", "reference": "d.png"},
            {"image_file": "c.png", "text": "three"},
        ],
    )


def test_a_list_names_references(tmp_path):
    """Those that are targets, and others; one that points nowhere is counted, and its own picture is none."""
    pairs = open_pairs(cats(tmp_path))
    found = open_references(pairs)
    assert others(pairs, found) == {"a.png": ["b.png", "d.png"], "b.png": ["d.png"], "c.png": []}
    assert (found.rule, found.share, len(found.begins), len(pairs)) == ("field", 0.8, 3, 4)
    assert (
        found.told()
        == "2 of 3 pairs have another picture of their subject as image prompt (field), at 80% of their places"
    )
    assert pairs.told().splitlines() == [
        f"1 references point nowhere and are left out; the first: {tmp_path}/gone.png, of {tmp_path}/a.png",
        f"1 pictures have no other of their subject and are their own prompt; the first: {tmp_path}/c.png",
    ]
    cut = open_pairs(tmp_path / "list.json")
    cut.cut(1)
    assert others(cut, open_references(cut)) == {"a.png": ["b.png", "d.png"]}  # who is no target any more still prompts


def test_a_folders_own_list_names_references(tmp_path):
    write_files(tmp_path, {"x/a.png": png(1), "x/b.png": png(2)})
    lines = [{"file_name": "a.png", "text": "one", "reference": "b.png"}, {"file_name": "b.png", "text": "two"}]
    (tmp_path / "x/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = open_pairs(tmp_path / "x")
    assert others(pairs, open_references(pairs)) == {"a": ["b"], "b": []}


@pytest.mark.parametrize("form", ["folder", "shard", "list"])
def test_rules_by_name(tmp_path, form):
    names = ["x/cat_01", "x/cat_2", "x/cat (3)", "x/dog-front", "x/dog-back", "y/cat_01", "y/0001", "z"]
    files = {f"{name}.{kind}": content for name in names for kind, content in (("png", png(1)), ("txt", b"x"))}
    folder = write_files(tmp_path / "in", files)
    entries = [{"image_file": f"in/{name}.png", "text": "x"} for name in names]
    data = {"folder": folder, "list": listed(tmp_path, entries), "shard": write_tar(tmp_path / "a.tar", files)}[form]

    def found(rule: str) -> dict[str, list[str]]:
        pairs = open_pairs(data)
        kept = others(pairs, open_references(pairs, rule))
        return {
            name.removeprefix("in/").removesuffix(".png"): [n.removeprefix("in/").removesuffix(".png") for n in row]
            for name, row in kept.items()
        }

    wanted = {name: [] for name in names}
    wanted |= {a: sorted({*names[:3]} - {a}) for a in names[:3]} | {a: [*({*names[3:5]} - {a})] for a in names[3:5]}
    assert found("same-prefix") == wanted
    wanted = {a: sorted({*names[:5]} - {a}) for a in names[:5]} | {"y/cat_01": ["y/0001"], "y/0001": ["y/cat_01"]}
    assert found("same-folder") == wanted | {"z": []}


def test_a_picture_with_several_entries_is_no_reference_of_itself(tmp_path):
    write_files(tmp_path, {"a.png": png(1), "b.png": png(2)})
    entries = [{"image_file": name, "text": name} for name in ("a.png", "a.png", "b.png")]
    pairs = open_pairs(listed(tmp_path, entries))
    found = open_references(pairs, "same-folder")
    assert [found.of(i).tolist() for i in range(3)] == [[2], [2], [0, 1]]


def test_what_names_no_reference_is_refused(tmp_path):
    write_files(tmp_path, {"a.png": png(1), "sub/b.png": png(2)})
    plain = listed(tmp_path, [{"image_file": name, "text": "x"} for name in ("a.png", "sub/b.png")])
    nowhere = listed(tmp_path, [{"image_file": "a.png", "text": "x", "reference": "gone.png"}], "nowhere.json")
    assert open_references(open_pairs(plain)) is None
    with pytest.raises(UserError, match="`reference_share`: no list names references"):
        open_references(open_pairs(plain), None, 0.5)
    with pytest.raises(
        DataError, match='`reference` field: no entry of a list names another picture under "reference"$'
    ):
        open_references(open_pairs(plain), "field")
    with pytest.raises(DataError, match=r"`reference` field: .*; the first: .*/gone\.png, of .*/a\.png$"):
        open_references(open_pairs(nowhere))
    for rule in ("same-folder", "same-prefix"):
        with pytest.raises(DataError, match=f"`reference` {rule}: no two pictures of the data are of one group"):
            open_references(open_pairs(plain), rule)


class Source(list):
    """What `take` is asked for."""

    def take(self, i: int, caption: int, reference: int | None = None) -> tuple[int, int, int | None]:
        if reference == 7:
            raise BadSample("seven")
        return i, caption % 2, reference


def test_references_are_drawn_by_place_and_each_as_often(tmp_path):
    write_files(
        tmp_path, {f"{i}.{kind}": png(i) if kind == "png" else b"x" for i in range(8) for kind in ("png", "txt")}
    )
    pairs = open_pairs(tmp_path)
    found = open_references(pairs, "same-folder")

    def run(seed: int, places: range, references: References | None = found) -> list[tuple]:
        return [Places(Source(range(8)), seed, references)[place][1] for place in places]

    drawn, plain = run(0, range(4000)), run(0, range(4000), None)
    assert drawn[7:60:3] == run(0, range(7, 60, 3)) and drawn[:50] != run(1, range(50))
    assert [row[:2] for row in drawn] == [row[:2] for row in plain]  # pair and caption are as they were
    counts = Counter((i, reference) for i, _, reference in drawn)
    assert all(i != reference for i, reference in counts) and not any(reference == 7 for _, reference in counts)
    own = sum(count for (_, reference), count in counts.items() if reference is None)
    assert own / 4000 == pytest.approx(0.2 + 0.8 / 8, abs=0.02)  # where one cannot be read the target is its own
    assert all(30 <= count <= 100 for (_, reference), count in counts.items() if reference is not None)
    reasons = [Places(Source(range(8)), 0, found)[place][2] for place in range(99)]
    assert ["seven"] in reasons and [] in reasons


def test_who_prompts_for_whom_is_part_of_what_the_data_are(tmp_path):
    class Alone:
        def gather(self, lines: list[str]) -> list[str]:
            return lines

    found = []
    for rule, share in ((None, None), (None, 0.5), ("same-folder", 0.8)):
        pairs = open_pairs(cats(tmp_path))
        found.append(identity(pairs, Alone(), open_references(pairs, rule, share)))
    assert {one["data (pairs)"] for one in found} == {3}
    assert [one["references"] for one in found] == ["field, 0.8", "field, 0.5", "same-folder, 0.8"]
    assert found[0]["data (sha256)"] == found[1]["data (sha256)"] != found[2]["data (sha256)"]


def test_what_is_read_of_a_picture_is_read_of_its_reference(tmp_path):
    """For CLIP and as a face, encoded at each step or cached; what is trained on stays the target's."""
    write_files(tmp_path, {f"{name}.png": png(i) for i, name in enumerate("ab")})
    for i, name in enumerate("ab"):
        np.save(tmp_path / f"{name}.npy", np.eye(512, dtype=np.float32)[i])
    entries = [{"image_file": f"{name}.png", "text": name, "id_embed_file": f"{name}.npy"} for name in "ab"]
    pairs = open_pairs(listed(tmp_path, entries))
    base, image = open_base(WEIGHTS / "sd-tiny.safetensors"), load_image_encoder(WEIGHTS / "clip-tiny.safetensors")
    encoders = Encoders(base.vae(), base.text_encoder(), image, patches=True, faces=True)
    prepared = Prepared(pairs, 2, 64, 128, faces=True)
    cache = Cache(tmp_path / "cache", {}, prepared.identities())
    cache.begin(prepared, encoders.null())
    assert list(cache.fill(cache.missing(), encoders, prepared, workers=0)) == [[], []]
    cache.find()
    for source, prompt in ((prepared, {"clip", "face"}), (cache, {"image", "face"})):
        own, other, mixed = source.take(0), source.take(1), source.take(0, reference=1)
        assert mixed.keys() == own.keys() > prompt
        for key, value in mixed.items():
            assert torch.equal(value, (other if key in prompt else own)[key])
        assert not any(torch.equal(own[key], other[key]) for key in prompt)


def test_the_first_pairs_alone(tmp_path):
    """What is put behind them has neither the name nor the face of a pair that was cut off."""
    write_files(tmp_path, {f"{name}.png": png(i) for i, name in enumerate("abc")})
    entries = [{"image_file": f"{name}.png", "text": name, "id_embed_file": f"{name}.npy"} for name in "ab"]
    pairs = open_pairs(listed(tmp_path, [entries[0] | {"reference": "c.png"}, entries[1]]))
    pairs.cut(1)
    open_references(pairs)
    assert [(pairs[i].name, pairs[i].texts, pairs.face(i)) for i in range(len(pairs))] == [
        ("a.png", ("a",), str(tmp_path / "a.npy")),
        ("c.png", (), None),
    ]


@pytest.mark.slow
def test_a_run_with_references_cached_or_not_and_resumed(tmp_path):
    """Trained with the prompts that were drawn; the cache holds also what is a prompt alone; as one run throughout."""
    data = cats(tmp_path)
    flags = [*QUICK, "--data", data, "--steps", 2, "--save-every", 1, "--output"]
    done = train(*flags, tmp_path / "live")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 pairs have another picture" in done.stderr and "1 references point nowhere" in done.stderr
    done = train(*flags, tmp_path / "cached", "--cache", tmp_path / "cache")
    assert done.returncode == 0 and "4/4" in done.stderr, done.stderr
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("live", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert train(*flags, tmp_path / "plain", "--reference-share", 0).returncode == 0
    assert [line["loss"] for line in log(tmp_path / "plain")] != losses[0]
    assert train(*flags, tmp_path / "again", "--steps", 1).returncode == 0
    assert train("--output", tmp_path / "again", "--steps", 2, "--resume").returncode == 0
    assert same(tmp_path / "again", tmp_path / "live")
    done = train("--output", tmp_path / "again", "--resume", "--reference-share", 0.5)
    assert done.returncode == 2 and "has another references (field, 0.8; now field, 0.5)" in done.stderr


@pytest.mark.slow
def test_references_that_cannot_be_are_one_line(tmp_path):
    data = listed(write_files(tmp_path, {"a.png": png(1)}), [{"image_file": "a.png", "text": "x"}])
    for flags, wanted in (
        (["--reference", "field"], '--reference field: no entry of a list names another picture under "reference"\n'),
        (["--reference", "same-prefix"], "--reference same-prefix: no two pictures of the data are of one group\n"),
        (
            ["--reference-share", "0.5"],
            "--reference-share: no list names references; --reference with a rule is wanted",
        ),
        (["--reference", "best"], "--reference: invalid choice: 'best'"),
    ):
        done = train("--base", "sd15", "--data", data, "--output", tmp_path / "run", *flags)  # before it is fetched
        assert done.returncode == 2 and wanted in done.stderr and done.stderr.count("\n") == 1, done.stderr
