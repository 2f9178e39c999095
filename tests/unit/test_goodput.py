"""The goodput ledger: every second of a run is in it once, under the name that an operator would give it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from monitoring.event_book import EventBook
from monitoring.goodput import REASONS, GoodputAccount, Ledger, read_ledger
from monitoring.stretches import Stretches, divide, uncovered
from tests.selection import nightly
from tests.unit.events_in_tests import event_of, event_with
from tests.unit.test_controller_histories import live, make_world

T0 = 1000.0


def event(when: float, kind: str, /, **fields: Any) -> dict[str, Any]:
    return {"time": T0 + when, "kind": kind, **fields}


def step(number: int, at: float, seconds: float = 1.0, generation: int = 0, **fields: Any) -> dict[str, Any]:
    """A step committed `at`; its four ranks read for 0.1 s, and one has twice the work of the others."""
    ranks = [[[0.4], 0.1, 0.0, 0.0, 1.0, 10, 0]] * 3 + [[[0.8], 0.1, 0.0, 0.0, 1.0, 10, 0]]
    return {
        "step": number, "generation": generation, "seconds": seconds, "committed_at": T0 + at, "tokens": 40,
        "phase_seconds": {}, "ranks": ranks,
    } | fields  # fmt: skip


def incident(detected: float, at: float, kind: str = "kill", worker: int | None = 1) -> dict[str, Any]:
    return event(
        detected, "incident", incident=kind, worker=worker, incarnation=0, cause=f"{kind} of a test", step=5,
        at=T0 + at, detect_seconds=detected - at,
    )  # fmt: skip


def generation(at: float, number: int, **fields: Any) -> dict[str, Any]:
    return event(at, "generation", generation=number, start_step=0, workers=[], **fields)


START = [
    event(0, "controller", session="a", epoch=1),
    event(0, "run_started", run="test", steps=100, min_workers=2),
    event(0, "worker_requested", worker=0, incarnation=0),
    event(1, "worker_placed", worker=0, incarnation=0, node="n"),
    event(3, "worker_placed", worker=1, incarnation=0, node="n"),
    event(8, "worker_ready", worker=0, incarnation=0, node="n"),
    event(9, "worker_ready", worker=1, incarnation=0, node="n"),
    generation(9, 0),
    event(9.5, "generation_running", generation=0),
]
"""Training can begin after ten seconds."""


def told(*parts: Any, steps: list[dict[str, Any]] | None = None) -> GoodputAccount:
    """The account of START, these events, and steps, wherever they belong by their times."""
    ledger = ledger_of(*parts, steps=steps)
    account = ledger.account()
    assert account.wall_seconds == pytest.approx(account.productive_seconds + sum(account.badput_seconds.values()))
    segments = ledger.segments()
    assert segments[0][0] == T0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(segments)), "a gap or an overlap"
    return account


def ledger_of(*parts: Any, steps: list[dict[str, Any]] | None = None) -> Ledger:
    book = EventBook()
    work: list[tuple[float, dict[str, Any]]] = [(e["time"], e) for e in [*START, *parts]]
    work += [(s["committed_at"], s) for s in (steps or [])]
    for at, entry in sorted(work, key=lambda pair: pair[0]):
        if "kind" in entry:
            if entry["kind"] == "rollback":
                book.roll_back(entry["committed"], [s for s in steps or [] if s["committed_at"] < at], at)
            else:
                book.record(event_of(entry), at)
        else:
            book.step(entry, at)
    book.record(event_with("metrics_endpoint", url=""), max(at for at, _ in work))
    if (under_way := book._stretches.peek()) is not None:
        book.ledger.add({"kind": "steps", **under_way})
    return book.ledger


def spent(account: GoodputAccount) -> dict[str, float]:
    return {reason: round(seconds, 6) for reason, seconds in account.badput_seconds.items() if seconds > 1e-9}


BEGINNING = {"waiting_for_resources": 3.0, "initialisation": 6.0, "training_preparation": 1.0}
"""Two workers are needed: the second has a place after three seconds and is ready after nine."""
TEN = [step(n, 11.0 + n) for n in range(10)]
"""Ten steps of a second, from 10 to 20."""
IN_TEN = {"data_loading": 1.0, "straggler_wait": 3.0}


def test_the_beginning_the_steps_and_the_end() -> None:
    steps = [step(n, 11.0 + n) for n in range(100)]
    account = told(event(112, "run_finished", status="finished"), steps=steps)
    assert account.wall_seconds == 112
    assert spent(account) == BEGINNING | {"data_loading": 10.0, "straggler_wait": 30.0, "finalisation": 2.0}
    assert account.productive_seconds == pytest.approx(60.0)
    assert account.ratio == pytest.approx(60 / 112)


def test_a_step_is_divided_by_what_its_ranks_tell() -> None:
    """The average rank reads 0.1 s, and waits for the slowest, at 0.9 s of work, from 0.5 s on (three) or not (one)."""
    assert divide(step(0, 1)) == pytest.approx({"productive": 0.6, "data_loading": 0.1, "straggler_wait": 0.3})
    assert divide(step(0, 1, ranks=[])) == {"productive": 1.0, "data_loading": 0.0, "straggler_wait": 0.0}
    # What a step that was interrupted and resumed accounts for reaches back further than its seconds.
    cut_short = divide(step(0, 1, seconds=0.2))
    assert sum(cut_short.values()) == pytest.approx(0.2)
    assert min(cut_short.values()) >= 0


def test_a_kill_is_wasted_work_detection_and_recovery() -> None:
    account = told(
        incident(21.0, 20.5), generation(21.5, 1), event(22, "generation_running", generation=1),
        steps=[*TEN, step(10, 24.0, generation=1)],
    )  # fmt: skip
    assert spent(account) == BEGINNING | {
        "data_loading": 1.1, "straggler_wait": 3.3, "wasted_steps": 0.5, "detection": 0.5, "recovery": 2.0,
    }  # fmt: skip


def test_what_an_incident_cost_is_told_of_it_alone() -> None:
    ledger = ledger_of(
        incident(21.0, 20.5), generation(21.5, 1),
        event(24.1, "recovery", incident="kill", worker=1, at=T0 + 20.5, step=10, stall_seconds=2.5, steps_lost=0),
        incident(25.0, 25.0, "grow", None), generation(26.5, 2),
        steps=[*TEN, step(10, 24.0, generation=1), step(11, 25.0, generation=1), step(12, 28.0, generation=2)],
    )  # fmt: skip
    kill, grow = ledger.incidents()
    assert (kill["incident"], kill["stall_seconds"], kill["total_seconds"]) == ("kill", 2.5, 3.0)
    assert kill["seconds"] == {"wasted_steps": 0.5, "detection": 0.5, "recovery": 2.0}
    assert (grow["incident"], grow["seconds"]) == ("grow", {"resize": 2.0})


@pytest.mark.parametrize(
    ("kind", "reason"), [("grow", "resize"), ("shrink", "resize"), ("drain", "resize"), ("rebalance", "rebalance")]
)
def test_a_change_by_agreement_interrupts_no_step(kind: str, reason: str) -> None:
    account = told(
        incident(15.2, 15.2, kind, None), generation(20.4, 1), steps=[*TEN, step(10, 22.0, generation=1)]
    )  # fmt: skip
    assert spent(account) == BEGINNING | {"data_loading": 1.1, "straggler_wait": 3.3, reason: 1.0}


def test_waiting_for_machines_is_neither_detection_nor_recovery() -> None:
    account = told(
        incident(20.5, 20.0), event(20.5, "worker_died", worker=1, incarnation=0),
        event(21.0, "waiting", workers=1, needed=2), event(51.0, "worker_placed", worker=1, incarnation=1, node="m"),
        event(55.0, "worker_ready", worker=1, incarnation=1, node="m"), generation(55.0, 1),
        steps=[*TEN, step(10, 57.0, generation=1)],
    )  # fmt: skip
    assert spent(account) == BEGINNING | {
        "data_loading": 1.1, "straggler_wait": 3.3, "detection": 0.5, "waiting_for_resources": 33.0, "recovery": 5.5,
    }  # fmt: skip


def test_what_fails_while_nothing_is_computed_wastes_nothing() -> None:
    """A worker that dies while the run waits for machines, or while a generation forms."""
    account = told(
        incident(20.5, 20.5, "drain"), event(20.6, "worker_released", worker=1, incarnation=0),
        event(21.0, "waiting", workers=1, needed=2), incident(620.5, 620.0, "kill", 0), generation(630.0, 1),
        steps=[*TEN, step(10, 632.0, generation=1)],
    )  # fmt: skip
    assert spent(account) == BEGINNING | {
        "data_loading": 1.1, "straggler_wait": 3.3, "other": 0.5, "resize": 0.5, "waiting_for_resources": 3.0 + 608.5,
        "detection": 0.5, "recovery": 1.0,
    }  # fmt: skip
    account = told(
        incident(19.5, 19.5, "grow", None), generation(20.0, 1), incident(23.5, 23.0), generation(24.0, 2),
        steps=[*TEN, step(10, 26.0, generation=2)],
    )  # fmt: skip
    assert spent(account) == BEGINNING | {
        "data_loading": 1.1, "straggler_wait": 3.3, "resize": 3.0, "detection": 0.5, "recovery": 1.5,
    }  # fmt: skip


def test_steps_of_the_run_that_this_one_was_forked_from_are_not_its_own() -> None:
    parents = [step(n, 11.0 + n - 100.0) for n in range(10)]
    account = read_ledger(START, parents).account()
    assert account.productive_seconds == 0.0
    assert spent(account) == pytest.approx(BEGINNING | {"training_preparation": 0.5})


def test_what_happened_long_ago_is_not_looked_at_again() -> None:
    """Ten thousand steps of one generation, with a checkpoint every other step."""
    ledger = Ledger()
    for each in START:
        ledger.add(each)
    stretches = Stretches(max_seconds=0.0)
    for number in range(10_000):
        for stretch in stretches.add(step(number, 11.0 + number)):
            ledger.add({"time": stretch["ended"], "kind": "steps", **stretch})
        if number % 2:
            ledger.add(event(11.0 + number, "checkpoint_saved", committed=number))
    assert len(ledger._marks) < 10


def test_steps_that_are_run_again_were_wasted_and_reading_a_checkpoint_is_named() -> None:
    again = [step(n, 26.0 + n - 6, generation=1) for n in range(6, 10)]
    ledger = ledger_of(
        incident(20.5, 20.0), event(21.0, "rollback", committed=6),
        generation(21.0, 1, restore="step-6"), event(24.0, "generation_running", generation=1), steps=[*TEN, *again],
    )  # fmt: skip
    account = ledger.account()
    assert account.wall_seconds == pytest.approx(29.0)
    assert spent(account) == pytest.approx(
        BEGINNING
        | {"data_loading": 1.0, "straggler_wait": 3.0, "wasted_steps": 4.0, "detection": 0.5, "recovery": 1.5,
           "checkpoint_restore": 3.0}
    )  # fmt: skip
    assert account.productive_seconds == pytest.approx(6.0)
    assert ledger.incidents()[0]["seconds"]["wasted_steps"] == pytest.approx(4.0)


def test_a_run_that_nobody_steered_for_a_while_was_interrupted() -> None:
    account = told(
        event(22.0, "checkpoint_saved", committed=10), event(122.0, "controller", session="b", epoch=2),
        event(122.5, "worker_placed", worker=0, incarnation=1, node="n"),
        event(123.0, "worker_placed", worker=1, incarnation=1, node="n"),
        generation(126.0, 1, restore="step-10"), event(127.0, "generation_running", generation=1),
        steps=[*TEN, step(10, 129.0, generation=1)],
    )  # fmt: skip
    assert spent(account) == {
        "waiting_for_resources": 4.0, "initialisation": 9.0, "training_preparation": 2.0, "data_loading": 1.1,
        "straggler_wait": 3.3, "checkpoint_restore": 1.0, "interrupted": 100.0, "other": 2.0,
    }  # fmt: skip


def test_a_controller_that_is_restarted_interrupts_nothing() -> None:
    account = told(event(15.5, "controller", session="a", epoch=2), event(15.6, "controller_restarted"), steps=TEN)
    assert spent(account) == BEGINNING | IN_TEN


def test_what_saves_hold_up_is_between_steps() -> None:
    steps = [step(0, 11.0), step(1, 12.5, phase_seconds={"save": 0.4}), step(2, 13.5)]
    assert spent(told(steps=steps)) == BEGINNING | {
        "data_loading": 0.3, "straggler_wait": 0.9, "checkpoint_save": 0.4, "other": 0.1,
    }  # fmt: skip


def test_a_step_under_way_counts_until_it_is_known_to_be_lost() -> None:
    ledger = ledger_of()
    partial = Stretches(max_seconds=60.0)
    for each in TEN[:-1]:
        partial.add(each)
    assert ledger.settled(T0 + 20.5, partial.peek())["pending"] == pytest.approx(1.5)
    partial.add(TEN[-1])
    assert ledger.account(T0 + 23.0, partial.peek()).productive_seconds == pytest.approx(6.0 + 3.0)
    ledger.add(incident(23.0, 21.0))
    later = ledger.account(T0 + 24.0, partial.peek())
    assert spent(later) == pytest.approx(BEGINNING | IN_TEN | {"wasted_steps": 1.0, "detection": 2.0, "recovery": 1.0})
    assert later.wall_seconds == pytest.approx(24.0)


def test_clocks_that_differ_leave_no_gap_and_no_overlap() -> None:
    """The second rank 0 sits on a machine whose clock is three seconds behind."""
    late = [step(n, 11.0 + n - 3.0, generation=1) for n in range(10, 14)]
    account = told(incident(20.2, 20.0), generation(20.4, 1), event(30.0, "run_finished", status="stopped"),
                   steps=[*TEN, *late])  # fmt: skip
    assert account.wall_seconds == pytest.approx(30.0)


def test_steps_that_no_event_tells_of_are_found_in_the_records() -> None:
    ledger = read_ledger(START, TEN)
    assert spent(ledger.account()) == BEGINNING | IN_TEN
    (stretch,) = uncovered(START, TEN)
    assert (stretch["first"], stretch["last"], stretch["tokens"]) == (0, 9, 400)
    recorded = {"kind": "steps", "time": stretch["ended"], **stretch}
    assert uncovered([*START, recorded], TEN) == []
    assert uncovered([*START, recorded, event(21, "rollback", committed=7)], TEN[:7]) == []


def test_long_stretches_are_told_in_parts_with_nothing_between_them() -> None:
    stretches = Stretches(max_seconds=5.0)
    steps = [step(n, 1.2 * n + 1.0) for n in range(20)]
    events = [told for each in steps for told in stretches.add(each)] + stretches.flush()
    assert len(events) > 3
    assert all(a["ended"] == b["began"] for a, b in itertools.pairwise(events))
    assert sum(e["last"] - e["first"] + 1 for e in events) == 20
    for each in events:
        assert sum(each["seconds"].values()) == pytest.approx(each["ended"] - each["began"], abs=1e-5)
    assert sum(e["seconds"]["other"] for e in events) == pytest.approx(19 * 0.2)


# ---------------------------------------------------------------------------------------- whatever happens


@pytest.mark.parametrize("first_seed", [0, *nightly(range(100, 1000, 100))])
def test_goodput_and_badput_add_up_to_the_wall_time_of_chaotic_runs(first_seed: int) -> None:
    seen = dict.fromkeys(REASONS, 0.0)
    for seed in range(first_seed, first_seed + 100):
        world = make_world(seed)
        live(world)
        assert world.outcome is not None
        account = world.book.account()
        what = f"seed {seed}: {account.as_dict()}"
        wall = world.outcome.at - world.events[1]["time"]
        assert account.wall_seconds == pytest.approx(wall, rel=1e-6, abs=1e-3), what
        total = account.productive_seconds + sum(account.badput_seconds.values())
        assert total == pytest.approx(wall, rel=1e-6, abs=1e-3), what
        assert min(account.productive_seconds, *account.badput_seconds.values()) >= 0.0, what
        assert account.productive_seconds <= sum(report.seconds for report in world.steps) + 1e-3, what
        # From what is on disk alone it is the same.
        again = read_ledger([json.loads(json.dumps(each)) for each in world.events])
        assert again.account().as_dict() == account.as_dict(), what
        segments = again.segments()
        assert all(a[1] == b[0] for a, b in itertools.pairwise(segments)), what
        costs = sum(each["total_seconds"] for each in again.incidents())
        assert costs <= sum(account.badput_seconds.values()) + 1e-3, what
        # And at any time in between; what was counted is never taken back but from what was thought productive.
        ledger, before = Ledger(), 0.0
        for each in world.events:
            ledger.add(each)
            now = max(each["time"], before)
            at = ledger.account(now)
            assert at.wall_seconds == pytest.approx(max(now, ledger._until) - world.events[1]["time"], abs=1e-3), what
            before = now
        for reason, seconds in account.badput_seconds.items():
            seen[reason] += seconds
    missing = {reason for reason, seconds in seen.items() if not seconds}
    # Simulated workers read no data and save beside training; nobody goes home in the middle of a simulated run.
    assert missing <= {"data_loading", "checkpoint_save", "evaluation", "interrupted", "rebalance"}, missing
