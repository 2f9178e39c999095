"""With more workers decisions take longer in proportion, and no faster than that: counted in operations of the
interpreter, which a busy machine does not change."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from benchmarks.control_plane import CHANGES, changes, started
from orchestrator.control.core.protocol import Tick
from orchestrator.control.training.controller import Controller
from orchestrator.control.training.protocol import Action, Event
from orchestrator.training.messages import Heartbeat
from tests.selection import nightly

FEW, MANY = 128, 512
MOST = 1.4
"""How much more than in proportion: sorting takes n log n, and what grows with the square would show as 4.0."""


class Operations:
    """Counts the instructions that a controller executes, but for those of heartbeats and ticks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        handle = Controller.handle

        def counted(controller: Controller, event: Event, now: float) -> list[Action]:
            if isinstance(event, Heartbeat | Tick):
                return handle(controller, event, now)
            before = sys.gettrace()
            sys.settrace(self._trace)
            try:
                return handle(controller, event, now)
            finally:
                sys.settrace(before)

        monkeypatch.setattr(Controller, "handle", counted)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.count += event == "opcode"
        return self._trace

    def clock(self) -> float:
        return float(self.count)


@pytest.mark.parametrize("layout", ["optimizer-tp8", *nightly(["replicated"])])
def test_what_a_change_of_membership_takes_grows_with_the_number_of_workers(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = Operations(monkeypatch)
    few, many = (changes(layout, workers, 1, operations.clock) for workers in (FEW, MANY))
    for kind in CHANGES:
        growth = sum(many[kind][0]) / sum(few[kind][0])
        assert growth < MOST * MANY / FEW, f"{kind}: {growth:.1f} times as much for {MANY / FEW:.0f} times as many"


def test_what_a_start_takes_grows_with_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = Operations(monkeypatch)
    few, many = (started("replicated", workers, operations.clock)[1] for workers in (FEW, MANY))
    for part, took in many.items():
        assert took < MOST * few[part] * MANY / FEW, part
