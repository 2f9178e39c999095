"""What checkpoints and their files are called."""

from __future__ import annotations

import re
from typing import NamedTuple

_CHECKPOINT = re.compile(r"step-(\d{8,18})", re.ASCII)
DATA_FILE = r"^part-e[0-9]{1,18}-g[0-9]{1,18}-a[0-9]{1,18}-r[0-9]{1,18}\.safetensors$"
"""A pattern of the names of a checkpoint's data: nothing else is read for one."""
_PART = re.compile(r"part-e\d+-g\d+-a\d+-r\d+\.(safetensors|json)", re.ASCII)


def directory_name(committed: int) -> str:
    """The name of the checkpoint of the state after `committed` steps."""
    return f"step-{committed:08d}"


def step_of(name: str) -> int | None:
    """The number of committed steps in a checkpoint's name; None for another name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match and directory_name(int(match[1])) == name else None


def is_part(name: str) -> bool:
    """Whether a file of this name is a rank's part of some attempt."""
    return _PART.fullmatch(name) is not None


class Save(NamedTuple):
    """One attempt to save the state after `committed` steps, by ranks of a generation of the controller `term`. Its
    files have names that no other attempt uses."""

    committed: int
    term: int
    generation: int
    attempt: int = 0

    @property
    def directory(self) -> str:
        return directory_name(self.committed)

    @property
    def prefix(self) -> str:
        """What the names of all its parts begin with."""
        return f"part-e{self.term}-g{self.generation}-a{self.attempt}-"

    def part(self, rank: int) -> str:
        """What the names of a rank's files begin with."""
        return f"{self.prefix}r{rank:05d}"
