"""The book of incidents: what made generations end, what it cost, and when the run had recovered from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from monitoring.events import IncidentOpened, Recovered
from monitoring.goodput import VOLUNTARY
from orchestrator.control.core.workers import WorkerId


@dataclass
class Incident:
    """Something that made a generation end, from the event to the first step committed after it.

    `generation` is the one formed after it, None until then. `buffer_bytes` is the most that buffers took on any one of
    its members.
    """

    kind: str
    cause: str
    worker: WorkerId | None
    at: float
    detected_at: float
    step: int
    generation: int | None = None
    steps_lost: int = 0
    source: str = "peers"
    bytes_moved: int = 0
    buffer_bytes: int = 0

    def opening(self) -> IncidentOpened:
        """The event for the log."""
        return IncidentOpened(
            incident=self.kind,
            worker=None if self.worker is None else self.worker.slot,
            incarnation=None if self.worker is None else self.worker.incarnation,
            cause=self.cause,
            step=self.step,
            at=self.at,
            detect_seconds=round(max(0.0, self.detected_at - self.at), 4),
        )

    def recovery(self, committed_at: float, committed_before: float | None, median_step_s: float) -> Recovered:
        """The event for the log; times in seconds. The steps before and after it were committed at the two times.

        While a membership changes by agreement the old generation trains on, so what stalls is only the gap between
        its last step and the next generation's first.
        """
        pause_s = 0.0 if committed_before is None else committed_at - committed_before
        since = self.at
        if self.kind in VOLUNTARY and committed_before is not None:
            since = max(since, committed_before)
        return Recovered(
            generation=self.generation,
            cause=self.cause,
            incident=self.kind,
            worker=None if self.worker is None else self.worker.slot,
            step=self.step,
            at=self.at,
            detect_seconds=round(max(0.0, self.detected_at - self.at), 4),
            stall_seconds=round(max(0.0, committed_at - since - median_step_s), 4),
            pause_seconds=round(max(0.0, pause_s - median_step_s), 4),
            steps_lost=self.steps_lost,
            source=self.source,
            bytes_moved=self.bytes_moved,
            buffer_bytes=self.buffer_bytes,
        )


class IncidentBook:
    """The open incidents, oldest first."""

    def __init__(self, open_incidents: Iterable[Incident] = ()) -> None:
        self.open: list[Incident] = list(open_incidents)

    def add(self, incident: Incident) -> bool:
        """Opens an incident; False when it is known. One worker's trouble is one incident, however often it is seen."""
        for known in self.open:
            if incident.worker is not None:
                # In a generation formed since, it is in new trouble.
                same = known.worker == incident.worker and (
                    known.kind == incident.kind == "drain" or (known.kind not in VOLUNTARY and known.generation is None)
                )
            else:
                # A change by agreement that is under way (for a restarted controller: was) is not wanted twice.
                same = incident.kind in VOLUNTARY and known.kind == incident.kind and known.generation is None
            if same:
                return False
        self.open.append(incident)
        return True

    def unanswered(self) -> list[Incident]:
        """Those that no generation has been formed after yet."""
        return [incident for incident in self.open if incident.generation is None]

    def charge(self, steps: int) -> bool:
        """Puts lost steps on the account of one incident, so that the accounts add up; False when none is open.

        The last failure took the last holder of the state, else there were steps to be had.
        """
        failures = [incident for incident in self.open if incident.kind not in VOLUNTARY] or self.open
        if failures:
            failures[-1].steps_lost += steps
        return bool(failures)

    def answered(self, generation: int, source: str, start: int) -> None:
        """A generation was formed that runs from step `start`: the first step it commits is the recovery of all that is
        open. What came since the last one happened in that step, whatever of it was on record by then."""
        for incident in self.open:
            if incident.generation is None and not incident.steps_lost:
                incident.step = start
            incident.generation = generation
            if source != "peers":
                incident.source = source

    def moved(self, generation: int, num_bytes: int, buffer_bytes: int) -> None:
        """A member of `generation` received so much state, and its buffers for that took so much at once."""
        for incident in self.open:
            if incident.generation == generation:
                incident.bytes_moved += num_bytes
                incident.buffer_bytes = max(incident.buffer_bytes, buffer_bytes)

    def recovered(
        self, generation: int, committed_at: float, committed_before: float | None, median_step_s: float
    ) -> list[Recovered]:
        """Closes what a step that `generation` committed is the recovery of; the events for the log."""
        return self._close(
            [i for i in self.open if i.generation is not None and i.generation <= generation],
            committed_at, committed_before, median_step_s,
        )  # fmt: skip

    def close_all(
        self, generation: int, now: float, committed_before: float | None, median_step_s: float
    ) -> list[Recovered]:
        """The run ends in good order: what is still open needed no further step."""
        for incident in self.open:
            if incident.generation is None:
                incident.generation = generation
        return self._close(list(self.open), now, committed_before, median_step_s)

    def _close(
        self, closing: list[Incident], committed_at: float, committed_before: float | None, median_step_s: float
    ) -> list[Recovered]:
        if not closing:
            return []
        ended = {id(incident) for incident in closing}
        self.open = [incident for incident in self.open if id(incident) not in ended]
        return [i.recovery(committed_at, committed_before, median_step_s) for i in closing]


@dataclass
class StepFailures:
    """How often a step failed. A generation fails once, whatever number of its members went with it.

    `weight` says how likely the step itself is to blame: an exception counts 1, a death a fraction, because machines
    go for reasons of their own.
    """

    limit: float
    _weights: dict[int, dict[int, float]] = field(default_factory=dict)

    def add(self, step: int, generation: int, weight: float) -> str | None:
        """Counts a failure; how often the step failed, in words, when that is too often."""
        weights = self._weights.setdefault(step, {})
        weights[generation] = max(weight, weights.get(generation, 0.0))
        times, total = len(weights), sum(weights.values())
        if total < self.limit:
            return None
        if total >= times:
            return f"{times} times"
        return (
            f"{times} times, which counts as {total:g} of elastic.max_failures_per_step = {self.limit:g} (an exception "
            "as one, a lost connection or no progress as a half, a death or silence as a quarter, too little memory as "
            "half of all)"
        )

    def forget_before(self, step: int) -> None:
        """Steps below `step` are committed."""
        if len(self._weights) > 100:
            self._weights = {s: w for s, w in self._weights.items() if s >= step}
