"""Where workers introduce themselves to a controller that they have not met."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from orchestrator.runtime.orders import Introduction
from orchestrator.training.messages import WorkerId


class Reception:
    """Who has been met. May be used from several threads."""

    def __init__(self) -> None:
        self._met: dict[WorkerId, Introduction] = {}
        self._change = threading.Condition()
        self._heard: dict[WorkerId, float] = {}
        self._committed: int | None = None
        self._moved_at = float("-inf")

    def meet(self, introduction: Introduction) -> None:
        with self._change:
            self._met[introduction.worker] = introduction
            self._change.notify_all()

    def forget(self, worker: WorkerId) -> None:
        with self._change:
            self._met.pop(worker, None)

    def hear(self, worker: WorkerId | None, committed: int | None = None) -> None:
        """A worker says something, met or not; also, perhaps, how many steps are committed."""
        now = time.monotonic()
        with self._change:
            if worker is not None:
                self._heard[worker] = now
            if committed is not None:
                if self._committed is not None and committed > self._committed:
                    self._moved_at = now
                self._committed = max(committed, self._committed or 0)

    def show_life(self, workers: Collection[WorkerId], within_s: float) -> bool:
        """Whether any of these was heard in the last `within_s` seconds, or a step was committed, which none is
        without every member."""
        since = time.monotonic() - within_s
        with self._change:
            return self._moved_at > since or any(self._heard.get(worker, since) > since for worker in workers)

    def wait_for(self, workers: Collection[WorkerId], patience_s: float) -> dict[WorkerId, Introduction]:
        """Those that have been met, of any; returns as soon as all of these have, and after `patience_s` at the
        latest."""
        deadline = time.monotonic() + patience_s
        with self._change:
            while not self._met.keys() >= set(workers) and (left := deadline - time.monotonic()) > 0:
                self._change.wait(left)
            return dict(self._met)
