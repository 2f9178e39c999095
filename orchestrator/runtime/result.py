"""The result of a run, from what is on record."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from monitoring.evaluations import StandingEvaluations, metrics_by_step
from monitoring.records import read_records
from orchestrator.data import DataError
from orchestrator.data.ledger import audit
from orchestrator.evaluation.judge import EvaluationRules
from orchestrator.evaluation.record import judged
from orchestrator.job import Job
from orchestrator.job.parts import update_rule_of
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.run_log import RunLog


def outline(directory: RunDirectory, steps: list[dict[str, Any]], status: str, reason: str) -> dict[str, Any]:
    """What every result begins with. `steps` are the records of metrics.jsonl."""
    return {
        "run": directory.run_id,
        "status": status,
        "reason": reason,
        "steps": len(steps),
        "tokens": sum(int(record["tokens"]) for record in steps),
        "final_loss": steps[-1]["loss"] if steps else None,
    }


def outline_of(run_log: RunLog) -> dict[str, Any]:
    """The same numbers as the controller knows them, for a run whose records cannot be read any more."""
    last = run_log.last_step
    return {
        "steps": run_log.committed,
        "tokens": run_log.tokens,
        "final_loss": None if last is None else last["loss"],
    }


def settled(attempt: Callable[[], bool], deadline: float) -> bool:
    """Tries until it succeeds or the deadline (monotonic seconds) has passed; at least once."""
    while not attempt():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def compose(
    directory: RunDirectory,
    job: Job,
    run_log: RunLog,
    data: dict[str, Any],
    status: str,
    reason: str,
    digest: str | None,
) -> dict[str, Any]:
    """The content of result.json, but for the times: a run whose ledger does not add up has failed, however it ended.

    `data` says what the samples of each step must be, `digest` is that of the final state.
    """
    steps = []
    with suppress(OSError, ValueError):
        steps = list(read_records(directory.metrics))
    data_digest = None
    if status != "failed" or steps:
        try:
            report = audit(directory.metrics, **data)
            data_digest = report.data_digest or None
            if not report.ok:
                status, reason = "failed", f"the ledger does not add up: {report.problems[0]}"
        except (DataError, OSError, ValueError) as error:
            reason = f"{reason}; the ledger could not be audited: {error}"
    return outline(directory, steps, status, reason) | {
        "wall_seconds": 0.0,
        "goodput_ratio": 0.0,
        "median_step_seconds": round(statistics.median(s["seconds"] for s in steps), 4) if steps else None,
        "reduction": job.strategy.reduction,
        "bit_exact": bit_exact(job),
        "state_digest": digest,
        "data_digest": data_digest,
        "wire_bytes": dict(sorted(run_log.wire_bytes.items())),
        "generations": run_log.generations,
        "recoveries": run_log.recoveries,
        **({} if run_log.loaded is None else {"model": run_log.loaded}),
        **({} if run_log.evaluated.last is None else {"evaluation": evaluation(job, run_log.evaluated)}),
    }


def evaluation(job: Job, evaluations: StandingEvaluations) -> dict[str, Any]:
    """The last and the best of the evaluations, each with its step and metrics."""
    by_step = metrics_by_step(evaluations)
    last, best = max(by_step), judged(by_step, EvaluationRules.of(job)).best_step
    found: dict[str, Any] = {"last": {"step": last, **by_step[last]}}
    if best in by_step:
        found["best"] = {"step": best, **by_step[best]}
    return found


def bit_exact(job: Job) -> bool | str:
    """Whether the bits of the result are a function of the job file alone; "replayable": of what is on record, too."""
    if job.strategy.reduction != "canonical" or job.elastic.mixed_numerics:
        return False
    return True if (result := update_rule_of(job).result) == "job" else result
