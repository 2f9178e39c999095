"""The end of a run: the workers that hold its final state are asked for its digest."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.views import WorkerView


class Finalization:
    """Who was asked about the state of how many steps, at what time, and what came back."""

    def __init__(self, committed: int, asked: Sequence[WorkerView], now: float) -> None:
        self.committed = committed
        self.asked = {view.worker: view for view in asked}
        self.since = now
        self._answers: dict[WorkerId, str] = {}
        for view in asked:
            view.last_heard = now

    def answer(self, worker: WorkerId, digest: str) -> None:
        self._answers[worker] = digest

    def living(self) -> list[WorkerId]:
        """Those asked that live."""
        return [worker for worker, view in self.asked.items() if view.alive]

    def unanswered(self) -> list[WorkerView]:
        """The living that have not answered yet."""
        return [view for view in self.asked.values() if view.alive and view.worker not in self._answers]

    def digests(self) -> dict[WorkerId, str]:
        """What the living answered."""
        return {
            worker: self._answers[worker]
            for worker, view in self.asked.items()
            if view.alive and worker in self._answers
        }

    def skip_gap(self, gap_s: float) -> None:
        """Nobody could be heard for this long."""
        self.since += gap_s
