"""Being the one controller of a run.

Three things see to it that two never both steer: a lock on the run directory, which ends with the process that holds
it; the term, a number claimed once for each controller, which workers obey only when it is the newest they know of;
and the session, which tells controllers that Ray restarted (they go on) from those that another driver started (they
begin anew, and only when nobody has the run).
"""

from __future__ import annotations

import os
from contextlib import suppress

from monitoring.events import ControllerBegan, RunFinished
from monitoring.records import read_records
from orchestrator.rundir import RunDirectory, RunDirectoryError

PATIENCE_S = 2.0
"""How long the lock is waited for: others may have it for a moment, to see whether the run is free, and a predecessor
that still lives needs a second to see that it is no longer wanted."""


class Lease:
    """`is_successor` says that an earlier controller of the same session had the run: Ray lost that one and started
    this; `has_ended` that it had ended the run by then.

    Raises RunDirectoryError when another controller has the run, took it over meanwhile, or has finished it.
    """

    def __init__(self, directory: RunDirectory, session: str) -> None:
        self._directory = directory
        sessions: list[str] = []
        self.has_ended = False
        for event in read_records(directory.events):
            if event["kind"] == ControllerBegan.kind:
                sessions.append(event.get("session", ""))
            elif event["kind"] == RunFinished.kind:
                self.has_ended = sessions[-1:] == [session]
        self.is_successor = session in sessions
        if self.is_successor and sessions[-1] != session:
            raise RunDirectoryError(f"{directory.path} has been taken over by the controller of another driver")
        self._lock: int | None = None
        self._is_given_up = False
        if self.is_successor:
            # Ray starts another only when it takes the first for lost. That one may be cut off, and its machine's lock
            # may outlive it: it steps down when it sees the newer term, and its workers obey this one.
            self.term = directory.next_term()
            with suppress(RunDirectoryError):
                self._lock = directory.lock(PATIENCE_S)
        else:
            self._lock = directory.lock(PATIENCE_S)
            if directory.final_result is not None:
                # The run that had it when this driver looked has ended since.
                self.end()
                raise RunDirectoryError(f"{directory.path} has finished already; its result stands in result.json")
            self.term = directory.next_term()

    def is_over(self) -> bool:
        """Whether a newer controller has the run. Asked now and then; also gets the lock if it was not to be had."""
        if self._directory.newest_term() > self.term:
            return True
        if self._lock is None and not self._is_given_up:
            with suppress(RunDirectoryError):
                self._lock = self._directory.lock()
        return False

    def end(self) -> None:
        """The run is nobody's any more: it may be resumed from here."""
        self._is_given_up = True
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
