"""Waiting for workers to introduce themselves."""

from __future__ import annotations

import threading

from monitoring.clock import reading
from orchestrator.control.core.workers import WorkerId
from orchestrator.runtime.mailbox import Introduction, Introductions

W0, W1, W2 = (WorkerId(slot, 0) for slot in range(3))


def introduction(worker: WorkerId) -> Introduction:
    return Introduction(worker, "node", 100 + worker.slot, None, reading())


def test_a_waiter_hears_of_all_as_soon_as_the_last_one_it_waits_for_is_met() -> None:
    reception = Introductions()
    reception.add(introduction(W2))
    found: list[set[WorkerId]] = []
    waiting = threading.Thread(target=lambda: found.append(set(reception.wait_for({W0, W1}, 60.0))))
    waiting.start()
    reception.add(introduction(W0))
    assert waiting.is_alive()
    reception.add(introduction(W1))
    waiting.join(30.0)
    assert found == [{W0, W1, W2}]


def test_patience_ends_and_nobody_has_to_be_waited_for() -> None:
    reception = Introductions()
    reception.add(introduction(W0))
    assert set(reception.wait_for({W0, W1}, 0.01)) == {W0}
    assert set(reception.wait_for((), 60.0)) == {W0}
    reception.forget(W0)
    reception.forget(W1)
    assert not reception.wait_for((), 60.0)


def test_workers_that_were_not_met_may_show_life() -> None:
    reception = Introductions()
    assert not reception.show_life({W0}, 60.0)
    reception.hear(W1)
    assert not reception.show_life({W0}, 60.0)
    assert reception.show_life({W0, W1}, 60.0), "one of them says something"
    reception.hear(W2, 7)
    reception.hear(W2, 7)
    assert not reception.show_life({W0}, 60.0), "that may be long ago"
    reception.hear(W2, 8)
    assert reception.show_life({W0}, 60.0), "no step is committed without every member"
    assert not reception.show_life({W0}, 0.0)
