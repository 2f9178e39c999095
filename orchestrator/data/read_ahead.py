"""Batches fetched before they are asked for, where reading proves slow, and nothing in the way where it is fast.

Which batches a rank will want is known: they are a function of step and virtual worker. Knows nothing of what a batch
is.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[int, int]

SLOW_S = 0.002
"""Reading is slow when the median of the last reads took longer: a thread would cost more than faster ones."""

MAX_BYTES = 256 << 20
_TELL_AGAIN_S = 60.0
_LOOK_S = 1.0
_STEPS_AHEAD = 2
_REMEMBERED = 9
_MIN_REMEMBERED = 3


class ReadAhead(Generic[T]):
    """A function (step, virtual worker) -> batch that fetches the next batches in a thread while reading is slow.

    Ahead are the batches of the virtual workers named by `expect` that come after the one asked for, in this step and
    the next ones: at most two steps' worth, and at most max_bytes (but one batch in any case). Any other batch can be
    asked for too. What fetching ahead raises is raised by the call that needs the batch, once: the next call for it
    reads again.

    More than 15 attributes: they are what two threads share under one lock.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], T],
        *,
        num_steps: int | None = None,
        max_bytes: int = MAX_BYTES,
        slow_s: float = SLOW_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """num_steps: the steps there are; clock: seconds."""
        self._fetch = fetch
        self._num_steps = num_steps
        self._max_bytes = max_bytes
        self._slow_s = slow_s
        self._clock = clock
        self._change = threading.Condition()
        self._held: tuple[int, ...] = ()
        self._timing = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._batch_bytes = 0
        self._told_at = -_TELL_AGAIN_S
        self.look: Callable[[], object] = lambda: None
        """Called every second by who waits for what is read ahead; what it raises ends the waiting."""
        self.is_slow = False
        """Whether batches are fetched ahead."""
        self._wanted: list[Key] = []  # in the order they will be asked for; some of them are ready
        self._ready: dict[Key, tuple[T | None, BaseException | None]] = {}
        self._at_work: Key | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def expect(self, virtual_workers: Sequence[int]) -> None:
        """From now on these are asked for in every step, in this order; what was fetched for others is dropped."""
        with self._change:
            self._held = tuple(virtual_workers)
            self._want([key for key in self._wanted if key[1] in self._held])

    def close(self) -> None:
        """Ends the thread, after what it is fetching; nothing is fetched ahead any more."""
        with self._change:
            self._is_closed = True
            self._want([])

    def __call__(self, step: int, virtual_worker: int) -> T:
        key = (step, virtual_worker)
        if not self._wanted and not self.is_slow:
            return self._timed(key)
        with self._change:
            is_coming = key in self._ready or key == self._at_work
            while is_coming and key not in self._ready:
                if not self._change.wait(_LOOK_S):
                    self.look()
                is_coming = key in self._ready or key == self._at_work
            batch, error = self._ready.pop(key) if is_coming else (None, None)
            # The batch asked for is read here, if it is not there, while the thread reads the ones after it.
            self._want(self._next(key) if self.is_slow and not self._is_closed else [])
        if error is not None:
            raise error
        return batch if is_coming else self._timed(key)  # type: ignore[return-value]

    def _next(self, key: Key) -> list[Key]:
        """What will be asked for after this one, as far as is fetched ahead."""
        step, virtual_worker = key
        if virtual_worker not in self._held:
            return self._wanted
        count = _STEPS_AHEAD * len(self._held)
        if self._batch_bytes:
            count = min(count, max(1, self._max_bytes // self._batch_bytes))
        later = self._held[self._held.index(virtual_worker) + 1 :]
        keys = [(step, one) for one in later]
        keys += [(step + ahead, one) for ahead in range(1, _STEPS_AHEAD + 1) for one in self._held]
        return [one for one in keys if self._num_steps is None or one[0] < self._num_steps][:count]

    def _want(self, keys: list[Key]) -> None:
        """Makes these the batches to fetch ahead. To be called with the lock held."""
        self._wanted = keys
        self._ready = {key: found for key, found in self._ready.items() if key in keys}
        if keys and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                while (key := self._first_missing()) is None:
                    if self._is_closed:
                        return
                    self._change.wait()
                self._at_work = key
            found: tuple[T | None, BaseException | None]
            try:
                found = self._timed(key), None
            except BaseException as error:  # raised again where the batch is needed
                found = None, error
            with self._change:
                self._at_work = None
                # Unless the assignment has changed meanwhile.
                if key in self._wanted:
                    self._ready[key] = found
                self._change.notify_all()
            del found

    def _first_missing(self) -> Key | None:
        return next((key for key in self._wanted if key not in self._ready), None)

    def _timed(self, key: Key) -> T:
        start = self._clock()
        batch = self._fetch(*key)
        seconds = self._clock() - start
        with self._timing:
            self._seconds.append(seconds)
            count, was_slow = len(self._seconds), self.is_slow
            self.is_slow = count >= _MIN_REMEMBERED and sorted(self._seconds)[count // 2] > self._slow_s
            self._batch_bytes = max(self._batch_bytes, num_bytes(batch))
            usual_s = sorted(self._seconds)[count // 2]
        if self.is_slow != was_slow:
            self._tell(usual_s)
        return batch

    def _tell(self, usual_s: float) -> None:
        """Reading became slow or fast. Where that changes all the time it is said once a minute."""
        if (now := self._clock()) - self._told_at >= _TELL_AGAIN_S:
            self._told_at = now
            what = "slow: batches are read ahead" if self.is_slow else "fast again"
            log.info("reading is %s (%.1f ms a batch)", what, usual_s * 1000)


def num_bytes(batch: Any) -> int:
    """The bytes of the arrays in a batch: an array, or a tuple, list, mapping or dataclass of batches."""
    if isinstance(size := getattr(batch, "nbytes", None), int):
        return size
    if isinstance(batch, dict):
        return sum(num_bytes(one) for one in batch.values())
    if isinstance(batch, list | tuple):
        return sum(num_bytes(one) for one in batch)
    if dataclasses.is_dataclass(batch):
        return sum(num_bytes(getattr(batch, field.name)) for field in dataclasses.fields(batch))
    return 0
