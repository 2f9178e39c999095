"""Stories of the controller in layouts where no worker holds the whole state: shards, pipelines, tensor parallelism."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from orchestrator.checkpoint.names import Save
from orchestrator.control.core.protocol import (
    Died,
    DrainNotice,
    Finish,
    KillWorker,
    Placed,
    ReleaseWorker,
    RequestWorker,
    Resize,
    Start,
    Stop,
    Tick,
)
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.forming import choose_ranks, make_generation
from orchestrator.control.training.layouts import Layouts
from orchestrator.control.training.protocol import Rollback, TakeOver
from orchestrator.control.training.state import Origin, newest_state, pick_holders, state_at_hand
from orchestrator.control.training.views import ControllerConfig, Progress, RunState, WorkerView, is_collective
from orchestrator.models.costs import ModelCosts
from orchestrator.planning.choose import NoLayoutFits
from orchestrator.training.messages import CheckpointSaved, Finalized, Heartbeat, Joined, Left, Ready, Status
from orchestrator.training.orders import Finalize, Interrupt, Pause, StartGeneration
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import NOTHING, Span, Spans, union, whole
from tests.unit.layouts_in_tests import MODEL, layouts
from tests.unit.test_controller import ELEMENTS, W0, W1, W2, W3, WHOLE, Stage, of, ready_message, successor, the

Q0, Q1, Q2, Q3 = (Span(0, 250 * quarter, 250 * (quarter + 1)) for quarter in range(4))
LOW, HIGH = union([Q0, Q1]), union([Q2, Q3])
W4, W5, W6, W7 = (WorkerId(slot, 0) for slot in range(4, 8))


def holder(worker: WorkerId, committed: int, *held: Span, prepared: bool = False, trained: bool = True) -> WorkerView:
    return WorkerView(
        worker, 0.0, WorkerState.IDLE, ready=ready_message(worker), committed=committed, prepared=prepared,
        has_trained=trained, held=union(held), whole=WHOLE, initial="i",
    )  # fmt: skip


def sharded(*workers: WorkerId, overlap: bool = False, **config: Any) -> Stage:
    """A run that trains with these, each of which holds an equal part of the state; with `overlap` two hold each."""
    stage = Stage(**{"shard": "optimizer", "max_workers": len(workers), **config}).running(*workers)
    bounds = [ELEMENTS * index // len(workers) for index in range(len(workers) + 1)]
    own = [Span(0, start, stop) for start, stop in pairwise(bounds)]
    for index, worker in enumerate(workers):
        stage.held[worker] = union([own[index]], [own[index - 1]] if overlap else [])
    return stage


# ------------------------------------------------------------------------------------ what state there is


def test_parts_of_the_state_make_it_whole_together() -> None:
    origin = state_at_hand([holder(W0, 5, Q0, Q1), holder(W1, 5, Q1, Q2), holder(W2, 5, Q3)], Progress(5, norm=2.0))
    assert origin == Origin(5, {W0: LOW, W1: union([Q1, Q2]), W2: union([Q3])}, WHOLE)


def test_the_missing_part_of_the_newest_state_is_rolled_forward_to() -> None:
    views = [holder(W0, 5, Q0, Q1), holder(W1, 4, Q2, Q3, prepared=True)]
    origin = state_at_hand(views, Progress(5, norm=2.0))
    assert origin == Origin(5, {W0: LOW, W1: HIGH}, WHOLE, frozenset({W1}), 2.0)
    # Not without the norm of that step.
    assert state_at_hand(views, Progress(5)) == Origin(0, {W0: WHOLE, W1: WHOLE}, WHOLE)


def test_a_step_that_is_not_on_record_is_not_rolled_over() -> None:
    views = [holder(W0, 4, Q0, Q1, prepared=True), holder(W1, 4, Q2, Q3, prepared=True)]
    origin = state_at_hand(views, Progress(4, norm=2.0))
    assert origin is not None
    assert (origin.committed, origin.rolling, origin.norm) == (4, frozenset(), None)


def test_a_part_that_nobody_has_is_read_from_the_newest_checkpoint() -> None:
    views = [holder(W0, 5, Q0, Q1), holder(W1, 5, Q2)]
    assert newest_state(views, Progress(5, norm=2.0), {2: "c2", 4: "c4"}) == Origin(4, restore="c4")


def test_workers_that_were_idle_meanwhile_have_an_older_state() -> None:
    views = [holder(W0, 5, Q0, Q1), holder(W1, 3, Q0, Q1), holder(W2, 3, Q2, Q3)]
    at_hand = newest_state(views, Progress(5, norm=2.0), {2: "c2"})
    assert at_hand is not None
    assert (at_hand.committed, set(at_hand.held)) == (3, {W1, W2})
    assert newest_state(views, Progress(5, norm=2.0), {4: "c4"}) == Origin(4, restore="c4")


def test_without_a_checkpoint_it_is_made_again_by_those_that_never_trained() -> None:
    views = [holder(W0, 5, Q0, Q1), holder(W1, 0, *WHOLE, trained=False)]
    assert newest_state(views, Progress(5, norm=2.0), {}) == Origin(0, {W1: WHOLE}, WHOLE)
    assert newest_state(views[:1], Progress(5, norm=2.0), {}) == Origin(0, {W0: WHOLE}, WHOLE), "or by all"


def test_few_holders_are_picked() -> None:
    held: dict[WorkerId, Spans] = {W0: union([Q0]), W1: LOW, W2: union([Q1]), W3: HIGH}
    assert pick_holders(WHOLE, held, held) == [W1, W3]
    assert pick_holders(union([Q0]), held, held) == [W0]
    assert pick_holders(NOTHING, held, held) == []


def test_in_the_same_layout_everybody_keeps_their_rank() -> None:
    """There is each one's part of the state, so only a newcomer is sent anything."""
    members = [holder(worker, 5, span) for worker, span in zip((W0, W1, W2, W3), (Q0, Q1, Q2, Q3), strict=True)]
    choice = Layouts(ControllerConfig(total_steps=9, chooser=layouts(max_workers=4), min_workers=1, max_workers=4))
    first = choose_ranks(members, Origin(5, {view.worker: view.held for view in members}, WHOLE), 4, choice, 0.0)
    assert first is not None
    choice.trains(make_generation(0, 0, "", Origin(5), first, ()))
    rest = [view for view in members if view.worker != W1]
    origin = Origin(5, {view.worker: view.held for view in rest}, WHOLE)
    again = choose_ranks([*rest, holder(W4, 0, trained=False)], origin, 4, choice, 0.0)
    assert again is not None
    assert [view.worker for view in again.members] == [W0, W4, W2, W3]
    fewer = choose_ranks(rest, origin, 4, choice, 0.0)
    assert fewer is not None
    assert [view.worker for view in fewer.members] == [W0, W2, W3], "in another layout there are other parts"


