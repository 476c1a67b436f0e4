"""The one straight line: open models, say what the picture should show, make pictures."""

import ipadapter  # noqa: F401, isort: skip, first: it sees to it that what follows are our rooms

from files.features import Features, read_features
from generate.control import Hint
from generate.embeddings import features, save_features
from generate.group import ImageGroup
from generate.models import Models, open_models
from generate.picture import pictures
from generate.prompt import prompts, scaled
from generate.seeing import attention_sheet
from generate.sweep import Sweep, sweep_sheet, swept

__all__ = [
    "Features",
    "Hint",
    "ImageGroup",
    "Models",
    "Sweep",
    "attention_sheet",
    "features",
    "open_models",
    "pictures",
    "prompts",
    "read_features",
    "save_features",
    "scaled",
    "sweep_sheet",
    "swept",
]
