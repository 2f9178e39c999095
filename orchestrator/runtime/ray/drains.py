"""Which nodes drain, and whom that concerns."""

from __future__ import annotations

import time
from collections.abc import Iterable

import ray

from orchestrator.control.core.protocol import DrainNotice
from orchestrator.control.core.workers import WorkerId
from orchestrator.runtime.ray import compat
from orchestrator.runtime.ray.placement import WorkerHandle

LATE_S = 3600.0
"""When a node that drains without a deadline is taken to go."""


class DrainWatch:
    """`concerns_me` says that this process's own node drains, and did not when this process came to it: who is started
    on one has no other to go to."""

    def __init__(self) -> None:
        self._mine = ray.get_runtime_context().get_node_id()
        self._stays_anyway = self._mine in compat.state.get_draining_nodes()
        self._told: dict[WorkerId, float] = {}
        self.concerns_me = False

    def news(self, handles: Iterable[WorkerHandle], now: float) -> list[DrainNotice]:
        """Notices for workers whose nodes drain, or drain sooner than was said; also for those that came to such a node
        just before Ray knew. `now` on the run's line of time, as the deadlines of the notices; Ray has them in wall
        time, and what is left is counted here, once."""
        draining: dict[str, int] = compat.state.get_draining_nodes()
        self.concerns_me = self._mine in draining and not self._stays_anyway
        news: dict[tuple[str, float], list[WorkerId]] = {}
        wall = time.time()
        for handle in handles:
            if handle.node is None or handle.node not in draining:
                continue
            deadline_ms = draining[handle.node]
            known = self._told.get(handle.worker)
            if known is not None and (not deadline_ms or deadline_ms / 1000 >= known):
                continue
            deadline = deadline_ms / 1000 if deadline_ms else wall + LATE_S
            self._told[handle.worker] = deadline
            news.setdefault((handle.node, now + deadline - wall), []).append(handle.worker)
        return [DrainNotice(tuple(who), f"node {node[:8]} drains", deadline) for (node, deadline), who in news.items()]
