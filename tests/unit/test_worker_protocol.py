"""A worker's side of the protocol: whom it obeys, what it wants of votes, what it tells and when."""

from __future__ import annotations

import pytest

from orchestrator.checkpoint.names import Save
from orchestrator.control.core.orders import Leave, Order
from orchestrator.control.core.workers import WorkerId
from orchestrator.training.messages import Generation, Member, Ready, Reply, StepReport
from orchestrator.training.orders import (
    CommitCheckpoint,
    Deal,
    DiscardCheckpoint,
    Finalize,
    Interrupt,
    Pause,
    RequestSave,
    SaveState,
    StartGeneration,
)
from orchestrator.training.worker_protocol import Holds, WorkerProtocol
from strategies.layout.parallel import ParallelLayout
from strategies.layout.statemap import NOTHING

US, OTHER = WorkerId(0, 0), WorkerId(1, 0)
NOTHING_HELD = Holds(0, NOTHING, prepared=False)


def generation(number: int, term: int = 1, committed: int = 0, first: WorkerId = US) -> Generation:
    members = tuple(Member(worker, "node", 1, "host", 1) for worker in (first, OTHER if first == US else US))
    layout = ParallelLayout(2, ((0,), (1,)))
    return Generation(number, term, committed, "test", members, layout, (NOTHING, NOTHING))


def inside(number: int = 3, term: int = 1, first: WorkerId = US) -> WorkerProtocol:
    """A worker that takes part in a generation."""
    protocol = WorkerProtocol(US)
    start = generation(number, term, first=first)
    assert protocol.takes(StartGeneration(start), term)
    protocol.enters(start)
    return protocol


def wishes(protocol: WorkerProtocol) -> list[str]:
    """What it was told to want that concerns the generation that it is in."""
    said = {"pause": protocol.pause_requested, "save": protocol.save_requested, "out": protocol.is_interrupted}
    return [wish for wish, is_so in said.items() if is_so]


def step(number: int) -> StepReport:
    return StepReport(number, 3, 1.0, 1.0, 0.1, 10, "", False, 0.0, 0.1)


ORDERS: list[Order] = [
    Interrupt((), 3), Pause((), 3), RequestSave((), 3), Deal((), 3, 1, ((0, 1), ())), Finalize(()),
    SaveState((US,), Save(4, 1, 3)), CommitCheckpoint(US, Save(4, 1, 3), (), {}), DiscardCheckpoint(US, Save(4, 1, 3)),
    Leave(US), StartGeneration(generation(4)), StartGeneration(generation(4, term=0)),
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_no_order_of_an_older_controller_is_obeyed(order: Order) -> None:
    protocol = inside(term=1)
    assert not protocol.takes(order, 0)
    assert not wishes(protocol)
    assert (protocol.term, protocol.accepted) == (1, 3)


@pytest.mark.parametrize("order", ORDERS[:-1], ids=lambda order: type(order).__name__)
def test_every_order_of_a_newer_one_is_and_then_no_more_of_the_older(order: Order) -> None:
    protocol = inside(term=1)
    assert protocol.takes(order, 2)
    assert protocol.term == 2
    assert not protocol.takes(Finalize(()), 1)


def test_a_generation_is_joined_once_and_never_an_older_one() -> None:
    protocol = inside(3)
    for number in (2, 3):
        assert not protocol.takes(StartGeneration(generation(number, term=5)), 5)
    assert protocol.takes(StartGeneration(generation(4, term=5)), 5)
    assert not protocol.takes(StartGeneration(generation(4, term=5)), 5), "told twice"


def test_orders_about_another_generation_change_nothing() -> None:
    protocol = inside(3)
    assert not protocol.takes(RequestSave((), 2), 1)
    assert not protocol.takes(Deal((), 4, 1, ()), 1)
    assert protocol.takes(Pause((), 2), 1)
    assert protocol.takes(Interrupt((), 2), 1)
    assert not wishes(protocol)


def test_what_comes_before_the_generation_is_entered_counts_in_it() -> None:
    protocol = WorkerProtocol(US)
    start = generation(3)
    protocol.takes(StartGeneration(start), 1)
    protocol.takes(Pause((), 3), 1)
    protocol.takes(Interrupt((), 3), 1)
    assert not protocol.is_interrupted, "it is in none yet"
    protocol.enters(start)
    assert protocol.pause_requested
    assert protocol.is_interrupted
    later = generation(4)
    protocol.enters(later)
    assert not wishes(protocol), "that was about the one before"


def test_a_save_that_has_to_wait_is_told_once_and_asked_for_until_it_is_made() -> None:
    protocol = inside()
    assert protocol.takes(RequestSave((), 3), 1)
    assert protocol.save_requested
    assert protocol.saves(is_due=True, is_busy=True, is_last=False) == (False, True)
    assert protocol.save_requested, "so that it is due again at the next boundary"
    assert protocol.saves(is_due=True, is_busy=True, is_last=False) == (False, False)
    assert protocol.saves(is_due=True, is_busy=False, is_last=False) == (True, False)
    assert not protocol.save_requested
    assert protocol.saves(is_due=False, is_busy=False, is_last=False) == (False, False)
    assert protocol.saves(is_due=True, is_busy=True, is_last=True) == (False, False), "others are asked then"


def test_the_first_rank_tells_of_steps_until_they_are_known_and_all_keep_them_until_they_are_on_record() -> None:
    first, second = inside(), inside(first=OTHER)
    for protocol in (first, second):
        protocol.reports += map(step, range(4))
        assert not protocol.heeds(Reply(recorded=1, term=1, known=3))
    assert [report.step for report in first.unknown()] == [3]
    assert second.unknown() == ()
    assert [report.step for report in second.reports] == [1, 2, 3]
    first.begins_at(2)
    assert [report.step for report in first.reports] == [1], "the others are run again"
    assert first.heeds(Reply(recorded=4, term=1, shutdown=True))
    assert not first.reports


def test_its_account_for_a_successor() -> None:
    protocol = inside()
    protocol.reports.append(step(7))
    ready = Ready(US, "node", 1, "host", 1, "initial", 10)
    dealt = ((1,), (0,))
    assert protocol.status(0, ready, NOTHING_HELD, None, dealt) is None, "to an older one it says nothing"
    account = protocol.status(4, ready, NOTHING_HELD, None, dealt)
    assert account is not None
    assert (account.term, account.joined, account.left, account.assignment) == (4, False, None, ())
    assert [report.step for report in account.reports] == [7]
    protocol.is_joined = True
    left = protocol.leaves("peer", Holds(7, NOTHING, prepared=True), 12.5, "it is gone")
    assert (left.generation, left.committed, left.prepared, left.at) == (3, 7, True, 12.5)
    account = protocol.status(4, ready, NOTHING_HELD, None, dealt)
    assert account is not None
    assert (account.left, account.assignment) == (left, dealt)
    assert not protocol.takes(Finalize(()), 3), "it obeys the successor now"


def test_an_order_says_nothing_of_whom_else_it_is_for() -> None:
    both = (US, OTHER)
    for order in (Interrupt(both, 3), Pause(both, 3), Finalize(both), RequestSave(both, 3), Deal(both, 3, 1, ())):
        assert order.recipients == both
        assert order.sent().workers == ()
    saved = SaveState(both, Save(4, 1, 3))
    assert saved.sent().workers == both, "each writes its share among them"
    assert StartGeneration(generation(3)).recipients == both
