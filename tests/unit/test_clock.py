"""The clock of a run: steady across jumps of the wall clock, controllers, machines and versions."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import monitoring.clock
from monitoring.clock import Line, Reading, RunClock, on_line, reading, when
from monitoring.event_book import EventBook
from monitoring.goodput import read_ledger
from monitoring.terminal.facts import RunFacts
from orchestrator.control.core.protocol import FaultFired
from orchestrator.control.core.workers import WorkerId
from orchestrator.training import messages
from orchestrator.training.messages import Heartbeat, Left, Ready, Status, StepReport, dated
from strategies.layout.statemap import Spans
from tests.unit.events_in_tests import event_with

ROOT = Path(__file__).parents[2]
HOUR = 3600.0

WALL_TIME = {
    "monitoring/clock.py": "the run's line is anchored in it, and every record tells it",
    "monitoring/report/page.py": "when the page was written",
    "orchestrator/cli/looking.py": "`--since`: what a user means by a time",
    "orchestrator/rundir.py": "the name of a request",
    "orchestrator/checkpoint/catalog.py": "when a checkpoint was saved, for showing",
    "orchestrator/checkpoint/listing.py": "its age",
    "orchestrator/runtime/ray/drains.py": "Ray's deadlines are wall time",
    "orchestrator/runtime/ray/fault_injection.py": "Ray's deadlines are wall time",
    "orchestrator/runtime/ray/nodes.py": "Ray's deadlines are wall time",
    "orchestrator/runtime/ray/node_watcher/local.py": "Ray's deadlines are wall time",
    "orchestrator/runtime/ray/node_watcher/watch.py": "clouds' deadlines are wall time",
    "orchestrator/runtime/ray/node_watcher/wrapper.py": "Ray's deadlines are wall time",
    "orchestrator/cli/drain.py": "Ray's deadlines are wall time",
    "orchestrator/cli/following.py": "times of files are wall time",
    "orchestrator/models/content.py": "times of files are wall time",
    "orchestrator/succession.py": "when another process, perhaps on another machine, recorded last",
    "orchestrator/runtime/ray/examination/examine.py": "how far the clocks of nodes differ is what is asked",
    "orchestrator/runtime/ray/examination/node.py": "how far the clocks of nodes differ is what is asked",
}
"""Where the wall clock may be read, and why. Everything that waits, ticks, orders or measures uses another."""


def reads_of_the_wall_clock(tree: ast.AST) -> Iterable[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            if any(alias.name in ("time", "time_ns") for alias in node.names):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns"):
            yield node.lineno


def test_the_wall_clock_is_read_for_showing_only() -> None:
    found = set()
    for package in ("orchestrator", "strategies", "monitoring"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            lines = list(reads_of_the_wall_clock(ast.parse(path.read_text())))
            if lines:
                found.add(name)
            assert not lines or name in WALL_TIME, (
                f"{name}:{lines[0]} reads the wall clock, which may jump: use time.monotonic() or the run's clock "
                "(monitoring/clock.py)"
            )
    assert found == set(WALL_TIME), "an exception that nobody needs"


class Clocks:
    """The clocks of a machine, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wall: float = 1_000_000.0, steady: float = 50.0) -> None:
        self.wall, self.steady, self.boot = wall, steady, "boot 1"
        monkeypatch.setattr("monitoring.clock.time.time", lambda: self.wall)
        monkeypatch.setattr("monitoring.clock.time.monotonic", lambda: self.steady)
        monkeypatch.setattr(monitoring.clock, "this_boot", lambda: self.boot)

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def controller(clock: RunClock) -> dict[str, Any]:
    return {"kind": "controller", "session": "s", **clock.stamp(clock.now()), **clock.anchor()}


# ---------------------------------------------------------------------------------------- the line


def test_a_run_begins_at_the_wall_time_and_is_counted_steadily(clocks: Clocks) -> None:
    clock = RunClock()
    assert clock.now() == 1_000_000.0
    for jump in (HOUR, -2 * HOUR, 5 * HOUR):
        clocks.wall += jump
        clocks.pass_by(10.0)
    assert clock.now() == pytest.approx(1_000_030.0)
    assert clock.stamp(clock.now()) == {"time": 1_014_430.0, "clock": pytest.approx(1_000_030.0)}


