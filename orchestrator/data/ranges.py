"""Reading a range of bytes from the first of several places that gives it: tried again, then read elsewhere, then given
up with the reason of every place.

Used for sources while they are tokenised and for shards while they train. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.data.locations import LASTING, Location, Patience
from orchestrator.data.sources import DataError

T = TypeVar("T")


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
    """A thread of its own that does one thing after the other, so that a waiting caller can stop waiting."""

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
        places: Sequence[Location],
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
