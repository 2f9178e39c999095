"""A sink: the loss of every step as a line of a text file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitoring.sinks.base import SinkRun
from monitoring.sinks.stream import Item, Scalars


class Lines:
    """`settings`: {file: PATH}."""

    name = "lines"

    def __init__(self, settings: dict[str, Any]) -> None:
        self._file = Path(settings["file"])

    def open(self, run: SinkRun) -> None:
        with self._file.open("a") as file:
            file.write(f"run {run.run}\n")

    def write(self, items: Sequence[Item]) -> None:
        with self._file.open("a") as file:
            file.writelines(f"{item.step} {item.values}\n" for item in items if isinstance(item, Scalars))

    def close(self, status: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{status}\n")
