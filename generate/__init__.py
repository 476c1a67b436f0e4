"""The one straight line: open models, say what the picture should show, make pictures."""

from generate.models import Models, open_models
from generate.picture import pictures
from generate.prompt import prompts, scaled

__all__ = ["Models", "open_models", "pictures", "prompts", "scaled"]
