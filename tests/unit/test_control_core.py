"""Processes without training: another machine, a service that keeps some of them warm, stands on the same room."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from monitoring.events import IncidentOpened, Recovered, RunEvent
from orchestrator.control.core import detection
from orchestrator.control.core.config import PoolConfig, ScalingRules
from orchestrator.control.core.incidents import Incident, IncidentBook
from orchestrator.control.core.machine import Machine, WantsRoom
from orchestrator.control.core.protocol import (
    Died,
    DrainNotice,
    Finish,
    KillWorker,
    Placed,
    ProcessAction,
    ReleaseWorker,
    RequestWorker,
    Resize,
    Start,
    Stop,
    TellShortage,
    Tick,
)
from orchestrator.control.core.roster import Roster, death_of, notice_of
from orchestrator.control.core.workers import PastWorkers, ProcessView, WorkerId, WorkerState


@dataclass(frozen=True)
class Warm:
    """What a replica of the service says when it can answer, and from time to time after that."""

    worker: WorkerId


class Service:
    """Keeps a number of replicas; nothing is known of what they do."""

    def __init__(self, config: PoolConfig, past: PastWorkers | None = None) -> None:
        self.config = config
        self.target = config.within_limits(config.max_workers)
        self.roster: Roster[ProcessView] = Roster(config, past or PastWorkers({}, set(), {}, {}), ProcessView)
        self.book = IncidentBook()
        self.is_over = False
        self.fired_faults: Collection[int] = ()
        self.wants_room: WantsRoom = "no"
        self.gives_way_to = ""

    @property
    def workers(self) -> dict[WorkerId, ProcessView]:
        return self.roster.workers

    def snapshot(self) -> dict[str, Any]:
        return {"warm": self.roster.num_warm, "target": self.target}

    def handle(self, event: Any, now: float) -> Sequence[ProcessAction]:
        roster, out = self.roster, []
        match event:
            case Placed():
                out += roster.placed(event, now)
            case Warm():
                view = roster.living(event.worker)
                if view is not None and view.state is WorkerState.STARTING:
                    out += roster.ready(view, view.node, 1, now, lateness_s=0.0, facts={})
                    out += self.book.recovered(0, now, None, 0.0)
                elif view is not None:
                    view.last_heard = now
            case Died():
                if (view := roster.living(event.worker)) is not None:
                    out += [death_of(view, event), *self.lose(detection.died(view, event), now)]
            case DrainNotice():
                out += [notice_of(view, event) for view in roster.notice(event)]
            case Resize():
                self.target = self.config.within_limits(event.workers)
            case Stop():
                self.is_over = True
                return [*roster.withdraw("it ends"), Finish("stopped", event.reason, None)]
            case Tick():
                for failure in detection.find_hung(roster.alive(), self.config, now, event.lateness_s):
                    out += self.lose(failure, now)
                out += roster.tell_shortage(now)
        out += roster.fill(
            self.target, (), now, needed=lambda: (), may_leave=self.may_leave, worth=lambda unit: (len(unit),)
        )  # fmt: skip
        return out

    def lose(self, failure: detection.Failure[ProcessView], now: float) -> list[ProcessAction]:
        assert failure.view is not None
        worker = failure.view.worker
        incident = Incident(failure.kind, failure.cause, worker, failure.at or now, now, 0)
        self.book.add(incident)
        self.book.answered(0, "peers", 0)
        if failure.kill:
            return [incident.opening(), *self.roster.kill(failure.view, failure.kill)]
        self.roster.remove(failure.view)
        return [incident.opening()]

    def may_leave(self, view: ProcessView) -> bool:
        """When as many others are warm as are wanted."""
        return sum(v.state is WorkerState.IDLE and not v.leaving for v in self.roster.alive()) >= self.target


A, B, C = WorkerId(0, 0), WorkerId(1, 0), WorkerId(2, 0)


def of(kind: type, actions: Sequence[Any]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def kinds(actions: Sequence[Any]) -> list[str]:
    return [action.kind for action in of(RunEvent, actions)]


@pytest.fixture
def service() -> Service:
    made = Service(PoolConfig(min_workers=1, max_workers=2, scaling=ScalingRules(shortage_after_s=5.0)))
    machine: Machine = made
    assert [action.worker for action in of(RequestWorker, machine.handle(Start(), 0.0))] == [A, B]
    for worker in (A, B):
        made.handle(Placed(worker, f"node-{worker.slot}"), 1.0)
        assert kinds(made.handle(Warm(worker), 2.0)) == ["worker_ready"]
    return made


def test_one_that_dies_is_asked_for_again_and_its_incident_closed(service: Service) -> None:
    told = service.handle(Died(A, "exit code 1"), 10.0)
    assert kinds(told)[:2] == ["worker_died", "incident"]
    (asked,) = of(RequestWorker, told)
    assert asked.worker == WorkerId(0, 1)
    service.handle(Placed(asked.worker, "node-2"), 11.0)
    (recovery,) = of(Recovered, service.handle(Warm(asked.worker), 13.0))
    assert recovery.stall_seconds == 3.0
    assert service.snapshot() == {"warm": 2, "target": 2}


def test_one_that_is_silent_is_ended(service: Service) -> None:
    service.handle(Warm(B), 9.0)
    told = service.handle(Tick(), 10.0)
    assert [action.worker for action in of(KillWorker, told)] == [A]
    assert of(IncidentOpened, told)[0].incident == "hang"


def test_one_whose_node_drains_is_replaced_before_it_goes(service: Service) -> None:
    told = service.handle(DrainNotice((A,), "spot", 60.0), 3.0)
    assert [action.worker for action in of(RequestWorker, told)] == [C]
    assert not of(ReleaseWorker, told)
    service.handle(Placed(C, "node-3"), 4.0)
    assert [action.worker for action in of(ReleaseWorker, service.handle(Warm(C), 5.0))] == [A]


def test_sizes_shortages_and_the_end(service: Service) -> None:
    assert [action.worker for action in of(ReleaseWorker, service.handle(Resize(1), 3.0))] == [B]
    service.handle(Resize(2), 4.0)
    service.handle(Warm(A), 9.5)
    assert of(TellShortage, service.handle(Tick(), 10.0))
    ended = service.handle(Stop("enough"), 11.0)
    assert isinstance(ended[-1], Finish)
    assert service.is_over