# ------------------------------------------------------------------------------------ shards


def test_a_lost_shard_that_has_a_copy_costs_no_step() -> None:
    stage = sharded(W0, W1, W2, overlap=True)
    stage.train(4)
    stage.tell(Died(W1, "SIGKILL"))
    stage.leave(W0, "peer")
    generation = the(StartGeneration, stage.leave(W2, "peer")).generation
    assert (generation.committed, generation.restore) == (4, None)
    assert generation.held == (stage.held[W0], stage.held[W2])
    assert generation.layout.shard == "optimizer"
    assert not of(Rollback, stage.told)


def test_a_lost_shard_without_a_copy_costs_the_steps_since_the_checkpoint() -> None:
    stage = sharded(W0, W1)
    stage.train(4)
    stage.tell(CheckpointSaved(W0, Save(3, 0, 0), "c3"))
    stage.tell(Died(W1, "SIGKILL"))
    decided = stage.leave(W0, "peer")
    assert the(Rollback, decided).committed == 3
    generation = the(StartGeneration, decided).generation
    assert (generation.committed, generation.restore, generation.held) == (3, "c3", (NOTHING,))


def test_a_lost_shard_without_a_copy_or_a_checkpoint_starts_over() -> None:
    stage = sharded(W0, W1)
    stage.train(4)
    stage.tell(Died(W1, "SIGKILL"))
    decided = stage.leave(W0, "peer")
    assert the(Rollback, decided).committed == 0
    generation = the(StartGeneration, decided).generation
    assert (generation.committed, generation.held) == (0, (WHOLE,))


