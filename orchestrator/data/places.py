"""Reading a range of bytes from the first of several places that gives it: tried again, then read elsewhere, then given
up with the reason of every place.

Used for sources while they are tokenised and for shards while they train. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
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
        """Waits after so many failures (at least one)."""
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


class Place(Protocol):
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
        return os.fstat(self.open().number).st_size

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
        size = self.info().get("size")
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


class Unreadable(Exception):
    """No place gave a range; `problems` are (where, what went wrong at last, number of attempts), in order."""

    def __init__(self, problems: Sequence[tuple[str, Exception, int]]) -> None:
        super().__init__(list(problems))
        self.problems = list(problems)

    def __str__(self) -> str:
        """`problem[, nor at place: problem]...`, to stand behind the name of what could not be read."""
        told = []
        for number, (where, error, attempts) in enumerate(self.problems):
            is_plain = isinstance(error, (OSError, DataError))
            text = str(error) or type(error).__name__
            text = text if is_plain else f"{type(error).__name__}: {text}"
            text += f" (tried {attempts} times)" if attempts > 1 else ""
            told.append(f"nor at {where}: {text}" if number else text)
        return ", ".join(told)


class Lane:
    """A thread of its own that does one thing after the other, so that whoever waits can stop waiting."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="reading", daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()
        self._work.put((answer, function))
        return answer

    def close(self) -> None:
        """Ends the thread after what it has been given."""
        self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            answer, function = item
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)
            del item, answer, function


class Ranges:
    """One file that lies in several places, best first.

    identify(number of the place) and verify(place, start, data, length) raise when a place gives something else;
    identify is asked before the first range of each place. own_thread: reads happen on a thread, so that they can be
    given up and begun ahead. `current` is where a range was read at last, and where the next one is looked for first;
    `lacking` are the places that do not have this file, as opposed to those that fail.

    Not for several threads at once.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        identify: Callable[[int], None],
        verify: Callable[[int, int, bytes, int], None],
        patience: Patience,
        own_thread: bool,
        first: int = 0,
    ) -> None:
        assert places
        self.places = tuple(places)
        self.current = first
        self.lacking: set[int] = set()
        self._identify = identify
        self._verify = verify
        self._patience = patience
        self._own_thread = own_thread
        self._lane: Lane | None = None
        self._known: set[int] = set()

    def read(self, start: int, length: int, begun: Begun | None = None) -> bytes:
        """The bytes from `start` on (fewer where the file's size is not known, and it ends). Raises Unreadable."""
        problems: list[tuple[str, Exception, int]] = []
        for turn in range(len(self.places)):
            number = (self.current + turn) % len(self.places)
            for attempt in range(1, self._patience.attempts + 1):
                try:
                    data = self._attempt(number, start, length, begun)
                except Exception as error:
                    begun = None
                    if isinstance(error, LASTING):
                        self.lacking.add(number)
                    if isinstance(error, LASTING) or attempt == self._patience.attempts:
                        problems.append((self.places[number].where, error, attempt))
                        break
                    self._forget(number)
                    self._patience.pause(attempt)
                else:
                    self.current = number
                    return data
            self._forget(number)
        raise Unreadable(problems)

    def begin(self, start: int, length: int) -> Begun | None:
        """Begins to read a range that will be asked for; None where there is no thread to do so."""
        if not self._own_thread:
            return None
        return self._submit(self.current, start, length)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def _attempt(self, number: int, start: int, length: int, begun: Begun | None) -> bytes:
        if not self._own_thread:
            return self._read(number, start, length)
        # What was begun on a thread that got stuck may never end.
        if begun is None or begun.place != number or begun.lane is not self._lane:
            begun = self._submit(number, start, length)
        try:
            return self._patience.wait(begun.answer)
        except TimeoutError as error:
            if begun.answer.done():
                raise
            # That thread may be stuck for ever; nobody waits for it, and it ends when its call does.
            self.close()
            raise TimeoutError(f"no answer within {self._patience.timeout_s:g} s") from error

    def _read(self, number: int, start: int, length: int) -> bytes:
        if number not in self._known:
            self._identify(number)
            self._known.add(number)
        data = self.places[number].read(start, length)
        self._verify(number, start, data, length)
        return data

    def _forget(self, number: int) -> None:
        self._known.discard(number)
        try:
            self.places[number].reopen()
        except Exception:  # the next attempt will say what is wrong
            return

    def _submit(self, number: int, start: int, length: int) -> Begun:
        if self._lane is None:
            self._lane = Lane()
        return Begun(number, self._lane, self._lane.submit(lambda: self._read(number, start, length)))


@dataclass(frozen=True)
class Begun:
    """A range that is being read at a place."""

    place: int
    lane: Lane
    answer: Future[bytes]