def test_a_successor_on_the_same_boot_goes_on_whatever_the_wall_clock_says(clocks: Clocks) -> None:
    event = controller(RunClock())
    clocks.pass_by(7.0)
    clocks.wall -= HOUR
    successor = RunClock([event])
    assert successor.now() == pytest.approx(1_000_007.0)
    assert Line.of([event, controller(successor)]).now() == pytest.approx(1_000_007.0)


@pytest.mark.parametrize(("away", "expected"), [(600.0, 1_000_620.0), (-HOUR, 1_000_020.0)])
def test_elsewhere_the_wall_clocks_tell_how_long_it_has_been_and_never_back(
    clocks: Clocks, away: float, expected: float
) -> None:
    clock = RunClock()
    events = [controller(clock)]
    clocks.pass_by(20.0)
    events.append({"kind": "waiting", **clock.stamp(clock.now())})
    clocks.boot, clocks.steady = "boot 2", 3.0
    clocks.wall += away
    assert RunClock(events).now() == pytest.approx(expected)


def test_records_of_older_versions_have_the_wall_time_only(clocks: Clocks) -> None:
    old = [{"kind": "controller", "time": 999_000.0, "session": "s"}, {"kind": "waiting", "time": 999_990.0}]
    assert RunClock(old).now() == 1_000_000.0
    clocks.wall = 900_000.0
    assert RunClock(old).now() == 999_990.0
    assert when(old[1]) == 999_990.0
    assert on_line(old[1]) == old[1]


def test_a_fork_begins_after_the_steps_it_has(clocks: Clocks) -> None:
    assert RunClock((), at_least=1_000_500.0).now() == 1_000_500.0


def test_a_reader_elsewhere_counts_from_when_it_saw_the_status_change(clocks: Clocks) -> None:
    line = Line()
    # Written by a machine whose wall clock is two hours behind.
    line.take({"time": 992_800.0, "clock": 992_800.0})
    line.take({"time": 992_801.0, "clock": 992_801.0})
    clocks.pass_by(3.0)
    clocks.wall += HOUR
    assert line.now() == pytest.approx(992_804.0)


# ---------------------------------------------------------------------------------------- workers elsewhere


def test_clocks_of_this_boot_are_one(clocks: Clocks) -> None:
    clock = RunClock()
    sent = reading()
    clocks.pass_by(2.0)
    assert clock.shift_of("w", sent, clock.now()) + sent.seconds == pytest.approx(1_000_000.0)


def test_of_another_machine_the_message_that_took_the_shortest_tells(clocks: Clocks) -> None:
    clock = RunClock()
    began = clock.now()
    shifts = []
    for number, delay in enumerate((0.5, 0.002, 9.0, 0.3)):
        happened = began + 10.0 * number
        sent = Reading("elsewhere", 70_000.0 + happened - began)
        shift = clock.shift_of("w", sent, happened + delay)
        shifts.append(shift + sent.seconds - happened)
    assert shifts[:2] == pytest.approx([0.5, 0.002])
    assert all(0.0 <= error < 0.02 for error in shifts[1:]), "a message that is late does not make what it tells late"
    # A process that is started anew on another boot has another clock.
    assert clock.shift_of("w", Reading("third", 5.0), began) == began - 5.0


def test_every_time_in_a_message_is_dated() -> None:
    worker = WorkerId(1, 0)
    step = StepReport(3, 1, 2.0, 1.0, 0.1, 64, "", False, 10.0, 0.5)
    held: Spans = ()
    left = Left(worker, 1, "exception", 3, held, reports=(step,), at=11.0)
    ready = Ready(worker, "n", 1, "h", 1, "i", 1)
    status = Status(ready, None, left, 3, held, False, True, 0, reports=(step,))

    assert dated(Heartbeat(worker, 1, "compute", 3, 3, reports=(step,)), 100.0).reports[0].committed_at == 110.0
    assert dated(left, 100.0).at == 111.0
    assert dated(left, 100.0).reports[0].committed_at == 110.0
    there = dated(status, 100.0)
    assert there.left is not None
    assert (there.left.at, there.left.reports[0].committed_at, there.reports[0].committed_at) == (111.0, 110.0, 110.0)
    assert dated(FaultFired(worker, 0, 12.0), 100.0).at == 112.0
    assert dated(ready, 100.0) is ready
    with_reports = [kind for kind in vars(messages).values() if "reports" in getattr(kind, "__dataclass_fields__", ())]
    assert len(with_reports) == 4
    for kind in with_reports:
        message = object.__new__(kind)
        for name, field in kind.__dataclass_fields__.items():
            object.__setattr__(message, name, (step,) if name == "reports" else None if field.name != "at" else 0.0)
        assert dated(message, 100.0).reports[0].committed_at == 110.0, kind
    assert dated(Left(worker, 1, "pause", 3, held), 100.0).at == 0.0, "0: not told"


