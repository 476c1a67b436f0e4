"""How far it is from the script's loop to the paper's equation: one image-prompted step stays short to read."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch

import generate.picture
import ipadapter.attention
from generate import open_models, pictures, prompts
from ipadapter import DecoupledCrossAttention
from sampler import ddim
from unet import UNet
from unet.unet import GEGLU, ResBlock, SelfAttention, TransformerBlock

ROOT = Path(__file__).parent.parent
ROOMS = (
    "ipadapter",
    "unet",
    "control",
    "vae",
    "clip",
    "sampler",
    "weights",
    "files",
    "generate",
    "training",
    "cli",
    "sample.py",
)  # not a virtual environment beside them


def ours(code: CodeType) -> bool:
    path = Path(code.co_filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS


@pytest.fixture(scope="module")
def step() -> tuple[list[CodeType], set[CodeType]]:
    """The functions on the way from `denoise` to the image prompt's attention, and all that a step enters."""
    models = open_models(device="cpu")
    prompt, null = prompts(models, "red apple", images=[ROOT / "tiny/example.png"])
    kernel, stacks, entered, steps = ipadapter.attention.scaled_dot_product_attention, [], set(), []

    def watched(*inputs: torch.Tensor) -> torch.Tensor:
        frame, stack = sys._getframe(1), []
        while frame and frame.f_code is not generate.picture.denoise.__code__:
            if ours(frame.f_code):
                stack.insert(0, frame.f_code)
            frame = frame.f_back
        stacks.append([frame.f_code, *stack])
        return kernel(*inputs)

    def watch(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and ours(frame.f_code):
            entered.add(frame.f_code)

    def on_step() -> None:
        """The second step, and nothing before it, is watched."""
        steps.append(1)
        sys.setprofile(watch if len(steps) == 1 else None)

    ipadapter.attention.scaled_dot_product_attention = watched
    try:
        list(pictures(models, prompt, null, steps=2, on_step=on_step))
    finally:
        ipadapter.attention.scaled_dot_product_attention = kernel
        sys.setprofile(None)
    assert len(steps) == 2
    assert len(stacks) == 2 * 2 * 16  # two steps, text and image, 16 layers
    longest = max(stacks, key=len)
    assert longest[-1] is ipadapter.attention.DecoupledCrossAttention.forward.__code__
    return longest, entered - {on_step.__code__} | set(longest)


def test_keys_and_values_are_computed_once_a_run():
    """Of the text and of the image prompt, and of their absence: neither changes from step to step."""
    models = open_models(device="cpu")
    layers, calls = list(models.unet().cross_attentions()), []
    asked = [m for layer in layers for m in (layer.to_k, layer.to_v)]
    asked += [m for ip in models.adapter().key_values() for m in (ip.to_k_ip, ip.to_v_ip)]
    for module in asked:
        module.register_forward_hook(lambda *_: calls.append(1))
    list(pictures(models, *prompts(models, "red apple", images=[ROOT / "tiny/example.png"]), steps=3))
    assert len(layers) == 16 and len(calls) == 2 * len(asked)


def lines(functions: set[CodeType]) -> set[tuple[str, int]]:
    """(file, line) of all lines of these functions that are not blank, docstrings and comments among them."""
    found = set()
    for code in functions:
        text, first = inspect.getsourcelines(code)
        found |= {(code.co_filename, first + i) for i, line in enumerate(text) if line.strip()}
    return found


def test_the_way_to_the_equation_is_at_most_7_frames_in_5_files(step):
    way, _ = step
    assert len(way) <= 7, [code.co_name for code in way]
    assert len({code.co_filename for code in way}) <= 5


def test_one_step_enters_at_most_260_lines_in_5_files(step):
    _, entered = step
    assert len({code.co_filename for code in entered}) <= 5
    assert len(lines(entered)) <= 260


def test_the_watched_step_is_the_whole_step(step):
    """Should the counting break, these would be missing."""
    functions = [
        generate.picture.denoise,
        inspect.unwrap(ddim),
        UNet.forward,
        ResBlock.forward,
        TransformerBlock.forward,
    ]
    functions += [ipadapter.attention.heard, SelfAttention.forward, DecoupledCrossAttention.forward, GEGLU.forward]
    assert {function.__code__ for function in functions} <= step[1]


@pytest.mark.slow
def test_a_whole_run_stays_short_to_read(tmp_path):
    """From `main` to the written picture, the functions of one image-prompted run of sample.py."""
    code = """
import sys
entered = set()
def watch(frame, event, arg):
    if event == "call":
        entered.add(frame.f_code)
import sample
sys.setprofile(watch)
try:
    sample.main()
finally:
    sys.setprofile(None)
    import json
    print(json.dumps(sorted({(c.co_filename, c.co_firstlineno, c.co_name) for c in entered})))
"""
    flags = ["--image", str(ROOT / "tiny/example.png"), "--prompt", "red apple", "--steps", "2"]
    command = [sys.executable, "-c", code, *flags, "--output", str(tmp_path / "x.png")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    counted = set()
    for file, first, name in json.loads(run.stdout.splitlines()[-1]):
        path = Path(file)
        inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS
        if inside and name not in ("<module>", "<lambda>") and not name.startswith("<"):
            source = path.read_text().splitlines()
            block = inspect.getblock([line + "\n" for line in source[first - 1 :]])
            counted |= {(file, first + i) for i, line in enumerate(block) if line.strip()}
    assert (str(ROOT / "sample.py"),) in {(file,) for file, _ in counted} and (tmp_path / "x.png").exists()
    assert len(counted) <= 2705, len(counted)


def test_a_file_is_read_in_one_sitting():
    """Beside tests, each has 300 lines at most; the UNet stays in one, as its original does."""
    beside = {ROOT / "tests", ROOT / ".venv"}
    files = [path for path in ROOT.glob("*/*.py") if path.parent not in beside] + [*ROOT.glob("*.py")]
    longer = {str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 300}
    assert len(files) > 150 and longer == {"unet/unet.py"}
