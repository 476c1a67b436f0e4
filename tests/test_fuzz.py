"""A short run of the fuzzers, always of the same inputs; `python -m tests.fuzz` goes on for as long as it is let."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_no_damaged_file_makes_a_reader_fail():
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "0", "--minutes", "9", "--inputs", "30"]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    tried = {line[:16].strip(): int(line[16:].split()[0]) for line in run.stdout.splitlines()[1:]}
    assert len(tried) == 22 and set(tried.values()) == {30}
