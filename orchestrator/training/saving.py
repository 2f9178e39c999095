"""Saving from a worker: a copy of its share at a step boundary, and everything else behind training."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from monitoring.clock import wall_time_of
from orchestrator.checkpoint.catalog import Catalog, Description
from orchestrator.checkpoint.manifest import CheckpointError, FrozenEntry, TensorEntry
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.parts import ChunkData, write_part
from orchestrator.checkpoint.tensors import DTYPES, bytes_of
from orchestrator.control.core.workers import WorkerId
from orchestrator.job import Job
from orchestrator.training import build
from orchestrator.training.messages import CheckpointSaved, PartSaved, SaveBegun, SavePlan, StepReport
from strategies.layout.statemap import Spans
from strategies.model.frozen import FrozenWeights
from strategies.state.snapshot import Snapshot
from strategies.state.training_state import TrainingState

log = logging.getLogger(__name__)

MAX_STEPS_KEPT = 10_000
"""Of those that a manifest has the records of."""


class Saver:
    """Saves parts of checkpoints, completes and discards them, one after the other on a thread of its own. More than 15
    attributes: what two threads know of what is under way.

    `position` says where in its data's epochs a run is after this many samples, `send` tells the controller, and
    `reports` has the last steps that this worker took part in.
    """

    def __init__(
        self,
        worker: WorkerId,
        job: Job,
        catalog: Catalog,
        state: TrainingState,
        position: Callable[[int], dict[str, Any]],
        send: Callable[[Any], object],
        reports: Callable[[], Sequence[StepReport]] = tuple,
    ) -> None:
        self.worker = worker
        self.catalog = catalog
        self.last_part: PartSaved | None = None
        self.best_step = -1
        """The checkpoint of this step stays, however many newer ones there are; -1: there is none."""
        self._last_reports: dict[int, StepReport] = {}
        self._job = job
        self._state = state
        self._position = position
        self._send = send
        self._reports = reports
        self._snapshot = Snapshot(state.space, state.device)
        self._tasks: queue.Queue[Callable[[], None]] = queue.Queue()
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._waiting = 0
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether there is something under way, so that another snapshot would have to wait."""
        return not self._idle.is_set()

    def wait(self) -> None:
        """Until nothing is under way."""
        self._idle.wait()

    # ------------------------------------------------------------------------------------ the training thread

    def save(
        self,
        save: Save,
        shares: Sequence[Spans],
        workers: Sequence[WorkerId],
        rank: int,
        layout: dict[str, Any],
    ) -> None:
        """Copies this rank's share now and writes it behind training. `shares` and `workers` are by rank.

        Nothing else may be under way.
        """
        started = time.perf_counter()
        sharing = [number for number, share in enumerate(shares) if share] or [0]
        first = sharing[0] == rank
        if rank in sharing:
            self._snapshot.take(self._state, shares[rank], buffers=first)
        blocked_s = time.perf_counter() - started
        plan = SavePlan(save, tuple(workers[number] for number in sharing), layout)
        if first:
            self._send(SaveBegun(self.worker, plan, blocked_s))
        if rank in sharing:
            updates = self._state.updates
            reports = tuple(report for report in self._reports() if report.step < save.committed)
            self._submit(lambda: self._write(plan, rank, updates, reports))

    # ------------------------------------------------------------------------------------ any thread

    def commit(self, save: Save, parts: dict[int, str], layout: dict[str, Any]) -> None:
        """Completes a checkpoint of the parts that all ranks wrote."""
        self._submit(lambda: self._commit(save, parts, layout))

    def discard(self, save: Save) -> None:
        """Removes what is left of an attempt."""
        self._submit(lambda: self._discard(save))

    def set_aside(self, committed: int, reason: str) -> None:
        """Keeps a checkpoint that is not what was saved from being used again."""
        try:
            self.catalog.set_aside(committed, reason)
        except OSError as error:
            # The controller remembers it as long as it lives.
            log.warning("the checkpoint of %d steps could not be set aside: %s", committed, error)

    def _submit(self, task: Callable[[], None]) -> None:
        with self._lock:
            self._waiting += 1
            self._idle.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="checkpoint", daemon=True)
                self._thread.start()
        self._tasks.put(task)

    def _loop(self) -> None:
        while True:
            task = self._tasks.get()
            try:
                task()
            except Exception:
                log.exception("a task of the checkpoint thread failed")
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._idle.set()

    # ------------------------------------------------------------------------------------ the checkpoint thread

    def _write(self, plan: SavePlan, rank: int, updates: int, reports: tuple[StepReport, ...]) -> None:
        save = plan.save
        started = time.perf_counter()
        digest, num_bytes, error = "", 0, ""
        try:
            chunks = [
                ChunkData(
                    copied.name, DTYPES[copied.values.dtype], copied.box.offsets, copied.box.sizes,
                    bytes_of(copied.values),
                )
                for copied in self._snapshot.contents()
            ]  # fmt: skip
            part, digest = write_part(self.catalog.storage, save, rank, updates, chunks, self.catalog.cipher(save))
            num_bytes = part.file.size
        except Exception as caught:
            log.warning("part %d of %s was not written", rank, save.directory, exc_info=not isinstance(caught, OSError))
            error = _told(caught)
        seconds = time.perf_counter() - started
        if not error:
            log.info("part %d of %s is written: %.1f MB in %.2f s", rank, save.directory, num_bytes / 1e6, seconds)
        self._last_reports |= {report.step: report for report in reports}
        for step in sorted(self._last_reports)[:-MAX_STEPS_KEPT]:
            del self._last_reports[step]
        self.last_part = PartSaved(self.worker, plan, rank, digest, seconds, num_bytes, error)
        self._send(replace(self.last_part, reports=reports))

    def _commit(self, save: Save, parts: dict[int, str], layout: dict[str, Any]) -> None:
        started = time.perf_counter()
        path, num_bytes, error = self.catalog.storage.locate(save.directory), 0, ""
        try:
            num_bytes = self.catalog.commit(save, parts, self._describe(save.committed, layout))
        except Exception as caught:
            log.warning("%s was not completed", save.directory, exc_info=not isinstance(caught, OSError))
            error = _told(caught)
        self._send(CheckpointSaved(self.worker, save, path, time.perf_counter() - started, num_bytes, error))
        if not error:
            log.info("checkpoint of %d steps is complete: %s", save.committed, path)
            self._prune(save.committed)

    def _prune(self, newest: int) -> None:
        settings = self._job.checkpoint
        try:
            self.catalog.prune(newest, settings.keep, settings.keep_every, spare={self.best_step})
        except (OSError, CheckpointError) as error:
            # They take room, and that is all; the next one tries again.
            log.warning("old checkpoints could not be removed: %s", error)

    def _discard(self, save: Save) -> None:
        try:
            self.catalog.discard(save)
        except OSError as error:
            log.warning("what is left of %s could not be removed: %s", save.directory, error)

    def _describe(self, committed: int, layout: dict[str, Any]) -> Description:
        job = self._job
        spec = build.step_spec(job)
        samples = committed * job.train.global_batch
        return Description(
            job=job.digest(),
            layout=layout,
            steps=[_record(report) for step, report in sorted(self._last_reports.items()) if step < committed],
            data={
                "step": committed, "global_batch": job.train.global_batch, "samples": samples,
                **self._position(samples), "seed": job.train.seed,
            },
            randomness={"seed": job.train.seed, "streams": "step, virtual worker, micro-batch, layer"},
            schedule={
                "name": spec.schedule.name, "step": committed, "lr": spec.base_lr * spec.schedule.factor(committed),
            },
            tensors={
                name: TensorEntry(dtype=DTYPES[dtype], shape=list(shape))
                for name, (dtype, shape) in self._state.tensors().items()
            },
            frozen=frozen_entry(self._state.blueprint.frozen),
        )  # fmt: skip


def frozen_entry(frozen: FrozenWeights) -> FrozenEntry | None:
    """As a manifest has them; None where there are none."""
    if not frozen:
        return None
    described = {name: frozen.describe(name) for name in frozen}
    tensors = {name: TensorEntry(dtype=DTYPES[dtype], shape=list(shape)) for name, (dtype, shape) in described.items()}
    return FrozenEntry(xxh3_128=frozen.digest, tensors=tensors)


def _record(report: StepReport) -> dict[str, Any]:
    """A step as metrics.jsonl has it, but for what its ranks spent on it, and by the wall clock: the run's is not known
    here, nor this one elsewhere."""
    record = asdict(report) | {"ranks": [], "phase_seconds": {}, "committed_at": wall_time_of(report.committed_at)}
    for key in ("loss", "grad_norm"):
        if not math.isfinite(record[key]):
            record[key] = None
    return record


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, (OSError, CheckpointError)) else f"{type(error).__name__}: {error}"