# ---------------------------------------------------------------------------------------- what is made of records


def history(jumps: dict[float, float]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A run with a failure in it; `jumps` says by how much the wall clock is ahead from which time on."""

    def stamp(now: float) -> dict[str, float]:
        ahead = next((jump for since, jump in sorted(jumps.items(), reverse=True) if now >= since), 0.0)
        return {"time": now + ahead, "clock": now}

    book = EventBook(stamp=stamp)
    events: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []

    def note(kind: str, now: float, **fields: Any) -> None:
        events.extend(book.record(event_with(kind, **fields), now))

    def train(first: int, last: int, began: float, generation: int) -> None:
        for step in range(first, last):
            at = began + step - first + 1.0
            record = {"step": step, "generation": generation, "committed_at": at, "seconds": 1.0, "tokens": 8,
                      "phase_seconds": {}, "ranks": [], "skipped": False, "loss": 1.0, "grad_norm": 1.0,
                      "lr": 0.1}  # fmt: skip
            steps.append(record)
            events.extend(book.step(record, at + 0.1))

    note("run_started", 1000.0, run="r", steps=60, min_workers=1)
    note("controller", 1000.1, session="s", epoch=0)
    note("worker_ready", 1004.0, worker=0, incarnation=0, pid=1)
    note(
        "generation",
        1005.0,
        generation=0,
        start_step=0,
        workers=[{"worker": 0, "incarnation": 0}],
        layout={},
        cause="start",
    )
    note("generation_running", 1006.0, generation=0)
    train(0, 30, 1006.0, 0)
    note("incident", 1038.0, incident="kill", worker=0, cause="killed", step=30, at=1037.0, detect_seconds=1.0)
    note(
        "generation",
        1039.0,
        generation=1,
        start_step=30,
        workers=[{"worker": 0, "incarnation": 1}],
        layout={},
        cause="kill",
    )
    note("generation_running", 1040.0, generation=1)
    train(30, 60, 1040.0, 1)
    note(
        "recovery",
        1041.0,
        incident="kill",
        worker=0,
        at=1037.0,
        step=30,
        stall_seconds=4.0,
        steps_lost=0,
        detect_seconds=1.0,
        bytes_moved=0,
        source="peers",
    )
    note("run_finished", 1072.0, status="finished", reason="")
    return events, steps


JUMPS = [{1010.0: HOUR}, {1010.0: -HOUR}, {1037.5: HOUR, 1039.5: -HOUR}, {1000.05: -HOUR, 1060.0: 24 * HOUR}]


@pytest.mark.parametrize("jumps", JUMPS)
def test_a_jump_of_the_wall_clock_changes_nothing_that_is_measured(jumps: dict[float, float]) -> None:
    events, steps = history({})
    told, same = history(jumps)
    assert [event["time"] for event in told] != [event["time"] for event in events]
    expected, found = read_ledger(events, steps), read_ledger(told, same)
    assert found.account() == expected.account()
    assert found.account().wall_seconds == pytest.approx(72.0)
    assert found.incidents() == expected.incidents()
    assert found.segments() == expected.segments()


@pytest.mark.parametrize("jumps", JUMPS)
def test_what_is_shown_of_a_run_is_of_its_own_time(jumps: dict[float, float], tmp_path: Path) -> None:
    events, steps = history(jumps)
    for name, records in (("events.jsonl", events), ("metrics.jsonl", steps)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = RunFacts(tmp_path)
    told, _ = facts.refresh()
    assert facts.started == 1000.0
    assert [event["time"] for event in told] == [event["clock"] for event in events]
    assert facts.goodput is not None
    assert facts.goodput["wall_seconds"] == pytest.approx(72.0)


def test_a_status_of_an_earlier_attempt_is_known_by_being_there_already(tmp_path: Path) -> None:
    """Not by its time: its writer's clock may be an hour behind ours, or ahead."""
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"time": 4e9, "state": "over"}))
    facts = RunFacts(tmp_path, is_new=True)
    assert facts.live is None
    status.write_text(json.dumps({"time": 1e9, "state": "running"}))
    facts.refresh()
    assert facts.live is not None
