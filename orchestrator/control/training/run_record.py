"""What is on the record of a run: steps, incidents, the number of the last generation.

Others write it down; what is added to it comes back as actions that say so.
"""

from __future__ import annotations

from monitoring.evaluations import metrics_by_step
from monitoring.events import FaultInjected
from orchestrator.control.core.incidents import Incident, IncidentBook, StepFailures
from orchestrator.control.core.protocol import FaultFired
from orchestrator.control.training.evaluations import Evaluations
from orchestrator.control.training.history import History
from orchestrator.control.training.protocol import Action, Rollback, StepCommitted
from orchestrator.control.training.views import ControllerConfig, Progress, WorkerView
from orchestrator.training.messages import StepReport


class RunRecord:
    """`last_generation` is the last number used (-1: none), `incidents` are those that the run has not recovered from
    yet."""

    def __init__(self, config: ControllerConfig, history: History) -> None:
        self.progress = Progress(history.committed, history.last_commit_at, list(history.step_seconds), history.norm)
        self.fired_faults = set(history.fired_faults)
        self.incidents = IncidentBook(history.incidents)
        self.last_generation = history.generation
        self.evaluations = Evaluations(config.evaluation, metrics_by_step(history.evaluated))
        self._failures = StepFailures(config.max_failures_per_step)

    # ------------------------------------------------------------------------------------ steps

    def commit(self, report: StepReport) -> list[Action]:
        """Takes a step that workers committed; nothing happens unless it is the next one."""
        progress = self.progress
        if report.step != progress.committed:
            return []
        before, median = progress.last_commit_at, progress.median_step_s()
        progress.commit(report)
        self._failures.forget_before(progress.committed)
        recovered = self.incidents.recovered(report.generation, report.committed_at, before, median)
        return [StepCommitted(report), *recovered]

    def roll_back(self, committed: int, now: float) -> list[Action]:
        """Takes the steps from `committed` on off the record and puts them on the account of an incident."""
        lost = self.progress.committed - committed
        if lost == 0:
            return []
        actions: list[Action] = []
        if not self.incidents.charge(lost):
            # Nobody saw the loss happen: the whole cluster went, and the controller with it.
            actions += self.incident("restart", f"the run began again, {lost} steps before the end of its record", now)
            self.incidents.charge(lost)
        self.progress.committed, self.progress.norm = committed, None
        self.evaluations.roll_back(committed)
        return [*actions, Rollback(committed)]

    def step_failed(self, detail: str, weight: float) -> str | None:
        """Counts a failure of the step that is due. A step that fails again and again fails for a reason of its own:
        then that is returned, and the run should end with it."""
        step = self.progress.committed
        times = self._failures.add(step, self.last_generation, weight)
        return None if times is None else f"step {step} failed {times}, last: {detail}"

    # ------------------------------------------------------------------------------------ incidents

    def incident(
        self, kind: str, cause: str, now: float, view: WorkerView | None = None, at: float | None = None
    ) -> list[Action]:
        """Opens an incident that began at `at` (now), or when the injected fault of the worker `view` was fired."""
        started = now if at is None else at
        if view is not None and view.fault_at is not None:
            started = view.fault_at
        worker = None if view is None else view.worker
        incident = Incident(kind, cause, worker, started, now, self.progress.committed)
        if not self.incidents.add(incident):
            return []
        if view is not None:
            view.fault_at = view.fault_committed = None
        return [incident.opening()]

    def close(self, now: float) -> list[Action]:
        """The run ends in good order."""
        progress = self.progress
        return [*self.incidents.close_all(self.last_generation, now, progress.last_commit_at, progress.median_step_s())]

    def fault_fired(self, event: FaultFired) -> list[Action]:
        self.fired_faults.add(event.index)
        slot = None if event.worker is None else event.worker.slot
        return [FaultInjected(fault=event.index, worker=slot, at=event.at)]
