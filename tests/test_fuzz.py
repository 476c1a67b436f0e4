"""A short run of the fuzzers, always of the same inputs; `python -m tests.fuzz` goes on for as long as it is let."""

import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import fuzz
import pytest

pytestmark = pytest.mark.slow


def test_no_damaged_file_makes_a_reader_fail(capsys):
    """The inputs are tried in processes of their own, which are forks of this one."""
    with patch.object(sys, "argv", ["fuzz", "--seed", "0", "--minutes", "9", "--inputs", "30"]):
        code = fuzz.main()
    out = capsys.readouterr().out
    assert code == 0, out
    tried = {line[:16].strip(): int(line[16:].split()[0]) for line in out.splitlines()[1:]}
    assert tried == dict.fromkeys(fuzz.KINDS, 30)


def test_a_reader_is_late_by_what_it_computes_and_not_by_what_others_do(tmp_path, monkeypatch):
    def compute(path: Path) -> None:
        until = time.process_time() + 0.4
        while time.process_time() < until:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    before = signal.signal(signal.SIGPROF, fuzz.too_long)
    readers = compute, lambda path: time.sleep(0.3)
    late, read = (fuzz.attempt(fuzz.Kind(fuzz.text_file, read), "texts", 0, 0, tmp_path) for read in readers)
    signal.signal(signal.SIGPROF, before)
    assert (late, read) == ("more than 0.1 seconds of CPU time", "read")
