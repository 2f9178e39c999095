"""Where a run's endpoint is told to Prometheus."""

from __future__ import annotations

from pathlib import Path

from monitoring import discovery
from orchestrator.job import Job
from orchestrator.runtime.ray import compat


def targets_directory(job: Job, *, own_cluster: bool, cwd: str | None) -> Path:
    """Where the job says (relative to `cwd`, None: to here), or beside Ray's own discovery file."""
    if job.monitoring.targets is not None:
        return Path(cwd or ".") / job.monitoring.targets
    if own_cluster:
        return discovery.targets_directory()  # Its own Ray's directory is gone with it, and nobody watches it.
    return discovery.targets_directory(str(Path(compat.session_dir()).parent))
