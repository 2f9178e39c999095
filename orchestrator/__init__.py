"""Elastic training on Ray: the result is a function of the job file, not of the cluster's luck.

from orchestrator import Job, run

result = run(Job.load("examples/quickstart.yaml"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import RunResult, run
    from orchestrator.job import Job, JobError

__all__ = ["Job", "JobError", "RunResult", "run"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `orchestrator --help` need not wait for pydantic or ray.
    if name in ("Job", "JobError"):
        from orchestrator import job

        return getattr(job, name)
    if name in ("RunResult", "run"):
        from orchestrator import api

        return getattr(api, name)
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
