"""When a notice becomes a drain, with a clock, a source and a drain of the test's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from orchestrator.notices.notice import Notice, SourceError
from orchestrator.runtime.ray.node_watcher.watch import UNKNOWN_DEADLINE_S, Watcher
from orchestrator.runtime.ray.nodes import GcsError, HeadNodeError, NodeError

NOW = datetime(2026, 8, 2, 8, 20, 0, tzinfo=UTC).timestamp()


class Bench:
    """A watcher with a clock that is set by hand; `notices` stand, `fails` is what the next drains raise."""

    name = "bench"

    def __init__(self, *, early: bool = False) -> None:
        self.now = NOW
        self.notices: list[Notice] = []
        self.trouble: Exception | None = None
        self.fails: list[Exception] = []
        self.drained: list[tuple[str, float]] = []
        self.ahead = 0.0
        self.watcher = Watcher(
            [self], self._drain, poll_s=2.0, lead_s=180.0, early=early, clock=lambda: self.now, wall=self.wall
        )

    def wall(self) -> float:
        """The wall clock, which is set meanwhile; `now` never goes back."""
        return self.now + self.ahead

    def detect(self) -> bool:
        return True

    def poll(self, now: float) -> list[Notice]:
        if self.trouble is not None:
            raise self.trouble
        return self.notices

    def _drain(self, reason: str, deadline: float) -> str:
        if self.fails:
            raise self.fails.pop(0)
        self.drained.append((reason, deadline - self.wall()))
        return "drained it"

    def run(self, seconds: float) -> list[float]:
        """Ticks for some seconds; returns the waits between."""
        waits, end = [], self.now + seconds
        while self.now < end:
            waits.append(self.watcher.tick())
            self.now += waits[-1]
        return waits


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="orchestrator.runtime.ray.node_watcher")
    return lambda: [record.getMessage() for record in caplog.records]


def test_one_drain_for_one_notice(said: Callable[[], list[str]]) -> None:
    bench = Bench()
    assert bench.run(10) == [2.0] * 5
    assert bench.drained == []
    bench.notices = [Notice("a", "AWS takes it", bench.now + 120)]
    bench.run(60)
    assert bench.drained == [("bench: AWS takes it", 120)]
    assert said() == ["bench: notice: AWS takes it, in 120 s", "bench: drained it"]


def test_a_far_deadline_is_waited_for_and_an_unknown_one_is_near() -> None:
    bench = Bench()
    bench.notices = [Notice("a", "reboot", NOW + 3600)]
    bench.run(3400)
    assert bench.drained == []
    bench.run(30)
    assert bench.drained == [("bench: reboot", pytest.approx(180, abs=2))]
    bench.notices = [Notice("b", "some time", None)]
    bench.run(2)
    assert bench.drained[1] == ("bench: some time", UNKNOWN_DEADLINE_S)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_wall_clock_that_is_set_neither_stops_the_watch_nor_moves_a_deadline(jump: float) -> None:
    bench = Bench()
    bench.run(10)
    bench.ahead = jump
    bench.notices = [Notice("a", "reboot", bench.wall() + 600)]
    bench.run(10)
    bench.notices, bench.ahead = [Notice("a", "reboot", None)], -jump
    bench.run(400)
    assert bench.drained == []
    bench.run(20)
    assert bench.drained == [("bench: reboot", pytest.approx(180, abs=3))]


def test_a_deadline_that_comes_nearer_is_believed() -> None:
    bench = Bench()
    bench.notices = [Notice("a", "reboot", NOW + 900)]
    bench.run(10)
    bench.notices = [Notice("a", "reboot", NOW + 15)]
    bench.run(10)
    assert bench.drained == [("bench: reboot", 5)]


def test_what_is_only_possible_needs_to_be_asked_for(said: Callable[[], list[str]]) -> None:
    notice = Notice("a", "rebalance", None, possible=True)
    calm, early = Bench(), Bench(early=True)
    calm.notices = early.notices = [notice]
    calm.run(100)
    assert calm.drained == []
    assert "only possible" in said()[0]
    early.run(100)
    assert len(early.drained) == 1


def test_a_withdrawn_notice_is_said_and_may_come_again(said: Callable[[], list[str]]) -> None:
    bench = Bench()
    bench.notices = [Notice("a", "spot", NOW + 120)]
    bench.run(4)
    bench.notices = []
    bench.run(4)
    assert said()[-1] == "bench: withdrawn: spot; a Ray drain cannot be withdrawn, so the node stays drained"
    bench.notices = [Notice("a", "spot", NOW + 100)]
    bench.run(4)
    assert len(bench.drained) == 2


def test_a_gcs_that_is_away_is_asked_until_the_deadline(said: Callable[[], list[str]]) -> None:
    bench = Bench()
    bench.notices = [Notice("a", "spot", NOW + 30)]
    bench.fails = [GcsError("GCS away")] * 20
    waits = bench.run(28)
    assert set(waits[:20]) == {1.0}, "more often than it polls"
    assert [reason for reason, _ in bench.drained] == ["bench: spot"]
    assert [line for line in said() if "GCS away" in line] == [
        "bench: not drained: GCS away; trying again until the deadline"
    ]
    gone = Bench()
    gone.notices = [Notice("a", "spot", NOW + 30)]
    gone.fails = [NodeError("no node here")] * 1000
    gone.run(120)
    assert gone.drained == []
    assert 968 <= len(gone.fails) <= 970, "tried each second until the deadline, then never again"
    assert said()[-1] == "bench: given up at the deadline: spot"


def test_the_head_is_not_asked_twice() -> None:
    bench = Bench()
    bench.notices = [Notice("a", "spot", NOW + 30)]
    bench.fails = [HeadNodeError("the head"), NodeError("asked twice")]
    bench.run(30)
    assert len(bench.fails) == 1


def test_a_failing_source_is_said_once_and_asked_more_seldom(said: Callable[[], list[str]]) -> None:
    bench = Bench()
    bench.trouble = SourceError("down")
    assert bench.run(60) == [4.0, 8.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    bench.trouble = RuntimeError("a bug of somebody else's")
    bench.run(20)
    bench.trouble = None
    bench.notices = [Notice("a", "spot", bench.now + 120)]
    bench.run(2)
    assert said()[:3] == [
        "bench: SourceError: down; asking again",
        "bench: RuntimeError: a bug of somebody else's; asking again",
        "bench: answers again, after 9 failed polls",
    ]
    assert len(bench.drained) == 1


def test_a_source_in_trouble_withdraws_nothing(said: Callable[[], list[str]]) -> None:
    bench = Bench()
    bench.notices = [Notice("a", "reboot", NOW + 900)]
    bench.run(2)
    bench.trouble = SourceError("down")
    bench.run(800)
    assert len(bench.drained) == 1, "at its time, although its source is silent"
    assert not any("withdrawn" in line for line in said())
