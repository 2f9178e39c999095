"""The status of a run (status.json): what the controller sees now, for all who look, with or without Ray.

Pure but for the clock it is given. docs/run-directory.md tells of every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from monitoring.clock import when
from monitoring.skew import Rating
from orchestrator.control.core.workers import WorkerState
from orchestrator.control.training.controller import Controller
from orchestrator.control.training.views import RunState, WorkerView
from orchestrator.job import Job
from orchestrator.runtime.run_log import RunLog
from orchestrator.training.messages import Generation


def status_of(machine: Controller, run_log: RunLog, job: Job, now: float) -> dict[str, Any]:
    """Everything but who the controller is."""
    generation = machine.generation
    ranks = {} if generation is None else {member.worker: rank for rank, member in enumerate(generation.members)}
    window = machine.window
    ratings: Mapping[Any, Rating] = {} if window is None else window.workers
    found = {slot: finding["finding"] for finding in run_log.findings for slot in finding["workers"]}
    views = [view for view in list(machine.workers.values()) if view.alive]
    median_s = machine.progress.median_step_s()
    step = run_log.last_step
    return {
        **run_log.clock.stamp(now),
        "name": job.name,
        "over": machine.state is RunState.OVER,
        "state": machine.state.name.lower(),
        "detail": machine.state.value,
        "status": machine.status,
        "step": run_log.committed,
        "steps": job.train.steps,
        "median_step_seconds": round(median_s, 6),
        "tokens": run_log.tokens,
        "tokens_per_second": round(step["tokens"] / median_s, 3) if step is not None and median_s else None,
        "loss": None if step is None else step["loss"],
        "grad_norm": None if step is None else step["grad_norm"],
        "lr": None if step is None else step["lr"],
        "mfu": None if (mfu := run_log.metrics.mfu) is None else round(mfu, 6),
        "generation": None if generation is None else generation.number,
        "layout": None if generation is None else generation.layout.describe(),
        "target": machine.target,
        "min": job.elastic.workers.min,
        "max": job.elastic.workers.max,
        "workers": [
            _worker(view, ranks.get(view.worker), generation, ratings.get(view.worker), run_log.last_ranks)
            | {"finding": found.get(view.worker.slot)}
            for view in sorted(views, key=lambda view: view.worker)
        ],
        "incidents": {
            "total": len(run_log.recoveries) + len(run_log.open_incidents),
            "open": [{key: i[key] for key in ("incident", "worker", "cause", "at")} for i in run_log.open_incidents],
        },
        "last_recovery": run_log.recoveries[-1] if run_log.recoveries else None,
        "checkpoint": _checkpoint(machine, run_log),
        "checkpoint_interval_seconds": _interval(job, median_s),
        "goodput": run_log.account(now).as_dict(),
        "unwritten": run_log.unwritten(),
        "findings": [{key: f[key] for key in ("finding", "workers", "detail")} for f in run_log.findings],
    }


def _worker(
    view: WorkerView, rank: int | None, generation: Generation | None, rating: Rating | None, accounts: Any
) -> dict[str, Any]:
    is_member = view.state is WorkerState.MEMBER and rank is not None and generation is not None
    place = generation.layout.place(rank) if is_member and generation is not None and rank is not None else None
    account = accounts[rank] if is_member and rank is not None and rank < len(accounts) else None
    return {
        "worker": view.worker.slot,
        "incarnation": view.worker.incarnation,
        "node": view.node,
        "pid": None if view.ready is None else view.ready.pid,
        "state": view.state.name.lower(),
        "rank": rank if is_member else None,
        "coordinates": place and {"data": place.data, "pipeline": place.stage, "tensor": place.tensor},
        "phase": view.phase,
        "heartbeat": view.last_heard or None,
        "speed": None if rating is None else round(rating.speed, 4),
        "own_speed": None if rating is None else round(rating.own_speed, 4),
        "wait_share": None if rating is None else round(rating.wait_share, 4),
        "step_seconds": None if account is None else round(account.work, 6),
        "data_seconds": None if account is None else account.data,
        "virtual_workers": None if account is None else len(account.busy),
        "tokens": None if account is None else account.tokens,
        "host_bytes": view.host_bytes,
        "device_bytes": view.device_bytes,
        "gpu": None if view.gpu is None else asdict(view.gpu),
        "leaving": view.leaving,
    }


def _checkpoint(machine: Controller, run_log: RunLog) -> dict[str, Any] | None:
    last = run_log.last_checkpoint
    if last is None:
        return None
    return {"committed": last["committed"], "time": when(last), "saving": machine.is_saving}


def _interval(job: Job, median_step_s: float) -> float:
    """Seconds between planned checkpoints at the present speed; 0 when none is planned but the last."""
    planned = []
    if job.checkpoint.every_seconds is not None:
        planned.append(float(job.checkpoint.every_seconds))
    if job.checkpoint.every_steps is not None:
        planned.append(job.checkpoint.every_steps * median_step_s)
    return round(min(planned), 3) if planned else 0.0
