"""The rooms of the house: who may import whom, told from the source alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import started

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}

GROUND = {"ipadapter", "clip", "vae", "files"}
ALLOWED = {  # besides Python's own library: other rooms, and public packages
    "ipadapter": {"torch"},
    "clip": {"torch", "numpy", "PIL", "ftfy", "regex", "files.pictures"},
    "vae": {"torch"},
    "files/faces.py": {"torch", "numpy", "PIL", "safetensors", "insightface"},  # the last one where it is installed
    "files/decoding.py": {"numpy", "PIL", "pillow_heif"},  # likewise
    "files": {"torch", "numpy", "PIL", "safetensors"},
    "unet": {"torch", "ipadapter"},
    "control/canny.py": {"numpy", "PIL"},
    "control": {"torch", "ipadapter", "unet"},
    "sampler": {"torch", "ipadapter"},
    "weights/hub.py": {"huggingface_hub", *GROUND},
    "weights": {"torch", "safetensors", "unet", "control", "sampler", *GROUND},
    "generate": {"torch", "PIL", "unet", "control", "sampler", "weights", *GROUND},
    "training/measures.py": {"torch", "PIL", "open_clip", "weights", *GROUND},  # likewise
    "training/monitors.py": {"torch", "numpy", "PIL", "wandb", *GROUND},  # the last one where it is installed
    "training/optimizers.py": {"torch", "bitsandbytes", *GROUND},  # likewise
    "training/remote.py": {"webdataset", *GROUND},  # likewise
    "training": {"torch", "numpy", "PIL", "safetensors", "unet", "sampler", "weights", "generate", *GROUND},
}
ROOMS = ("clip", "control", "files", "generate", "ipadapter", "sampler", "training", "unet", "vae", "weights")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
# What a user of the scripts runs; tests and benchmarks may use anything.
RUN_TIME = [
    *FILES,
    *sorted(path.relative_to(ROOT) for path in (ROOT / "tiny").rglob("*.py")),
    *(path.relative_to(ROOT) for path in sorted((ROOT / "cli").glob("*.py"))),
    *(Path(f"{name}.py") for name in sorted(SCRIPTS)),
]


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it; `from unet import UNet` gives `unet`."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            for alias in node.names:  # `from weights import configs` imports a file of the room
                if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists():
                    found.add(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "__import__",
            "import_module",
        ):
            raise AssertionError(f"{path}:{node.lineno}: an import that cannot be read off")
    return found


def within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_room_imports_only_what_its_row_of_the_table_allows(path):
    allowed = ALLOWED.get(str(path), ALLOWED[path.parts[0]]) | {path.parts[0]}
    foreign = {
        module
        for module in imports(path)
        if module.split(".")[0] not in sys.stdlib_module_names and not within(module, allowed)
    }
    assert not foreign


@pytest.mark.parametrize("path", RUN_TIME, ids=str)
def test_nothing_at_run_time_imports_the_libraries_it_is_measured_against(path):
    others = {"diffusers", "transformers", "torchvision", "open_clip", "timm", "accelerate", "peft", "xformers"}
    if path == Path("training/measures.py"):  # scores by any CLIP that open_clip has a name for
        others.remove("open_clip")
    assert not {module for module in imports(path) if module.split(".")[0] in others}


@pytest.mark.parametrize("path", [path for path in RUN_TIME if path.parent != Path()], ids=str)
def test_no_room_imports_a_script_or_the_tests(path):
    above = SCRIPTS | {"tests", "benchmarks"} | ({"cli"} if path in FILES else set())
    assert not {module for module in imports(path) if module.split(".")[0] in above}


def test_models_import_without_files_and_pictures():
    """What a port to another backbone takes along needs torch alone."""
    code = "import sys, ipadapter, unet, vae, sampler; print(*sys.modules)"
    loaded = {name.split(".")[0] for name in started(code).ended().stdout.split()}
    assert {"torch", "ipadapter", "unet", "vae", "sampler"} <= loaded
    assert not {"weights", "tiny", "clip", "PIL", "safetensors", "diffusers", "transformers", "torchvision"} & loaded


@pytest.mark.slow
def test_all_that_is_run_as_a_module_finds_what_it_imports():
    folders = ("experiments", "benchmarks", "tiny")
    names = sorted(f"{room}.{path.stem}" for room in folders for path in (ROOT / room).glob("[a-z]*.py"))
    code = f"import importlib, sys; sys.path.remove({str(ROOT / 'tests')!r})\n"
    run = started(f"{code}[importlib.import_module(name) for name in {names}]").ended()
    assert len(names) > 30 and run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", FILES, ids=str)
def test_rooms_have_no_import_that_only_a_script_may_have(path):
    """Flags, bars and prints belong to scripts, and to `cli/`, which they share."""
    assert not {"argparse", "tqdm"} & imports(path)
    calls = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]


def tracked_text_files() -> list[Path]:
    """All that git would carry: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    suffixes = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".cfg", ".sh", ".json"}
    return [Path(name) for name in names if Path(name).suffix in suffixes and (ROOT / name).is_file()]


def test_the_source_names_no_path_of_a_machine():
    files = tracked_text_files()
    assert Path("sample.py") in files
    machine = re.compile(r"(?<![\w.~/:])/(?:work|root|home|Users|tmp|mnt|data|scratch|opt)/\w|\b[A-Z]:\\\\?Users")
    found = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path in files
        if path != Path("tests/test_rooms.py")
        for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), 1)
        if machine.search(line)
    ]
    assert not found
