"""Signals to the process that started or follows a run."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

NOBODY_READS = "nobody reads what the driver prints"


class Interrupted(BaseException):
    """A signal came before there was a run that could be ended in good order."""


class Interruption:
    """What the user's signals ask for: the first ends the run in good order, the second at once.

    While the run is being prepared (`follows` is false) a signal ends that, by an exception.

    A terminal that goes away (SIGHUP, or nobody reads what is printed) counts as the first signal, however often it is
    noticed, and `is_left` tells it from one that a user sent.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.follows = False
        self.is_left = False
        self._numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` leaves it
            self._numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.getsignal(number) for number in self._numbers}
        self.arm()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def arm(self) -> None:
        """Takes the signals; to be repeated after others may have taken them. Only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                signal.signal(number, self._heard)

    def leave(self, why: str) -> None:
        """The terminal is gone. Raises Interrupted while the run is being prepared."""
        if self.is_left:
            return
        self.is_left = True
        if self.count == 0:
            self.count, self.name = 1, why
        log.warning("the terminal of this driver is gone: %s", why)
        if not self.follows:
            raise Interrupted(why)

    def _heard(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            self.leave("SIGHUP")
            return
        self.count += 1
        self.name = signal.Signals(number).name
        if not self.follows:
            raise Interrupted(self.name)
