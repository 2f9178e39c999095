"""Checkpoints in the making, as the controller sees them."""

from __future__ import annotations

from monitoring.events import CheckpointComplete, CheckpointFailed
from orchestrator.checkpoint.names import Save
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.saving import Saving
from orchestrator.training.messages import CheckpointSaved, PartSaved, SaveBegun, SavePlan
from orchestrator.training.orders import CommitCheckpoint, DiscardCheckpoint

A, B, C = WorkerId(0, 0), WorkerId(1, 0), WorkerId(2, 0)
PLAN = SavePlan(Save(20, 1, 3), (A, B), {"data": 2})


def begun() -> Saving:
    saving = Saving({}, None)
    saving.is_due = True
    saving.begun(SaveBegun(A, PLAN, 0.01), 0.0)
    return saving


def wrote(saving: Saving, worker: WorkerId, error: str = "") -> None:
    rank = PLAN.writers.index(worker)
    saving.wrote(PartSaved(worker, PLAN, rank, f"digest {rank}", seconds=1.0 + rank, error=error), 1.0)


def test_when_all_parts_are_there_one_of_the_writers_completes_it() -> None:
    saving = begun()
    assert not saving.is_due
    wrote(saving, A)
    assert saving.review({A, B}, {A, B}, 0.0) == []
    wrote(saving, B)
    commit = CommitCheckpoint(A, PLAN.save, ((0, "digest 0"), (1, "digest 1")), {"data": 2})
    assert saving.review({A, B}, {A, B}, 0.0) == [commit]
    assert saving.review({A, B}, {A, B}, 0.0) == [], "it is told once"
    assert saving.is_saving(20)
    (record,) = saving.saved(CheckpointSaved(A, PLAN.save, "c20", 0.5, 100), 0.0)
    assert record == CheckpointComplete(
        committed=20, path="c20", bytes=100, seconds=2.5, blocked_seconds=0.01, writers=2
    )
    assert saving.checkpoints == {20: "c20"}
    assert not saving.is_saving(20)


def test_parts_may_be_heard_of_before_the_beginning() -> None:
    saving = Saving({}, None)
    wrote(saving, B)
    wrote(saving, A)
    saving.begun(SaveBegun(A, PLAN, 0.01), 0.0)
    assert isinstance(saving.review({A, B}, {A, B}, 0.0)[0], CommitCheckpoint)


def test_a_lost_writer_ends_the_attempt_and_another_is_due_at_once() -> None:
    saving = begun()
    assert saving.review({A}, {A}, 0.0) == [], "who lives may still be writing: there would be more to remove"
    wrote(saving, A)
    discard, record = saving.review({A}, {A}, 0.0)
    assert discard == DiscardCheckpoint(A, PLAN.save)
    assert record == CheckpointFailed(committed=20, error="worker 1 was lost before it had written its part")
    assert saving.is_due


def test_a_writer_that_lives_and_never_had_the_state_is_not_waited_for() -> None:
    """It missed the news of the vote on the last of these steps; perhaps before anybody told of the save."""
    for is_told_first in (True, False):
        saving = begun() if is_told_first else Saving({}, None)
        saving.left(A, 3, 20)
        saving.left(B, 3, 19)
        if not is_told_first:
            saving.begun(SaveBegun(A, PLAN, 0.01), 0.0)
        assert saving.review({A, B}, {A, B}, 0.0) == [], "the other still writes"
        wrote(saving, A)
        discard, record = saving.review({A, B}, {A, B}, 0.0)
        assert discard == DiscardCheckpoint(A, PLAN.save)
        assert isinstance(record, CheckpointFailed)
        assert record.error == "worker 1 was out of the generation before it had the state to save"
        assert saving.is_due


def test_who_left_with_the_state_or_an_earlier_generation_writes_on() -> None:
    saving = begun()
    saving.left(A, 3, 20)
    saving.left(B, 2, 19)
    wrote(saving, A)
    assert saving.review({A, B}, {A, B}, 0.0) == []


def test_who_has_written_may_be_lost() -> None:
    saving = begun()
    wrote(saving, B)
    wrote(saving, A)
    commit = CommitCheckpoint(A, PLAN.save, ((0, "digest 0"), (1, "digest 1")), {"data": 2})
    assert saving.review({A, C}, {A, C}, 0.0) == [commit], "survivors finish it"
    assert saving.review({C}, {C}, 0.0) == [CommitCheckpoint(C, *[commit.save, commit.parts, commit.layout])]
    assert saving.review(set(), set(), 0.0) == []
    assert saving.review({B}, {B}, 0.0)[0] == CommitCheckpoint(B, commit.save, commit.parts, commit.layout)


