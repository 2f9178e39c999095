"""What the actors of a run are called."""

from __future__ import annotations

from orchestrator.control.core.workers import WorkerId

NAMESPACE = "orchestrator"
"""All actors of all runs live in this Ray namespace."""


def controller_name(run_id: str) -> str:
    return f"{run_id}/controller"


def worker_name(run_id: str, worker: WorkerId) -> str:
    return f"{run_id}/worker-{worker}"


def teacher_name(run_id: str, number: int | str) -> str:
    return f"{run_id}/teacher-{number}"
