"""Weights by name: what a name means, what it brings along, the cache, and the download, from a hub on this machine."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
from processes import started

from weights import WeightsError, hub, load_adapter, load_image_encoder, open_base, presets
from weights.hub import cache, cached, fetch, table
from weights.names import SUFFIXES, check_together, find, names, resolve
from weights.presets import PRESETS, ROWS, Preset

ROOT = Path(__file__).parent.parent
CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLUS = Preset("adapter", "plus", "models/plus.safetensors", 1, repo="someone/adapters", sha256=SHA256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an empty memory of hashes."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "hub"


def put(preset: Preset, content: bytes = CONTENT, commit: str = COMMIT) -> Path:
    """Lay a file into the cache as the hub's own library does: a blob, a link to it, a reference to the commit."""
    folder = cache() / f"models--{preset.repo.replace('/', '--')}"
    blob, link = folder / "blobs" / hashlib.sha256(content).hexdigest(), folder / "snapshots" / commit / preset.file
    for path in (blob, link, folder / "refs/main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs/main").write_text(commit)
    return link


def refused(call, *args) -> str:
    with pytest.raises(WeightsError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The table


def test_every_row_is_whole():
    assert len(PRESETS) == len(ROWS), "two rows of the same kind and name"
    assert set(presets.SHA256) <= {f"{row.kind} {row.name}" for row in ROWS}
    for row in PRESETS.values():
        assert re.fullmatch(r"[a-z0-9.-]+", row.name) and not row.name.endswith(SUFFIXES)
        assert row.file.endswith(SUFFIXES)
        assert row.repo is None or re.fullmatch(r"[\w.-]+/[\w.-]+", row.repo)
        assert row.revision is None or row.repo is not None
        assert row.revision is None or re.fullmatch(r"[0-9a-f]{40}", row.revision)
        assert row.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", row.sha256)
        assert (row.side is not None) == (row.kind == "base") and (row.kind != "base" or len(row.families) == 1)
    assert presets.REVISIONS.keys() <= {row.repo for row in ROWS if row.repo}
    hashes = [row.sha256 for row in PRESETS.values() if row.sha256]
    assert len(set(hashes)) == len(hashes)


def test_all_that_a_row_brings_goes_with_it():
    for row in ROWS:
        if row.kind == "adapter":
            check_together(
                {kind: find(kind, getattr(row, kind)) for kind in ("base", "image_encoder") if getattr(row, kind)}
                | {"adapter": row}
            )
        if row.adapter:
            assert PRESETS["adapter", row.adapter].goes_with(row.families[0].name)


# Parameters of the released files, as their papers' code builds them; all are stored with two bytes each.
PARAMETERS = {
    "base": 22_319_616,
    "light": 22_319_616,
    "light-v11": 22_319_616,
    "vit-g": 23_106_048,
    "plus": 49_087_488,
    "plus-face": 49_087_488,
    "full-face": 21_794_304,
    "sdxl": 351_285_248,
    "sdxl-vit-h": 349_188_096,
    "sdxl-plus": 423_748_864,
    "sdxl-plus-face": 423_748_864,
    "faceid": 48_354_816,
    "faceid-plus": 78_260_736,
    "faceid-plusv2": 78_260_736,
    "sdxl-faceid": 535_507_968,
    "faceid-portrait": 32_291_328,
    "faceid-portrait-v11": 32_291_328,
    "sdxl-faceid-portrait": 374_903_808,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_of_the_architectures(name):
    assert PRESETS["adapter", name].megabytes == pytest.approx(2 * PARAMETERS[name] / 1e6, abs=0.6)


def test_one_is_stored_with_four_bytes():
    assert PRESETS["adapter", "noob-ipa-mark1"].megabytes == pytest.approx(4 * PARAMETERS["sdxl"] / 1e6, abs=0.6)


def test_only_the_second_versions_of_faceid_plus_say_so():
    assert {row.name for row in ROWS if row.faceid_v2} == {"faceid-plusv2", "sdxl-faceid-plusv2"}


def test_the_bundled_files_are_what_their_rows_say():
    base = open_base(fetch(PRESETS["base", "tiny"]))
    encoder = load_image_encoder(fetch(PRESETS["image_encoder", "tiny"]))
    for name in names("adapter", "tiny"):
        adapter = load_adapter(fetch(PRESETS["adapter", name]))
        assert len(adapter.ip_adapter) == len(base.layers) and encoder.config.image_size == PRESETS["base", "tiny"].side
    for row in ROWS:
        if row.repo is None:
            assert row.megabytes == pytest.approx((ROOT / row.file).stat().st_size / 1e6, rel=0.2)


# What a value means


def test_a_file_that_exists_wins_over_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plus").write_bytes(b"x")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "mine").mkdir()
    assert find("adapter", "plus") == Path("plus")
    assert find("base", "tiny") == PRESETS["base", "tiny"]
    assert find("base", "./tiny") == Path("tiny")
    assert find("base", "mine") == Path("mine")


@pytest.mark.parametrize("value", ["plus-face", "Plus-Face", "plus_face"])
def test_spelling(value):
    assert find("adapter", value) is PRESETS["adapter", "plus-face"]


@pytest.mark.parametrize("value", ["x/sd15", "./sd15", "sd15.safetensors", "sd15.ckpt", "A.BIN", "a.pt", "a.pth"])
def test_what_looks_like_a_path_is_one(value):
    assert refused(find, "base", value) == f"`base` {value}: no such file"


def test_a_missing_file_with_a_published_name_is_told_the_short_one():
    message = refused(find, "adapter", "models/ip-adapter-plus_sd15.safetensors")
    assert message.endswith("no such file (`adapter` plus is the published one)")
    assert refused(find, "image_encoder", "model.safetensors").endswith("no such file")  # three have that name


def test_an_unknown_name_is_told_those_near_it():
    message = refused(find, "adapter", "plusface")
    assert (
        message.startswith("`adapter` plusface: ") and "plus-face" in message and "python sample.py --list" in message
    )
    assert "near" not in refused(find, "image_encoder", "qqqqqqq")


# What follows from what


def run(image: bool = True, **given: str) -> tuple[str, ...]:
    """Names or files of base, adapter, image encoder and autoencoder; - for none."""
    kinds = ("base", "adapter", "image_encoder", "vae")
    found = resolve({kind: given.get(kind) for kind in kinds}, image)
    assert tuple(found) == kinds
    return tuple("-" if one is None else one.name for one in found.values())  # a Path has a name, too


@pytest.mark.parametrize(
    ("given", "brought"),
    [
        ({}, "tiny tiny-full-face tiny -"),
        ({"adapter": "tiny"}, "tiny tiny tiny -"),
        ({"image": False}, "tiny - - -"),
        ({"adapter": "plus-face"}, "sd15 plus-face vit-h -"),
        ({"adapter": "vit-g"}, "sd15 vit-g vit-bigg -"),
        ({"adapter": "sdxl"}, "sdxl sdxl vit-bigg -"),
        ({"adapter": "sdxl-plus"}, "sdxl sdxl-plus vit-h -"),
        ({"adapter": "sdxl-plus", "base": "juggernaut-xl-9"}, "juggernaut-xl-9 sdxl-plus vit-h -"),
        ({"adapter": "noob-ipa-mark1"}, "noobai-xl-1.1 noob-ipa-mark1 vit-bigg -"),
        ({"base": "noobai-xl-1.1"}, "noobai-xl-1.1 noob-ipa-mark1 vit-bigg -"),
        ({"adapter": "faceid"}, "sd15 faceid - -"),
        ({"adapter": "faceid-plusv2"}, "sd15 faceid-plusv2 vit-h -"),
        ({"base": "sd15"}, "sd15 base vit-h -"),
        ({"base": "sdxl"}, "sdxl sdxl-vit-h vit-h -"),
        ({"base": "sdxl", "image": False}, "sdxl - - -"),
        ({"base": "sd21", "image": False}, "sd21 - - -"),
        ({"base": "sd15", "vae": "sd-vae-ft-mse"}, "sd15 base vit-h sd-vae-ft-mse"),
        ({"adapter": "sdxl-plus", "image": False}, "sdxl - - -"),
        ({"adapter": "a.bin"}, "tiny a.bin tiny -"),
        ({"adapter": "plus", "base": "b.ckpt"}, "b.ckpt plus vit-h -"),
        ({"adapter": "plus", "image_encoder": "e.pt"}, "sd15 plus e.pt -"),
        ({"base": "sd15", "adapter": "a.bin", "image_encoder": "vit-h"}, "sd15 a.bin vit-h -"),
        ({"base": "b.ckpt", "adapter": "a.bin", "image_encoder": "e.pt"}, "b.ckpt a.bin e.pt -"),
        ({"base": "b.ckpt", "image": False}, "b.ckpt - - -"),
    ],
    ids=str,
)
def test_defaults_follow(given, brought, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.bin", "b.ckpt", "e.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert " ".join(run(**given)) == brought


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"base": "b.ckpt"}, ["`adapter` is wanted beside b.ckpt", "--list"]),
        ({"base": "b.ckpt", "adapter": "a.bin"}, ["`image_encoder` is wanted beside a.bin"]),
        ({"base": "sd15", "adapter": "a.bin"}, ["`image_encoder` is wanted beside a.bin"]),
        ({"base": "sd21"}, ["`base` sd21: no adapter is published for SD 2.x"]),
        ({"base": "sdxl", "adapter": "plus"}, ["`adapter` plus is for SD 1.x", "`base` sdxl is SDXL", "sdxl-plus"]),
        ({"base": "ssd-1b", "adapter": "sdxl"}, ["is SSD-1B; for that: none is published"]),
        (
            {"base": "sdxl", "vae": "sd-vae-ft-mse"},
            ["`vae` sd-vae-ft-mse is for SD 1.x and SD 2.x", "sdxl-vae-fp16-fix"],
        ),
        ({"adapter": "plus", "image_encoder": "vit-bigg"}, ["`adapter` plus reads `image_encoder` vit-h; vit-bigg"]),
        ({"adapter": "plux", "image": False}, ["`adapter` plux", "plus"]),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(given, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.bin", "b.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    message = refused(lambda: run(**given))
    assert all(part in message for part in parts), message


def test_a_lora_is_held_against_the_base():
    check_together({"base": PRESETS["base", "sd15"], "lora": PRESETS["lora", "lcm"]})
    message = refused(check_together, {"base": PRESETS["base", "sdxl"], "lora": PRESETS["lora", "lcm"]})
    assert message == "`lora` lcm is for SD 1.x, `base` sdxl is SDXL; for that: sdxl-lcm"


def test_a_new_adapter_takes_the_encoder_that_the_usual_one_reads(tmp_path, monkeypatch):
    """What train.py asks for: `--base sd15` means the same as in sample.py, less the adapter that is to be made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.ckpt").write_bytes(b"x")
    for given, brought in {
        (): ("tiny", None, "tiny"),
        ("base", "sd15"): ("sd15", None, "vit-h"),
        ("base", "sdxl"): ("sdxl", None, "vit-h"),
        ("base", "sd15", "image_encoder", "vit-bigg"): ("sd15", None, "vit-bigg"),
        ("base", "sd21", "image_encoder", "vit-h"): ("sd21", None, "vit-h"),
        ("base", "sd15", "adapter", "plus"): ("sd15", "plus", "vit-h"),
        ("adapter", "vit-g"): ("sd15", "vit-g", "vit-bigg"),
    }.items():
        found = resolve(dict(zip(given[::2], given[1::2], strict=True)), image=True, new_adapter=True)
        assert tuple(found[kind] and found[kind].name for kind in ("base", "adapter", "image_encoder")) == brought
    for base, said in {"b.ckpt": "is wanted beside b.ckpt", "sd21": "FILE"}.items():
        message = refused(lambda base=base: resolve({"base": base}, image=True, new_adapter=True))
        assert "`image_encoder`" in message and said in message and "`adapter`" not in message


def test_the_bundled_files_are_what_nothing_given_means():
    found = {kind: cached(one) for kind, one in resolve({}, image=True).items()}
    assert {kind: path.name for kind, path in found.items()} == {
        "base": "sd-tiny.safetensors",
        "adapter": "ip-adapter-full-face-tiny.safetensors",
        "image_encoder": "clip-tiny.safetensors",
    }
    assert all(path.is_file() for path in found.values())


# The cache


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HUB_CACHE": "$HOME/a"}, "/h/a"),
        ({"HF_HOME": "~/a"}, "/h/a/hub"),
        ({}, "/h/.cache/huggingface/hub"),
    ],
    ids=str,
)
def test_the_cache_is_where_the_hubs_own_library_has_it(variables, folder, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/h", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(cache()) == folder
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == folder


def test_a_file_in_the_cache_is_found_as_the_hubs_own_library_finds_it(own_cache):
    assert cached(PLUS) is None
    link = put(PLUS)
    assert cached(PLUS) == link == fetch(PLUS)
    assert huggingface_hub.try_to_load_from_cache(PLUS.repo, PLUS.file, cache_dir=own_cache) == str(link)
    assert link.name == "plus.safetensors"


def test_of_two_revisions_the_later_counts():
    old, new = put(PLUS, b"old", "a" * 40), put(PLUS, CONTENT, "9" * 40)
    os.utime(old, (1, 1))
    assert cached(PLUS) == new


def test_of_several_revisions_the_pinned_one_counts():
    pinned = replace(PLUS, revision="a" * 40)
    later = put(PLUS, CONTENT, "9" * 40)
    assert cached(pinned) == later  # what its content is, its hash will tell
    mine = put(PLUS, b"old", pinned.revision)
    os.utime(mine, (1, 1))
    assert cached(pinned) == mine and cached(PLUS) == later


def test_a_link_without_its_blob_is_not_there():
    os.remove(os.path.realpath(put(PLUS)))
    assert cached(PLUS) is None


def test_another_content_is_refused_every_time_and_taken_if_given_as_a_file():
    link = put(PLUS, b"something else")
    for _ in range(2):
        message = refused(fetch, PLUS)
        assert message.startswith(os.path.realpath(link)) and SHA256[:10] in message
        assert message.endswith(f"`adapter` {link}")
    assert find("adapter", str(link)) == link
    assert fetch(replace(PLUS, sha256=None)) == link


def test_the_list_says_what_is_here():
    put(PRESETS["adapter", "plus-face"])
    *paragraphs, last = table().split("\n\n")
    listed = {}
    for head, *lines in map(str.splitlines, paragraphs):
        listed |= {(head.split()[0], line.split()[0]): line.split()[3] for line in lines}
        assert max(map(len, lines)) <= 100
    here = {row.name for row in ROWS if row.repo is None} | {"plus-face"}
    assert listed == {(f"`{row.kind}`", row.name): "yes" if row.name in here else "no" for row in ROWS}
    assert str(cache()) in last


# The download


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for. What it answers follows from the repository's name."""

    protocol_version = "HTTP/1.1"
    child = None  # the process to interrupt
    interrupted = threading.Event()
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        repo = self.path.split("/resolve/")[0].strip("/")
        errors = {"someone/gated": (403, "GatedRepo"), "someone/gone": (401, "RepoNotFound")}
        errors |= {"someone/without": (404, "EntryNotFound"), "someone/busy": (503, "")}
        errors |= {"someone/rewritten": (404, "RevisionNotFound")}
        Hub.asked.append(self.path)
        if repo == "someone/silent":
            self.close_connection = True
            return
        status, code = errors.get(repo, (200, ""))
        content = b"no" if repo == "someone/other" else CONTENT
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) if status == 200 else 0))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if body and status == 200:
            if repo == "someone/slow" and not Hub.interrupted.is_set():
                self.wfile.write(content[:100])
                self.wfile.flush()
                Hub.interrupted.set()
                os.kill(Hub.child.process.pid, signal.SIGINT)
                time.sleep(1)
                self.close_connection = True
            else:
                self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


