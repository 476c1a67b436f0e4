"""The notebook runs from top to bottom, cell by cell, as a reader would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "examples/first_steps.ipynb").read_text())["cells"]
    source = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    shown = (
        "import types, sys\nsys.modules['IPython.display'] = types.SimpleNamespace(display=lambda x: print(x.size))\n"
    )
    (tmp_path / "cells.py").write_text(shown + source)  # without the package that shows pictures in a browser
    run = subprocess.run(
        [sys.executable, tmp_path / "cells.py"], cwd=ROOT / "examples", capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    sizes = run.stdout.splitlines()
    assert sizes[:2] == ["(128, 128)"] * 2 and len(sizes) == 4


def test_another_package_of_the_same_name_does_not_stand_in_the_way(tmp_path):
    """OpenAI's `clip` installed, the project's folder last on the path, another current directory."""
    for name in ("clip", "sampler", "vae", "files"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the other one')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r})\n"
        "from {room} import {name}; import clip; print(clip.__file__)"
    )
    for room, name in (("generate", "open_models"), ("ipadapter", "IPAdapter"), ("weights", "open_base")):
        command = [sys.executable, "-c", code.format(room=room, name=name)]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == str(ROOT / "clip" / "__init__.py")


def test_a_foreign_package_that_is_imported_already_is_told(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("")
    code = "import clip, sys; sys.path.append(sys.argv[1]); import generate"
    command = [sys.executable, "-c", code, str(ROOT)]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 1 and "ImportError: another package called `clip`" in run.stderr.splitlines()[-1]
