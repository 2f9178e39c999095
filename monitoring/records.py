"""Append-only JSON-lines files: one record per line, written whole, readable while they grow."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null, so that every reader can read every line."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


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
                    out.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
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


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, oldest first; a torn last line is passed over. Nothing when there is no file."""
    for _, record in records_from(path, 0):
        if record is not None:
            yield record


def records_from(path: Path, offset: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The whole lines of a file from byte `offset` on: where each ends, and its record; None for a line that is none
    (it may be the end of another, of a file that was cut and written anew). Nothing when there is no file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # Not written to its end yet.
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield offset, record if isinstance(record, dict) else None
