"""How far it is from the script's loop to the paper's equation: one image-prompted step stays short to read."""

import inspect
import sys
from argparse import Namespace
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch

import ipadapter.attention
import sample
from ipadapter import DecoupledCrossAttention, Prompt
from sampler import ddim
from unet import UNet
from unet.unet import GEGLU, ResBlock, SelfAttention, TransformerBlock

ROOT = Path(__file__).parent.parent
ROOMS = (
    "ipadapter",
    "unet",
    "vae",
    "clip",
    "sampler",
    "weights",
    "files",
    "generate",
    "training",
    "cli.py",
    "sample.py",
)  # not a virtual environment beside them


def ours(code: CodeType) -> bool:
    path = Path(code.co_filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ROOMS


class Bar:
    """Stands in for the progress bar: the second step, and nothing before it, is watched."""

    def __init__(self):
        self.steps = 0
        self.entered: set[CodeType] = set()

    def update(self) -> None:
        self.steps += 1
        sys.setprofile(self.watch if self.steps == 1 else None)

    def watch(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and ours(frame.f_code):
            self.entered.add(frame.f_code)


@pytest.fixture(scope="module")
def step(unet, base_adapter) -> tuple[list[CodeType], set[CodeType]]:
    """The functions on the way from `sample.denoise` to the image prompt's attention, and all that a step enters."""
    size = {"num_images": 1, "height": 64, "width": 64, "batch": 4}
    args = Namespace(**size, seed=0, device="cpu", sampler="ddim", steps=2, guidance_scale=7.5, apart=False)
    prompt, null = (Prompt(torch.randn(1, 77, 64), (base_adapter.prompt(torch.randn(1, 4, 64)),)) for _ in range(2))
    kernel, stacks = ipadapter.attention.scaled_dot_product_attention, []

    def watched(*inputs: torch.Tensor) -> torch.Tensor:
        frame, stack = sys._getframe(1), []
        while frame:
            if ours(frame.f_code):
                stack.insert(0, frame.f_code)
            frame = frame.f_back
        stacks.append(stack)
        return kernel(*inputs)

    bar = Bar()
    ipadapter.attention.scaled_dot_product_attention = watched
    try:
        sample.denoise(args, unet, "eps", prompt, null, bar)
    finally:
        ipadapter.attention.scaled_dot_product_attention = kernel
        sys.setprofile(None)
    assert bar.steps == 2
    assert len(stacks) == 2 * 2 * 16  # two steps, text and image, 16 layers
    longest = max(stacks, key=len)
    assert longest[0] is sample.denoise.__code__
    assert longest[-1] is ipadapter.attention.DecoupledCrossAttention.forward.__code__
    return longest, bar.entered | set(longest)


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
    functions = [sample.denoise, inspect.unwrap(ddim), UNet.forward, ResBlock.forward, TransformerBlock.forward]
    functions += [ipadapter.attention.heard, SelfAttention.forward, DecoupledCrossAttention.forward, GEGLU.forward]
    assert {function.__code__ for function in functions} <= step[1]