CHILD = """
import json, sys
from pathlib import Path
from typing import ClassVar
from weights import WeightsError
from weights.hub import cache, cached, fetch
from weights.presets import Preset

def preset(name):
    pinned = "f" * 40 if name in ("pinned", "rewritten") else None
    file = "models/plus.safetensors"
    return Preset("adapter", name, file, 0.1, repo=f"someone/{name}", revision=pinned, sha256=sys.argv[1])

said = {}
for name in ("placed", "adapters", "adapters", "slow", "slow", "gated", "gone", "without", "busy", "silent", "other", "pinned", "rewritten"):
    try:
        said.setdefault(name, []).append(str(fetch(preset(name))))
    except WeightsError as error:
        said.setdefault(name, []).append(str(error))
    except KeyboardInterrupt:
        left = [str(path) for path in cache().rglob("models--someone--slow/**/*") if path.is_file() and path.name != "main"]
        said.setdefault(name, []).append(["interrupted", str(cached(preset(name))), left])
    said.setdefault("imported", "huggingface_hub" in sys.modules)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> tuple[dict, str, Path]:
    """What a process said that fetched from such a hub: by preset, its stderr, its cache. One, since torch is slow."""
    folder = tmp_path_factory.mktemp("downloads")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        put(replace(PLUS, repo="someone/placed"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    drop = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder),
        "XDG_CACHE_HOME": str(folder),
        "TQDM_POSITION": "-1",  # a bar although stderr is no terminal
    }
    Hub.child = started(CHILD, SHA256, env=env)
    done = Hub.child.ended()
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, folder / "hub"


def test_a_download_lands_in_the_cache_with_a_bar_and_is_found_there_again(downloads):
    said, err, folder = downloads
    first, second = said["adapters"]
    assert first == second == str(folder / f"models--someone--adapters/snapshots/{COMMIT}/models/plus.safetensors")
    assert Path(first).read_bytes() == CONTENT
    assert "plus.safetensors: 100%" in err


def test_a_file_is_asked_for_in_its_revision(downloads):
    asked = [path for path in Hub.asked if path.startswith("/someone/pinned/")]
    assert asked and all(path.startswith(f"/someone/pinned/resolve/{'f' * 40}/models/") for path in asked)
    assert all("/resolve/main/" in path for path in Hub.asked if path.startswith("/someone/adapters/"))


def test_an_interrupted_download_leaves_nothing_and_the_next_one_is_whole(downloads):
    said, _, _ = downloads
    (word, found, left), then = said["slow"]
    assert (word, found) == ("interrupted", "None")
    assert not [path for path in left if not path.endswith((".incomplete", ".lock"))]
    assert Path(then).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gated", "someone/gated is gated: accept its terms"),
        ("gone", "the repository someone/gone is gone or not public"),
        ("without", "someone/without has no models/plus.safetensors any more"),
        ("rewritten", f"someone/rewritten has no revision {'f' * 40} any more"),
        ("busy", "the hub does not give it now"),
        ("silent", "it cannot be reached"),
    ],
)
def test_a_download_that_fails_says_why_in_one_line(downloads, name, part):
    said, err, folder = downloads
    (message,) = said[name]
    assert message.startswith(f"`adapter` {name}: not in {folder}, and ") and part in message and "\n" not in message
    assert message.endswith("or give a file: `adapter` FILE") and "Retrying" not in err


def test_a_download_of_another_content_is_refused(downloads):
    said, _, folder = downloads
    (message,) = said["other"]
    assert message.startswith(f"{folder}/models--someone--other/blobs/") and SHA256[:10] in message


def test_what_is_in_the_cache_needs_neither_the_network_nor_the_hubs_library(downloads):
    said, _, folder = downloads
    assert said["placed"] == [str(folder / f"models--someone--placed/snapshots/{COMMIT}/models/plus.safetensors")]
    assert said["imported"] is False


def test_offline_says_so(own_cache):
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # as all tests are, by conftest.py
    assert refused(fetch, PLUS) == (
        f"`adapter` plus: not in {own_cache}, and HF_HUB_OFFLINE is set: fetch it once without that; "
        "or give a file: `adapter` FILE"
    )


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOSPC, "the disk is full, 1 MB are wanted: make room, or set HF_HOME"),
        (errno.EACCES, "that cannot be written to: set HF_HOME"),
    ],
)
def test_a_disk_that_takes_nothing(number, part, monkeypatch):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    assert part in refused(fetch, PLUS)


def test_a_disk_without_room_is_refused_before_the_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**5))
    assert "the disk is full" in refused(fetch, PLUS)
