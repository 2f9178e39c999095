"""When there is nothing more to wait for in a run that is followed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from orchestrator.rundir import RunDirectory

POLL_S = 0.2
PATIENCE_S = 10.0
"""A run that nobody steers may have its controller restarted: it is given up when nothing was written for so long."""
START_PATIENCE_S = 300.0
"""While a run starts or is resumed, nobody steers it either: Ray comes up and the data is prepared, which says little
and takes longer."""


def is_abandoned(
    directory: RunDirectory, patience_s: float = PATIENCE_S, start_patience_s: float = START_PATIENCE_S
) -> bool:
    """Whether a run is steered by nobody, and has not been for a while.

    A run of which nothing was recorded since it was started (job.resolved.json is written then) has `start_patience_s`
    from then, or from what was last said in its logs; any other has `patience_s` from its last record.
    """
    recorded = _newest((directory.events, directory.metrics, directory.path / "status.json",
                        directory.path / "result.json"))  # fmt: skip
    started = _newest((directory.path / "job.resolved.json",))
    if recorded < started:
        recorded, patience_s = max(started, _newest((directory.path / "logs").glob("*"))), start_patience_s
    return recorded > 0 and time.time() - recorded > patience_s and not (directory.is_steered or directory.is_driven)


def _newest(paths: Iterable[Path]) -> float:
    """When something was last written to one of the files, in seconds since the epoch; 0 when all are missing or
    empty."""
    newest = 0.0
    for path in paths:
        with suppress(OSError):
            found = path.stat()
            if found.st_size:
                newest = max(newest, found.st_mtime)
    return newest
