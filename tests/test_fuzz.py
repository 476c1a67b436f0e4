"""A short run of the fuzzers, always of the same inputs; `python -m tests.fuzz` goes on for as long as it is let."""

import sys
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
