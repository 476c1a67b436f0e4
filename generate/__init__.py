"""The one straight line: open models, say what the picture should show, make pictures."""
