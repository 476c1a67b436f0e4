"""Structure for a UNet: ControlNets and T2I-Adapters, and hints for them."""

import ipadapter  # noqa: F401, isort: skip, first: it sees to it that what follows are our rooms

from control.controlled import Control, attentions, controlled, joined
from control.controlnet import ControlNet, ControlNetUnion
from control.style import StyleAdapter
from control.t2i import T2IAdapter, T2IConfig

__all__ = [
    "Control",
    "ControlNet",
    "ControlNetUnion",
    "StyleAdapter",
    "T2IAdapter",
    "T2IConfig",
    "attentions",
    "controlled",
    "joined",
]
