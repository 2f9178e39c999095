"""Injected faults, for tests and for users' game days: a real signal, a real crash, a real hang."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable

from orchestrator.job import Job


class InjectedFault(RuntimeError):
    """Raised by the fault kind `raise`."""


class FaultInjector:
    """Fires a job's faults on one worker.

    `announce(index)` tells the controller that a fault is about to happen and returns once it is on record, so that
    it never happens twice and recoveries are measured from its true time. `poison(step)` spoils the gradient of a step.
    """

    def __init__(self, job: Job, slot: int, announce: Callable[[int], None], poison: Callable[[int], None]) -> None:
        self._faults = list(enumerate(job.faults))
        self._slot = slot
        self._announce = announce
        self._poison = poison
        self._fired: set[int] = set()
        self._slow_factor = 1.0
        self._slow_until = float("inf")
        self._compute_started: float | None = None
        self.rank = 0

    def already_fired(self, indices: tuple[int, ...]) -> None:
        self._fired |= set(indices)

    def on_phase(self, phase: str, step: int) -> None:
        """Called at the start of every phase of every step."""
        if not self._faults:
            return
        self._be_slow(phase)
        for index, fault in self._faults:
            mine = fault.worker == self._slot or (fault.worker is None and self.rank == 0)
            if index in self._fired or not mine or fault.step != step or fault.phase != phase:
                continue
            self._fired.add(index)
            self._announce(index)
            self._fire(fault.kind, step, fault.seconds, fault.factor)

    def _fire(self, kind: str, step: int, seconds: float | None, factor: float | None) -> None:
        match kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "exit":
                os._exit(17)
            case "raise":
                raise InjectedFault(f"injected at step {step}")
            case "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "deadlock":
                threading.Event().wait()
            case "nan":
                self._poison(step)
            case "slow":
                self._slow_factor = factor or 2.0
                self._slow_until = time.monotonic() + (seconds if seconds is not None else float("inf"))
            case _:
                # drain, node and controller are carried out by the controller when the fault is announced.
                pass

    def _be_slow(self, phase: str) -> None:
        """Stretches the compute phase by the factor of an active `slow` fault."""
        now = time.monotonic()
        if phase == "compute":
            self._compute_started = now
        elif self._compute_started is not None:
            spent, self._compute_started = now - self._compute_started, None
            if self._slow_factor > 1.0 and now < self._slow_until:
                time.sleep(spent * (self._slow_factor - 1.0))
