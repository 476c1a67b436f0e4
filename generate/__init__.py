"""The one straight line: open models, say what the picture should show, make pictures."""

import ipadapter  # noqa: F401, isort: skip, first: it sees to it that what follows are our rooms

from generate.control import Hint
from generate.group import ImageGroup
from generate.models import Models, open_models
from generate.picture import pictures
from generate.prompt import prompts, scaled
from generate.seeing import attention_sheet

__all__ = [
    "Hint",
    "ImageGroup",
    "Models",
    "attention_sheet",
    "open_models",
    "pictures",
    "prompts",
    "scaled",
]
