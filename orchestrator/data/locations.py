"""One file in one place, local or remote, read by ranges; and how patient its reader is.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeVar

from orchestrator.data.sources import DataError, filesystem_of

T = TypeVar("T")


class Changed(OSError):
    """A place holds something else under this name."""


# Asking again changes nothing about these.
LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, Changed, DataError)


@dataclass(frozen=True)
class Patience:
    """How long to wait for one range at one place: `attempts` in all, each answered within `timeout_s`, after pauses
    that double from `pause_s` up to `longest_pause_s`, each of a random length around that, so that many readers do not
    come back at once."""

    attempts: int = 4
    timeout_s: float = 30.0
    pause_s: float = 0.25
    longest_pause_s: float = 5.0

    def pause(self, failures: int) -> None:
        """Waits after this many failures (at least one)."""
        pause_s = min(self.longest_pause_s, self.pause_s * 2 ** (failures - 1))
        self.sleep(pause_s * random.uniform(0.5, 1.5))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, answer: Future[T]) -> T:
        """What was asked for. Raises TimeoutError when it does not come in time."""
        return answer.result(self.timeout_s)


def persist(patience: Patience, reopen: Callable[[], None], function: Callable[[], T]) -> T:
    """What a function returns, called again while what it raises may pass; `reopen` is called in between."""
    for failures in range(1, patience.attempts):
        try:
            return function()
        except LASTING:
            raise
        except Exception:
            reopen()
            patience.pause(failures)
    return function()


class Location(Protocol):
    """One file in one place. All methods may raise any exception, as every storage library has its own."""

    where: str

    def size(self) -> int | None:
        """Bytes of the file; None where nobody knows before it is read."""

    def read(self, start: int, length: int) -> bytes:
        """The bytes from `start` on: fewer than `length` only at the end of the file."""

    def reopen(self) -> None:
        """Forgets what is open: it may be what is wrong."""


class Descriptor:
    """The descriptor of an open file. It is closed when nobody refers to it any more, as another thread may be reading
    from it, and its number would be given to another file."""

    number = -1

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class LocalPlace:
    """A file that the operating system knows."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._file: Descriptor | None = None

    def open(self) -> Descriptor:
        """The open file, which stays so until `reopen`."""
        file = self._file
        if file is None:
            file = self._file = Descriptor(self.where)
        return file

    def size(self) -> int | None:
        status = os.fstat(self.open().number)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.where)
        return status.st_size

    def read(self, start: int, length: int) -> bytes:
        file = self.open()
        data = os.pread(file.number, length, start)
        while len(data) < length and (more := os.pread(file.number, length - len(data), start + len(data))):
            data += more
        return data

    def reopen(self) -> None:
        self._file = None


class RemotePlace:
    """A file at an fsspec URL whose size is known, read by ranges."""

    def __init__(self, url: str) -> None:
        self.where = url

    def info(self) -> dict[str, Any]:
        """What the storage says about the file."""
        filesystem, path = filesystem_of(self.where)
        found: dict[str, Any] = filesystem.info(path)
        return found

    def size(self) -> int | None:
        info = self.info()
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.where)
        size = info.get("size")
        return None if size is None else int(size)

    def read(self, start: int, length: int) -> bytes:
        filesystem, path = filesystem_of(self.where)
        data: bytes = filesystem.cat_file(path, start=start, end=start + length)
        # A web server may ignore what range was asked for, and send everything.
        return data[start : start + length] if len(data) > length else data

    def reopen(self) -> None:
        filesystem, path = filesystem_of(self.where)
        filesystem.invalidate_cache(path)


class StreamPlace(RemotePlace):
    """A file at an fsspec URL whose size nobody knows before its end: it can only be read from front to back."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._stream: _Stream | None = None

    def read(self, start: int, length: int) -> bytes:
        stream = self._stream
        if stream is None or stream.position > start:
            filesystem, path = filesystem_of(self.where)
            stream = self._stream = _Stream(filesystem.open(path, "rb"))
        while stream.position < start and stream.take(min(start - stream.position, 1 << 20)):
            pass
        return stream.take(length)

    def reopen(self) -> None:
        super().reopen()
        self._stream = None


class _Stream:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.position = 0

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length and (more := self._stream.read(length - len(data))):
            data += more
        self.position += len(data)
        return data


def place_at(url: str, *, has_size: bool = True) -> LocalPlace | RemotePlace:
    """A file at a local path or fsspec URL. has_size: whether it is known how long the file is."""
    if "://" not in url:
        return LocalPlace(url)
    return RemotePlace(url) if has_size else StreamPlace(url)
