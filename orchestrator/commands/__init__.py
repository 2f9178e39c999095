"""Bodies of commands that read a run directory. `cli.py` has their options; nothing here needs Ray or torch."""
