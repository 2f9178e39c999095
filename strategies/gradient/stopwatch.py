"""How long a rank is busy with each virtual worker of a step, apart from what it waits for others.

On CUDA, where the host runs ahead of the device, the device's own events tell; they are read when the step is over, so
that measuring makes nobody wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch


def _nothing_waited() -> float:
    return 0.0


class Stopwatch:
    """`with watch.on(index):` is time spent on a virtual worker; `seconds` is the sum of it for each, since `reset`.

    `waited` tells for how many seconds this rank has waited in collectives so far: on a CPU, what of that falls into a
    measured stretch is not counted. (The device's events cannot tell it: on CUDA it counts.) `drag`, where there is
    one, is called with the seconds of every stretch before it ends, and may make it longer (an injected slow device).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.waited: Callable[[], float] = _nothing_waited
        self.drag: Callable[[float], None] | None = None
        self._uses_events = device is not None and device.type == "cuda"
        self._device = device
        self._seconds: dict[int, float] = {}
        self._events: list[tuple[int, Any, Any]] = []

    def reset(self) -> None:
        """Another step begins."""
        self._seconds, self._events = {}, []

    def on(self, index: int) -> Stretch:
        """A stretch of work on virtual worker `index`; on CPU not to be nested."""
        return Stretch(self, index)

    def seconds(self) -> dict[int, float]:
        """By virtual worker. On CUDA it waits for what is still running."""
        for index, start, end in self._events:
            end.synchronize()
            self._seconds[index] = self._seconds.get(index, 0.0) + start.elapsed_time(end) / 1000
        self._events = []
        return dict(self._seconds)


class Stretch:
    """See `Stopwatch.on`; also one that is interrupted counts."""

    def __init__(self, watch: Stopwatch, index: int) -> None:
        self._watch = watch
        self._index = index

    def __enter__(self) -> None:
        watch = self._watch
        if watch._uses_events:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        self._waited, self._entered = watch.waited(), time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch = self._watch
        if watch.drag is not None:
            if watch._uses_events:
                torch.cuda.synchronize(watch._device)
            watch.drag(self._elapsed())
        if watch._uses_events:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            watch._events.append((self._index, self._start, end))
        else:
            watch._seconds[self._index] = watch._seconds.get(self._index, 0.0) + self._elapsed()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._entered - (self._watch.waited() - self._waited)
