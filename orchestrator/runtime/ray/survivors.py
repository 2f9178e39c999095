"""The workers that an earlier controller left: who they are, by their own accounts."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from orchestrator.control.core.detection import stretched_s
from orchestrator.control.core.protocol import Placed
from orchestrator.control.core.workers import WorkerId
from orchestrator.lateness import Lateness
from orchestrator.runtime.mailbox import Introduction, Introductions
from orchestrator.runtime.ray.processes import WorkerProcesses

INTRODUCTION_S = 5.0
"""How long, at least, a restarted controller waits for the living workers to introduce themselves; longer while it is
late itself, and while they show life: a worker that lost its controller and its GCS together asks again after 25 s."""
MOST_INTRODUCTION_S = 60.0
SOON_S = 1.5
"""How long it takes them mostly. Of those that take longer it is seen whether their nodes are still there."""
LOOK_S = 0.25


@dataclass(frozen=True)
class Survivors:
    """`statuses` are the accounts of those that are warm, `starting` those that are on their way."""

    statuses: list[Any]
    starting: list[Placed]

    @classmethod
    def find(
        cls, processes: WorkerProcesses, introductions: Introductions, lateness: Lateness, warm: Set[WorkerId],
        timeout_s: float, tell: Callable[[Any], None],
    ) -> Survivors:  # fmt: skip
        """Those that were `warm` are waited for; the others are on their way, and go on being so. A worker that nothing
        is heard of is ended. What they would say but once, and said to the predecessor, goes to `tell`."""
        placed = processes.find()
        warm = warm & placed.keys()
        met = introductions.wait_for(warm, SOON_S)
        if silent := warm - met.keys():
            silent -= {worker for worker in silent if processes.is_lost(placed[worker])}
            met = _wait_for(silent, introductions, lateness, timeout_s)
        found = cls([], [])
        for worker, handle in placed.items():
            introduction = met.get(worker)
            if introduction is not None:
                handle.pid = introduction.pid
            if introduction is not None and introduction.status is not None:
                found.statuses.append(introduction.status)
            elif worker not in warm and handle.node is not None:
                found.starting.append(Placed(worker, handle.node))
            else:
                handle.kill()
                continue
            processes.adopt(handle)
        met = introductions.wait_for((), 0.0)
        for worker in (each.worker for each in found.starting):
            if (late := met.get(worker)) is not None and late.status is not None:
                tell(late.status.ready)  # It has become warm meanwhile.
        processes.release_other_places()
        return found


def _wait_for(
    silent: Set[WorkerId], introductions: Introductions, lateness: Lateness, timeout_s: float
) -> dict[WorkerId, Introduction]:
    """Those that have been met when these have, or patience with them has run out."""
    began = time.monotonic()
    while True:
        met = introductions.wait_for(silent, LOOK_S)
        missing, waited_s = silent - met.keys(), SOON_S + time.monotonic() - began
        limit_s = stretched_s(max(INTRODUCTION_S, timeout_s), lateness.recent_s())
        is_late = waited_s > limit_s and not introductions.show_life(missing, timeout_s)
        if not missing or is_late or waited_s > MOST_INTRODUCTION_S:
            return met
