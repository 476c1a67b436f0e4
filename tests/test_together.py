"""Several processes at one work: files of a cache that each is made by one, and a run of which one dies."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from processes import environment, free_port, started
from test_buckets import squares_and_wide
from test_train import QUICK, SCRIPT, log, train, wait_for_step

from files.whole import write_text
from training.claims import shared

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")


def make(paths: list[Path], each: float, stale: float) -> None:
    for i, mine in shared(paths, stale):
        if mine:
            time.sleep(each)
            write_text(paths[i], str(os.getpid()))


def sharing(paths: list[Path], each: float, stale: float = 60.0) -> multiprocessing.Process:
    process = FORK.Process(target=make, args=(paths, each, stale))
    process.start()
    return process


def test_files_are_shared_out_and_each_made_once(tmp_path):
    paths = [tmp_path / f"{i}.x" for i in range(8)]
    processes = [sharing(paths, 0.05) for _ in range(2)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    makers = [path.read_text() for path in paths]
    assert {*makers} == {str(process.pid) for process in processes}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    assert list(shared(paths)) == [(i, False) for i in range(8)]


def test_what_a_dead_process_had_begun_another_makes(tmp_path):
    """At once where it is of this machine; else when it has shown no sign of life for long enough."""
    paths = [tmp_path / f"{i}.x" for i in range(3)]
    dying = sharing(paths, 60)
    while not (tmp_path / "0.claim").exists():
        time.sleep(0.01)
    dying.kill()
    dying.join()
    (tmp_path / "1.claim").write_text("another-machine 1")
    began = time.monotonic()
    assert sorted(shared(paths[:1])) == [(0, True)] and time.monotonic() - began < 5
    assert [mine for _, mine in shared(paths[1:], stale=0.5)] == [True, True]
    assert 0.4 < time.monotonic() - began < 5 and not list(tmp_path.glob("*.claim"))


def test_who_lives_keeps_its_claim(tmp_path):
    paths = [tmp_path / "0.x"]
    slow = sharing(paths, 1.5, stale=0.6)
    while not (tmp_path / "0.claim").exists():
        time.sleep(0.01)
    os.utime(tmp_path / "0.claim")
    (tmp_path / "0.claim").write_text("another-machine 1")  # so that only its signs of life tell
    assert list(shared(paths, stale=0.6)) == [(0, False)]
    slow.join(5)
    assert paths[0].read_text() == str(slow.pid)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line_and_fewer_go_on(tmp_path):
    flags = [*QUICK, "--data", squares_and_wide(tmp_path / "in"), "--output", tmp_path / "run", "--steps", 5000]
    flags = [*map(str, flags), "--save-every", "2"]
    port = free_port()
    first, second = (started(SCRIPT, *flags, env=environment(rank, port)) for rank in range(2))
    wait_for_step(3, tmp_path / "run", first)
    second.send_signal(signal.SIGKILL)
    ended = first.ended()
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    gone = "a process of the run has ended; --resume goes on behind the newest checkpoint, with fewer if need be"
    assert ended.stderr.count(gone) == 1
    step = max(int(path.stem) for path in (tmp_path / "run/checkpoints").glob("*.safetensors"))
    done = train("--output", tmp_path / "run", "--resume", "--steps", step + 1)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log(tmp_path / "run")] == [*range(1, step + 2)]


HANGS = """
import sys, time, torch
from training import ranks
ranks.PULSE, ranks.LOST = 0.2, 2.0
of = ranks.Ranks(torch.device("cpu"))
print("ready", flush=True)
for _ in range(1000):
    of.mean(1.0)
    time.sleep(0.1)
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_too(tmp_path):
    """As one whose machine is gone: nothing tells but that it shows no sign of life."""
    port = free_port()
    both = first, second = [started(HANGS, env=environment(i, port)) for i in range(2)]
    while not all(process.out.read_text() == "ready\n" for process in both):
        assert first.poll() is None and second.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGSTOP)
    ended = first.ended()
    second.send_signal(signal.SIGKILL)
    assert ended.returncode == 2 and ended.stderr.count("a process of the run has ended") == 1
    assert "Traceback" not in ended.stderr and second.ended().returncode == -signal.SIGKILL
