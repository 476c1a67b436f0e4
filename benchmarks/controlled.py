"""Whole runs whose image prompts are heard in their own ways, ours and diffusers'; `benchmarks.exact` compares them."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from PIL import Image
from torch import nn

from benchmarks.reference import drawn
from generate import ImageGroup, Models, pictures, prompts

HEARD = ("two adapters", "style", "masks left and right", "until 0.5")


def runs(
    models: Models, theirs: nn.Module, seen: Image.Image, names: Sequence[str] = HEARD, **how: object
) -> Iterator[tuple[str, object, object]]:
    """(what it is, our picture, theirs).

    Args:
        models: with the base adapter and the plus adapter.
        theirs: diffusers' pipeline without an adapter; after all of the runs it has one, the plus adapter.
        seen: the image prompt.
        names: of the runs.
        how: text, negative, seed, side, steps, guidance.
    """
    text, negative, seed, side, steps, guidance = how.values()
    other = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = Image.new("L", (side, side))
    left.paste(255, (0, 0, side // 2, side))
    right = left.point(lambda x: 255 - x)
    masks = torch.stack([torch.from_numpy(np.array(mask)) / 255 for mask in (left, right)])[None]
    base, plus = (adapter.file for adapter in models.adapters)
    both = [ImageGroup([seen, other], scale=0.6), ImageGroup([other], adapter=1, scale=0.7)]
    halves = [
        ImageGroup([seen], adapter=1, scale=0.8, mask=left),
        ImageGroup([other], adapter=1, scale=0.6, mask=right),
    ]
    cases = {
        "two adapters": (both, [base, plus], [[seen, other], [other]], [0.6, 0.7], {}),
        "style": (
            [ImageGroup([seen], adapter=1, scale=0.8, layers="style")],
            [plus],
            seen,
            {"up": {"block_1": 0.8}},
            {},
        ),
        "masks left and right": (
            *(halves, [plus], [[seen, other]], [[0.8, 0.6]]),
            {"cross_attention_kwargs": {"ip_adapter_masks": [masks]}},
        ),
        "until 0.5": (
            *([ImageGroup([seen], adapter=1, scale=0.8, until=0.5)], [plus], seen, 0.8),
            {"callback_on_step_end": IPAdapterScaleCutoffCallback(None, steps // 2 - 1)},
        ),
    }
    attached = None
    for name in names:
        groups, files, images, scale, more = cases[name]
        if files != attached:
            where = {"subfolder": [""] * len(files), "weight_name": [file.name for file in files]}
            theirs.load_ip_adapter([str(file.parent) for file in files], **where, image_encoder_folder=None)
            attached = files
        theirs.set_ip_adapter_scale(scale)
        pair = prompts(models, text, negative, groups)
        settings = {"steps": steps, "guidance_scale": guidance, "height": side, "width": side}
        (ours,) = pictures(models, *pair, seed, **settings)
        found = drawn(theirs, text, negative, images, steps, guidance, seed, height=side, width=side, **more)
        yield name, ours, found