def test_what_the_storage_refuses_waits_for_the_next_interval() -> None:
    saving = begun()
    wrote(saving, A)
    wrote(saving, B, error="No space left on device")
    discard, record = saving.review({A, B}, {A, B}, 0.0)
    assert discard == DiscardCheckpoint(A, PLAN.save)
    assert record == CheckpointFailed(committed=20, error="No space left on device")
    assert not saving.is_due


def test_a_checkpoint_that_cannot_be_completed_is_discarded() -> None:
    saving = begun()
    wrote(saving, A)
    wrote(saving, B)
    saving.review({A, B}, {A, B}, 0.0)
    discard, record = saving.saved(CheckpointSaved(A, PLAN.save, "c20", error="EIO"), 0.0)
    assert discard == DiscardCheckpoint(A, PLAN.save)
    assert record == CheckpointFailed(committed=20, path="c20", error="EIO")
    assert saving.checkpoints == {}


def test_it_is_asked_for_once_in_a_generation_and_not_while_one_is_under_way() -> None:
    saving = Saving({}, None)
    assert not saving.order(3)
    saving.is_due = True
    assert saving.order(3)
    assert not saving.order(3)
    assert saving.order(4), "the members of the generation before may not have heard of it"
    saving.begun(SaveBegun(A, PLAN, 0.0), 0.0)
    saving.is_due = True
    assert not saving.order(5)


def test_time_makes_one_due() -> None:
    saving = Saving({}, 10.0)
    saving.tick(100.0)
    saving.tick(109.0)
    assert not saving.is_due
    saving.tick(110.0)
    assert saving.is_due
    saving.begun(SaveBegun(A, PLAN, 0.0), 111.0)
    saving.tick(120.0)
    assert not saving.is_due
    saving.tick(121.0)
    assert saving.is_due


def test_what_is_already_saved_is_not_taken_up_again() -> None:
    """A controller that was restarted hears of the last parts once more."""
    saving = Saving({20: "c20"}, None)
    wrote(saving, A)
    assert not saving.is_saving(20)
    assert saving.review({A}, {A}, 0.0) == []


def test_the_end_of_a_run_is_tried_again_at_once_when_a_writer_is_lost() -> None:
    saving = Saving({}, None)
    tried = []
    for _ in range(4):
        save = saving.attempt_at(100, 1, 7, 0.0)
        assert save is not None
        saving.expect(SavePlan(save, (A,)), 0.0)
        assert saving.attempt_at(100, 1, 7, 0.0) is None, "one at a time"
        saving.review(set(), set(), 0.0)
        tried.append(save)
    assert [save.attempt for save in tried] == [1, 2, 3, 4]
    saving.try_no_more(100)
    assert saving.attempt_at(100, 1, 7, 1e9) is None


def test_a_storage_that_refuses_the_end_is_asked_again_after_growing_pauses() -> None:
    saving, now, pauses = Saving({}, None), 0.0, []
    save = saving.attempt_at(100, 1, 7, now)
    for _ in range(8):
        assert save is not None
        plan = SavePlan(save, (A,))
        saving.expect(plan, now)
        saving.wrote(PartSaved(A, plan, 0, "", error="No space left on device"), now)
        saving.review({A}, {A}, now)
        began = now
        while (save := saving.attempt_at(100, 1, 7, now)) is None:
            now += 1.0
        pauses.append(now - began)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert saving.why_unsaved(100) == "No space left on device"


def test_nobody_waits_for_ever() -> None:
    saving = begun()
    assert saving.give_up(20, 100.0, 600.0) == []
    saving.skip_gap(200.0)
    assert saving.give_up(20, 700.0, 600.0) == []
    (record,) = saving.give_up(20, 900.0, 600.0)
    assert record == CheckpointFailed(committed=20, error="it was not complete after 600 s")
    assert not saving.is_saving(20)
    assert saving.attempt_at(20, 1, 7, 900.0) is None, "what hangs is not asked again at once"
    assert saving.attempt_at(20, 1, 7, 902.0) is not None
