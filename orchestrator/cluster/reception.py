"""Where workers introduce themselves to a controller that they have not met."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from orchestrator.cluster.orders import Introduction
from orchestrator.messages import WorkerId


class Reception:
    """Who has been met. May be used from several threads."""

    def __init__(self) -> None:
        self._met: dict[WorkerId, Introduction] = {}
        self._change = threading.Condition()

    def meet(self, introduction: Introduction) -> None:
        with self._change:
            self._met[introduction.worker] = introduction
            self._change.notify_all()

    def forget(self, worker: WorkerId) -> None:
        with self._change:
            self._met.pop(worker, None)

    def wait_for(self, workers: Collection[WorkerId], patience_s: float) -> dict[WorkerId, Introduction]:
        """Those that have been met, of any; returns as soon as all of these have, and after `patience_s` at the
        latest."""
        deadline = time.monotonic() + patience_s
        with self._change:
            while not self._met.keys() >= set(workers) and (left := deadline - time.monotonic()) > 0:
                self._change.wait(left)
            return dict(self._met)
