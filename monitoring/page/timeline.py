"""Generations and incidents of a run, one line each. Pure."""

from __future__ import annotations

from collections import deque
from typing import Any

from monitoring.events import (
    CheckpointFailed,
    CheckpointInvalid,
    ControllerRestarted,
    DrainNoticed,
    Evicted,
    EvictionWithdrawn,
    FaultInjected,
    GaveWay,
    GenerationFormed,
    GivesWayNoMore,
    IncidentOpened,
    MarketChanged,
    Rebalanced,
    RebalanceMeasured,
    Recovered,
    ResizeRequested,
    RolledBack,
    RunFinished,
    RunStarted,
    Shortage,
    ShortageOver,
    SkewFound,
    SkewOver,
    StartFailed,
    StopRequested,
    TeachersMissing,
    Waiting,
)
from monitoring.follow import describe_event

MAX_ENTRIES = 300
MAX_TEXT = 300
MAX_NAMED = 12
"""Workers of a generation that are told by name."""

_LEVELS = {
    IncidentOpened.kind: "bad",
    StartFailed.kind: "bad",
    CheckpointFailed.kind: "bad",
    CheckpointInvalid.kind: "bad",
    Waiting.kind: "warn",
    SkewFound.kind: "warn",
    Evicted.kind: "warn",
    DrainNoticed.kind: "warn",
    RolledBack.kind: "warn",
    Shortage.kind: "warn",
    TeachersMissing.kind: "warn",
    ShortageOver.kind: "good",
    MarketChanged.kind: "info",
    GaveWay.kind: "warn",
    GivesWayNoMore.kind: "info",
    ControllerRestarted.kind: "warn",
    StopRequested.kind: "warn",
    FaultInjected.kind: "warn",
    Recovered.kind: "good",
    SkewOver.kind: "good",
    RunFinished.kind: "good",
    EvictionWithdrawn.kind: "good",
    "damaged": "bad",
    GenerationFormed.kind: "info",
    RunStarted.kind: "info",
    Rebalanced.kind: "info",
    RebalanceMeasured.kind: "info",
    ResizeRequested.kind: "info",
}
"""What is shown, and how bad it is. What workers do one by one is seen in the grid of workers."""


def describe(event: dict[str, Any]) -> str:
    """An event in one line, whatever it lacks."""
    match event["kind"]:
        case RunStarted.kind:
            return "the run began"
        case RunFinished.kind:
            return f"the run {event.get('status', 'ended')}" + (f": {event['reason']}" if event.get("reason") else "")
        case GenerationFormed.kind if isinstance(event.get("workers"), list):
            slots = [str(worker.get("worker")) for worker in event["workers"] if isinstance(worker, dict)]
            who = f" ({', '.join(slots)})" if len(slots) <= MAX_NAMED else ""
            number = f"generation {event.get('generation')} from step {event.get('start_step')}"
            return f"{number}: {len(slots)} {'worker' if len(slots) == 1 else 'workers'}{who}"
        case "damaged":
            return str(event.get("text"))
        case RolledBack.kind:
            return f"{event.get('steps')} steps from step {event.get('committed')} on are done again"
        case FaultInjected.kind:
            who = "" if event.get("worker") is None else f" on worker {event['worker']}"
            return f"fault {event.get('fault')} of the job is injected{who}"
    try:
        text = describe_event(event)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        text = None
    if text is None:
        text = ", ".join(f"{key}={value}" for key, value in event.items() if key not in ("time", "clock", "kind"))
    return text


class Timeline:
    """The last entries, numbered."""

    def __init__(self) -> None:
        self._entries: deque[dict[str, Any]] = deque(maxlen=MAX_ENTRIES)
        self._number = 0
        self._told = 0

    def on_event(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind not in _LEVELS:
            return
        text = describe(event)
        entry = {
            "id": self._number,
            "time": round(float(event["time"]), 3),
            "kind": kind,
            "level": _LEVELS[kind],
            "text": text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…",
        }
        if kind == RunFinished.kind and event.get("status") == "failed":
            entry["level"] = "bad"
        for key in ("incident", "worker", "step", "at", "generation"):
            if event.get(key) is not None:
                entry[key] = event[key]
        self._number += 1
        self._entries.append(entry)

    def entries(self) -> list[dict[str, Any]]:
        """All that are kept, oldest first."""
        return list(self._entries)

    def take_new(self) -> list[dict[str, Any]]:
        """Those since this was last asked."""
        found = [entry for entry in self._entries if entry["id"] >= self._told]
        self._told = self._number
        return found
