"""Training's executor: the record of the run, what is told of it, and its result."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from monitoring import discovery
from monitoring.events import (
    ControllerRestarted,
    FaultInjected,
    MetricsEndpoint,
    ModelLoaded,
    RunEvent,
    RunFinished,
    RunStarted,
)
from monitoring.skew import Window
from orchestrator.checkpoint.manifest import CheckpointError
from orchestrator.checkpoint.of_run import catalog_of, catalog_spec, catch_up
from orchestrator.control.core.orders import Order
from orchestrator.control.core.protocol import Placed, Stop
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.controller import Controller
from orchestrator.control.training.history import History
from orchestrator.control.training.protocol import Action, Event, Rollback, SaveRequested, StepCommitted, TakeOver
from orchestrator.control.training.views import ControllerConfig
from orchestrator.job.parts import objective_of
from orchestrator.planning.choose import LayoutChooser
from orchestrator.runtime.action_log import log_action, tell
from orchestrator.runtime.executor import ExecutorContext
from orchestrator.runtime.presence import Presence
from orchestrator.runtime.result import compose, outline_of, settled
from orchestrator.runtime.run_log import RunLog
from orchestrator.runtime.status import status_of
from orchestrator.training.messages import Heartbeat, Ready, Reply, Status, dated
from orchestrator.training.orders import Interrupt

log = logging.getLogger(__name__)

PUBLISH_S = 0.5
"""How often status.json and the metrics are brought up to date, where that takes no time."""


class TrainingExecutor:
    """An `orchestrator.runtime.executor.Executor` for one run of a job.

    More than 15 attributes: what is told of a run from the first to the last moment, and by which of its threads.
    """

    def __init__(self, context: ExecutorContext) -> None:
        """Raises OSError while the run directory cannot be read or written."""
        self._context = context
        self._spec, self._directory, self._lease = context.spec, context.directory, context.lease
        self._job = job = context.job
        self.faults = job.faults
        self.unit = job.strategy.tensor
        self.heartbeat_timeout_s = job.elastic.heartbeat_timeout_s
        self._catalog = catalog = catalog_of(self._directory, job)
        if not self._lease.has_ended and (found := catch_up(self._directory, catalog)):
            log.info("%d steps that only a checkpoint knew of are put on record", found)
        self._run_log = RunLog(self._directory, job)
        self.clock = self._run_log.clock
        self._presence = Presence(self._directory, self._run_log)
        self._loss = ""
        self._result: dict[str, Any] | None = None
        self._window: Window | None = None
        self._telling = threading.Lock()
        self._has_told_the_end = False
        self._published_at = 0.0
        self._publishing_s = 0.0
        self._url = ""
        self._target: Path | None = None
        history = self._history(self._run_log.past_events, self._run_log.past_steps)
        self.warm = frozenset(history.warm)
        self.machine = Controller(
            ControllerConfig.for_job(job, LayoutChooser.for_job(job), term=self._lease.term),
            history,
            checkpoints={step: catalog.locate(step) for step in catalog.steps()},
        )
        self._run_log.forget_the_past()

    def _history(self, events: list[dict[str, Any]], steps: list[dict[str, Any]]) -> History:
        """What is on record, with the faults of this job file only: a run may be resumed under others."""
        history = History.read(events, steps)
        faults = dict(enumerate(fault.model_dump() for fault in self._job.faults))
        fired = [event for event in events if event["kind"] == FaultInjected.kind]
        history.fired_faults = {e["fault"] for e in fired if e.get("what") == faults.get(e["fault"])}
        return history

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json once the run is over."""
        return self._result

    # ------------------------------------------------------------------------------------ beginnings

    def open(self, host: str, targets: Path | None) -> None:
        """Serves the metrics at `host`, and lets Prometheus find this run by the directory `targets` (None: it does
        not)."""
        port = self._run_log.metrics.serve(host, self._job.monitoring.port)
        self._url = f"http://{host}:{port}/metrics"
        self.record(MetricsEndpoint(url=self._url))
        if targets is None:
            return
        try:
            self._target = discovery.announce(targets, self._directory.run_id, host, port)
        except (OSError, ValueError) as error:
            log.warning("Prometheus will not find this run by itself: %s", error)
            return
        # What others left there may take its time.
        threading.Thread(target=discovery.sweep, args=(targets,), name="sweep", daemon=True).start()

    def begin(self) -> bool:
        job = self._job
        if self._run_log.started_at is None:
            self.record(
                RunStarted(
                    run=self._directory.run_id,
                    job=job.digest(),
                    steps=job.train.steps,
                    min_workers=job.elastic.workers.min,
                    loss_unit=objective_of(job).loss_unit,
                )
            )
        elif self._lease.is_successor and (previous := self._directory.read_json("result.json")) is not None:
            # A predecessor ended the run and died before it could say goodbye: that of an earlier driver's is cleared.
            if not self._lease.has_ended:
                self.record(RunFinished(status=previous["status"], reason=previous.get("reason", "")))
            self._result = previous
            return False
        return True

    def resume(self, statuses: Sequence[Status], starting: Sequence[Placed]) -> TakeOver:
        self.record(
            ControllerRestarted(epoch=self._lease.term, workers_found=len(statuses), workers_starting=len(starting))
        )
        return TakeOver(tuple(statuses), tuple(starting))

    def worker_spec(self) -> dict[str, Any]:
        passed_on = ("job", "environment", "cwd", "stores", "held_out", "rendezvous_secret", "own_cluster")  # fmt: skip
        return {key: self._spec[key] for key in passed_on} | {
            "run_id": self._directory.run_id,
            "run_dir": str(self._directory.path),
            "umask": self._directory.umask,
            "catalog": catalog_spec(self._directory, self._job),
            "secret": self._spec.get("secret"),
            "resources": self._job.resources.model_dump(),
        }

    # ------------------------------------------------------------------------------------ events and actions

    def before(self, event: Event) -> None:
        if isinstance(event, Ready) and event.loaded is not None and self._run_log.loaded is None:
            self.record(ModelLoaded(**event.loaded))

    def after(self, event: Event) -> None:
        if (window := self.machine.window) is not None and window is not self._window:
            self._window = window
            self._run_log.metrics.on_window(window)

    def log_action(self, action: Action) -> None:
        log_action(action, self._context.about)

    def carry_out(self, action: Action) -> None:
        match action:
            case StepCommitted():
                self._run_log.step(action.report)
            case Rollback():
                self._run_log.roll_back(action.committed)

    def probed_by(self, order: Order) -> dict[WorkerId, tuple[str, int]]:
        """Somebody lost a peer: where the others listen, of which one may be gone."""
        if not isinstance(order, Interrupt):
            return {}
        views = (self.machine.workers.get(worker) for worker in order.workers)
        return {view.worker: (view.ready.host, view.ready.store_port) for view in views if view and view.ready}

    def record(self, event: RunEvent) -> None:
        tell(self._run_log.record(event))

    # ------------------------------------------------------------------------------------ what others say and ask

    def dated(self, message: Any, shift: float) -> Any:
        return dated(message, shift)

    def progress_of(self, message: Any) -> int | None:
        return message.committed if isinstance(message, Heartbeat) else None

    def reply(self) -> Reply:
        return Reply(
            recorded=self._run_log.recorded, term=self._lease.term, shutdown=self._result is not None,
            known=self._run_log.committed, evaluated=self.machine.evaluated,
        )  # fmt: skip

    def event_of(self, request: Mapping[str, Any]) -> Event | None:
        return SaveRequested() if request["kind"] == "checkpoint" else None

    def snapshot(self) -> dict[str, Any]:
        run_log = self._run_log
        return self.machine.snapshot() | {
            "step": run_log.committed,
            "unwritten": run_log.unwritten(),
            "steps": self._job.train.steps,
            "last_step": run_log.last_step,
            "recoveries": len(run_log.recoveries),
            "last_recovery": run_log.recoveries[-1] if run_log.recoveries else None,
            "last_incident": run_log.last_incident,
            "over": self._result is not None,
            "epoch": self._lease.term,
        }

    # ------------------------------------------------------------------------------------ on the reporter's thread

    def look(self) -> None:
        """Writes what waits for room, and sees whether there is a directory at all."""
        self._run_log.flush(self.clock.now())
        if not self._loss and (loss := self._presence.look(time.monotonic())):
            log.error("%s; the run ends", loss)
            self._loss = loss
            self._context.tell(Stop(loss))

    def publish(self) -> None:
        """Brings status.json and the metrics up to date. What takes long is done the more seldom, so that neither many
        workers nor a slow directory keep this machine busy."""
        now = self.clock.now()
        if now - self._published_at < max(PUBLISH_S, 20 * self._publishing_s):
            return
        try:
            with self._telling:
                if not self._has_told_the_end:
                    self._run_log.publish(self._status(now), now)
        finally:
            self._published_at, self._publishing_s = self.clock.now(), self.clock.now() - now

    def _publish_the_end(self) -> None:
        """Nothing is told after this. What cannot be told changes nothing of how the run ended."""
        with self._telling, suppress(Exception):
            self._has_told_the_end = True
            now = self.clock.now()
            self._run_log.publish(self._status(now), now)

    def _status(self, now: float) -> dict[str, Any]:
        return {
            "run": self._directory.run_id,
            "epoch": self._lease.term,
            "controller": {"pid": os.getpid(), "node": self._context.node},
            "metrics_url": self._url,
            **status_of(self.machine, self._run_log, self._job, now),
        }

    # ------------------------------------------------------------------------------------ the end

    def must_end(self) -> str:
        """A run whose directory is lost has nowhere to save its state, unless that is stored elsewhere."""
        return self._loss if self._job.checkpoint.storage is None else ""

    def end(self, status: str, reason: str, digest: str | None) -> None:
        """Writes the result, then ends every worker; nothing of the run is left behind."""
        if self._result is not None:
            return
        if (loss := self._loss or self._presence.loss()) != "":
            status, reason = "failed", self._told_loss(loss)
        waits = not loss and self._run_log.unwritten() is not None
        if waits or "composition" in self._spec["data"]:
            # The audit goes through all steps again, which may take long, as may a disk to have room again; the
            # workers' machines do not wait for it.
            self._context.end_workers()
        patience_s = 0.0 if loss else self._job.checkpoint.final_patience_s
        deadline = time.monotonic() + patience_s
        settled(lambda: self._run_log.flush(self.clock.now()), deadline)
        result = compose(self._directory, self._job, self._run_log, self._spec["data"], status, reason, digest)
        if loss:
            result |= outline_of(self._run_log)
        unfired = [index for index in range(len(self._job.faults)) if index not in self.machine.fired_faults]
        if unfired and result["status"] == "finished":
            result["faults_not_fired"] = unfired
        try:
            account = self._run_log.account(self.clock.now())
            result |= {"wall_seconds": round(account.wall_seconds, 3), "goodput_ratio": round(account.ratio, 4)}
            if not loss:
                self._write_end(result, deadline)
        finally:
            self._context.end_workers()
            if not loss:
                self._tidy()
            if self._target is not None:
                with suppress(OSError):
                    discovery.withdraw(self._target)
            self._lease.end()
            self._result = result

    def _tidy(self) -> None:
        """Removes checkpoints that need not stay: a worker may have been at it when it was ended."""
        settings, judged = self._job.checkpoint, self.machine.judged
        spare = {judged.best_step} if self._job.evaluation is not None and self._job.evaluation.best is not None else ()
        try:
            if steps := self._catalog.steps():
                self._catalog.prune(steps[0], settings.keep, settings.keep_every, spare=spare)
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints could not be removed: %s", error)

    def _told_loss(self, loss: str) -> str:
        """What is lost with the run directory, and what is not."""
        last = self._run_log.last_checkpoint
        if last is None or self._job.checkpoint.storage is None:
            return f"{loss}; {self._run_log.committed} steps were committed"
        return f"{loss}; the state of {last['committed']} steps is in {last['path']}"

    def _write_end(self, result: dict[str, Any], deadline: float) -> None:
        """Writes down how the run ended. Where that cannot be done, those that follow the run are told all the same,
        and that it has failed."""
        failure = ""

        def write() -> bool:
            nonlocal failure
            try:
                self._directory.write_json("result.json", result)
            except OSError as error:
                failure = str(error)
                return False
            return True

        everything = settled(lambda: self._run_log.flush(self.clock.now()), deadline)
        if not everything and (waiting := self._run_log.unwritten()) is not None:
            failure = f"{waiting['error']} ({waiting['records']} records, {waiting['steps']} of them of steps)"
        if not everything or not settled(write, deadline):
            why = f"{result['reason']}; the run's end could not be recorded: {failure}"
            result |= {"status": "failed", "reason": why}
            settled(write, time.monotonic())
        # After the result: what has one is over for others that come next, also if this process dies here.
        self.record(RunFinished(status=result["status"], reason=result["reason"]))
        settled(lambda: self._run_log.flush(self.clock.now()), deadline)
        self._publish_the_end()

    def close(self) -> None:
        self._run_log.close()
