"""When there is nothing more to wait for in a run that is followed."""

from __future__ import annotations

import time
from contextlib import suppress

from orchestrator.rundir import RunDirectory

POLL_S = 0.2
PATIENCE_S = 10.0
"""A run that nobody steers may have its controller restarted: it is given up when nothing was written for so long."""


def is_steered(directory: RunDirectory) -> bool:
    """Whether a controller has the run right now."""
    with directory.probe_lock() as free:
        return not free


def is_abandoned(directory: RunDirectory, patience_s: float = PATIENCE_S) -> bool:
    """Whether a run that has begun is steered by nobody, and has not been for a while."""
    if not directory.events.exists() or not directory.events.stat().st_size or is_steered(directory):
        return False
    newest = 0.0
    for path in (directory.events, directory.metrics, directory.path / "status.json", directory.path / "result.json"):
        with suppress(OSError):
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest > patience_s