def test_shards_that_missed_the_vote_roll_forward_with_its_norm() -> None:
    stage = sharded(W0, W1, W2, overlap=True)
    stage.train(2)
    stage.tell(Died(W2, "SIGKILL"))
    stage.leave(W0, "peer", 3, reports=(stage.report(2),))
    generation = the(StartGeneration, stage.leave(W1, "peer", 2, prepared=True)).generation
    assert (generation.committed, generation.roll_forward, generation.norm) == (3, (1,), 1.0)
    assert union(*generation.held) == WHOLE


def test_a_take_over_remembers_the_norm_of_the_last_step() -> None:
    stage = sharded(W0, W1)
    stage.train(2)
    after = successor(stage)
    statuses = []
    for worker, committed, prepared in ((W0, 2, False), (W1, 1, True)):
        held = stage.held[worker]
        left = Left(worker, 0, "peer", committed, held, prepared)
        statuses.append(Status(ready_message(worker), stage.generation, left, committed, held, prepared, True, 1))
    generation = the(StartGeneration, after.tell(TakeOver(tuple(statuses)))).generation
    assert (generation.committed, generation.roll_forward, generation.norm) == (2, (1,), 1.0)


def test_who_leaves_while_joining_has_what_it_says() -> None:
    """Members keep what they brought until all have what they need."""
    stage = sharded(W0, W1, W2, overlap=True)
    stage.train(2)
    stage.tell(Died(W2, "SIGKILL"))
    stage.leave(W0, "peer")
    the(StartGeneration, stage.leave(W1, "peer"))
    stage.tell(Died(W1, "SIGKILL"))
    stage.tell(CheckpointSaved(W0, Save(1, 0, 0), "c1"))
    decided = stage.leave(W0, "peer", 2, held=WHOLE)
    assert not of(Rollback, decided)
    assert the(StartGeneration, decided).generation.held == (WHOLE,)


def test_an_exception_of_one_that_may_hold_a_part_alone_is_judged_when_all_are_out() -> None:
    for overlap in (False, True):
        stage = sharded(W0, W1, overlap=overlap)
        stage.train(2)
        assert not of(KillWorker, stage.leave(W0, "exception", detail="RuntimeError: bad luck"))
        decided = stage.leave(W1, "peer")
        assert [action.worker for action in of(KillWorker, decided)] == ([W0] if overlap else [])
        generation = the(StartGeneration, decided).generation
        assert (generation.committed, len(generation.members)) == (2, 1 if overlap else 2)
        assert [incident["incident"] for incident in stage.recorded("incident")] == ["crash"]


def test_those_that_are_let_go_hand_over_what_nobody_else_has() -> None:
    stage = sharded(W0, W1, W2, W3)
    stage.train(2)
    the(Pause, stage.tell(Resize(2)))
    decided = stage.leave_all("pause")
    generation = the(StartGeneration, decided).generation
    assert ([m.worker for m in generation.members], generation.layout.spares) == ([W0, W1, W2, W3], 2)
    assert (generation.layout.data, union(*generation.held)) == (2, WHOLE)
    assert not of(ReleaseWorker, decided)
    assert the(Pause, stage.join()).workers == (W0, W1, W2, W3)
    stage.held = {W0: LOW, W1: HIGH, W2: NOTHING, W3: NOTHING}
    stage.train(1)
    decided = stage.leave_all("pause")
    assert {action.worker for action in of(ReleaseWorker, decided)} == {W2, W3}
    generation = the(StartGeneration, decided).generation
    assert ([m.worker for m in generation.members], generation.layout.spares) == ([W0, W1], 0)
    assert not of(Pause, stage.join()), "that was the last change"
    stage.train(1)
    assert [r["incident"] for r in stage.recorded("recovery")] == ["shrink"]


def test_where_all_hold_everything_at_most_two_hand_over() -> None:
    stage = Stage(max_workers=3).running(W0, W1, W2)
    stage.train(2)
    stage.tell(DrainNotice((W0, W1, W2), "spot", stage.now + 3.0))
    stage.leave_all("pause")
    assert stage.controller.state is RunState.WAITING
    generation = the(StartGeneration, stage.ready(W3)).generation
    assert ([m.worker for m in generation.members], generation.layout.spares) == ([W3, W0, W1], 2)


