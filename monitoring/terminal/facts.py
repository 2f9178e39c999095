"""What is known of a run at this moment, from the files of its directory alone: `status.json`, which the controller
renews twice a second, and the records. An older run without `status.json`, or one that ended badly, has the
records. Whether anybody steers the run is for the caller to know: it takes a lock to find out."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from monitoring.clock import Line, on_line
from monitoring.evaluations import StandingEvaluations
from monitoring.events import (
    CheckpointComplete,
    ControllerBegan,
    GenerationFormed,
    IncidentOpened,
    Recovered,
    RolledBack,
    RunFinished,
    RunStarted,
    SkewFound,
    SkewOver,
)
from monitoring.follow import Tail
from monitoring.goodput import Ledger
from monitoring.outside import Unreadable, read_json
from monitoring.records import passed_over_text
from monitoring.shapes import SMALL_FILES

LAST_STEPS_BYTES = 1 << 18
"""How much of metrics.jsonl is read to begin with: what matters now is at its end."""
SPEED_STEPS = 20

Json = dict[str, Any]


class RunFacts:
    """Facts of one run; `refresh` brings them up to date.

    With `is_new` an attempt is about to begin: a `status.json` that is there already is of an earlier one and not used.
    `steps` says how many steps the job has; without it, the job in the directory does.

    More than 15 attributes: each is one fact that is shown.
    """

    def __init__(self, run_dir: Path, is_new: bool = False, steps: int | None = None) -> None:
        self.run_dir = run_dir
        self._steps_of_job = steps
        self._unreadable: dict[str, str] = {}
        self._stale = self._read("status.json") if is_new else None
        self._events = Tail(run_dir / "events.jsonl")
        self._steps = Tail(run_dir / "metrics.jsonl", last_bytes=LAST_STEPS_BYTES)
        self.live: Json | None = None
        """The content of status.json."""
        self.result: Json | None = None
        self.job: Json = {}
        self.run = run_dir.name
        self.started: float | None = None
        self.is_over = False
        self.generation: Json | None = None
        self.recoveries: list[Json] = []
        self._recent: deque[Json] = deque(maxlen=SPEED_STEPS)
        self._incidents: list[Json] = []
        self._num_incidents = 0
        self._findings: dict[tuple[str, str], Json] = {}
        self._checkpoint: Json | None = None
        self.evaluations = StandingEvaluations()
        self._ledger = Ledger()
        self._line = Line()
        self.refresh_files()

    @property
    def damaged(self) -> list[str]:
        """What of the run's files could not be read, a sentence each."""
        lines = passed_over_text(self._events.passed_over + self._steps.passed_over)
        return [*lines, *self._unreadable.values()]

    def refresh(self) -> tuple[list[Json], list[Json]]:
        """Reads what is new. Returns the new events and the new steps, with times on the run's line."""
        events, steps = [], list(self._steps.new())
        for record in self._events.new():
            self._line.take(record)
            events.append(on_line(record))
            self._take(events[-1])
        self._recent.extend(steps)
        self.refresh_files()
        return events, steps

    def refresh_files(self) -> None:
        """Reads the small files, which are replaced whole."""
        live = self._read("status.json")
        if live is not None and live != self._stale:
            self._line.take(live)
            self.live = on_line(live)
        else:
            self.live = None
        self.result = self._read("result.json")
        self.job = self.job or self._read("job.resolved.json") or {}

    def _read(self, name: str) -> Json | None:
        """A small JSON file; None when it is not there or not what it should be."""
        self._unreadable.pop(name, None)
        try:
            return dict(read_json(self.run_dir / name, SMALL_FILES[name]))
        except FileNotFoundError:
            return None
        except Unreadable as error:
            self._unreadable[name] = str(error)
            return None

    def _take(self, event: Json) -> None:
        self._ledger.add(event)
        self.evaluations.take(event)
        match event["kind"]:
            case RunStarted.kind:
                self.started, self.run = event["time"], event.get("run", self.run)
            case ControllerBegan.kind:
                self.is_over = False  # resumed
            case GenerationFormed.kind:
                self.generation = event
            case IncidentOpened.kind:
                self._num_incidents += 1
                self._incidents.append(event)
            case Recovered.kind:
                self.recoveries.append(event)
                self._incidents = [
                    open_ for open_ in self._incidents
                    if (open_["incident"], open_.get("worker")) != (event["incident"], event["worker"])
                ]  # fmt: skip
            case SkewFound.kind:
                self._findings[event["finding"], str(event["workers"])] = event
            case SkewOver.kind:
                self._findings.pop((event["finding"], str(event["workers"])), None)
            case CheckpointComplete.kind:
                self._checkpoint = event
            case RolledBack.kind:
                kept = [record for record in self._recent if record["step"] < event["committed"]]
                self._recent = deque(kept, maxlen=SPEED_STEPS)
            case RunFinished.kind:
                self.is_over = True
                self._incidents, self._findings = [], {}

    # ------------------------------------------------------------------------------------ what they say

    def now(self) -> float:
        """The present on the run's line of time."""
        return self._line.now()

    @property
    def last_step(self) -> Json | None:
        """The record of the newest committed step."""
        return self._recent[-1] if self._recent else None

    @property
    def step(self) -> int:
        """How many steps are committed."""
        return int(self.last_step["step"]) + 1 if self.last_step is not None else 0

    @property
    def steps(self) -> int:
        """How many steps the job has."""
        return self._steps_of_job or int(self.job.get("train", {}).get("steps") or 0)

    @property
    def step_seconds(self) -> float | None:
        """A usual step of the last ones."""
        if self.live is not None and self.live.get("median_step_seconds"):
            return float(self.live["median_step_seconds"])
        return median(record["seconds"] for record in self._recent) if self._recent else None

    @property
    def tokens_per_second(self) -> float | None:
        if self.live is not None and self.live.get("tokens_per_second"):
            return float(self.live["tokens_per_second"])
        seconds = sum(record["seconds"] for record in self._recent)
        return sum(record["tokens"] for record in self._recent) / seconds if seconds else None

    @property
    def layout(self) -> Json | None:
        return (self.live or {}).get("layout") or (self.generation or {}).get("layout")

    @property
    def workers(self) -> list[Json]:
        """As in status.json; without it the members of the newest generation, of which only names are known."""
        if self.live is not None:
            return list(self.live.get("workers") or [])
        members = [] if self.generation is None else self.generation["workers"]
        return [worker | {"rank": rank, "state": "member"} for rank, worker in enumerate(members)]

    @property
    def goodput(self) -> Json | None:
        """wall_seconds, productive_seconds, badput_seconds; None where nothing was added up."""
        if self.live is not None and self.live.get("goodput"):
            return dict(self.live["goodput"])
        account = self._ledger.account()
        return account.as_dict() if account.wall_seconds else None

    @property
    def checkpoint(self) -> Json | None:
        """committed, time, saving."""
        if self.live is not None:
            return self.live.get("checkpoint")
        if self._checkpoint is None:
            return None
        return {"committed": self._checkpoint["committed"], "time": self._checkpoint["time"], "saving": False}

    @property
    def open_incidents(self) -> list[Json]:
        """incident, worker, cause, at."""
        if self.live is not None:
            return list(self.live.get("incidents", {}).get("open", []))
        return self._incidents

    @property
    def num_incidents(self) -> int:
        if self.live is not None and "incidents" in self.live:
            return int(self.live["incidents"].get("total", 0))
        return self._num_incidents

    @property
    def findings(self) -> list[Json]:
        """finding, workers, detail."""
        if self.live is not None:
            return list(self.live.get("findings") or [])
        return list(self._findings.values())

    def state(self, alive: bool) -> str:
        """running, finished, failed, stopped, interrupted."""
        if alive:
            return "running"
        return "interrupted" if self.result is None else str(self.result["status"])

    def as_json(self, alive: bool) -> Json:
        """What `status --json` prints."""
        record = self.last_step
        return {
            "run": self.run,
            "run_dir": str(self.run_dir),
            "state": self.state(alive),
            "step": self.step,
            "steps": self.steps,
            "loss": None if record is None else record["loss"],
            "evaluation": self.evaluations.last,
            "generation": self.generation,
            "recoveries": self.recoveries,
            "result": self.result,
            "live": self.live,
            "goodput": self.goodput,
            "damaged": self.damaged,
        }
