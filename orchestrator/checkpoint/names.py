"""Where checkpoints are, without opening them (and without importing torch)."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{8,})")


def directory_name(committed: int) -> str:
    """The name of the checkpoint of the state after `committed` steps."""
    return f"step-{committed:08d}"


def find(directory: Path) -> list[tuple[int, Path]]:
    """(committed steps, path) of every checkpoint in `directory`, newest first; whether it is valid, `load` tells."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)
