"""Append-only JSON-lines files: one record per line, written whole, readable while they grow."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from monitoring.outside import Unreadable, open_regular, parse
from monitoring.outside import plain as _plain
from monitoring.shapes import LINES

MAX_LINE_BYTES = 64 << 20
"""A longer line is no record; that of a step of 10,000 ranks has 1 MB."""


MOST_WAITING_BYTES = 64 << 20
"""Of records that wait until they can be written."""


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"


class RecordFile:
    """Appends records to one file. Each goes out in a single write, so a crash tears at most the last line.

    What cannot be written (a full disk, a storage that is away) waits in memory, in order, and goes out whole when
    there is room: with the next record, or with `flush`. When what waits takes more than `most_bytes`, `shed` makes
    each of it smaller, or gives it up (None): `dropped` counts these by kind.
    """

    def __init__(
        self,
        path: Path,
        *,
        most_bytes: int = MOST_WAITING_BYTES,
        shed: Callable[[dict[str, Any]], dict[str, Any] | None] = dict,
    ) -> None:
        self.path = path
        self.error: OSError | None = None
        """Why records wait; None when none does."""
        self.dropped: Counter[str] = Counter()
        self._most_bytes = most_bytes
        self._shed = shed
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._shed_at = most_bytes
        self._written = 0  # of the first that waits
        path.parent.mkdir(parents=True, exist_ok=True)
        self._repair()
        self._file = path.open("ab", buffering=0)

    @property
    def num_waiting(self) -> int:
        """How many records are not in the file yet."""
        return len(self._waiting)

    @property
    def is_gone(self) -> bool:
        """Whether the file was removed, or replaced by another: what is written to it nobody will ever read."""
        try:
            there = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        return there.st_ino != os.fstat(self._file.fileno()).st_ino

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record behind all that wait. Never raises OSError: see the class."""
        line = _line(record)
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        if not self.flush() and self._waiting_bytes > self._shed_at:
            self._make_room()

    def flush(self) -> bool:
        """Writes what waits, as far as it can be written; whether nothing waits any more."""
        while self._waiting:
            line = self._waiting[0]
            try:
                while self._written < len(line):
                    # Of a short write the rest comes next, at the latest when there is room again.
                    self._written += os.write(self._file.fileno(), memoryview(line)[self._written :])
            except OSError as error:
                self.error = error
                return False
            self._waiting.popleft()
            self._waiting_bytes -= len(line)
            self._written = 0
        self.error, self._shed_at = None, self._most_bytes
        return True

    def records(self) -> Iterator[dict[str, Any]]:
        """All there are, oldest first, also those that wait."""
        yield from read_records(self.path)
        yield from map(json.loads, list(self._waiting))

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the file with only the wanted records, atomically. Where there is no room for that, it is cut off
        before the first that is not wanted, and what is wanted after it waits to be written again."""
        whole = list(self._waiting)
        try:
            self._rewrite(wanted)
        except OSError:
            whole = self._cut(wanted) + whole
        self._waiting = deque(line for line in whole if wanted(json.loads(line)))
        self._waiting_bytes, self._written = sum(map(len, self._waiting)), 0
        self.flush()

    def _rewrite(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        draft = self.path.with_name(self.path.name + ".draft")
        try:
            with draft.open("wb") as out:
                for record in read_records(self.path):
                    if wanted(record):
                        out.write(_line(record))
                out.flush()
                os.fsync(out.fileno())
            os.replace(draft, self.path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def _cut(self, wanted: Callable[[dict[str, Any]], bool]) -> list[bytes]:
        """Cuts the file off before the first record that is not wanted; the lines of those after it."""
        start, cut_off, after = 0, None, []
        for end, record in records_from(self.path, 0):
            if cut_off is None and record is not None and not wanted(record):
                cut_off = start
            elif cut_off is not None and record is not None:
                after.append(_line(record))
            start = end
        self._file.truncate(start if cut_off is None else cut_off)
        return after

    def _make_room(self) -> None:
        """Makes what waits smaller. What is being written stays as it is."""
        first, *others = self._waiting
        kept = [first]
        for line in others:
            record = json.loads(line)
            smaller = self._shed(record)
            if smaller is None:
                self.dropped[str(record.get("kind", ""))] += 1
            else:
                kept.append(_line(smaller))
        self._waiting = deque(kept)
        self._waiting_bytes = sum(map(len, kept))
        self._shed_at = max(self._most_bytes, self._waiting_bytes + self._most_bytes // 4)

    def close(self) -> None:
        self.flush()
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