# ------------------------------------------------------------------------------------ the end


def test_the_end_of_a_sharded_run_collects_its_state() -> None:
    stage = sharded(W0, W1, total_steps=3)
    stage.train(3)
    generation = the(StartGeneration, stage.leave_all("complete", 3)).generation
    assert generation.collect
    assert (generation.committed, generation.held) == (3, (stage.held[W0], stage.held[W1]))
    assert not of(RequestWorker, stage.wait(1.0, W0, W1, phase="collect"))
    stage.join()
    assert not of(Finalize, stage.leave(W1, "complete", 3))
    assert the(Finalize, stage.leave(W0, "complete", 3, held=WHOLE)).workers == (W0,)
    stage.tell(Finalized(W0, "sha256:a"))
    finish = the(Finish, stage.save())
    assert (finish.status, finish.digest) == ("finished", "sha256:a")
    assert not stage.recorded("recovery")
    assert stage.recorded("generation")[-1]["collect"]


def test_a_member_lost_while_the_state_is_collected() -> None:
    stage = sharded(W0, W1, W2, overlap=True, total_steps=3)
    stage.train(3)
    stage.leave_all("complete", 3)
    stage.tell(Died(W0, "SIGKILL"))
    stage.leave(W1, "peer", 3)
    generation = the(StartGeneration, stage.leave(W2, "peer", 3)).generation
    assert (generation.collect, [m.worker for m in generation.members]) == (True, [W1, W2])
    stage.leave(W2, "complete", 3)
    the(Finalize, stage.leave(W1, "complete", 3, held=WHOLE))
    stage.tell(Finalized(W1, "sha256:a"))
    the(Finish, stage.save())
    assert [(r["incident"], r["worker"], r["steps_lost"]) for r in stage.recorded("recovery")] == [("kill", 0, 0)]


def test_the_collected_state_lost_with_its_worker_is_collected_again() -> None:
    stage = sharded(W0, W1, W2, overlap=True, total_steps=3)
    stage.train(3)
    stage.leave_all("complete", 3)
    stage.leave(W1, "complete", 3)
    stage.leave(W2, "complete", 3)
    the(Finalize, stage.leave(W0, "complete", 3, held=WHOLE))
    generation = the(StartGeneration, stage.tell(Died(W0, "SIGKILL"))).generation
    assert (generation.collect, [m.worker for m in generation.members]) == (True, [W1, W2])


def test_a_collection_that_fails_for_ever_ends_the_run() -> None:
    stage = sharded(W0, W1, total_steps=3)
    stage.train(3)
    stage.leave_all("complete", 3)
    for _ in range(20):
        if of(Finish, stage.leave_all("peer", 3)):
            break
    assert the(Finish, stage.told).status == "failed"


def test_a_final_state_with_a_part_lost_is_trained_again() -> None:
    stage = sharded(W0, W1, total_steps=3)
    stage.train(2)
    stage.tell(CheckpointSaved(W0, Save(2, 0, 0), "c2"))
    stage.train(1)
    stage.leave_all("complete", 3)
    stage.tell(Died(W1, "SIGKILL"))
    generation = the(StartGeneration, stage.leave(W0, "peer", 3)).generation
    assert (generation.collect, generation.restore) == (False, "c2")


def test_a_stopped_sharded_run_collects_its_state() -> None:
    stage = sharded(W0, W1)
    stage.train(2)
    the(Pause, stage.tell(Stop("enough")))
    assert the(StartGeneration, stage.leave_all("pause")).generation.collect
    assert not of(Pause, stage.join())
    stage.leave(W1, "complete")
    the(Finalize, stage.leave(W0, "complete", held=WHOLE))
    stage.tell(Finalized(W0, "sha256:a"))
    finish = the(Finish, stage.save())
    assert (finish.status, finish.digest) == ("stopped", "sha256:a")


# ------------------------------------------------------------------------------------ pipelines


def pipelined(*workers: WorkerId, **config: Any) -> Stage:
    stage = Stage(**{"pipeline": 2, "max_workers": 4, **config}).running(*workers)
    for rank, worker in enumerate(stage.members):
        stage.held[worker] = (LOW, HIGH)[rank % 2]
    return stage


