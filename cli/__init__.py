"""What the scripts share at the command line: the terminal, flags, and what those of sample.py come to."""
