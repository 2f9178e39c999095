"""What a run's controller writes down, and what follows from it: metrics, the goodput ledger, the result's lists.

Everything here is made of events.jsonl and metrics.jsonl, so that a controller that takes over knows what its
predecessor knew. Knows nothing of Ray. May be called from several threads.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from monitoring.clock import RunClock, when
from monitoring.evaluations import StandingEvaluations
from monitoring.event_book import EventBook
from monitoring.events import (
    CheckpointComplete,
    CheckpointDelayed,
    CheckpointFailed,
    ControllerBegan,
    Evaluated,
    FaultInjected,
    GaveWay,
    GenerationFormed,
    GivesWayNoMore,
    IncidentOpened,
    MarketChanged,
    MetricsEndpoint,
    ModelLoaded,
    Rebalanced,
    RebalanceMeasured,
    RecordsDelayed,
    RecordsDropped,
    Recovered,
    RolledBack,
    RunEvent,
    RunFinished,
    RunStarted,
    Shortage,
    ShortageOver,
    SkewFound,
    SkewOver,
    StartFailed,
    TeachersMissing,
)
from monitoring.goodput import GoodputAccount
from monitoring.metrics import RunMetrics
from monitoring.records import RecordFile, read_records
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory
from orchestrator.training.messages import StepReport

log = logging.getLogger(__name__)

_EXPENDABLE = frozenset(
    {
        CheckpointDelayed.kind,
        CheckpointFailed.kind,
        GaveWay.kind,
        GivesWayNoMore.kind,
        MarketChanged.kind,
        MetricsEndpoint.kind,
        Rebalanced.kind,
        RebalanceMeasured.kind,
        Shortage.kind,
        ShortageOver.kind,
        SkewFound.kind,
        SkewOver.kind,
        StartFailed.kind,
        TeachersMissing.kind,
    }
)
"""Kinds of events that only inform: where records wait for a full disk and memory for them is short, these go. What a
result, the goodput ledger or a successor is made of stays."""

RANKS_PER_STEP = 64
"""How many ranks' accounts a step's record may have; with more ranks only some steps have them."""


class RunLog:
    """`past_events` and `past_steps` are what was on record when this controller began; `committed` counts the steps
    that are known now.

    While the run directory cannot be written (a full disk), records wait in memory; see `RecordFile`.

    More than 15 attributes: what is on record, counted as it is written, so that nobody reads it again.
    """

    def __init__(self, directory: RunDirectory, job: Job) -> None:
        self._directory = directory
        self._job = job
        self._lock = threading.RLock()
        self._events = RecordFile(directory.events, shed=_shed_event)
        self._steps = RecordFile(directory.metrics, shed=_shed_step)
        self._unwritten_since: float | None = None
        self._most_waiting = 0
        self.past_events = list(read_records(directory.events))
        self.past_steps = list(read_records(directory.metrics))
        self.committed = len(self.past_steps)
        self.last_step: dict[str, Any] | None = self.past_steps[-1] if self.past_steps else None
        self.last_ranks: tuple[Any, ...] = ()
        self.last_incident: dict[str, Any] | None = None
        self.last_checkpoint: dict[str, Any] | None = None
        self.open_incidents: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = []
        self.generations: list[dict[str, Any]] = []
        self.recoveries: list[dict[str, Any]] = []
        self.evaluated = StandingEvaluations()
        """Of the weights of steps that are on record."""
        self.loaded: dict[str, Any] | None = None
        """What became of the weights of the model's directory, if it has one."""
        self.started_at: float | None = None
        self.tokens = sum(int(record["tokens"]) for record in self.past_steps)
        self.wire_bytes: Counter[str] = Counter()
        """That ranks have sent in steps that were committed, by kind; also in those that were replayed later."""
        for record in self.past_steps:
            self.wire_bytes.update(record.get("wire_bytes", {}))
        for event in self.past_events:
            self._note(event)
        self.metrics = RunMetrics(directory.run_id, job.name, _version())
        self.metrics.replay(self.past_events, self.past_steps)
        self.metrics.go_on_from(_counters(directory))
        committed_at = 0.0 if self.last_step is None else float(self.last_step["committed_at"])
        self.clock = RunClock(self.past_events, at_least=committed_at)
        self._book = EventBook(self.past_events, self.past_steps, self.clock.stamp)
        self._write(self._book.catch_up(self.clock.now()))

    # ------------------------------------------------------------------------------------ events

    def record(self, event: RunEvent) -> dict[str, Any]:
        """Puts an event on record; the record of it."""
        match event:
            case FaultInjected():
                event = replace(event, what=self._job.faults[event.fault].model_dump())
            case ControllerBegan():
                event = replace(event, **self.clock.anchor())
        with self._lock:
            records = self._book.record(event, self.clock.now())
            self._write(records)
            return records[-1]

    def _write(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._events.append(event)
            self._see_what_waits()
            self.metrics.on_event(event)
            self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case RunStarted.kind if self.started_at is None:
                self.started_at = when(event)
            case ModelLoaded.kind:
                self.loaded = {key: value for key, value in event.items() if key not in ("kind", "time", "clock")}
            case ControllerBegan.kind:
                self.findings = []
            case GenerationFormed.kind:
                if is_training(event):
                    self.generations.append(generation_entry(event))
            case Recovered.kind:
                self.recoveries.append(recovery_entry(event))
                same = ("incident", "worker", "at")
                keep = [i for i in self.open_incidents if any(i[key] != event[key] for key in same)]
                self.open_incidents = keep
            case IncidentOpened.kind:
                self.last_incident = event
                self.open_incidents = [*self.open_incidents, event]
            case CheckpointComplete.kind:
                self.last_checkpoint = event
            case Evaluated.kind | RolledBack.kind:
                self.evaluated.take(event)
            case SkewFound.kind:
                self.findings = [*self.findings, event]
            case SkewOver.kind:
                self.findings = [f for f in self.findings if (f["finding"], f["workers"]) != _key(event)]
            case RunFinished.kind:
                self.open_incidents, self.findings = [], []

    # ------------------------------------------------------------------------------------ steps

    def step(self, report: StepReport) -> None:
        """Puts a committed step on record."""
        with self._lock:
            now = self.clock.now()
            record = {"time": self.clock.stamp(now)["time"]} | asdict(report)
            self._write(self._book.step(record, now))
            self.last_ranks = report.ranks
            every = -(-len(report.ranks) // RANKS_PER_STEP)
            if every > 1 and report.step % every:
                record["ranks"] = ()
            self._steps.append(record)
            self._see_what_waits()
            self.committed += 1
            self.tokens += report.tokens
            self.wire_bytes.update(report.wire_bytes)
            self.last_step = record
            self.metrics.on_step(record)

    def roll_back(self, committed: int) -> None:
        """Takes the steps from `committed` on off the record."""
        with self._lock:
            events = self._book.roll_back(committed, self._steps.records(), self.clock.now())
            self._write(events)
            self._steps.keep(lambda record: int(record["step"]) < committed)
            self.committed = min(self.committed, committed)
            self.tokens -= events[-1]["tokens"]

    # ------------------------------------------------------------------------------------ what follows

    def account(self, now: float | None = None) -> GoodputAccount:
        """What the wall time went into so far."""
        with self._lock:
            return self._book.account(now)

    def forget_the_past(self) -> None:
        """What was on record when this controller began is no longer asked for; of a long run it is large."""
        self.past_events, self.past_steps = [], []

    def publish(self, status: Mapping[str, Any], now: float) -> None:
        """Tells how things are, in the metrics and in status.json. Raises OSError when that cannot be written."""
        with self._lock:
            self.metrics.on_status(status)
            settled = self._book.settled(now)
            counters = {key: round(seconds, 6) + 1e-6 for key, seconds in self.metrics.book(settled).items()}
        try:
            # First where a successor finds it, then to those who would notice when a counter goes back.
            self._directory.write_json("status.json", {**status, "counters": counters})
        finally:
            with self._lock:
                self.metrics.on_goodput(settled)

    # ------------------------------------------------------------------------------------ what is not written yet

    @property
    def recorded(self) -> int:
        """How many steps are in the file. Workers keep the reports of all others: should this process end before they
        are written, its successor hears of them again."""
        return max(0, self.committed - self._steps.num_waiting)

    def unwritten(self) -> dict[str, Any] | None:
        """What waits for room in the run directory, since when and why; None when nothing does."""
        error = self._steps.error or self._events.error
        if error is None:
            return None
        return {
            "records": self._steps.num_waiting + self._events.num_waiting,
            "steps": self._steps.num_waiting,
            "since": self._unwritten_since,
            "error": str(error),
        }

    def flush(self, now: float) -> bool:
        """Writes what waits, if it can be written now; whether nothing waits any more. To be called now and then."""
        with self._lock:
            self._see_what_waits()
            dropped = self._events.dropped
            written = self._steps.flush() and self._events.flush()
            if written and self._unwritten_since is not None:
                delayed = RecordsDelayed(records=self._most_waiting, seconds=round(now - self._unwritten_since, 1))
                since, self._unwritten_since, self._most_waiting = self._unwritten_since, None, 0
                self.record(delayed)
                if dropped:
                    self._events.dropped = Counter()
                    self.record(RecordsDropped(count=dropped.total(), kinds=dict(dropped), since=since))
                written = not self._events.num_waiting
            return written

    def _see_what_waits(self) -> None:
        """Also when there is room again a moment later, it is told that there was none."""
        if waiting := self._steps.num_waiting + self._events.num_waiting:
            self._unwritten_since = self._unwritten_since or self.clock.now()
            self._most_waiting = max(self._most_waiting, waiting)

    def missing_files(self) -> list[str]:
        """Record files that are not where they were made any more: what is written to them is lost."""
        with self._lock:
            return [file.path.name for file in (self._events, self._steps) if file.is_gone]

    def close(self) -> None:
        self.metrics.close()
        self._events.close()
        self._steps.close()


def _shed_event(event: dict[str, Any]) -> dict[str, Any] | None:
    return None if event["kind"] in _EXPENDABLE else event


def _shed_step(record: dict[str, Any]) -> dict[str, Any]:
    """No step is given up, as they are the proof of what was trained on; but what its ranks spent on it is."""
    return record | {"ranks": (), "phase_seconds": {}}


def _key(finding: Mapping[str, Any]) -> tuple[Any, Any]:
    return finding["finding"], finding["workers"]


def _counters(directory: RunDirectory) -> dict[str, float]:
    """What a predecessor may have shown. A status.json that cannot be read is no reason not to go on."""
    try:
        last = directory.read_json("status.json")
        found = {} if last is None else last.get("counters", {})
        return {key: float(seconds) for key, seconds in found.items() if math.isfinite(seconds)}
    except Exception as error:
        log.warning("counters of goodput may go back, as status.json cannot be read: %s", error)
        return {}


def _version() -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("elastic-orchestrator")
    return ""


def is_training(event: Mapping[str, Any]) -> bool:
    """Whether an event tells of a generation that trains; one that only collects the final state is not told of in the
    result."""
    return bool(event["kind"] == GenerationFormed.kind and not event.get("collect"))


def generation_entry(event: Mapping[str, Any]) -> dict[str, Any]:
    """A generation as result.json has it."""
    return {key: event[key] for key in ("generation", "start_step", "cause", "workers", "layout")}


def recovery_entry(event: Mapping[str, Any]) -> dict[str, Any]:
    """A recovery as result.json has it."""
    fields = {key: value for key, value in event.items() if key not in ("time", "clock", "kind")}
    return fields | {"kind": event["incident"]}
