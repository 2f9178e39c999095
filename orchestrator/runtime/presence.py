"""Is the run directory still there? A run whose directory is deleted or moved away in mid-run has lost its record: what
is still written goes to files that nobody will ever read."""

from __future__ import annotations

from orchestrator.rundir import RunDirectory
from orchestrator.runtime.run_log import RunLog

LOST_AFTER_S = 5.0
"""How long a file may be missing: a file system may be away for a moment."""


class Presence:
    """Looks now and then; times are monotonic seconds."""

    def __init__(self, directory: RunDirectory, run_log: RunLog) -> None:
        self._directory = directory
        self._run_log = run_log
        self._missing_since: float | None = None

    def loss(self) -> str:
        """What of the run is missing now; "": nothing, as far as can be told."""
        try:
            missing = self._run_log.missing_files()
        except OSError:
            return ""
        if not missing:
            return ""
        what = (
            str(self._directory.path)
            if not self._directory.path.exists()
            else f"{self._directory.path}: " + (" and ".join(missing))
        )
        return f"{what} was deleted or moved away in mid-run, and what was recorded there with it"

    def look(self, now: float) -> str:
        """What is missing for good; "": nothing."""
        loss = self.loss()
        if not loss:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        return loss if loss and now - (self._missing_since or now) >= LOST_AFTER_S else ""
