"""Whether a run is under way, also while nobody steers it because Ray restarts its controller, and waiting for that.

The lock on the run directory ends with the controller's process. Whether another controller is to be expected is told
by what is on record (a controller that did not end the run), and on a cluster of the run's own by its driver, which
keeps a lock too: when that is gone, so is the cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from monitoring.events import ControllerBegan, RunFinished
from monitoring.records import read_records
from orchestrator.rundir import RunDirectory, RunDirectoryError

RESTART_PATIENCE_S = 60.0
"""How long a successor is waited for: Ray starts it within seconds, on a loaded machine it takes tens of them."""
TELL_AFTER_S = 1.0
ANSWER_PATIENCE_S = 15.0
"""How long a controller that is there may take to answer a request."""
_POLL_S = 0.2


class NoAnswer(RuntimeError):
    """A controller that is there did not answer a request; the request is withdrawn."""


class Succession:
    """Whether nobody steers a run just now and a controller is to be expected. Only at the first look the wall clock
    tells how long ago the last one gave a sign of life; from then on it is measured."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._sign: float | None = None
        self._since = 0.0

    def is_expected(self) -> bool:
        """To be asked again and again."""
        directory = self._directory
        with suppress(RunDirectoryError, OSError):
            if directory.read_json("result.json") is not None:
                return False
        if directory.is_driven:
            return True
        last, sign = _last_controller(directory)
        if last is None or last.get("own_cluster"):
            return False  # Its driver is gone, and the cluster with it.
        if sign != self._sign:
            age_s = max(0.0, time.time() - sign) if self._sign is None else 0.0
            self._sign, self._since = sign, time.monotonic() - age_s
        return time.monotonic() - self._since < RESTART_PATIENCE_S


def awaits_controller(directory: RunDirectory) -> bool:
    """At a first look; see `Succession`."""
    return Succession(directory).is_expected()


def wait_for_controller(
    directory: RunDirectory, tell: Callable[[str], None], patience_s: float = RESTART_PATIENCE_S
) -> bool:
    """Waits until a controller steers the run; False when none is to be expected, or none came."""
    began, told = time.monotonic(), False
    succession = Succession(directory)
    while not directory.is_steered:
        waited_s = time.monotonic() - began
        if waited_s > patience_s or not succession.is_expected():
            return False
        if waited_s > TELL_AFTER_S and not told:
            told = True
            tell(f"the controller of {directory.path} is being started or restarted; waiting")
        time.sleep(_POLL_S)
    return True


def ask(directory: RunDirectory, tell: Callable[[str], None], kind: str, **fields: Any) -> dict[str, Any]:
    """Leaves a request for the controller and returns its answer; a controller that is being restarted is waited for.

    Raises RunDirectoryError when the run is not under way, or ends without an answer; NoAnswer when its controller
    gives none. Either way the request is withdrawn: nobody obeys it later.
    """
    if not wait_for_controller(directory, tell):
        raise RunDirectoryError(f"{directory.path} is not running now{_how_it_ended(directory)}; nothing to {kind}")
    request = directory.request(kind, **fields)
    try:
        deadline = time.monotonic() + ANSWER_PATIENCE_S
        while time.monotonic() < deadline:
            if (answer := directory.answer(request, timeout_s=1.0)) is not None:
                return answer
            if directory.is_steered:
                continue
            if not wait_for_controller(directory, tell):
                if (answer := directory.answer(request, timeout_s=0.1)) is not None:
                    return answer
                raise RunDirectoryError(f"{directory.path} has ended{_how_it_ended(directory)}; nothing to {kind}")
            deadline = time.monotonic() + ANSWER_PATIENCE_S
    finally:
        directory.withdraw(request)
    raise NoAnswer(f"the controller of {directory.path} did not answer within {ANSWER_PATIENCE_S:.0f} s")


def _how_it_ended(directory: RunDirectory) -> str:
    with suppress(RunDirectoryError, OSError):
        result = directory.read_json("result.json")
        if isinstance(result, dict) and "status" in result:
            return f" (it {'has ' if result['status'] == 'finished' else 'was '}{result['status']})"
    return ""


def _last_controller(directory: RunDirectory) -> tuple[dict[str, Any] | None, float]:
    """What the last controller said of itself, None when there was none or it ended the run; and when it last put
    anything on record, which one that lives does all the time."""
    last, sign = None, 0.0
    for event in read_records(directory.events):
        if event.get("kind") == ControllerBegan.kind:
            last = event
        elif event.get("kind") == RunFinished.kind:
            last = None
        sign = event["time"] if isinstance(event.get("time"), int | float) else sign
    with suppress(OSError):
        sign = max(sign, (directory.path / "status.json").stat().st_mtime)
    return last, sign
