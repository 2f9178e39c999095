"""Append-only JSON-lines files: one record per line, written whole, readable while they grow."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from monitoring.outside import Unreadable, open_regular, parse
from monitoring.outside import plain as _plain
from monitoring.shapes import LINES

MAX_LINE_BYTES = 64 << 20
"""A longer line is no record; that of a step of 10,000 ranks has 1 MB."""


class RecordFile:
    """Appends records to one file. Each goes out in a single write, so a crash tears at most the last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._repair()
        self._file = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_plain(record), separators=(",", ":"), allow_nan=False).encode() + b"\n")

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the file with only the wanted records, atomically."""
        self._file.close()
        draft = self.path.with_name(self.path.name + ".draft")
        with draft.open("wb") as out:
            for record in read_records(self.path):
                if wanted(record):
                    out.write(json.dumps(_plain(record), separators=(",", ":"), allow_nan=False).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, self.path)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()

    def _repair(self) -> None:
        """Cuts off a last line that a crash left torn, so that the next record starts on a line of its own."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            start = max(0, end - (1 << 20))
            file.seek(start)
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if whole != len(tail):
                file.truncate(start + whole)


def read_records(path: Path, passed_over: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a file, oldest first; a torn last line is left out. Nothing when there is no file.

    A line that is no record of this file is passed over and counted in `passed_over`, by the name of the file. Raises
    Unreadable for what is no file.
    """
    for _, record in records_from(path, 0):
        if record is not None:
            yield record
        elif passed_over is not None:
            passed_over[path.name] += 1


def records_from(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The whole lines of a file from byte `offset` on: where each ends, and its record; None for a line that is none
    (it may be the end of another, of a file that was cut and written anew). Nothing when there is no file.

    What a record must have is told by the name of the file: see monitoring.shapes. Raises Unreadable for what is no
    file."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    check = LINES.get(path.name)
    with file:
        file.seek(offset)
        while line := file.readline(MAX_LINE_BYTES):
            is_whole = len(line) < MAX_LINE_BYTES or line.endswith(b"\n")
            offset += len(line)
            while not line.endswith(b"\n"):
                if not (line := file.readline(MAX_LINE_BYTES)):
                    return  # Not written to its end yet.
                offset += len(line)
            yield offset, _record(line, check) if is_whole else None


def _record(line: bytes, check: Callable[[Any], str | None] | None) -> dict[str, Any] | None:
    try:
        record = parse(line)
    except Unreadable:
        return None
    return record if isinstance(record, dict) and (check is None or check(record) is None) else None


def passed_over_text(passed_over: Mapping[str, int]) -> list[str]:
    """What is said of lines that were passed over, a sentence for each file."""
    return [
        f"{number} line{'' if number == 1 else 's'} of {name} could not be read"
        for name, number in sorted(passed_over.items())
        if number
    ]
