"""Signals of whoever started or follows a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(BaseException):
    """A signal came before there was a run that could be ended in good order."""


class Interruption:
    """What the user's signals ask for: the first ends the run in good order, the second at once.

    While the run is being prepared (`follows` is false) a signal ends that, by an exception.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.follows = False

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._heard)

    def _heard(self, number: int, frame: Any) -> None:
        self.count += 1
        self.name = signal.Signals(number).name
        if not self.follows:
            raise Interrupted(self.name)
