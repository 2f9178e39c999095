"""The log of a run's processes: where it goes, and what the controller says of what it decides and of what happens.

Beside events.jsonl, which holds facts for tools, the log tells an operator who was told to do what.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monitoring.events import (
    CheckpointFailed,
    CheckpointInvalid,
    DrainNoticed,
    GenerationFormed,
    IncidentOpened,
    RolledBack,
    Shortage,
    SkewFound,
    StartFailed,
)
from monitoring.follow import describe_event
from monitoring.goodput import VOLUNTARY
from monitoring.logs import LogContext, set_up
from orchestrator.control.core.protocol import Finish, KillWorker, ReleaseWorker, RequestWorker
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.protocol import Action, Rollback, StepCommitted
from orchestrator.training.orders import (
    CommitCheckpoint,
    Deal,
    DiscardCheckpoint,
    Finalize,
    Interrupt,
    Pause,
    RequestSave,
    SaveState,
    StartGeneration,
)

log = logging.getLogger(__name__)

_LOGGED_AS_ACTIONS = frozenset({GenerationFormed.kind, RolledBack.kind})
"""Told as actions already."""
_BAD = frozenset(
    {
        IncidentOpened.kind,
        CheckpointFailed.kind,
        CheckpointInvalid.kind,
        StartFailed.kind,
        DrainNoticed.kind,
        SkewFound.kind,
        Shortage.kind,
    }
)


def set_up_logs(spec: Mapping[str, Any], process: str, *, worker: int | None = None) -> LogContext:
    """This process's log as the job in `spec` wants it, below `run_dir`, where that can be seen from here."""
    about = LogContext(run=str(spec["run_id"]), process=process, worker=worker)
    monitoring = spec["job"].get("monitoring", {})
    set_up(
        Path(spec["run_dir"]) / "logs", about,
        form=monitoring.get("logs", "text"), level=monitoring.get("log_level", "info"),
    )  # fmt: skip
    return about


def log_action(action: Action, about: LogContext) -> None:
    """Says what the controller does, and keeps what its records are about."""
    match action:
        case StepCommitted():
            about.step = action.report.step + 1  # what is worked on, as for a worker
            log.debug("step %d is committed", action.report.step)
        case StartGeneration():
            generation = action.generation
            about.generation, about.step = generation.number, generation.committed
            log.info(
                "generation %d, %s: workers %s start from step %d",
                generation.number, generation.cause, _names([member.worker for member in generation.members]),
                generation.committed,
            )  # fmt: skip
        case RequestWorker():
            log.info("worker %s is requested", action.worker)
        case ReleaseWorker():
            log.info("worker %s is released: %s", action.worker, action.reason)
        case KillWorker():
            log.warning("worker %s is killed: %s", action.worker, action.reason)
        case Interrupt():
            log.info("workers %s are told to break out of generation %d", _names(action.workers), action.generation)
        case Pause():
            log.info("generation %d is to pause at the next step boundary", action.generation)
        case Deal():
            log.info("deal %d of the virtual workers of generation %d is offered", action.number, action.generation)
        case RequestSave():
            log.info("a checkpoint is asked for at the next step boundary")
        case SaveState():
            log.info("workers %s are to save %s", _names(action.workers), action.save.directory)
        case CommitCheckpoint():
            log.info("all parts of %s are written; worker %s completes it", action.save.directory, action.worker)
        case DiscardCheckpoint():
            log.info("what is left of %s is discarded", action.save.directory)
        case Rollback():
            about.step = action.committed
            log.warning("back to the state of %d steps: what came after is run again", action.committed)
        case Finalize():
            log.info("workers %s digest their state", _names(action.workers))
        case Finish():
            level = logging.ERROR if action.status == "failed" else logging.INFO
            log.log(level, "the run ends: %s%s", action.status, action.reason and f", {action.reason}")


def tell(event: Mapping[str, Any]) -> None:
    """Says what was put on record, where that is of interest to more than tools."""
    if event["kind"] in _LOGGED_AS_ACTIONS:
        return
    try:
        text = describe_event(dict(event))
    except (KeyError, TypeError, ValueError):  # steering does not depend on what can be said of it
        text = None
    if text is not None:
        is_bad = event["kind"] in _BAD and event.get("incident") not in VOLUNTARY
        log.log(logging.WARNING if is_bad else logging.INFO, "%s: %s", event["kind"], text)


def _names(workers: list[WorkerId] | tuple[WorkerId, ...]) -> str:
    return ", ".join(str(worker) for worker in workers[:16]) + (", ..." if len(workers) > 16 else "")
