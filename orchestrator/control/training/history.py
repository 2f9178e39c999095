"""What a restarted controller knows of its run: read from the records its predecessors left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from monitoring.evaluations import StandingEvaluations
from monitoring.events import (
    DrainNoticed,
    Evaluated,
    Evicted,
    EvictionWithdrawn,
    FaultInjected,
    GenerationFormed,
    GpuFaulty,
    IncidentOpened,
    NodeSuspected,
    Recovered,
    ResizeRequested,
    RolledBack,
    RunFinished,
    StopRequested,
    WorkerDied,
    WorkerKilled,
    WorkerReady,
    WorkerReleased,
    WorkerRequested,
)
from orchestrator.control.core.incidents import Incident, IncidentBook
from orchestrator.control.core.workers import PastWorkers, WorkerId


@dataclass
class History:
    """The part of events.jsonl and metrics.jsonl that decisions depend on. More than 15 attributes: each is what a kind
    of record says.

    `generation` is the last number used (-1: none), `incarnations` the last of each slot ever asked for, so that no
    name is used twice. `incidents` are those without a recovery, `members` those of the last generation that were not
    heard to have gone, `warm` all that were ready and not heard to have gone, `gone` all that were; `evicting` were
    found too slow, on these nodes; `suspects` are nodes of which a device failed, `faulty` compute
    on devices that ought not to be used.
    """

    committed: int = 0
    generation: int = -1
    fired_faults: set[int] = field(default_factory=set)
    incarnations: dict[int, int] = field(default_factory=dict)
    incidents: list[Incident] = field(default_factory=list)
    members: set[WorkerId] = field(default_factory=set)
    warm: set[WorkerId] = field(default_factory=set)
    gone: set[WorkerId] = field(default_factory=set)
    draining: dict[WorkerId, float] = field(default_factory=dict)
    evicting: dict[WorkerId, str] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)
    faulty: set[WorkerId] = field(default_factory=set)
    target: int | None = None
    stop: str | None = None
    step_seconds: list[float] = field(default_factory=list)
    last_commit_at: float | None = None
    norm: float | None = None
    evaluated: StandingEvaluations = field(default_factory=StandingEvaluations)
    """Of the weights of steps that are on record."""
    probe: tuple[WorkerId, str, str] | None = None
    """The first worker that had one, its digest, and what it computed on."""

    @property
    def workers(self) -> PastWorkers:
        """What there is on record of workers."""
        return PastWorkers(self.incarnations, self.gone, self.draining, self.evicting, self.suspects, self.faulty)

    @classmethod
    def read(cls, events: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]]) -> History:
        """From the records of events.jsonl (with their `kind`) and of metrics.jsonl."""
        history = cls()
        for event in events:
            history._add(event)
        for step in steps:
            history.committed += 1
            history.step_seconds.append(float(step["seconds"]))
            history.last_commit_at = float(step["committed_at"])
            # JSON has no word for a norm that is not finite.
            history.norm = math.nan if (norm := step["grad_norm"]) is None else float(norm)
        del history.step_seconds[:-200]
        return history

    def _add(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case WorkerRequested.kind:
                slot = event["worker"]
                self.incarnations[slot] = max(self.incarnations.get(slot, -1), event["incarnation"])
            case WorkerReady.kind:
                worker = WorkerId(event["worker"], event["incarnation"])
                self.warm.add(worker)
                if self.probe is None and event.get("probe"):
                    self.probe = (worker, event["probe"], event["device"])
            case WorkerDied.kind | WorkerKilled.kind | WorkerReleased.kind:
                worker = WorkerId(event["worker"], event["incarnation"])
                self.gone.add(worker)
                self.members.discard(worker)
                self.warm.discard(worker)
            case IncidentOpened.kind:
                self.incidents.append(_incident(event))
            case GenerationFormed.kind:
                self.generation = max(self.generation, event["generation"])
                self.members = {WorkerId(w["worker"], w["incarnation"]) for w in event["workers"]}
                self.warm |= self.members
                book = IncidentBook(self.incidents)
                book.charge(event["steps_lost"])
                book.answered(event["generation"], event["source"], event["start_step"])
            case Recovered.kind:
                key = (event["incident"], event["worker"], event["at"])
                self.incidents = [i for i in self.incidents if (i.kind, i.worker and i.worker.slot, i.at) != key]
            case FaultInjected.kind:
                self.fired_faults.add(event["fault"])
            case DrainNoticed.kind:
                self.draining[WorkerId(event["worker"], event["incarnation"])] = event["deadline"]
            case Evicted.kind:
                self.evicting[WorkerId(event["worker"], event["incarnation"])] = event["node"]
            case EvictionWithdrawn.kind:
                self.evicting.pop(WorkerId(event["worker"], event["incarnation"]), None)
            case GpuFaulty.kind if event["action"] == "retire":
                self.faulty.add(WorkerId(event["worker"], event["incarnation"]))
            case NodeSuspected.kind:
                self.suspects.add(event["node"])
            case ResizeRequested.kind:
                self.target = event["to"]
            case Evaluated.kind | RolledBack.kind:
                self.evaluated.take(event)
            case StopRequested.kind:
                self.stop = event["reason"]
            case RunFinished.kind:
                self.stop = None
                self.incidents = []


def _incident(event: Mapping[str, Any]) -> Incident:
    worker = None if event["worker"] is None else WorkerId(event["worker"], event["incarnation"])
    at = event["at"]
    return Incident(event["incident"], event["cause"], worker, at, at + event["detect_seconds"], event["step"])
