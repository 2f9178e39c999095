"""Stories of the controller, told one event at a time: what happened, and what it decided."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from monitoring.events import GpuFaulty, RunEvent
from orchestrator.checkpoint.names import Save
from orchestrator.control.core.protocol import (
    Abort,
    Died,
    DrainNotice,
    FaultFired,
    Finish,
    KillWorker,
    Placed,
    ReleaseWorker,
    RequestWorker,
    Resize,
    Start,
    Stop,
    TellShortage,
    Tick,
)
from orchestrator.control.core.roster import Roster
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.controller import Controller
from orchestrator.control.training.history import History
from orchestrator.control.training.protocol import Action, Event, Rollback, SaveRequested, StepCommitted, TakeOver
from orchestrator.control.training.views import ControllerConfig, RunState, WorkerView
from orchestrator.training.messages import (
    CheckpointSaved,
    Finalized,
    Generation,
    GpuTrouble,
    Heartbeat,
    Joined,
    Left,
    LeftCause,
    PartSaved,
    Ready,
    SaveBegun,
    SavePlan,
    Status,
    StepReport,
)
from orchestrator.training.orders import (
    CommitCheckpoint,
    DiscardCheckpoint,
    Finalize,
    Interrupt,
    Pause,
    RequestSave,
    SaveState,
    StartGeneration,
)
from strategies.layout.statemap import NOTHING, Spans, whole
from tests.unit.layouts_in_tests import MODEL, layouts

A = TypeVar("A", bound=Action)
ELEMENTS = 1000
WHOLE = whole(ELEMENTS, 1)
SHAPE = ("virtual_workers", "tensor", "pipeline", "shard")
W0, W1, W2, W3 = (WorkerId(slot, 0) for slot in range(4))


class Stage:
    """A controller and a clock. Every method tells the controller something and returns what it decided."""

    def __init__(self, controller: Controller | None = None, **config: Any) -> None:
        given = {name: config.pop(name) for name in SHAPE if name in config}
        defaults = {"total_steps": 100, "min_workers": 1, "max_workers": 4}
        config = {**defaults, "chooser": layouts(**given), **config}
        self.controller = controller or Controller(ControllerConfig(**config))
        self.now = 1000.0
        self.told: list[Action] = []
        self.held: dict[WorkerId, Spans] = {}

    def tell(self, event: Event, after: float = 0.1) -> list[Action]:
        self.now += after
        actions = self.controller.handle(event, self.now)
        self.told += actions
        return actions

    def wait(self, seconds: float, *speakers: WorkerId, phase: str = "compute") -> list[Action]:
        """Ticks go by; `speakers` send heartbeats from where they were last."""
        actions = []
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            for worker in speakers:
                view = self.controller.workers[worker]
                generation = self.controller.generation
                number = -1 if generation is None or generation.rank_of(worker) is None else generation.number
                actions += self.controller.handle(
                    Heartbeat(worker, number, phase, view.committed, view.committed), self.now
                )
            actions += self.controller.handle(Tick(), self.now)
        self.told += actions
        return actions

    def ready(self, *workers: WorkerId, node: str = "") -> list[Action]:
        actions = []
        for worker in workers:
            place = node or f"node-{worker.slot}"
            actions += self.tell(Placed(worker, place), 0.01)
            actions += self.tell(ready_message(worker, place), 0.01)
        return actions

    def join(self) -> list[Action]:
        """All members join, and the generation runs."""
        return [a for worker in self.members for a in self.tell(Joined(worker, self.generation.number, 10, 3), 0.01)]

    def train(self, steps: int, seconds: float = 1.0) -> list[Action]:
        """All members commit `steps` steps; rank 0 reports them."""
        actions = []
        for _ in range(steps):
            step = self.controller.progress.committed
            self.now += seconds
            for rank, worker in enumerate(self.members):
                reports = (self.report(step),) if rank == 0 else ()
                number = self.generation.number
                actions += self.tell(Heartbeat(worker, number, "compute", step + 1, step + 1, reports), 0.0)
        return actions

    def leave(
        self,
        worker: WorkerId,
        cause: LeftCause,
        committed: int | None = None,
        *,
        prepared: bool = False,
        reports: tuple[StepReport, ...] = (),
        detail: str = "",
        held: Spans | None = None,
    ) -> list[Action]:
        done = self.controller.progress.committed if committed is None else committed
        number = self.generation.number
        has = self.held.get(worker, whole(ELEMENTS, self.controller.config.tensor)) if held is None else held
        return self.tell(Left(worker, number, cause, done, has, prepared, detail, reports, self.now), 0.01)

    def leave_all(
        self, cause: LeftCause, committed: int | None = None, *, but: tuple[WorkerId, ...] = ()
    ) -> list[Action]:
        return [
            action for worker in self.members if worker not in but for action in self.leave(worker, cause, committed)
        ]

    def running(self, *workers: WorkerId) -> Stage:
        """A run that trains with these workers."""
        first = workers[: self.controller.target]
        self.tell(Start())
        self.ready(*first)
        self.wait(5.0, *first)
        self.join()
        self.wait(0.5, *first)
        self.ready(*workers[len(first) :])
        assert self.controller.state is RunState.RUNNING
        return self

    def save(self, order: SaveState | None = None) -> list[Action]:
        """The state that the run ends with is saved, by those of the last order that live."""
        save, workers = (order := order or of(SaveState, self.told)[-1]).save, order.workers
        for rank, worker in enumerate(workers):
            self.tell(PartSaved(worker, SavePlan(save, workers), rank, f"part {rank}"), 0.01)
        commit = of(CommitCheckpoint, self.told)[-1]
        return self.tell(CheckpointSaved(commit.worker, save, f"c{save.committed}"), 0.01)

    def report(self, step: int) -> StepReport:
        return StepReport(step, self.generation.number, 2.0, 1.0, 0.1, 64, f"s{step}", False, self.now, 1.0)

    @property
    def generation(self) -> Generation:
        assert self.controller.generation is not None
        return self.controller.generation

    @property
    def members(self) -> list[WorkerId]:
        return [member.worker for member in self.generation.members]

    def recorded(self, kind: str) -> list[dict[str, Any]]:
        return records(self.told, kind)


def ready_message(worker: WorkerId, node: str = "", initial: str = "i", memory_bytes: int = 0) -> Ready:
    return Ready(
        worker, node or f"node-{worker.slot}", 100 + worker.slot, "host", 7000 + worker.slot, initial, ELEMENTS,
        memory_bytes=memory_bytes, costs=MODEL,
    )  # fmt: skip


def holders(generation: Generation) -> tuple[int, ...]:
    """The ranks that have all of the state as it is."""
    return tuple(
        rank
        for rank, held in enumerate(generation.held)
        if held == whole(ELEMENTS, 1) and rank not in generation.roll_forward
    )


def of(kind: type[A], actions: list[Action]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def the(kind: type[A], actions: list[Action]) -> A:
    found = of(kind, actions)
    assert len(found) == 1, f"wanted one {kind.__name__}: {actions}"
    return found[0]


def records(actions: list[Action], kind: str) -> list[dict[str, Any]]:
    return [action.fields() for action in of(RunEvent, actions) if action.kind == kind]


# ------------------------------------------------------------------------------------ start, grow, shrink


def test_a_run_starts_when_all_that_were_placed_are_warm() -> None:
    stage = Stage()
    assert [a.worker for a in of(RequestWorker, stage.tell(Start()))] == [W0, W1, W2, W3]
    for worker in (W0, W1, W2, W3):
        stage.tell(Placed(worker, "node-a"))
    assert not of(StartGeneration, stage.ready(W2, W0, W3))
    generation = the(StartGeneration, stage.ready(W1)).generation
    assert [member.worker for member in generation.members] == [W0, W1, W2, W3]
    assert generation.layout.assignment == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert (generation.number, generation.committed, generation.restore) == (0, 0, None)
    assert holders(generation) == (0, 1, 2, 3), "equal models need not be sent around"
    stage.join()
    assert stage.controller.state is RunState.RUNNING


def test_a_model_that_was_built_otherwise_is_replaced() -> None:
    stage = Stage(max_workers=2)
    stage.tell(Start())
    stage.tell(ready_message(W0))
    start = the(StartGeneration, stage.tell(ready_message(W1, initial="other")))
    assert holders(start.generation) == (0,)


def test_what_is_not_placed_soon_is_not_waited_for() -> None:
    stage = Stage()
    stage.tell(Start())
    stage.ready(W0, W1)
    assert stage.controller.state is RunState.WAITING
    start = the(StartGeneration, stage.wait(4.0, W0, W1))
    assert len(start.generation.members) == 2


def test_it_grows_at_a_step_boundary_and_loses_nothing() -> None:
    stage = Stage().running(W0, W1)
    stage.train(5)
    pause = the(Pause, stage.ready(W2))
    assert pause.workers == (W0, W1)
    stage.train(1)
    start = the(StartGeneration, stage.leave_all("pause"))
    assert start.generation.members[2].worker == W2
    assert start.generation.committed == 6
    assert holders(start.generation) == (0, 1)
    stage.join()
    stage.train(1)
    recovery = stage.recorded("recovery")[0]
    assert (recovery["incident"], recovery["steps_lost"], recovery["source"]) == ("grow", 0, "peers")
    assert recovery["stall_seconds"] < 1.0, "the step that ran until the boundary is no stall"


def test_it_shrinks_on_request_and_grows_back() -> None:
    stage = Stage().running(W0, W1, W2, W3)
    stage.train(2)
    the(Pause, stage.tell(Resize(2)))
    decided = stage.leave_all("pause")
    assert len(the(StartGeneration, decided).generation.members) == 2
    assert {action.worker for action in of(ReleaseWorker, decided)} == {W2, W3}
    stage.join()
    assert len(of(RequestWorker, stage.tell(Resize(4)))) == 2


def test_a_size_beyond_the_job_is_cut_to_it() -> None:
    stage = Stage(virtual_workers=3, min_workers=2, max_workers=4)
    assert len(of(RequestWorker, stage.tell(Start()))) == 3, "no more workers than virtual workers"
    stage.tell(Resize(1))
    assert stage.controller.target == 2


def test_shrinking_while_nobody_trains_keeps_the_state() -> None:
    """Of the idle ones, those that hold the newest state are the last to be let go."""
    stage = Stage(min_workers=1, max_workers=4).running(W2, W3)
    stage.train(3)
    stage.ready(W0, W1)
    stage.leave_all("pause")
    assert (stage.members, holders(stage.generation)) == ([W0, W1, W2, W3], (2, 3))
    stage.tell(Resize(2))
    decided = stage.leave(W0, "peer", 0) + stage.leave(W1, "peer", 0)
    decided += stage.leave(W2, "peer") + stage.leave(W3, "peer")
    assert {action.worker for action in of(ReleaseWorker, decided)} == {W0, W1}
    generation = the(StartGeneration, decided).generation
    assert (generation.committed, [member.worker for member in generation.members]) == (3, [W2, W3])


def test_steps_go_on_record_once_and_in_order() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    reports = tuple(stage.report(step) for step in range(5))
    beats = [(0, reports[:2]), (0, reports[:3]), (1, ()), (0, reports[4:]), (0, reports[2:])]
    for rank, said in beats:
        stage.tell(Heartbeat((W0, W1)[rank], 0, "compute", 0, 0, said))
    assert [action.report.step for action in of(StepCommitted, stage.told)] == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------ deaths


def test_a_death_with_a_standby_is_answered_at_once() -> None:
    stage = Stage(max_workers=2, standby=1).running(W0, W1, W2)
    assert stage.members == [W0, W1]
    stage.train(4)
    decided = stage.tell(Died(W1, "SIGKILL"))
    assert the(Interrupt, decided).workers == (W0,)
    assert the(RequestWorker, decided).worker == WorkerId(1, 1)
    start = the(StartGeneration, stage.leave(W0, "peer", prepared=False))
    assert [member.worker for member in start.generation.members] == [W0, W2]
    assert start.generation.committed == 4
    stage.join()
    stage.train(1)
    recovery = stage.recorded("recovery")[-1]
    assert (recovery["incident"], recovery["worker"], recovery["steps_lost"]) == ("kill", 1, 0)
    # All that was moved, and the most that one member's buffers needed for it.
    assert (recovery["bytes_moved"], recovery["buffer_bytes"]) == (20, 3)


def test_the_neighbours_may_tell_first() -> None:
    stage = Stage().running(W0, W1)
    stage.train(1)
    the(Interrupt, stage.leave(W0, "peer"))
    assert not of(StartGeneration, stage.wait(0.5, W0))
    start = the(StartGeneration, stage.tell(Died(W1, "SIGKILL")))
    assert [member.worker for member in start.generation.members] == [W0]
    assert [incident["incident"] for incident in stage.recorded("incident")] == ["kill"]


def test_the_dead_do_not_speak() -> None:
    """What is still under way from a worker that was given up changes nothing."""
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(1)
    stage.tell(Died(W0, "SIGKILL"))
    assert not stage.tell(Heartbeat(W0, 0, "compute", 2, 2, (stage.report(1),)))
    assert not stage.leave(W0, "pause")
    assert stage.controller.progress.committed == 1


def test_two_deaths_at_once_are_two_incidents_and_one_new_generation() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(2)
    stage.tell(Died(W0, "SIGKILL"))
    stage.tell(Died(W2, "SIGKILL"), 0.0)
    start = the(StartGeneration, stage.leave(W1, "peer"))
    assert "worker 0 died" in start.generation.cause
    assert "worker 2 died" in start.generation.cause
    stage.join()
    stage.train(1)
    assert [(r["worker"], r["incident"]) for r in stage.recorded("recovery")] == [(0, "kill"), (2, "kill")]


def test_a_death_while_a_generation_forms() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(2)
    stage.tell(Died(W0, "SIGKILL"))
    stage.leave_all("peer", but=(W0,))
    assert stage.controller.state is RunState.FORMING
    the(Interrupt, stage.tell(Died(W1, "SIGKILL")))
    start = the(StartGeneration, stage.leave(W2, "peer"))
    assert (start.generation.number, start.generation.committed) == (2, 2)
    stage.join()
    stage.train(1)
    assert [(r["worker"], r["generation"]) for r in stage.recorded("recovery")] == [(0, 2), (1, 2)]


def test_who_missed_the_vote_rolls_forward() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(2)
    stage.tell(Died(W0, "SIGKILL"))
    stage.leave(W1, "peer", 3, reports=(stage.report(2),))
    start = the(StartGeneration, stage.leave(W2, "peer", 2, prepared=True))
    assert start.generation.committed == 3
    assert (holders(start.generation), start.generation.roll_forward) == ((0,), (1,))


def test_the_prepared_are_holders_when_the_last_that_committed_is_gone() -> None:
    """The step is on record and the gradient that was applied is still held: nothing is lost."""
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(2)
    stage.leave(W1, "peer", 2, prepared=True)
    stage.tell(Heartbeat(W0, 0, "compute", 3, 3, (stage.report(2),)))
    assert stage.controller.progress.committed == 3
    decided = stage.tell(Died(W0, "SIGKILL"))
    assert not of(Rollback, decided)
    generation = the(StartGeneration, decided).generation
    assert (generation.committed, holders(generation), generation.roll_forward) == (3, (), (0,))


def test_all_dead_goes_back_to_the_newest_checkpoint() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(10)
    stage.tell(CheckpointSaved(W0, Save(5, 0, 0), "ckpt-5"))
    stage.tell(CheckpointSaved(W0, Save(10, 0, 0), "", error="disk full"))
    stage.train(3)
    stage.tell(Died(W0, "SIGKILL", node_lost=True))
    stage.tell(Died(W1, "SIGKILL", node_lost=True))
    assert stage.recorded("waiting")
    decided = stage.ready(WorkerId(0, 1), WorkerId(1, 1))
    assert the(Rollback, decided).committed == 5
    generation = the(StartGeneration, decided).generation
    assert (generation.committed, generation.restore, holders(generation)) == (5, "ckpt-5", ())
    stage.join()
    assert [a.report.step for a in of(StepCommitted, stage.train(1))] == [5]
    recoveries = stage.recorded("recovery")
    assert sum(r["steps_lost"] for r in recoveries) == 8
    assert {r["source"] for r in recoveries} == {"checkpoint"}


def test_without_a_checkpoint_all_is_replayed() -> None:
    stage = Stage(max_workers=1).running(W0)
    stage.train(7)
    stage.tell(Died(W0, "SIGKILL"))
    decided = stage.ready(WorkerId(0, 1))
    assert the(Rollback, decided).committed == 0
    assert holders(the(StartGeneration, decided).generation) == (0,)
    stage.join()
    stage.train(1)
    assert stage.recorded("recovery")[0]["steps_lost"] == 7


def test_a_damaged_checkpoint_gives_way_to_an_older_one() -> None:
    config = ControllerConfig(total_steps=100, chooser=layouts(), min_workers=1, max_workers=1)
    stage = Stage(Controller(config, History(committed=10), {5: "c5", 10: "c10"}))
    stage.tell(Start())
    assert the(StartGeneration, stage.ready(W0)).generation.restore == "c10"
    decided = stage.leave(W0, "restore", 0, detail="digest of weights differs")
    assert stage.recorded("checkpoint_invalid") == [{"path": "c10", "reason": "digest of weights differs"}]
    assert the(Rollback, decided).committed == 5
    assert the(StartGeneration, decided).generation.restore == "c5"
    stage.join()
    stage.train(1)
    assert [(r["incident"], r["steps_lost"]) for r in stage.recorded("recovery")] == [("restart", 5)]


def test_a_read_error_while_training_does_not_condemn_the_checkpoint() -> None:
    stage = Stage(
        Controller(
            ControllerConfig(total_steps=100, chooser=layouts(), min_workers=1, max_workers=1),
            History(committed=10),
            {10: "c10"},
        )
    )
    stage.tell(Start())
    stage.ready(W0)
    stage.join()
    stage.train(1)
    stage.leave(W0, "restore", detail="the data cannot be read")
    assert stage.controller.checkpoints == {10: "c10"}
    assert stage.recorded("incident")[-1]["incident"] == "crash"


def test_a_step_whose_data_cannot_be_read_fails_the_run_in_the_end() -> None:
    """The phase is "restore", but nothing was restored: the failure counts as one of the step."""
    stage = Stage(max_workers=2).running(W0, W1)
    the(Interrupt, stage.leave(W0, "restore", detail="the data cannot be read"))
    stage.leave(W1, "peer")
    for number in range(1, 10):
        if stage.controller.state is RunState.OVER:
            break
        culprit = stage.members[-1]
        stage.leave(culprit, "restore", detail="the data cannot be read")
        stage.leave_all("peer", but=(culprit,))
        stage.ready(WorkerId(culprit.slot, number))
    finish = the(Finish, stage.told)
    assert finish.status == "failed"
    assert "the data cannot be read" in finish.reason


def test_a_half_received_state_is_no_state() -> None:
    """The last holder dies while it sends its state to a new worker; without a checkpoint that one makes the state of
    step 0 again."""
    stage = Stage(max_workers=2).running(W0)
    stage.train(5)
    stage.ready(W1)
    the(StartGeneration, stage.leave(W0, "pause"))
    stage.tell(Died(W0, "SIGKILL"))
    decided = stage.leave(W1, "peer", 0, held=NOTHING) + stage.wait(4.0, W1)
    generation = the(StartGeneration, decided).generation
    assert (generation.committed, generation.held) == (0, (WHOLE,))
    assert the(Rollback, decided).committed == 0


def test_too_few_wait_and_say_so_and_go_on() -> None:
    stage = Stage(min_workers=2, max_workers=2).running(W0, W1)
    stage.train(3)
    stage.tell(Died(W1, "SIGKILL"))
    decided = stage.leave(W0, "peer")
    assert records(decided, "waiting") == [{"workers": 1, "needed": 2}]
    assert not of(StartGeneration, stage.wait(60.0, W0))
    start = the(StartGeneration, stage.ready(WorkerId(1, 1)))
    assert (start.generation.committed, holders(start.generation)) == (3, (0,))


def test_waiting_has_an_end_when_the_job_says_so() -> None:
    stage = Stage(min_workers=2, max_workers=2, wait_timeout_s=30.0)
    stage.tell(Start())
    stage.ready(W0)
    finish = the(Finish, stage.wait(40.0, W0))
    assert finish.status == "failed"
    assert "elastic.workers.min" in finish.reason


def test_a_lost_node_is_one_failure_of_the_step() -> None:
    """Many workers go at once with a node; that says nothing against the step they were in."""
    workers = [WorkerId(slot, 0) for slot in range(32)]
    stage = Stage(virtual_workers=32, max_workers=32).running(*workers)
    stage.train(1)
    for worker in workers[1:]:
        stage.tell(Died(worker, "node", node_lost=True), 0.0)
    the(StartGeneration, stage.leave(W0, "peer"))


# ------------------------------------------------------------------------------------ hangs and stalls


def test_a_silent_member_is_ended_and_the_others_go_on() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    silent_since = stage.now
    decided = stage.wait(4.0, W0, phase="reduce")
    assert the(KillWorker, decided).worker == W1
    assert the(Interrupt, decided).workers == (W0,)
    the(StartGeneration, stage.leave(W0, "peer"))
    incident = stage.recorded("incident")[0]
    assert (incident["incident"], incident["worker"], incident["at"]) == ("hang", 1, silent_since)
    assert 3.0 <= incident["detect_seconds"] <= 4.0
    assert not stage.tell(Died(W1, "killed")), "its death is no second incident"


def test_silence_on_a_busy_machine_is_borne_for_longer_but_not_for_ever() -> None:
    def silent_for(own: float, controller: float) -> float:
        stage = Stage(max_workers=2, heartbeat_timeout_s=3.0).running(W0, W1)
        view = stage.controller.workers[W1]
        stage.tell(Heartbeat(W1, 0, "compute", 0, 0, lateness_s=own), 0.1)
        silent_since = stage.now
        while view.alive:
            stage.tell(Heartbeat(W0, 0, "reduce", 0, 0), 0.25)
            stage.tell(Tick(controller), 0.0)
            assert stage.now - silent_since < 60.0
        assert not of(Finish, stage.told)
        return stage.now - silent_since

    configured = silent_for(0.0, 0.0)
    assert configured == pytest.approx(3.0, abs=0.26)
    assert silent_for(0.09, 0.09) == configured, "what is usual on a quiet machine changes nothing"
    assert silent_for(1.1, 0.0) == pytest.approx(7.0, abs=0.26), "it has said that it is late"
    assert silent_for(0.0, 1.1) == pytest.approx(7.0, abs=0.26), "the controller is late itself"
    assert silent_for(1000.0, 0.0) == pytest.approx(15.0, abs=0.26)


def test_a_busy_neighbour_speaks_for_its_node_and_no_other() -> None:
    stage = Stage(max_workers=3, heartbeat_timeout_s=3.0)
    stage.tell(Start())
    for worker, node in ((W0, "a"), (W1, "a"), (W2, "b")):
        stage.ready(worker, node=node)
    stage.join()
    for _ in range(4):
        stage.tell(Heartbeat(W0, 0, "reduce", 0, 0, lateness_s=1.1), 1.0)
        stage.tell(Tick(), 0.0)
    assert [action.worker for action in of(KillWorker, stage.told)] == [W2]


def test_a_deadlocked_member_is_the_one_furthest_behind() -> None:
    stage = Stage(max_workers=2, progress_timeout_s=60.0).running(W0, W1)
    stage.train(10)
    for _ in range(250):
        stage.tell(Heartbeat(W0, 0, "reduce", 10, 10), 0.1)
        stage.tell(Heartbeat(W1, 0, "compute", 10, 10), 0.0)
        if of(KillWorker, stage.tell(Tick(), 0.0)):
            break
    assert the(KillWorker, stage.told).worker == W1
    incident = stage.recorded("incident")[0]
    assert (incident["incident"], incident["worker"]) == ("stall", 1)
    assert 20.0 <= incident["detect_seconds"] < 21.0, "twenty steps of one second"


def test_a_partition_is_interrupted_and_nobody_is_ended() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(10)
    decided = stage.wait(21.0, W0, W1, phase="reduce")
    assert the(Interrupt, decided).workers == (W0, W1)
    assert not of(KillWorker, decided)
    the(StartGeneration, stage.leave_all("peer"))


def test_all_equally_slow_are_no_culprits() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(10)
    assert not of(KillWorker, stage.wait(21.0, W0, W1, phase="compute"))
    the(StartGeneration, stage.leave_all("peer"))
    assert stage.recorded("incident")[0]["worker"] is None


def test_who_does_not_leave_when_told_is_ended() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(10)
    stage.wait(0.5, W0, W1, W2, phase="reduce")
    stage.tell(Died(W0, "SIGKILL"))
    stage.leave(W1, "peer")
    assert the(KillWorker, stage.wait(4.0, W1, W2, phase="reduce")).worker == W2
    assert {member.worker for member in stage.generation.members} == {W1}


def test_moving_a_large_state_takes_its_time() -> None:
    """The pace of steps says nothing about the time a state takes to move."""
    stage = Stage(max_workers=2, progress_timeout_s=60.0).running(W0)
    stage.train(20, seconds=0.1)
    stage.ready(W1)
    stage.leave(W0, "pause")
    assert not of(Interrupt, stage.wait(50.0, W0, W1, phase="form"))
    assert of(Interrupt, stage.wait(15.0, W0, W1, phase="form"))


def test_a_controller_that_slept_blames_nobody() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(10)
    assert not stage.tell(Tick(), after=120.0)
    stage.tell(Died(W0, "SIGKILL"))
    assert not of(KillWorker, stage.tell(Tick(), after=120.0))


def test_a_node_that_falls_silent_with_all_its_workers_is_one_incident() -> None:
    stage = Stage(max_workers=4)
    stage.tell(Start())
    stage.ready(W0, W1, node="here")
    stage.ready(W2, W3, node="there")
    stage.join()
    stage.train(2)
    stage.wait(2.0, *stage.members)
    decided = stage.wait(6.0, W0, W1)
    assert {action.worker for action in of(KillWorker, decided)} == {W2, W3}
    incidents = stage.recorded("incident")
    assert [incident["incident"] for incident in incidents] == ["node"]
    assert "worker 2, 3" in incidents[0]["cause"]


def test_a_long_computation_that_moves_is_not_stuck() -> None:
    """Micro-batches, transfers and reads count, however long the phase takes."""
    stage = Stage(max_workers=2, progress_timeout_s=60.0).running(W0, W1)
    number = stage.generation.number
    for moves in range(100):
        for worker in (W0, W1):
            decided = stage.tell(Heartbeat(worker, number, "compute", 0, 0, moves=moves), 0.5)
        assert not of(KillWorker, decided + stage.tell(Tick(), 1.0))
    assert of(KillWorker, stage.wait(70.0, W0)), "what stands still is found all the same"


def test_a_bad_machine_does_not_end_a_run_that_trains() -> None:
    stage = Stage(max_workers=2).running(W0)
    stage.train(3)
    assert not stage.tell(Abort("torch sees no CUDA device"))
    assert stage.train(1)
    assert the(Finish, Stage().tell(Abort("torch sees no CUDA device"))).status == "failed"


def test_the_time_a_controller_slept_is_not_waited_for_workers() -> None:
    stage = Stage(min_workers=2, max_workers=2, wait_timeout_s=30.0)
    stage.tell(Start())
    stage.ready(W0)
    assert not of(Finish, stage.tell(Tick(), after=60.0))
    assert not of(Finish, stage.wait(25.0, W0))
    the(Finish, stage.wait(10.0, W0))


def test_nothing_follows_the_end_of_a_run() -> None:
    """Two are found lost at once, and the first loss is one failure too many."""
    stage = Stage(max_workers=2, max_failures_per_step=1 / 4, heartbeat_timeout_s=5.0).running(W0, W1)
    stage.train(1)
    decided = stage.wait(10.0)
    assert isinstance(decided[-1], Finish), decided
    the(KillWorker, decided)


def test_members_that_lose_each_other_for_ever_end_the_run() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    for _ in range(20):
        if of(Finish, stage.leave_all("peer")):
            break
    finish = the(Finish, stage.told)
    assert finish.status == "failed"
    assert "lost a peer" in finish.reason
    # More often than the limit of 3: what a number says must not look like a mistake.
    assert "failed 6 times, which counts as 3 of elastic.max_failures_per_step = 3" in finish.reason
    assert {incident["incident"] for incident in stage.recorded("incident")} == {"network"}


# ------------------------------------------------------------------------------------ notices


def test_a_drained_worker_leaves_at_a_step_boundary() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(4)
    decided = stage.tell(DrainNotice((W1,), "spot", stage.now + 30.0))
    the(Pause, decided)
    the(RequestWorker, decided)
    stage.train(1)
    decided = stage.leave_all("pause")
    assert [m.worker for m in the(StartGeneration, decided).generation.members] == [W0, W2]
    assert the(ReleaseWorker, decided).worker == W1
    stage.join()
    stage.train(1)
    recovery = stage.recorded("recovery")[0]
    assert (recovery["incident"], recovery["worker"], recovery["steps_lost"]) == ("drain", 1, 0)
    assert len(stage.recorded("incident")) == 1


def test_a_notice_for_a_worker_that_is_starting_lets_it_go() -> None:
    stage = Stage(max_workers=2)
    stage.tell(Start())
    stage.tell(Placed(W1, "node-b"))
    decided = stage.tell(DrainNotice((W1,), "spot", stage.now + 60.0))
    assert the(ReleaseWorker, decided).worker == W1
    assert the(RequestWorker, decided).worker == WorkerId(1, 1)


def test_a_gpu_that_its_driver_gives_up_costs_the_worker_and_its_node_is_avoided() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(4)
    decided = stage.tell(GpuTrouble(W1, "replace", "Xid 79"))
    assert the(KillWorker, decided).worker == W1
    the(Interrupt, decided)
    request = the(RequestWorker, decided)
    assert (request.worker, request.avoid, request.must_avoid) == (WorkerId(1, 1), ("node-1",), False)
    assert [event["action"] for event in stage.recorded("gpu_faulty")] == ["replace"]
    (incident,) = stage.recorded("incident")
    assert (incident["incident"], incident["cause"]) == ("device", "the GPU of worker 1: Xid 79")
    assert stage.tell(GpuTrouble(W1, "replace", "Xid 79")) == [], "it is gone already"
    assert [event["node"] for event in stage.recorded("node_suspected")] == ["node-1"]
    assert the(StartGeneration, stage.leave_all("peer", but=(W1,))).generation.committed == 4


def test_a_gpu_that_is_given_up_by_whom_nobody_misses_is_no_incident() -> None:
    stage = Stage(max_workers=2)
    stage.tell(Start())
    stage.ready(W0)
    stage.tell(Placed(W1, "node-b"))
    decided = stage.tell(GpuTrouble(W1, "replace", "Xid 48"))
    assert the(KillWorker, decided).worker == W1
    assert stage.recorded("incident") == []
    stage.wait(5.0, W0)
    assert of(RequestWorker, stage.told)[-1].avoid == ("node-b",), "after a pause, as of all that cannot be started"


@pytest.mark.parametrize("least", [1, 3])
def test_a_gpu_that_is_to_be_reset_is_left_when_there_is_another(least: int) -> None:
    """However few the run could do with, and for as long as it takes: it works all the while."""
    stage = Stage(min_workers=least, max_workers=3).running(W0, W1, W2)
    stage.train(4)
    decided = stage.tell(GpuTrouble(W1, "retire", "a row"))
    assert not of(Pause, decided)
    request = the(RequestWorker, decided)
    assert (request.avoid, request.must_avoid) == (("node-1",), False)
    assert stage.tell(GpuTrouble(W1, "retire", "a row")) == [], "it is told with every heartbeat"
    told = Heartbeat(W1, stage.generation.number, "compute", 4, 4, trouble=GpuTrouble(W1, "retire", "a row"))
    assert stage.tell(told) == []
    stage.now += 3 * 3600
    stage.train(5)
    assert stage.controller.state is RunState.RUNNING
    newcomer = of(RequestWorker, stage.told)[-1].worker
    the(Pause, stage.ready(newcomer))
    decided = stage.leave_all("pause")
    assert {m.worker for m in the(StartGeneration, decided).generation.members} == {W0, W2, newcomer}
    assert the(ReleaseWorker, decided).reason == "another took its place, as its device is faulty"
    stage.join()
    stage.train(1)
    (recovery,) = stage.recorded("recovery")
    assert (recovery["incident"], recovery["steps_lost"]) == ("evict", 0)
    assert "whose device is faulty" in recovery["cause"]


def test_a_successor_knows_who_is_to_leave_a_faulty_gpu_and_does_not_keep_it_for_being_fast() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(4)
    stage.tell(GpuTrouble(W1, "retire", "a row"))
    past = history_of(stage).workers
    assert (past.faulty, past.suspects, past.evicting) == ({W1}, {"node-1"}, {})
    roster = Roster(ControllerConfig(total_steps=1, min_workers=1, max_workers=2, chooser=layouts()), past, WorkerView)
    roster.add(WorkerView(W1, requested_at=0.0, state=WorkerState.IDLE, node="node-1"))
    roster.keep_on(W1)
    view = roster.workers[W1]
    assert (view.evicting, view.faulty, view.leaving) == (True, True, True)


def test_the_rest_of_a_unit_leaves_a_place_with_a_failed_gpu_in_it() -> None:
    """Who comes after it would be given that GPU again."""
    stage = Stage(max_workers=4, tensor=2).running(W0, W1, W2, W3)
    stage.train(2)
    decided = stage.tell(GpuTrouble(W1, "replace", "Xid 79"))
    asked = of(RequestWorker, decided)
    assert sorted(request.worker.slot for request in asked) == [4, 5], "another unit"
    assert {request.avoid for request in asked} == {("node-1",)}
    assert [(told["worker"], told["action"]) for told in stage.recorded("gpu_faulty")] == [
        (1, "replace"),
        (0, "retire"),
    ]


def test_a_successor_refuses_a_worker_with_other_bits_that_has_become_warm_meanwhile() -> None:
    stage = Stage(max_workers=2)
    stage.tell(Start())
    stage.tell(Placed(W0, "node-0"))
    stage.tell(replace(ready_message(W0), probe="aaaa", device="a card"))
    after = successor(stage)
    odd = replace(ready_message(W1), probe="bbbb", device="another")
    known = replace(ready_message(W0), probe="aaaa", device="a card")
    everything = whole(ELEMENTS, 1)
    accounts = tuple(Status(ready, None, None, 0, everything, False, False, 1) for ready in (known, odd))
    decided = after.tell(TakeOver(accounts, ()))
    assert the(KillWorker, decided).worker == W1
    assert "computes other bits than worker 0" in the(KillWorker, decided).reason
    assert [event["node"] for event in records(decided, "node_suspected")] == ["node-1"]
    assert records(decided, "worker_ready") == [], "of the one that is known that is on record"
    fresh = Stage(max_workers=2)
    fresh.tell(Start())
    after = successor(fresh)
    decided = after.tell(TakeOver(accounts, ()))
    assert [(event["worker"], event["probe"]) for event in records(decided, "worker_ready")] == [(0, "aaaa")]
    assert the(KillWorker, decided).worker == W1, "the first that is found is what others are measured by"


def test_requests_that_ray_does_not_answer_are_no_shortage() -> None:
    stage = Stage(min_workers=1, max_workers=2)
    stage.tell(Start())
    stage.ready(W0)
    for _ in range(2000):
        stage.tell(Tick(asks_in_vain=True), 0.5)
        stage.tell(Heartbeat(W0, 0, "compute", 0, 0), 0.0)
    assert of(TellShortage, stage.told) == []
    assert [event["workers"] for event in stage.recorded("requests_held")] == [[1]]
    for _ in range(2000):
        stage.tell(Tick(), 0.5)
        stage.tell(Heartbeat(W0, 0, "compute", 0, 0), 0.0)
    assert len(of(TellShortage, stage.told)) == 1


def test_an_error_of_a_program_on_a_gpu_is_put_on_record() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    (told,) = stage.tell(GpuTrouble(W1, "none", "Xid 13"))
    assert isinstance(told, GpuFaulty)


def test_a_successor_still_avoids_nodes_of_which_a_gpu_failed() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(2)
    stage.tell(GpuTrouble(W1, "replace", "Xid 79"))
    assert history_of(stage).workers.suspects == {"node-1"}
    after = successor(stage)
    after.tell(Start())
    assert {request.avoid for request in of(RequestWorker, after.told)} == {("node-1",)}


def test_a_drained_worker_that_is_needed_works_on_until_its_replacement_is_there() -> None:
    stage = Stage(min_workers=2, max_workers=2).running(W0, W1)
    stage.train(4)
    assert not of(Pause, stage.tell(DrainNotice((W1,), "spot", stage.now + 60.0)))
    stage.train(5)
    the(Pause, stage.ready(W2))
    decided = stage.leave_all("pause")
    assert [m.worker for m in the(StartGeneration, decided).generation.members] == [W0, W2]
    stage.join()
    stage.train(1)
    assert stage.recorded("recovery")[0]["stall_seconds"] < 1.0, "it trained until the replacement came"


def test_a_drained_worker_that_is_needed_still_works_after_a_death() -> None:
    stage = Stage(min_workers=2, max_workers=3).running(W0, W1, W2)
    stage.train(4)
    stage.tell(DrainNotice((W1,), "spot", stage.now + 60.0))
    stage.tell(Died(W0, "SIGKILL"))
    decided = stage.leave(W1, "pause") + stage.leave(W2, "pause")
    generation = the(StartGeneration, decided).generation
    assert [(m.worker, bool(w)) for m, w in zip(generation.members, generation.layout.assignment, strict=True)] == [
        (W1, True),
        (W2, True),
    ]
    assert not of(Pause, stage.join()), "and is not asked to leave before there is another"


def test_the_only_worker_hands_its_state_over_before_it_leaves() -> None:
    stage = Stage(max_workers=1).running(W0)
    stage.train(4)
    assert the(RequestWorker, stage.tell(DrainNotice((W0,), "spot", stage.now + 60.0))).worker == W1
    stage.train(3)
    the(Pause, stage.ready(W1))
    generation = the(StartGeneration, stage.leave(W0, "pause")).generation
    assert [member.worker for member in generation.members] == [W1, W0], "a spare comes last"
    assert (holders(generation), generation.layout.spares) == ((1,), 1)
    assert generation.layout.assignment == (tuple(range(8)),)
    the(Pause, stage.join())
    stage.train(1)
    decided = stage.leave_all("pause")
    generation = the(StartGeneration, decided).generation
    assert [member.worker for member in generation.members] == [W1]
    assert the(ReleaseWorker, decided).worker == W0
    assert not of(Pause, stage.join()), "that was the last change"
    stage.train(1)
    assert generation.committed == 8
    assert [r["incident"] for r in stage.recorded("recovery")] == ["drain"]


def test_a_notice_does_not_take_the_last_holder_while_it_is_needed() -> None:
    stage = Stage(min_workers=2, max_workers=2).running(W0, W1)
    stage.train(3)
    stage.tell(Died(W1, "SIGKILL"))
    stage.leave(W0, "peer")
    assert stage.controller.state is RunState.WAITING
    assert not of(ReleaseWorker, stage.tell(DrainNotice((W0,), "spot", stage.now + 4.0)))
    generation = the(StartGeneration, stage.ready(WorkerId(1, 1), W2)).generation
    assert generation.committed == 3
    assert {member.worker for member in generation.members} == {W0, WorkerId(1, 1), W2}


def test_a_deadline_that_nobody_waited_for() -> None:
    """No replacement in time: the worker stops 5 s before the end, and the run waits with its state while it can."""
    stage = Stage(max_workers=1).running(W0)
    stage.train(2)
    stage.tell(CheckpointSaved(W0, Save(2, 0, 0), "c2"))
    stage.tell(DrainNotice((W0,), "spot", stage.now + 10.0))
    assert not of(Pause, stage.wait(4.0, W0))
    the(Pause, stage.wait(2.0, W0))
    stage.leave(W0, "pause")
    assert stage.controller.state is RunState.WAITING
    stage.tell(Died(W0, "its node is gone", node_lost=True), 3.0)
    assert the(StartGeneration, stage.ready(W1)).generation.restore == "c2"


# ------------------------------------------------------------------------------------ exceptions and ends


def test_an_exception_ends_its_worker_only() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(2)
    decided = stage.leave(W0, "exception", detail="RuntimeError: bad luck")
    assert the(KillWorker, decided).worker == W0
    assert the(Interrupt, decided).workers == (W1,)
    the(StartGeneration, stage.leave(W1, "peer"))
    assert stage.recorded("incident")[0]["incident"] == "crash"


def test_an_exception_of_the_only_holder_costs_no_step_it_tries_again() -> None:
    stage = Stage(max_workers=1).running(W0)
    stage.train(2)
    start = the(StartGeneration, stage.leave(W0, "exception", detail="RuntimeError: bad luck"))
    assert (start.generation.committed, holders(start.generation)) == (2, (0,))
    assert stage.members == [W0]
    assert of(KillWorker, stage.told) == []
    stage.join()
    stage.train(1)
    [recovery] = stage.recorded("recovery")
    assert (recovery["incident"], recovery["worker"], recovery["step"], recovery["steps_lost"]) == ("crash", 0, 2, 0)


def test_a_step_that_always_raises_ends_the_run_with_its_reason() -> None:
    stage = Stage(max_workers=1, max_failures_per_step=3).running(W0)
    for _ in range(3):
        assert not of(Finish, stage.told)
        decided = stage.leave(stage.members[0], "exception", detail="IndexError: token 300 of 256")
        if of(Finish, decided):
            break
        stage.join()
    finish = the(Finish, stage.told)
    assert finish.status == "failed"
    assert finish.reason == "step 0 failed 3 times, last: worker 0 raised: IndexError: token 300 of 256"


def test_deaths_do_not_make_the_next_exception_fatal() -> None:
    """Failures add up by what they say about the step; an exception does not turn earlier deaths into exceptions."""
    stage = Stage(max_workers=1, max_failures_per_step=3).running(W0)
    for incarnation in range(1, 5):
        stage.tell(Died(stage.members[0], "SIGKILL"))
        stage.ready(WorkerId(0, incarnation))
        stage.join()
    stage.leave(stage.members[0], "exception", detail="RuntimeError")
    assert stage.controller.status is None


def test_workers_that_never_start_end_the_run() -> None:
    stage = Stage(max_workers=1)
    stage.tell(Start())
    for incarnation in range(10):
        stage.tell(Placed(WorkerId(0, incarnation), "n"))
        if of(Finish, stage.tell(Died(WorkerId(0, incarnation), "ImportError: no module named torch"))):
            break
        stage.wait(31.0)
    assert incarnation == 4
    assert "ImportError" in the(Finish, stage.told).reason


def test_a_lost_node_is_no_reason_to_distrust_the_start() -> None:
    workers = [WorkerId(slot, 0) for slot in range(8)]
    stage = Stage(max_workers=8)
    stage.tell(Start())
    for worker in workers:
        stage.tell(Placed(worker, "n"))
    for worker in workers:
        assert not of(Finish, stage.tell(Died(worker, "node", node_lost=True)))


def test_the_end_compares_what_all_hold() -> None:
    stage = Stage(total_steps=3, max_workers=2).running(W0, W1)
    stage.train(3)
    ask = the(Finalize, stage.leave_all("complete", 3))
    assert ask.workers == (W0, W1)
    assert not of(Finish, stage.tell(Finalized(W0, "sha256:a")))
    assert not of(Finish, stage.save())
    finish = the(Finish, stage.tell(Finalized(W1, "sha256:a")))
    assert (finish.status, finish.digest) == ("finished", "sha256:a")
    assert stage.tell(Tick()) == []


def test_the_end_is_saved_by_all_that_have_it() -> None:
    stage = Stage(total_steps=3, max_workers=2).running(W0, W1)
    stage.train(3)
    order = the(SaveState, stage.leave_all("complete", 3))
    assert order == SaveState((W0, W1), Save(3, 0, 0, attempt=1))
    plan = SavePlan(order.save, order.workers)
    assert not of(Finish, stage.tell(Finalized(W0, "sha256:a")) + stage.tell(Finalized(W1, "sha256:a")))
    stage.tell(PartSaved(W0, plan, 0, "a"))
    commit = the(CommitCheckpoint, stage.tell(PartSaved(W1, plan, 1, "b")))
    assert (commit.worker, commit.parts) == (W0, ((0, "a"), (1, "b")))
    finish = the(Finish, stage.tell(CheckpointSaved(W0, order.save, "c3")))
    assert (finish.status, finish.digest) == ("finished", "sha256:a")
    assert stage.controller.checkpoints == {3: "c3"}


def test_what_was_saved_at_the_last_step_boundary_is_not_saved_again() -> None:
    stage = Stage(total_steps=3, max_workers=2).running(W0, W1)
    stage.train(3)
    plan = SavePlan(Save(3, 0, 0), (W0, W1))
    stage.tell(SaveBegun(W0, plan))
    assert not of(SaveState, stage.leave_all("complete", 3))
    stage.tell(PartSaved(W0, plan, 0, "a"))
    for worker in (W0, W1):
        assert not of(Finish, stage.tell(Finalized(worker, "sha256:a")))
    stage.tell(PartSaved(W1, plan, 1, "b"))
    the(Finish, stage.tell(CheckpointSaved(W0, plan.save, "c3")))


def test_who_dies_at_the_end_is_saved_for_by_the_others() -> None:
    stage = Stage(total_steps=3, max_workers=2).running(W0, W1)
    stage.train(3)
    first = the(SaveState, stage.leave_all("complete", 3)).save
    stage.tell(PartSaved(W1, SavePlan(first, (W0, W1)), 1, "b"))
    decided = stage.tell(Finalized(W1, "sha256:a")) + stage.tell(Died(W0, "SIGKILL"))
    assert the(DiscardCheckpoint, decided) == DiscardCheckpoint(W1, first)
    again = the(SaveState, decided)
    assert again == SaveState((W1,), Save(3, 0, 0, attempt=2))
    stage.tell(PartSaved(W1, SavePlan(again.save, (W1,)), 0, "a"))
    the(Finish, stage.tell(CheckpointSaved(W1, again.save, "c3")))


def refuse(stage: Stage, save: Save) -> list[Action]:
    return stage.tell(PartSaved(W0, SavePlan(save, (W0,)), 0, "", error="No space left on device"))


def unsaved(**changes: Any) -> tuple[Stage, Save]:
    """A run at its end, which worker 0 holds, and whose storage is full."""
    stage = Stage(total_steps=3, max_workers=1, final_patience_s=50.0, **changes).running(W0)
    stage.train(3)
    save = the(SaveState, stage.leave_all("complete", 3)).save
    stage.tell(Finalized(W0, "sha256:a"))
    assert not of(Finish, refuse(stage, save))
    assert stage.recorded("checkpoint_failed") == [{"committed": 3, "error": "No space left on device"}]
    return stage, save


def test_an_end_that_cannot_be_saved_at_first_is_saved_later() -> None:
    stage, first = unsaved()
    decided = stage.wait(3.0, W0)
    again = the(SaveState, decided).save
    assert (again.committed, again.attempt) == (3, first.attempt + 1)
    assert not of(Finish, decided), "the worker holds the state until it is saved"
    stage.tell(PartSaved(W0, SavePlan(again, (W0,)), 0, "a"))
    assert the(Finish, stage.tell(CheckpointSaved(W0, again, "c3"))) == Finish(
        "finished", "all steps committed", "sha256:a"
    )


def test_an_end_that_is_never_saved_is_a_failure_and_says_what_there_is() -> None:
    stage, _ = unsaved()
    tries, finish = 1, None
    while finish is None:
        decided = stage.wait(0.5, W0)
        for action in of(SaveState, decided):
            tries += 1
            decided += refuse(stage, action.save)
        finish = next(iter(of(Finish, decided)), None)
    assert tries == 5, "after 0, 2, 6, 14 and 30 s"
    assert (finish.status, finish.digest) == ("failed", "sha256:a")
    assert finish.reason == (
        "all steps committed, but the state of 3 steps could not be saved: No space left on device; there is no "
        "checkpoint, and `orchestrator resume` trains the rest again"
    )


@pytest.mark.parametrize(("checkpoints", "start", "source"), [({2: "c2"}, 2, "checkpoint"), ({}, 0, "initial")])
def test_a_run_whose_end_was_not_saved_is_gone_on_with(checkpoints: dict[int, str], start: int, source: str) -> None:
    config = ControllerConfig(total_steps=3, chooser=layouts(), min_workers=1, max_workers=1)
    stage = Stage(Controller(config, History(committed=3), checkpoints))
    stage.tell(Start())
    decided = stage.ready(W0)
    assert the(Rollback, decided).committed == start
    assert the(StartGeneration, decided).generation.committed == start
    assert stage.recorded("generation")[0]["source"] == source
    stage.join()
    stage.train(3 - start)
    assert [(r["steps_lost"], r["source"]) for r in stage.recorded("recovery")] == [(3 - start, source)]
    save = the(SaveState, stage.leave_all("complete", 3)).save
    stage.tell(Finalized(W0, "sha256:a"))
    stage.tell(PartSaved(W0, SavePlan(save, (W0,)), 0, "a"))
    assert the(Finish, stage.tell(CheckpointSaved(W0, save, "c3"))).status == "finished"


def test_steps_that_only_a_part_of_a_checkpoint_tells_of_are_on_record_before_it_is_used() -> None:
    """All workers may be lost before the next heartbeat."""
    stage = Stage(max_workers=1).running(W0)
    stage.train(2)
    plan = SavePlan(Save(4, 0, 0), (W0,))
    reports = tuple(stage.report(step) for step in (2, 3))
    stage.tell(PartSaved(W0, plan, 0, "a", reports=reports))
    assert stage.controller.progress.committed == 4
    stale = SavePlan(Save(6, 0, 9), (W0,))
    stage.tell(PartSaved(W0, stale, 0, "a", reports=tuple(stage.report(step) for step in (4, 5))))
    assert stage.controller.progress.committed == 4, "that was another generation"


def test_who_stops_a_run_that_tries_to_save_its_end_need_not_wait() -> None:
    stage, _ = unsaved()
    finish = the(Finish, stage.tell(Stop("enough")))
    assert finish.status == "failed"
    assert "could not be saved: No space left on device" in finish.reason


def test_a_stop_whose_state_is_not_saved_is_a_failure_too() -> None:
    stage = Stage(total_steps=9, max_workers=1, final_patience_s=0.0).running(W0)
    stage.train(3)
    stage.tell(Stop("enough"))
    save = the(SaveState, stage.leave_all("pause", 3)).save
    stage.tell(Finalized(W0, "sha256:a"))
    decided = refuse(stage, save) + stage.wait(1.0, W0)
    finish = the(Finish, decided)
    assert (finish.status, finish.reason.split(":")[0]) == (
        "failed", "enough, but the state of 3 steps could not be saved"
    )  # fmt: skip


def test_a_checkpoint_that_is_asked_for_is_made_at_the_next_step_boundary() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    assert the(RequestSave, stage.tell(SaveRequested())) == RequestSave((W0, W1), 0)
    assert not of(RequestSave, stage.tell(SaveRequested()) + stage.wait(2.0, W0, W1)), "they are told once"
    plan = SavePlan(Save(1, 0, 0), (W0, W1))
    stage.train(1)
    stage.tell(SaveBegun(W0, plan))
    stage.tell(PartSaved(W1, plan, 1, "b"))
    decided = stage.tell(Died(W0, "SIGKILL")) + stage.leave(W1, "peer", 1)
    assert the(DiscardCheckpoint, decided).worker == W1
    the(StartGeneration, decided)
    assert the(RequestSave, stage.join()) == RequestSave((W1,), 1), "lost with a writer, it is made again at once"


@pytest.mark.parametrize("why", ["a stop", "a drain notice", "time"])
def test_there_are_reasons_to_save(why: str) -> None:
    stage = Stage(max_workers=2, save_every_s=30.0).running(W0, W1)
    match why:
        case "a stop":
            decided = stage.tell(Stop("enough"))
        case "a drain notice":
            decided = stage.tell(DrainNotice((W0,), "spot", stage.now + 60.0))
        case _:
            assert not of(RequestSave, stage.wait(25.0, W0, W1))
            decided = stage.wait(15.0, W0, W1)
    kinds = [type(action) for action in decided if isinstance(action, (RequestSave, Pause))]
    assert kinds == ([RequestSave] if why == "time" else [RequestSave, Pause]), "it is saved before it is left"


def test_a_draining_worker_stays_until_it_has_written_its_part() -> None:
    stage = Stage(max_workers=2).running(W0, W1, W2)
    stage.tell(DrainNotice((W0,), "spot", stage.now + 60.0))
    stage.train(1)
    plan = SavePlan(Save(1, 0, 0), (W0, W1))
    stage.tell(SaveBegun(W0, plan))
    stage.leave_all("pause", 1)
    assert not of(ReleaseWorker, stage.join() + stage.wait(1.0, *stage.members))
    stage.tell(PartSaved(W1, plan, 1, "b"))
    decided = stage.tell(PartSaved(W0, plan, 0, "a")) + stage.wait(1.0, *stage.members)
    assert [action.worker for action in of(ReleaseWorker, decided)] == [W0]


def test_a_storage_that_cannot_be_read_does_not_condemn_the_checkpoint() -> None:
    config = ControllerConfig(total_steps=100, chooser=layouts(), min_workers=1, max_workers=1)
    stage = Stage(Controller(config, History(committed=10), {10: "c10"}))
    stage.tell(Start())
    assert the(StartGeneration, stage.ready(W0)).generation.restore == "c10"
    again = stage.leave(W0, "storage", 0, detail="connection refused", held=NOTHING)
    assert the(StartGeneration, again).generation.restore == "c10"
    assert stage.controller.checkpoints == {10: "c10"}
    stage.leave(W0, "storage", 0, detail="connection refused", held=NOTHING)
    finish = the(Finish, stage.leave(W0, "storage", 0, detail="connection refused", held=NOTHING))
    assert finish.status == "failed"
    assert "connection refused" in finish.reason


def test_a_checkpoint_that_is_not_for_this_job_is_for_a_person_to_sort_out() -> None:
    config = ControllerConfig(total_steps=100, chooser=layouts(), min_workers=1, max_workers=1)
    stage = Stage(Controller(config, History(committed=10), {10: "c10", 5: "c5"}))
    stage.tell(Start())
    stage.ready(W0)
    finish = the(Finish, stage.leave(W0, "unusable", 0, detail="encrypted with another key", held=NOTHING))
    assert (finish.status, finish.reason) == ("failed", "encrypted with another key")


def test_what_is_the_jobs_fault_ends_the_run_at_once() -> None:
    """A model that changes what it keeps would do so again on any worker: none is replaced."""
    stage = Stage(total_steps=9, max_workers=2).running(W0, W1)
    stage.train(3)
    asked = len(of(RequestWorker, stage.told))
    finish = the(Finish, stage.leave(W0, "job", 3, detail="the model has changed 'layers.1.rate'"))
    assert (finish.status, finish.reason) == ("failed", "the model has changed 'layers.1.rate'")
    assert len(of(RequestWorker, stage.told)) == asked
    assert records(stage.told, "incident") == []


def test_states_that_differ_fail_the_run() -> None:
    stage = Stage(total_steps=3, max_workers=2).running(W0, W1)
    stage.train(3)
    stage.leave_all("complete", 3)
    stage.tell(Finalized(W0, "sha256:a"))
    stage.save()
    finish = the(Finish, stage.tell(Finalized(W1, "sha256:b")))
    assert finish.status == "failed"
    assert "sha256:a" in finish.reason
    assert "sha256:b" in finish.reason


@pytest.mark.parametrize("how", ["dies", "hangs", "is mute", "cannot"])
def test_one_of_those_asked_for_the_end_fails(how: str) -> None:
    stage = Stage(total_steps=3, max_workers=2, finalize_timeout_s=20.0).running(W0, W1)
    stage.train(3)
    stage.leave_all("complete", 3)
    stage.save()
    decided = stage.tell(Finalized(W1, "sha256:a"))
    match how:
        case "dies":
            decided = stage.tell(Died(W0, "SIGKILL"))
        case "hangs":
            decided = stage.wait(5.0, W1)
        case "is mute":
            decided = stage.wait(25.0, W0, W1)
        case "cannot":
            decided = stage.tell(Finalized(W0, "", error="OSError: disk"))
    assert (the(Finish, decided).status, the(Finish, decided).digest) == ("finished", "sha256:a")


def test_all_of_those_asked_for_the_end_die() -> None:
    stage = Stage(total_steps=3, max_workers=1).running(W0)
    stage.train(3)
    stage.tell(CheckpointSaved(W0, Save(2, 0, 0), "c2"))
    stage.leave(W0, "complete", 3)
    stage.tell(Died(W0, "SIGKILL"))
    assert the(StartGeneration, stage.ready(WorkerId(0, 1))).generation.restore == "c2"
    stage.join()
    stage.train(1)
    stage.leave_all("complete", 3)
    stage.tell(Finalized(WorkerId(0, 1), "sha256:a"))
    the(Finish, stage.save())
    assert [(r["incident"], r["steps_lost"]) for r in stage.recorded("recovery")] == [("kill", 1)]


@pytest.mark.parametrize("when", ["running", "forming", "settling", "waiting"])
def test_a_stop_is_heard_whatever_goes_on(when: str) -> None:
    stage = Stage(min_workers=2, max_workers=2).running(W0, W1)
    stage.train(2)
    if when != "running":
        stage.tell(Died(W1, "SIGKILL"))
    if when in ("forming", "waiting"):
        stage.leave(W0, "peer")
    if when == "forming":
        stage.ready(WorkerId(1, 1))
        assert stage.controller.state is RunState.FORMING
    decided = stage.tell(Stop("asked by the user"))
    if when == "forming":
        assert not of(Pause, decided)
        decided = stage.join()
    if when in ("running", "forming"):
        the(Pause, decided)
        stage.train(1)
        decided = stage.leave_all("pause")
    elif when == "settling":
        decided = stage.leave(W0, "peer")
    for worker in the(Finalize, decided).workers:
        stage.tell(Finalized(worker, "sha256:a"))
    finish = the(Finish, stage.save())
    assert (finish.status, finish.reason, finish.digest) == ("stopped", "asked by the user", "sha256:a")


def test_a_stop_with_less_state_than_is_on_record_claims_none() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(2)
    stage.leave(W1, "peer", 2)
    stage.tell(Heartbeat(W0, 0, "compute", 3, 3, (stage.report(2),)))
    stage.tell(Stop("enough"))
    finish = the(Finish, stage.tell(Died(W0, "SIGKILL")))
    assert (finish.status, finish.digest) == ("stopped", None)


def test_a_stop_rolls_forward_over_what_is_on_record() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(2)
    stage.leave(W1, "peer", 2, prepared=True)
    stage.tell(Heartbeat(W0, 0, "compute", 3, 3, (stage.report(2),)))
    stage.tell(Stop("enough"))
    generation = the(StartGeneration, stage.tell(Died(W0, "SIGKILL"))).generation
    assert (generation.collect, generation.committed, generation.roll_forward, generation.norm) == (True, 3, (0,), 1.0)
    assert the(Finalize, stage.leave(W1, "complete")).workers == (W1,)
    stage.tell(Finalized(W1, "sha256:a"))
    finish = the(Finish, stage.save())
    assert (finish.status, finish.digest) == ("stopped", "sha256:a")


def test_an_abort_ends_the_run_at_once() -> None:
    stage = Stage()
    stage.tell(Start())
    assert the(Finish, stage.tell(Abort("the model cannot be built"))).status == "failed"


def test_a_recovery_is_measured_from_the_injected_fault() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    at = stage.now + 0.2
    stage.tell(FaultFired(W1, 0, at), 0.2)
    stage.tell(Died(W1, "SIGKILL"), 0.3)
    assert (stage.recorded("incident")[0]["at"], stage.recorded("incident")[0]["detect_seconds"]) == (at, 0.3)
    assert the(StartGeneration, stage.leave(W0, "peer")).generation.fired_faults == (0,)


def test_a_fault_that_was_survived_does_not_date_the_next_one() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.tell(FaultFired(W1, 0, stage.now))
    stage.train(30)
    stage.tell(Died(W1, "SIGKILL"))
    assert stage.recorded("incident")[0]["detect_seconds"] == 0.0


# ------------------------------------------------------------------------------------ a restarted controller


def history_of(stage: Stage) -> History:
    """What the controller put on record (as JSON, as it would be)."""
    events = [json.loads(json.dumps(event.record({}))) for event in of(RunEvent, stage.told)]
    steps = [
        {"seconds": 1.0, "grad_norm": 1.0, "committed_at": stage.now - stage.controller.progress.committed + step}
        for step in range(stage.controller.progress.committed)
    ]
    return History.read(events, steps)


def successor(stage: Stage) -> Stage:
    """The controller is lost; another is made from what it put on record."""
    config = ControllerConfig(**{**stage.controller.config.__dict__, "term": stage.controller.config.term + 1})
    after = Stage(Controller(config, history_of(stage), dict(stage.controller.checkpoints)))
    after.now = stage.now
    return after


def status_of(
    stage: Stage, worker: WorkerId, *, left: LeftCause | None = None, joined: bool = True, **changes: Any
) -> Status:
    done = stage.controller.progress.committed
    generation = changes.pop("generation", stage.generation)
    gone = None if left is None else Left(worker, generation.number, left, done, WHOLE, at=stage.now)
    held = changes.pop("held", WHOLE)
    prepared = changes.pop("prepared", False)
    return Status(ready_message(worker), generation, gone, done, held, prepared, joined, 1, **changes)


def test_take_over_of_a_running_generation_disturbs_nobody() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    after = successor(stage)
    decided = after.tell(TakeOver((status_of(stage, W0), status_of(stage, W1, reports=(stage.report(3),)))))
    assert [type(action) for action in decided] == [StepCommitted]
    assert after.controller.state is RunState.RUNNING
    after.train(1)
    assert after.controller.progress.committed == 5
    the(Interrupt, after.tell(Died(W1, "SIGKILL")))
    assert the(StartGeneration, after.leave(W0, "peer")).generation.number == 1
    assert after.generation.term == stage.generation.term + 1


def test_take_over_finds_a_member_missing() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    after = successor(stage)
    decided = after.tell(TakeOver((status_of(stage, W0),)))
    assert the(KillWorker, decided).worker == W1, "in case it lives and is out of reach"
    assert the(Interrupt, decided).workers == (W0,)
    the(StartGeneration, after.leave(W0, "peer"))
    assert [(i["incident"], i["worker"]) for i in after.recorded("incident")] == [("kill", 1)]


def test_take_over_while_a_generation_forms() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    after = successor(stage)
    after.tell(TakeOver((status_of(stage, W0), status_of(stage, W1, joined=False))))
    assert after.controller.state is RunState.FORMING
    after.tell(Joined(W1, 0, 10))
    assert after.controller.state is RunState.RUNNING


def test_take_over_when_not_all_heard_of_the_generation() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    old = stage.generation
    stage.leave(W1, "peer")
    stage.leave(W0, "peer")
    assert stage.generation.number == 1
    after = successor(stage)
    unaware = Status(ready_message(W1), old, Left(W1, 0, "peer", 3, WHOLE), 3, WHOLE, False, True, 1)
    decided = after.tell(TakeOver((status_of(stage, W0, joined=False), unaware)))
    assert any(set(action.workers) == {W0, W1} for action in of(Interrupt, decided))
    generation = the(StartGeneration, after.leave(W0, "peer")).generation
    assert (generation.number, generation.committed, holders(generation)) == (2, 3, (0, 1))


def test_take_over_never_gives_a_number_twice() -> None:
    """A generation on record that nobody heard of has its number all the same."""
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    old = stage.generation
    stage.leave_all("peer")
    after = successor(stage)
    statuses = tuple(
        Status(ready_message(w), old, Left(w, 0, "peer", 3, WHOLE), 3, WHOLE, False, True, 1) for w in (W0, W1)
    )
    decided = after.tell(TakeOver(statuses))
    assert the(Interrupt, decided).generation == 1
    assert the(StartGeneration, decided).generation.number == 2
    assert after.recorded("incident")[-1]["incident"] == "controller"


def test_take_over_while_members_leave() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(3)
    stage.tell(Died(W2, "SIGKILL"))
    after = successor(stage)
    decided = after.tell(TakeOver((status_of(stage, W0, left="peer"), status_of(stage, W1))))
    assert of(Interrupt, decided)
    the(StartGeneration, after.leave(W1, "peer"))
    after.join()
    after.train(1)
    assert not after.recorded("incident"), "it is on record already"
    assert [(r["incident"], r["worker"]) for r in after.recorded("recovery")] == [("kill", 2)]


def test_take_over_of_a_worker_that_had_raised() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    after = successor(stage)
    decided = after.tell(TakeOver((status_of(stage, W0, left="peer"), status_of(stage, W1, left="exception"))))
    assert the(KillWorker, decided).worker == W1
    assert [m.worker for m in the(StartGeneration, decided).generation.members] == [W0]


def test_take_over_at_the_end() -> None:
    stage = Stage(total_steps=3, max_workers=2).running(W0, W1)
    stage.train(3)
    stage.leave_all("complete", 3)
    assert stage.controller.state is RunState.FINALIZING
    after = successor(stage)
    decided = after.tell(TakeOver(tuple(status_of(stage, w, left="complete") for w in (W0, W1))))
    assert the(Finalize, decided).workers == (W0, W1)
    after.tell(Finalized(W0, "sha256:a"))
    after.tell(Finalized(W1, "sha256:a"))
    assert the(Finish, after.save()).status == "finished"


def test_take_over_keeps_what_users_and_the_cluster_asked_for() -> None:
    stage = Stage(max_workers=3, min_workers=2).running(W0, W1)
    stage.train(3)
    stage.tell(Resize(2))
    stage.tell(DrainNotice((W1,), "spot", stage.now + 60.0))
    stage.tell(Stop("enough"))
    after = successor(stage)
    decided = after.tell(TakeOver((status_of(stage, W0), status_of(stage, W1))))
    the(Pause, decided)
    assert after.controller.target == 2
    assert after.controller.workers[W1].draining
    assert of(Finalize, after.leave_all("pause"))


def test_take_over_lets_those_that_start_go_on() -> None:
    """The predecessor died while its run started: nobody starts anew for that."""
    stage = Stage(max_workers=2)
    stage.tell(Start())
    stage.ready(W0)
    stage.tell(Placed(W1, "node-1"))
    after = successor(stage)
    fresh = Status(ready_message(W0), None, None, 0, WHOLE, False, False, 1)
    decided = after.tell(TakeOver((fresh,), (Placed(W1, "node-1"),)))
    assert not decided, "it waits for the other, and asks for nobody"
    assert the(StartGeneration, after.tell(ready_message(W1))).generation.rank_of(W1) == 1


def test_take_over_gives_up_a_worker_that_starts_for_too_long() -> None:
    stage = Stage(max_workers=2, start_timeout_s=10.0).running(W0)
    stage.tell(Placed(W1, "node-1"))
    after = successor(stage)
    assert not after.tell(TakeOver((status_of(stage, W0),), (Placed(W1, "node-1"),)))
    told = after.wait(11.0, W0)
    assert the(KillWorker, told).worker == W1
    assert the(RequestWorker, told).worker == WorkerId(1, 1)


def test_the_record_knows_who_was_warm() -> None:
    stage = Stage(max_workers=2).running(W0)
    stage.tell(Placed(W1, "node-1"))
    assert history_of(stage).warm == {W0}
    stage.ready(W1)
    assert history_of(stage).warm == {W0, W1}
    stage.tell(Died(W0, "SIGKILL"))
    assert history_of(stage).warm == {W1}


def test_take_over_asks_for_workers_under_new_names() -> None:
    """A process of a request that the lost controller made may still turn up."""
    stage = Stage(max_workers=2)
    stage.tell(Start())
    after = successor(stage)
    requested = {action.worker for action in of(RequestWorker, after.tell(TakeOver(())))}
    assert requested == {WorkerId(0, 1), WorkerId(1, 1)}
    assert the(ReleaseWorker, after.tell(ready_message(W0))).worker == W0


def test_take_over_ends_whom_the_record_says_it_gave_up() -> None:
    """The predecessor died between writing that it ends a hung worker and ending it, and the worker woke up."""
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(3)
    assert the(KillWorker, stage.wait(4.0, W0, phase="reduce")).worker == W1
    after = successor(stage)
    decided = after.tell(TakeOver((status_of(stage, W0), status_of(stage, W1))))
    assert the(KillWorker, decided).worker == W1
    assert [m.worker for m in the(StartGeneration, after.leave(W0, "peer")).generation.members] == [W0]
    assert not after.recorded("incident"), "it is on record already"


def test_take_over_knows_a_half_received_state() -> None:
    stage = Stage(max_workers=2).running(W0)
    stage.train(5)
    stage.ready(W1)
    stage.leave(W0, "pause")
    assert stage.members == [W0, W1]
    after = successor(stage)
    torn = Status(ready_message(W1), stage.generation, Left(W1, 1, "peer", 0, NOTHING), 0, NOTHING, False, False, 1)
    after.tell(TakeOver((torn,)))
    after.wait(4.0, W1)
    generation = the(StartGeneration, after.told).generation
    assert (generation.committed, generation.held) == (0, (WHOLE,)), "it starts over"


def test_a_state_that_is_ahead_of_the_record_is_not_used() -> None:
    """Or its steps would never be on record (the predecessor went back and died before it had ended this worker)."""
    stage = Stage(max_workers=1).running(W0)
    stage.train(3)
    after = successor(Stage(max_workers=1).running(W0))
    after.tell(TakeOver((status_of(stage, W0, left="peer"),)))
    assert after.recorded("state_refused")[0]["committed"] == 3
    generation = the(StartGeneration, after.told).generation
    assert (generation.committed, generation.held) == (0, (WHOLE,)), "it starts over"


# ------------------------------------------------------------------------------------ many workers


def test_a_thousand_workers() -> None:
    """Time of the controller's thread, nothing else: 1,000 workers start, train, lose a node of 16, and go on."""
    count = 1000
    workers = [WorkerId(slot, 0) for slot in range(count)]
    stage = Stage(virtual_workers=count, max_workers=count, min_workers=count // 2)
    figures: dict[str, float] = {}

    def timed(name: str, started: float) -> float:
        figures[name] = time.process_time() - started
        return time.process_time()

    clock = time.process_time()
    stage.tell(Start())
    for worker in workers:
        stage.controller.handle(Placed(worker, f"node-{worker.slot // 16}"), stage.now)
    for worker in workers:
        stage.told += stage.controller.handle(ready_message(worker, f"node-{worker.slot // 16}"), stage.now)
    clock = timed("start", clock)
    assert len(the(StartGeneration, stage.told).generation.members) == count
    number = stage.generation.number
    for worker in workers:
        stage.controller.handle(Joined(worker, number, 0), stage.now)
    assert stage.controller.state is RunState.RUNNING
    clock = timed("join", clock)
    for step in range(20):
        for worker in workers:
            reports = (stage.report(step),) if worker == W0 else ()
            stage.controller.handle(Heartbeat(worker, number, "compute", step + 1, step + 1, reports), stage.now)
        stage.now += 0.1
    assert stage.controller.progress.committed == 20
    clock = timed("20,000 heartbeats", clock)
    for _ in range(10):
        stage.controller.handle(Tick(), stage.now)
    clock = timed("10 ticks", clock)
    for worker in workers[:16]:
        stage.told += stage.controller.handle(Died(worker, "node", node_lost=True), stage.now)
    for worker in workers[16:]:
        stage.told += stage.controller.handle(Left(worker, number, "peer", 20, WHOLE), stage.now)
    clock = timed("lose 16, form the next generation", clock)
    assert len(stage.generation.members) == count - 16
    print(", ".join(f"{name}: {seconds * 1000:.0f} ms" for name, seconds in figures.items()))
    # 2,000 heartbeats arrive in a second; they must be a small part of one.
    assert figures["20,000 heartbeats"] < 2.0
    assert figures["10 ticks"] < 1.0
    assert figures["lose 16, form the next generation"] < 5.0


def test_a_heartbeat_costs_the_same_among_many() -> None:
    def cost(count: int) -> float:
        workers = [WorkerId(slot, 0) for slot in range(count)]
        stage = Stage(virtual_workers=count, max_workers=count, min_workers=1)
        stage.tell(Start())
        for worker in workers:
            stage.controller.handle(ready_message(worker), stage.now)
        stage.join()
        best = float("inf")
        for _ in range(5):
            started = time.process_time()
            for turn in range(2000):
                stage.controller.handle(Heartbeat(W0, 0, "compute", turn, 0), stage.now)
            best = min(best, time.process_time() - started)
        return best

    assert cost(400) < 5 * cost(4) + 0.01


def test_a_controller_lost_while_a_checkpoint_is_made_is_told_what_was_written() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(2)
    plan = SavePlan(Save(2, 0, 0), (W0, W1, W2), {"data": 3})
    stage.tell(SaveBegun(W0, plan))
    stage.tell(PartSaved(W0, plan, 0, "a"))
    after = successor(stage)
    # One said it to the predecessor, one to nobody yet, one is still writing.
    parts = {W0: PartSaved(W0, plan, 0, "a"), W1: PartSaved(W1, plan, 1, "b"), W2: None}
    told = after.tell(TakeOver(tuple(status_of(stage, worker, part=part) for worker, part in parts.items())))
    assert not of(CommitCheckpoint, told)
    commit = the(CommitCheckpoint, after.tell(PartSaved(W2, plan, 2, "c")))
    assert commit == CommitCheckpoint(W0, plan.save, ((0, "a"), (1, "b"), (2, "c")), {"data": 3})


def test_a_controller_lost_with_a_writer_has_the_rest_discarded() -> None:
    stage = Stage(max_workers=2).running(W0, W1)
    stage.train(2)
    plan = SavePlan(Save(2, 0, 0), (W0, W1), {"data": 2})
    stage.tell(SaveBegun(W0, plan))
    after = successor(stage)
    told = after.tell(TakeOver((status_of(stage, W0, part=PartSaved(W0, plan, 0, "a")),)))
    assert the(DiscardCheckpoint, told) == DiscardCheckpoint(W0, plan.save)
    assert after.controller._run.saving.is_due


def test_what_was_complete_before_the_controller_was_lost_is_left_alone() -> None:
    stage = Stage(max_workers=1).running(W0)
    stage.train(2)
    plan = SavePlan(Save(2, 0, 0), (W0,))
    stage.tell(SaveBegun(W0, plan))
    stage.tell(PartSaved(W0, plan, 0, "a"))
    stage.tell(CheckpointSaved(W0, plan.save, "c2"))
    after = successor(stage)
    told = after.tell(TakeOver((status_of(stage, W0, part=PartSaved(W0, plan, 0, "a")),)))
    assert not of(CommitCheckpoint, told)
    assert not of(DiscardCheckpoint, told)
