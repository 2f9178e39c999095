"""The log files of a run directory, merged by time and followed while they grow.

Files of our own (`controller-1.log`, `worker-0.0.log`, `driver.log`, and what rotation left of them) hold records; what
workers printed (Ray's `worker-*.out` and `.err`, copied here when an embedded cluster ends) are plain lines, which are
shown after the records, with the name of their file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from monitoring.logs import LEVELS, LogRecord, parse_line
from monitoring.outside import Unreadable, open_regular

_OURS = re.compile(r"(controller-\d+|worker-(\d+)\.\d+|driver)\.log(?:\.(\d+))?")
_RAYS = re.compile(r"worker-[0-9a-f]{16,}.*?(?:-(\d+))?\.(out|err)")
_HEAD_BYTES = 64
MOST_LINE_BYTES = 1 << 20
"""Of a longer line only so much is read: it may be as long as a disk."""
_RAYS_MARK = re.compile(r":(job_id|actor_name|task_name):.*")


@dataclass
class _File:
    """How far a file has been read, and how it begins: an inode alone may be another file's by now."""

    head: bytes = b""
    offset: int = 0
    last: LogRecord | None = None
    is_cut: bool = False


@dataclass
class LogFiles:
    """Gives the records that were written since last asked, of all files there are by then, in the order of time.

    `worker` selects those of one slot, `level` those at least as bad; lines of plain output have no level and are left
    out then. `slots` says which slot a process was, by pid, as Ray names files by that.
    """

    directory: Path
    worker: int | None = None
    level: str | None = None
    slots: Mapping[int, int] = field(default_factory=dict)
    _read: dict[int, _File] = field(default_factory=dict)

    def new(self) -> list[LogRecord]:
        """New whole records, oldest first; lines of plain output last."""
        found = [record for path in self._paths() for record in self._of(path) if self._is_wanted(record)]
        # Sorting is stable: what has the same time stays in the order of its file.
        return sorted(found, key=lambda record: (record.level == "", record.time))

    def _paths(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        ours: list[tuple[str, int, Path]] = []
        rays = []
        for path in self.directory.iterdir():
            if (name := _OURS.fullmatch(path.name)) is not None:
                # The higher the number that rotation gave, the older.
                ours.append((name[1], -int(name[3] or 0), path))
            elif _RAYS.fullmatch(path.name):
                rays.append(path)
        return [path for _, _, path in sorted(ours)] + sorted(rays)

    def _is_wanted(self, record: LogRecord) -> bool:
        if self.worker is not None and record.worker != self.worker:
            return False
        if self.level is None:
            return True
        level = record.level.lower()
        return level in LEVELS and LEVELS.index(level) >= LEVELS.index(self.level)

    def _of(self, path: Path) -> Iterator[LogRecord]:
        try:
            found = path.stat()
            # The inode finds a file again under the name that rotation gives it.
            file = self._read.setdefault(found.st_ino, _File())
            if found.st_size == file.offset:
                return
            with open_regular(path) as opened:
                if opened.read(len(file.head)) != file.head or found.st_size < file.offset:
                    file = self._read[found.st_ino] = _File()
                opened.seek(file.offset)
                yield from self._lines(path, file, opened, found.st_mtime)
        except (OSError, Unreadable):
            return  # rotated away between two looks: it is read under its new name

    def _lines(self, path: Path, file: _File, opened: BinaryIO, written: float) -> Iterator[LogRecord]:
        rays = _RAYS.fullmatch(path.name)
        while raw := opened.readline(MOST_LINE_BYTES):
            if not file.head:
                file.head = raw[:_HEAD_BYTES]
            if not raw.endswith(b"\n") and len(raw) < MOST_LINE_BYTES:
                return
            file.offset += len(raw)
            if file.is_cut:  # what is left of a long line
                file.is_cut = not raw.endswith(b"\n")
                continue
            file.is_cut = not raw.endswith(b"\n")
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            if rays is not None:
                if line and not _RAYS_MARK.fullmatch(line):
                    yield LogRecord(written, "", line, path.name, worker=self.slots.get(int(rays[1] or -1)))
            elif (record := parse_line(line, path.name)) is not None:
                file.last = record
                yield record
            elif file.last is not None and line:
                # Not written by us, though in a file of ours: it belongs to what stands before it.
                yield replace(file.last, message=line)
