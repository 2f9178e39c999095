"""Where a run's endpoint is told to Prometheus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray._private import worker as ray_worker

from monitoring import discovery
from orchestrator.job import Job


def targets_directory(job: Job, *, own_cluster: bool, cwd: str | None) -> Path:
    """Where the job says (relative to `cwd`, None: to here), or beside Ray's own discovery file."""
    if job.monitoring.targets is not None:
        return Path(cwd or ".") / job.monitoring.targets
    if own_cluster:
        return discovery.targets_directory()  # Its own Ray's directory is gone with it, and nobody watches it.
    node: Any = ray_worker._global_node
    return discovery.targets_directory(str(Path(node.get_session_dir_path()).parent))
