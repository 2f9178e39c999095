"""The status of a run as the page shows it: where it is, how fast, and whether anybody still steers it. Pure."""

from __future__ import annotations

from typing import Any

from monitoring.events import (
    CheckpointComplete,
    ControllerBegan,
    GenerationFormed,
    GenerationRunning,
    IncidentOpened,
    Recovered,
    RunFinished,
    RunStarted,
    Waiting,
)
from monitoring.report.steps import Point

SILENT_S = 5.0
"""status.json is written every second; a controller that restarts is silent for some."""
INTERRUPTED_S = 30.0
"""After this long without a sign of life a run that has not said that it ended counts as interrupted."""

_COPIED = ("detail", "steps", "tokens", "tokens_per_second", "mfu", "generation", "layout", "target", "min", "max",
           "median_step_seconds", "epoch")  # fmt: skip
_OF_STEPS = ("step", "loss", "grad_norm", "lr")
"""metrics.jsonl has them at once, and is believed where there is one."""
_STATES = {
    RunStarted.kind: "starting",
    GenerationFormed.kind: "forming",
    GenerationRunning.kind: "running",
    Waiting.kind: "waiting",
    IncidentOpened.kind: "settling",
}
_ROUNDED = {"tokens_per_second": 4, "loss": 5, "grad_norm": 4, "lr": 4, "mfu": 3, "median_step_seconds": 3}


class RunStatus:
    """Folds events, steps and status.json into one flat record."""

    def __init__(self, name: str) -> None:
        self._fields: dict[str, Any] = {"name": name, "run": name, "state": "starting", "step": 0,
                                        "loss_unit": "nats per token"}  # fmt: skip
        self._finished: dict[str, Any] | None = None
        self._heard: float | None = None
        self._last_status: Any = None
        self._incidents = 0
        self._has_steps = False
        self._controller_at = self._state_at = 0.0

    @property
    def over(self) -> bool:
        return self._finished is not None

    def is_live(self, now: float) -> bool:
        """Whether somebody still steers the run, as far as one can tell."""
        return not self.over and self._heard is not None and now - self._heard <= INTERRUPTED_S

    def is_of_now(self, status: dict[str, Any]) -> bool:
        """Whether a status.json is of the controller that steers now, not of one before the run was resumed."""
        return float(status.get("time") or 0.0) >= self._controller_at

    def on_job(self, job: dict[str, Any]) -> None:
        self._fields["name"] = job.get("name", self._fields["name"])
        self._fields["steps"] = (job.get("train") or {}).get("steps")

    def on_event(self, event: dict[str, Any]) -> None:
        fields = self._fields
        at = float(event["time"])
        self._hear(at)
        state = _STATES.get(event["kind"])
        if state is not None:
            fields["state"], self._state_at = state, at
        match event["kind"]:
            case RunStarted.kind:
                fields["run"] = event.get("run", fields["run"])
                fields["loss_unit"] = event.get("loss_unit", fields["loss_unit"])
            case ControllerBegan.kind:
                self._finished = None  # Resumed.
                # What status.json said before is of the one before.
                self._controller_at, self._last_status, self._heard = at, None, at
            case GenerationFormed.kind:
                fields |= {"generation": event["generation"], "layout": event.get("layout")}
            case IncidentOpened.kind:
                self._incidents += 1
            case Recovered.kind:
                fields["last_recovery"] = _recovery(event)
            case CheckpointComplete.kind:
                fields["checkpoint"] = {"committed": event["committed"], "time": event["time"], "saving": False}
            case RunFinished.kind:
                self._finished = {"status": event["status"], "reason": event.get("reason"), "ended": event["time"]}

    def on_step(self, record: dict[str, Any], point: Point) -> None:
        self._hear(float(record["committed_at"]))
        self._has_steps = True
        self._fields |= {"step": point.step + 1, "loss": point.loss, "tokens_per_second": point.tokens_per_second}
        for key in ("grad_norm", "lr"):
            self._fields[key] = _rounded(key, record.get(key))

    def on_cut(self, step: int) -> None:
        """The steps from `step` on are to be done again."""
        self._fields["step"] = step

    def on_status(self, status: dict[str, Any] | None, now: float) -> None:
        if status is None:
            return
        if status != self._last_status:
            # A clock that differs from the writer's does not matter once the file has been seen to change.
            self._heard = float(status.get("time") or now) if self._last_status is None else now
            self._last_status = status
        if self.over:
            return
        if status.get("state") and float(status.get("time") or 0.0) >= self._state_at:
            self._fields["state"] = status["state"]
        for key in _COPIED if self._has_steps else (*_COPIED, *_OF_STEPS):
            if key in status:
                self._fields[key] = _rounded(key, status[key])
        for key in ("run", "name"):
            self._fields[key] = status.get(key) or self._fields[key]
        if status.get("over") and status.get("status"):
            self._finished = {"status": status["status"], "reason": None, "ended": status.get("time")}
        if status.get("checkpoint"):
            self._fields["checkpoint"] = status["checkpoint"]
        if status.get("last_recovery"):
            self._fields["last_recovery"] = _recovery(status["last_recovery"])
        incidents = status.get("incidents") or {}
        self._incidents = incidents.get("total", self._incidents)
        self._fields["open_incidents"] = list(incidents.get("open") or [])[:8]

    def shown(self, now: float) -> dict[str, Any]:
        """The record as of `now`: `life` is live, silent, interrupted, finished, failed or stopped."""
        fields = dict(self._fields)
        fields["incidents"] = self._incidents
        fields["ended"] = fields["reason"] = fields["silent_since"] = None
        if self._finished is not None:
            fields |= self._finished
            fields["life"] = str(self._finished["status"])
            fields["open_incidents"] = []
            return fields
        quiet = None if self._heard is None else now - self._heard
        fields["life"] = "live" if quiet is None or quiet <= SILENT_S else "silent"
        if quiet is not None and quiet > INTERRUPTED_S:
            fields["life"], fields["open_incidents"] = "interrupted", []
        if fields["life"] != "live":
            fields["silent_since"] = self._heard
        return fields

    def _hear(self, at: float) -> None:
        if self._last_status is None:
            self._heard = max(at, self._heard or at)


def _recovery(event: dict[str, Any]) -> dict[str, Any]:
    return {key: event.get(key) for key in ("incident", "worker", "step", "stall_seconds", "steps_lost")}


def _rounded(key: str, value: Any) -> Any:
    if key in _ROUNDED and isinstance(value, int | float):
        return float(f"{value:.{_ROUNDED[key]}g}")
    return value
