"""A kind of fault: a device that is slow for one step."""

from __future__ import annotations

from orchestrator.faults import FaultKind, FaultyWorker, Planned


class Stutter(FaultKind):
    name = "stutter"
    details = ("factor",)

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        worker.slow_down("compute", planned.factor or 3.0, 1, None)


STUTTER = Stutter()