def test_a_pipeline_is_cut_and_told_of() -> None:
    stage = pipelined(W0, W1, W2, W3)
    layout = stage.generation.layout
    assert (layout.data, layout.pipeline, layout.spares) == (2, 2, 0)
    assert stage.recorded("generation")[0]["layout"] == {
        "data": 2, "tensor": 1, "pipeline": 2, "shard": "none", "stages": [list(part) for part in layout.parts],
    }  # fmt: skip


def test_pipeline_neighbours_are_near_one_another() -> None:
    stage = Stage(pipeline=2)
    stage.tell(Start())
    for worker, node, zone in ((W0, "b", "east"), (W1, "a", "west"), (W2, "b", "east"), (W3, "c", "west")):
        ready = ready_message(worker, node)
        stage.tell(Placed(worker, node))
        stage.tell(Ready(**{**ready.__dict__, "zone": zone}))
    assert [(m.worker, m.zone) for m in stage.generation.members] == [
        (W0, "east"),
        (W2, "east"),
        (W1, "west"),
        (W3, "west"),
    ]


class OnlyPairs:
    """Pipelines of two, or nothing."""

    tensor = 1
    most_workers = 8

    def choose(
        self, workers: int, costs: ModelCosts | None, memory_bytes: int, current: ParallelLayout | None
    ) -> ParallelLayout | None:
        if workers < 2:
            raise NoLayoutFits("no layout of 1 worker fits in memory", 2)
        return ParallelLayout.fit(workers // 2 * 2, 8, pipeline=2, parts=((0, 3), (3, 6)))


def test_a_worker_without_work_stays_idle_and_changes_nothing() -> None:
    stage = Stage(chooser=OnlyPairs(), max_workers=4).running(W0, W1)
    generation = stage.generation
    stage.train(2)
    decided = stage.ready(W2) + stage.wait(5.0, W0, W1, W2)
    assert not of(Pause, decided)
    assert not of(ReleaseWorker, decided)
    the(Pause, stage.ready(W3))
    stage.train(1)
    assert generation.number + 1 == the(StartGeneration, stage.leave_all("pause")).generation.number
    assert len(stage.members) == 4
    assert [incident["cause"] for incident in stage.recorded("incident")] == ["worker 2, 3 joins"]


def test_who_is_left_without_work_is_counted() -> None:
    stage = Stage(chooser=OnlyPairs(), max_workers=4).running(W0, W1, W2, W3)
    stage.held = {W0: LOW, W1: HIGH, W2: LOW, W3: HIGH}
    stage.train(1)
    stage.tell(Died(W3, "SIGKILL"))
    stage.leave_all("peer", but=(W3,))
    assert stage.members == [W0, W1]
    assert stage.recorded("generation")[-1]["idle"] == 1
    assert not of(Pause, stage.join() + stage.wait(5.0, *stage.members, W2))


def test_too_few_for_any_layout_wait_for_more() -> None:
    stage = Stage(chooser=OnlyPairs(), max_workers=2).running(W0, W1)
    stage.held = {W0: WHOLE, W1: WHOLE}
    stage.train(1)
    stage.tell(Died(W1, "SIGKILL"))
    stage.leave(W0, "peer")
    assert stage.controller.state is RunState.WAITING
    assert not of(StartGeneration, stage.wait(30.0, W0))
    the(StartGeneration, stage.ready(WorkerId(1, 1)))


def test_a_size_that_no_layout_fits_is_rounded_up() -> None:
    stage = Stage(chooser=OnlyPairs(), max_workers=4).running(W0, W1, W2, W3)
    the(Pause, stage.tell(Resize(1)))
    stage.train(1)
    decided = stage.leave_all("pause")
    assert len(the(StartGeneration, decided).generation.members) == 2
    assert len(of(ReleaseWorker, decided)) == 2


def test_a_model_that_no_layout_fits_ends_the_run_with_the_reason() -> None:
    stage = Stage(pipeline=2, max_workers=2)
    stage.tell(Start())
    stage.tell(ready_message(W0, memory_bytes=1000))
    finish = the(Finish, stage.tell(ready_message(W1, memory_bytes=1000)))
    assert finish.status == "failed"
    assert "fits in memory" in finish.reason


def test_members_that_wait_for_one_another_in_compute_are_not_blamed() -> None:
    stage = pipelined(W0, W1, max_workers=2)
    stage.train(10)
    stage.tell(Heartbeat(W0, 0, "reduce", 10, 10))
    assert is_collective("compute", stage.generation.layout)
    assert not is_collective("data", stage.generation.layout)
    decided = stage.wait(21.0, W0, W1)
    assert the(Interrupt, decided).workers == (W0, W1)
    assert not of(KillWorker, decided)
    assert not stage.recorded("incident"), "it is not known yet whose trouble it is"
    stage.leave(W0, "peer")
    assert the(KillWorker, stage.wait(4.0, W0, W1)).worker == W1
    assert [(i["incident"], i["worker"]) for i in stage.recorded("incident")] == [("stall", 1)]
    assert stage.recorded("incident")[0]["detect_seconds"] > 20


def test_a_member_that_computes_is_given_the_time_to_come_to_an_end() -> None:
    stage = pipelined(W0, W1, W2, W3)
    stage.train(10)
    stage.wait(0.5, W0, W1, W2, W3, phase="compute")
    stage.tell(Died(W0, "SIGKILL"))
    stage.leave(W1, "peer")
    stage.leave(W2, "peer")
    assert not of(KillWorker, stage.wait(15.0, W1, W2, W3))
    assert the(KillWorker, stage.wait(10.0, W1, W2, W3)).worker == W3


# ------------------------------------------------------------------------------------ units


def tensor_parallel(*workers: WorkerId, **config: Any) -> Stage:
    stage = Stage(**{"tensor": 2, "max_workers": 4, **config})
    stage.tell(Start())
    for worker in workers:
        stage.ready(worker, node=f"node-{worker.slot // 2}")
    stage.wait(5.0, *workers)
    stage.join()
    for worker in (W0, W1, W2, W3, W4, W5):
        stage.held[worker] = union([Span(worker.slot % 2, 0, ELEMENTS)])
    return stage


def test_workers_are_asked_for_and_used_in_whole_units() -> None:
    stage = Stage(tensor=2, max_workers=5)
    assert len(of(RequestWorker, stage.tell(Start()))) == 4, "five are two units"
    stage.tell(Placed(W1, "a"))
    stage.ready(W0, node="a")
    stage.ready(W2, node="b")
    assert not of(StartGeneration, stage.wait(5.0, W0, W2)), "two halves are no unit"
    assert stage.controller.state is RunState.WAITING
    stage.ready(W3, node="b")
    generation = the(StartGeneration, stage.ready(W1, node="a")).generation
    assert [m.worker for m in generation.members] == [W0, W1, W2, W3]
    assert (generation.layout.tensor, generation.layout.data) == (2, 2)
    assert generation.held[0] == whole(ELEMENTS, 2)


def test_the_partner_of_a_lost_worker_waits_for_another_in_its_place() -> None:
    stage = tensor_parallel(W0, W1, W2, W3)
    stage.train(2)
    decided = stage.tell(Died(W1, "SIGKILL"))
    assert the(RequestWorker, decided).worker == WorkerId(1, 1)
    decided = stage.leave_all("peer", but=(W1,))
    assert [m.worker for m in the(StartGeneration, decided).generation.members] == [W2, W3]
    stage.join()
    assert not of(Pause, stage.train(1) + stage.wait(2.0, W0, W2, W3))
    the(Pause, stage.ready(WorkerId(1, 1), node="node-0"))
    generation = the(StartGeneration, stage.leave_all("pause")).generation
    assert [m.worker for m in generation.members] == [W0, WorkerId(1, 1), W2, W3]
    assert generation.held[:2] == (NOTHING, NOTHING), "what it held is old by now"


def test_the_partner_of_a_lost_worker_brings_what_only_it_has() -> None:
    stage = tensor_parallel(W0, W1, W2, W3)
    stage.train(2)
    stage.tell(Died(W1, "SIGKILL"))
    stage.tell(Died(W2, "SIGKILL"))
    stage.leave(W0, "peer")
    stage.leave(W3, "peer")
    assert stage.controller.state is RunState.WAITING
    generation = the(StartGeneration, stage.ready(WorkerId(1, 1), node="node-0")).generation
    assert [m.worker for m in generation.members] == [W0, WorkerId(1, 1), W3]
    assert (generation.layout.spares, generation.committed) == (1, 2)
    assert union(*generation.held) == whole(ELEMENTS, 2)


def test_a_unit_is_let_go_as_one() -> None:
    stage = tensor_parallel(W0, W1, W2, W3)
    stage.train(2)
    stage.tell(Resize(3))
    assert stage.controller.target == 2
    decided = stage.leave_all("pause")
    assert [m.worker for m in the(StartGeneration, decided).generation.members] == [W0, W1]
    assert {action.worker for action in of(ReleaseWorker, stage.told)} == set(), "they hold a part of the state each"
    assert {action.worker for action in of(ReleaseWorker, stage.join() + stage.wait(0.5, W0, W1))} == {W2, W3}


def test_a_unit_whose_node_drains_is_replaced_by_one() -> None:
    stage = tensor_parallel(W0, W1, max_workers=2)
    stage.train(2)
    decided = stage.tell(DrainNotice((W0, W1), "spot", stage.now + 60.0))
    assert {action.worker for action in of(RequestWorker, decided)} == {W2, W3}
    assert not of(Pause, stage.ready(W2, node="node-1"))
    the(Pause, stage.ready(W3, node="node-1"))
    generation = the(StartGeneration, stage.leave_all("pause")).generation
    assert ([m.worker for m in generation.members], generation.layout.spares) == ([W2, W3, W0, W1], 2)
    the(Pause, stage.join())
    stage.train(1)
    stage.held |= {W0: (), W1: ()}
    decided = stage.leave_all("pause")
    assert {action.worker for action in of(ReleaseWorker, decided)} == {W0, W1}
    assert [m.worker for m in the(StartGeneration, decided).generation.members] == [W2, W3]


def test_a_standby_for_units_is_a_unit() -> None:
    stage = tensor_parallel(W0, W1, max_workers=2, standby=1)
    stage.train(1)
    stage.tell(Tick())
    assert {action.worker for action in of(RequestWorker, stage.told)} == {W0, W1, W2, W3}


# ------------------------------------------------------------------------------------ layouts and limits


@pytest.mark.parametrize(
    ("tensor", "least", "most", "asked", "given"),
    [(1, 1, 4, 9, 4), (2, 1, 5, 5, 4), (2, 3, 8, 1, 4), (4, 1, 8, 7, 4), (2, 3, 3, 3, 2)],
)
def test_sizes_are_multiples_of_the_tensor_degree(tensor: int, least: int, most: int, asked: int, given: int) -> None:
    config = ControllerConfig(total_steps=10, chooser=layouts(8, tensor), min_workers=least, max_workers=most)
    assert config.within_limits(asked) == given


def test_a_question_is_asked_once() -> None:
    asked = []

    class Counting(OnlyPairs):
        def choose(
            self, workers: int, costs: ModelCosts | None, memory_bytes: int, current: ParallelLayout | None
        ) -> ParallelLayout | None:
            asked.append((workers, costs is MODEL, memory_bytes))
            return super().choose(workers, costs, memory_bytes, current)

    known = Layouts(ControllerConfig(total_steps=10, chooser=Counting(), min_workers=1, max_workers=8))
    views = [holder(W0, 0), holder(W1, 0)]
    views[1].ready = ready_message(W1, memory_bytes=7)
    assert (known.fewest(1, views), known.ranks(3, views), known.ranks(3, views)) == (2, 2, 2)
    assert asked == [(1, True, 7), (2, True, 7), (3, True, 7)]


def test_a_member_that_joined_a_sharded_generation_is_known_to_hold_nothing() -> None:
    """Until it says so: what a layout puts where is not the controller's to know."""
    stage = sharded(W0, W1)
    assert [view.held for view in stage.controller.workers.values()] == [NOTHING, NOTHING]
    stage = Stage(max_workers=1).running(W0)
    assert stage.controller.workers[W0].held == WHOLE
    assert stage.tell(Joined(W0, 0, 10)) == []
