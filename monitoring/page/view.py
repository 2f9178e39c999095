"""What the page shows of a run, folded from its records one by one. Pure: no files, no clock, no web.

`whole` is everything at once, as JSON-able data; `changes` is what differs since it was last asked, in the same shape
with less in it. Both are what static/state.js puts together again.
"""

from __future__ import annotations

from typing import Any

from monitoring.clock import Line, on_line
from monitoring.evaluations import StandingEvaluations, numbers_in
from monitoring.events import CheckpointComplete, CheckpointFailed, CheckpointInvalid, GenerationFormed
from monitoring.page.run_status import RunStatus
from monitoring.page.timeline import Timeline
from monitoring.page.workers import Workers
from monitoring.report.steps import Point, StepSeries

MAX_GENERATIONS = 500
"""This many generations back the number of workers is shown."""
MAX_CHECKPOINTS = 50
MAX_EVALUATIONS = 50


class View:
    """A run as the page shows it.

    Times in it are on the run's line, in seconds since the epoch; those of points and of the number of workers count
    from `start`.
    """

    def __init__(self, name: str) -> None:
        self.series = StepSeries()
        self.status = RunStatus(name)
        self.workers = Workers()
        self.timeline = Timeline()
        self._start: float | None = None
        self._damaged: set[str] = set()
        self._world: list[tuple[float, int, int, int]] = []
        self._checkpoints: list[dict[str, Any]] = []
        self._evaluations = StandingEvaluations()
        self._goodput: dict[str, Any] | None = None
        self._findings: list[dict[str, Any]] = []
        self._sent: dict[str, Any] = {}
        self.line = Line()

    # -------------------------------------------------------------------------------------------------- records in

    def on_job(self, job: dict[str, Any]) -> None:
        """job.resolved.json."""
        self.status.on_job(job)

    def on_event(self, event: dict[str, Any]) -> None:
        """The next record of events.jsonl; one that lacks what its kind should have is passed over."""
        if not isinstance(event.get("kind"), str) or not isinstance(event.get("time"), int | float):
            return
        self.line.take(event)
        event = on_line(event)
        if self._start is None:
            self._start = float(event["time"])
        takes = (
            self.status.on_event,
            self.workers.on_event,
            self.timeline.on_event,
            self._evaluations.take,
            self._fold,
        )
        for take in takes:
            try:
                take(event)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                continue  # Of another version, or damaged: the rest is worth showing.

    def on_damage(self, name: str, text: str) -> None:
        """Something of a file of the run could not be read; told once for each file."""
        if name not in self._damaged:
            self._damaged.add(name)
            at = self._start if self._start is not None else 0.0
            self.timeline.on_event({"kind": "damaged", "time": at, "text": text})

    def _fold(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case GenerationFormed.kind:
                at = self._since_start(float(event["time"]))
                entry = (at, int(event["start_step"]), len(event["workers"]), int(event["generation"]))
                self._world = [*self._world[-MAX_GENERATIONS + 1 :], entry]
            case CheckpointComplete.kind | CheckpointFailed.kind | CheckpointInvalid.kind:
                fields = ("time", "kind", "committed", "bytes", "seconds", "blocked_seconds", "error", "path", "reason")
                entry_of = {key: _short(event[key]) for key in fields if key in event}
                self._checkpoints = [entry_of, *self._checkpoints[: MAX_CHECKPOINTS - 1]]

    def on_step(self, record: dict[str, Any]) -> None:
        """The next record of metrics.jsonl."""
        at, seconds = float(record["committed_at"]), float(record.get("seconds") or 0.0)
        if self._start is None:
            self._start = at
        loss = record.get("loss")
        point = Point(
            int(record["step"]),
            self._since_start(at),
            None if loss is None else _digits(float(loss), 5),
            _digits(record.get("tokens", 0) / seconds if seconds > 0 else 0.0, 4),
            int(record.get("generation", 0)),
        )
        self.series.add(point)
        self.status.on_step(record, point)

    def cut(self, step: int) -> int:
        """The steps from `step` on were rolled back. Returns from which step on they have to be given again."""
        self.status.on_cut(step)
        return self.series.cut(step)

    def on_status(self, status: dict[str, Any] | None, now: float) -> None:
        """status.json as it is now, or None where there is none."""
        if status is not None:
            self.line.take(status)
            status = on_line(status)
            if not self.status.is_of_now(status):
                status = None
        self.status.on_status(status, now)
        over = self.status.over
        known = None if status is None else status.get("workers")
        written = now if status is None else float(status.get("time") or now)
        self.workers.on_status(known if isinstance(known, list) else None, now, written=written, over=over)
        self._findings = [] if status is None or over else list(status.get("findings") or [])
        if status is not None and status.get("goodput") and self.status.is_live(now):
            self.on_goodput(status["goodput"])

    def on_goodput(self, account: dict[str, Any]) -> None:
        """Where the time went: `goodput` of status.json, or what the ledger makes of all records."""
        seconds = {str(reason): round(float(s), 1) for reason, s in account["badput_seconds"].items()}
        self._goodput = {
            "wall_seconds": round(float(account["wall_seconds"]), 1),
            "productive_seconds": round(float(account["productive_seconds"]), 1),
            "badput_seconds": {reason: s for reason, s in seconds.items() if s > 0},
        }

    # ------------------------------------------------------------------------------------------------ pictures out

    def whole(self, now: float) -> dict[str, Any]:
        """Everything that the page shows, at `now` (seconds since the epoch)."""
        return {
            "now": round(now, 2),
            "start": self._start,
            "status": self.status.shown(now),
            "points": {"from": 0, "rows": [list(point) for point in self.series.points()]},
            "world": [list(entry) for entry in self._world],
            "workers": self.workers.shown(now),
            "timeline": self.timeline.entries(),
            "checkpoints": self._checkpoints,
            "evaluations": self._shown_evaluations(),
            "goodput": self._goodput,
            "findings": self._findings,
        }

    def changes(self, now: float) -> dict[str, Any] | None:
        """What is new since this was last asked; None: nothing.

        Of the status, changed fields; of points, those from a step on, which take the place of all from there; of
        workers, changed fields of changed workers, and null for those to forget; of the timeline, new entries, oldest
        first. Everything else is given whole when it changed.
        """
        found: dict[str, Any] = {}
        shown = self.status.shown(now)
        if changed := _changed_fields(self._sent.get("status", {}), shown):
            found["status"] = changed
        self._sent["status"] = shown
        if (first := self.series.take_changed()) is not None:
            found["points"] = {"from": first, "rows": [list(point) for point in self.series.points(first)]}
        workers = self.workers.shown(now)
        was = self._sent.get("workers", {})
        patch: dict[str, Any] = dict.fromkeys(was.keys() - workers.keys())
        patch |= {key: part for key, one in workers.items() if (part := _changed_fields(was.get(key, {}), one))}
        if patch:
            found["workers"] = patch
        self._sent["workers"] = workers
        if entries := self.timeline.take_new():
            found["timeline"] = entries
        for key, value in (
            ("start", self._start),
            ("world", [list(entry) for entry in self._world]),
            ("checkpoints", self._checkpoints),
            ("evaluations", self._shown_evaluations()),
            ("goodput", self._goodput),
            ("findings", self._findings),
        ):
            if value != self._sent.get(key):
                found[key] = self._sent[key] = value
        return {"now": round(now, 2), **found} if found else None

    def _shown_evaluations(self) -> list[dict[str, Any]]:
        """Newest first."""
        best = self._evaluations.best
        return [
            {
                "step": event["step"],
                "samples": event.get("samples"),
                "seconds": event.get("seconds"),
                "best": event is best,
                "metrics": {name: _digits(value, 5) for name, value in numbers_in(event["metrics"]).items()},
            }
            for event in reversed(self._evaluations.standing[-MAX_EVALUATIONS:])
        ]

    def _since_start(self, at: float) -> float:
        return round(at - (self._start or at), 2)


def _changed_fields(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in now.items() if key not in was or was[key] != value}
    return changed | dict.fromkeys(was.keys() - now.keys())


def _digits(value: float, digits: int) -> float:
    """As exact as a chart can show."""
    return float(f"{value:.{digits}g}")


def _short(value: Any) -> Any:
    return f"{value[:299]}…" if isinstance(value, str) and len(value) > 300 else value
