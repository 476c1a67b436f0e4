"""The notebook runs from top to bottom, cell by cell, as a reader would."""

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from generate import pictures

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs(monkeypatch):
    cells = json.loads((ROOT / "examples/first_steps.ipynb").read_text())["cells"]
    shown, steps = [], []

    def two_steps(*args: object, **how: object) -> Iterator[Image.Image]:
        steps.append(how.get("steps", 30))
        return pictures(*args, **how | {"steps": 2})

    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setattr("generate.pictures", two_steps)
    screen = types.SimpleNamespace(display=shown.append)  # the package that shows pictures in a browser
    monkeypatch.setitem(sys.modules, "IPython.display", screen)
    exec("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), {})  # noqa: S102, our own
    assert [image.size for image in shown[:2]] == [(128, 128)] * 2 and len(shown) == 4
    assert steps == [30, 20, 20]


def test_another_package_of_the_same_name_does_not_stand_in_the_way(tmp_path):
    """OpenAI's `clip` installed, the project's folder last on the path, another current directory."""
    for name in ("clip", "sampler", "vae", "files"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the other one')")
    code = """
import os, sys, torch
sys.path[:] = [sys.argv[1], *sys.path, sys.argv[2]]
for line in "from generate import open_models", "from ipadapter import IPAdapter", "from weights import open_base":
    if os.fork() == 0:  # each is the first of ours that is imported; torch is there already, for it takes seconds
        exec(line)
        import clip
        print(clip.__file__, flush=True)
        os._exit(0)
    os.wait()
"""
    command = [sys.executable, "-c", code, tmp_path, ROOT]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == [str(ROOT / "clip" / "__init__.py")] * 3, run.stderr


def test_a_foreign_package_that_is_imported_already_is_told(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("")
    code = "import clip, sys; sys.path.append(sys.argv[1]); import generate"
    command = [sys.executable, "-c", code, str(ROOT)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 1 and "ImportError: another package called `clip`" in run.stderr.splitlines()[-1]
