"""When there is nothing more to wait for in a run that is followed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from orchestrator.rundir import RunDirectory

POLL_S = 0.2
PATIENCE_S = 10.0
"""A run that nobody steers may have its controller restarted: it is given up when nothing was written for this long."""
START_PATIENCE_S = 300.0
"""While a run starts or is resumed, nobody steers it either: Ray comes up and the data is prepared, which says little
and takes longer."""


class Abandonment:
    """Whether a run that is followed is steered by nobody, and has not been for a while.

    A run of which nothing was recorded since it was started (job.resolved.json is written then) has `start_patience_s`
    from then, or from what was last said in its logs; any other has `patience_s` from its last record. The wall clock
    tells how long ago that was only at the first look; from then on it is measured for how long nothing came.
    """

    def __init__(
        self, directory: RunDirectory, patience_s: float = PATIENCE_S, start_patience_s: float = START_PATIENCE_S
    ) -> None:
        self._directory = directory
        self._patience_s = patience_s
        self._start_patience_s = start_patience_s
        self._newest: float | None = None
        self._since = 0.0

    def has_come(self) -> bool:
        """To be asked again and again."""
        directory, patience_s = self._directory, self._patience_s
        newest = _newest((directory.events, directory.metrics, directory.path / "status.json",
                          directory.path / "result.json"))  # fmt: skip
        started = _newest((directory.path / "job.resolved.json",))
        if newest < started:
            newest, patience_s = max(started, _newest((directory.path / "logs").glob("*"))), self._start_patience_s
        if newest != self._newest:
            age_s = max(0.0, time.time() - newest) if self._newest is None else 0.0
            self._newest, self._since = newest, time.monotonic() - age_s
        is_silent = newest > 0 and time.monotonic() - self._since > patience_s
        return is_silent and not (directory.is_steered or directory.is_driven)


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
