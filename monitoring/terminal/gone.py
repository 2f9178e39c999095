"""A terminal, or a pipe to another program, that nobody reads any more."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

EXIT_CODE = 141
"""What a shell shows for a program that SIGPIPE ended, as it ends most (128 + 13)."""


def silence_stdout() -> None:
    """What is still printed, and what Python kept to write at its end, goes nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
