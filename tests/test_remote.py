"""Remote shards, from a server that stalls, cuts off, is busy, or has none."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
from test_pairs import contents, expected, samples, write_tar

from training.captions import DataError
from training.data import open_pairs
from training.remote import fetched, place


class Server(ThreadingHTTPServer):
    """Serves a folder. `troubles`: for a name what happens to the first requests, one after the other."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.troubles, self.asked, self.over = folder, {}, Counter(), Event()
        self.url = f"http://127.0.0.1:{self.server_port}/in"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, name = self.server, self.path.rpartition("/")[2]
        server.asked[name] += 1
        trouble = server.troubles[name].pop(0) if server.troubles.get(name) else None
        if trouble == 503 or not (server.folder / name).exists():
            self.send_error(trouble or 404)
            return
        content = (server.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if trouble else content)
        if trouble == "stall":
            self.wfile.flush()
            server.over.wait(20)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "away").mkdir()
    for i in range(4):
        write_tar(tmp_path / f"away/{i:02d}.tar", samples(5, 5 * i))
    with Server(tmp_path / "away") as server:
        Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.mark.slow
def test_shards_come_through_a_stall_a_cut_and_a_busy_server(server, tmp_path):
    """The busy one is asked again by curl itself, the others by us; the pairs are those of the local shards."""
    server.troubles = {"01.tar": [503, 503], "02.tar": ["cut", "cut"], "03.tar": ["stall"]}
    url, counted = f"{server.url}/{{00..03}}.tar", []
    # curl waits 2 s before it asks a busy server again
    fetch = partial(fetched, folder=tmp_path / "kept", stall=3, waits=(0.01, 0.02, 0.03), on_shard=counted.append)
    assert contents(open_pairs(url, fetch=fetch)) == expected(20)
    assert server.asked == {"00.tar": 1, "01.tar": 3, "02.tar": 3, "03.tar": 2} and counted == [4] * 4
    kept = sorted(path.relative_to(tmp_path / "kept") for path in (tmp_path / "kept").rglob("*.*") if path.is_file())
    assert kept == [Path(f"127.0.0.1_{server.server_port}/in/{i:02d}.tar") for i in range(4)]
    assert open_pairs(url, fetch=fetch).digest() == open_pairs(tmp_path / "away/*.tar").digest()
    assert server.asked.total() == 9  # what is there is not asked for again


@pytest.mark.parametrize("trouble", ["stall", "cut"])
def test_a_shard_that_does_not_come_is_one_line(server, tmp_path, trouble):
    server.troubles = {"00.tar": [trouble] * 9}
    wanted = {"stall": "no byte within 0.2 s; 2 tries", "cut": "cut off; 2 tries"}[trouble]
    begun = time.monotonic()
    with pytest.raises(DataError, match=rf"/in/00\.tar: does not come \({wanted}\); whole shards are kept$"):
        fetched(f"{server.url}/00.tar", tmp_path / "kept", stall=0.2, waits=[0.7])
    assert 0.7 <= time.monotonic() - begun < 10
    assert server.asked["00.tar"] == 2 and not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


def test_a_shard_that_is_not_there_is_one_line(server, tmp_path):
    """It is the one that is told of, and those under way are given up, not waited for."""
    server.troubles, begun = {"01.tar": ["stall"]}, time.monotonic()
    with pytest.raises(DataError, match=r"/in/07\.tar: 404 Not Found$"):
        fetched(f"{server.url}/{{01,07}}.tar", tmp_path / "kept", stall=15)
    assert time.monotonic() - begun < 10
    assert server.asked["07.tar"] == 2  # the second time for the reason alone
    assert not [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]


def test_shards_of_s3_come_by_its_own_tool(tmp_path, monkeypatch):
    """A stand-in for it: it is told bucket and name as one word, and that the shard goes to its output."""
    (tmp_path / "bin").mkdir()
    write_tar(tmp_path / "a b.tar", samples(3))
    (tmp_path / "bin/aws").write_text(
        f'#!/bin/sh\n[ "$1 $2 $5" = "s3 cp -" ] && cat "{tmp_path}/${{4#s3://bucket/}}"\n'
    )
    (tmp_path / "bin/aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    fetch = partial(fetched, folder=tmp_path / "kept", waits=[0.01])
    assert contents(open_pairs("s3://bucket/a b.tar", fetch=fetch)) == expected(3)
    with pytest.raises(DataError, match=r"^s3://bucket/gone\.tar: does not come \(exit code 1; 2 tries\)"):
        fetch("s3://bucket/gone.tar")


def test_what_cannot_be_fetched_is_refused_before_anything_is(server, tmp_path, monkeypatch):
    for url, wanted in (
        ("pipe:aws s3 cp s3://a/b.tar -", "cannot be fetched from there; http://, https://, s3://, gs:// can"),
        ("ftp://host/a.tar", "cannot be fetched from there"),
        ("https://host/a.zip", r"not a shard by its name, which ends in \.tar or \.tar\.gz or \.tgz"),
        ("https://[host/a.tar", "not a URL"),
        (f"{server.url}/a.tar?{{1,2}}", "differ by what is behind the `\\?` alone"),
    ):
        with pytest.raises(DataError, match=wanted):
            fetched(url, tmp_path / "kept")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match="webdataset fetches remote shards: pip install webdataset"):
        fetched(f"{server.url}/00.tar", tmp_path / "kept")
    assert not server.asked and not (tmp_path / "kept").exists()


def test_copies_lie_under_host_and_path(tmp_path):
    for url, name in (
        ("https://user:word@host:80/a/../../../b/0.tar?token=1", "host_80/a/b/0.tar"),
        ("s3://bucket/x/0.tar.gz", "bucket/x/0.tar.gz"),
    ):
        assert place(url, tmp_path) == tmp_path / name
