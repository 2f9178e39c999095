"""A job's faults, fired on the worker that each is for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from orchestrator.job import Job
from orchestrator.job.kinds import fault_kind_named
from orchestrator.training.device_faults import exhaust_memory, fail_device, hang_in_collective
from strategies.comm.fabric import Fabric


@dataclass(frozen=True)
class _Slowness:
    """Virtual workers take `factor` times as long, from a step until another (excluded) or a time."""

    factor: float
    until_step: float
    until: float

    def lasts(self, step: int) -> bool:
        return step < self.until_step and time.monotonic() < self.until


class Victim(Protocol):
    """A worker, as far as faults happen to it. `fabric` are the groups of the generation that it is in."""

    fabric: Fabric | None

    @property
    def device(self) -> torch.device: ...

    def make_gradient_nan(self, step: int) -> None: ...


class FaultInjector:
    """Fires a job's faults on one worker.

    `announce(index)` tells the controller that a fault is about to happen and returns once it is on record, so that
    it never happens twice and recoveries are measured from its true time. `victim` is whom it happens to.
    """

    def __init__(self, job: Job, slot: int, announce: Callable[[int], None], victim: Victim) -> None:
        self._faults = list(enumerate(job.faults))
        self._slot = slot
        self._announce = announce
        self._victim = victim
        self._fired: set[int] = set()
        self._slow: dict[str, list[_Slowness]] = {"data": [], "compute": []}
        self._step = 0
        self._last_busy_s = 0.0
        self.rank = 0

    @property
    def may_be_slow(self) -> bool:
        """Whether anything may happen to this worker; only then `drag` and `delay` need to be asked."""
        return any(fault.worker in (self._slot, None) for _, fault in self._faults)

    def already_fired(self, indices: tuple[int, ...]) -> None:
        self._fired |= set(indices)

    def on_phase(self, phase: str, step: int) -> None:
        """Called at the start of every phase of every step."""
        if not self._faults:
            return
        self._step = step
        for index, fault in self._faults:
            mine = fault.worker == self._slot or (fault.worker is None and self.rank == 0)
            if index in self._fired or not mine or fault.step != step or fault.phase != phase:
                continue
            self._fired.add(index)
            self._announce(index)
            fault_kind_named(fault.kind).happen(fault, step, self)

    # ------------------------------------------------------------------------------------ what a kind can do here

    def make_gradient_nan(self) -> None:
        """See `orchestrator.faults.FaultyWorker`."""
        self._victim.make_gradient_nan(self._step)

    def fail_device(self) -> None:
        """See `orchestrator.faults.FaultyWorker`."""
        fail_device(self._victim.device)

    def exhaust_memory(self) -> None:
        """See `orchestrator.faults.FaultyWorker`."""
        exhaust_memory(self._victim.device)

    def hang_in_collective(self) -> None:
        """See `orchestrator.faults.FaultyWorker`."""
        if (fabric := self._victim.fabric) is not None:
            hang_in_collective(fabric)

    def slow_down(self, phase: str, factor: float, steps: int | None, seconds: float | None) -> None:
        """See `orchestrator.faults.FaultyWorker`."""
        if phase not in self._slow:
            raise ValueError(f"phase {phase} cannot be slow, only {' and '.join(self._slow)}")
        until_step = math.inf if steps is None else self._step + steps
        until = math.inf if seconds is None else time.monotonic() + seconds
        self._slow[phase].append(_Slowness(factor, until_step, until))

    def drag(self, busy_s: float) -> None:
        """A stretch of computing took this long, on a device that is to be slow."""
        self._last_busy_s = busy_s
        self._wait("compute")

    def delay(self) -> None:
        """Input is read, and is to be slow."""
        self._wait("data")

    def _wait(self, phase: str) -> None:
        """Slowness of the same kind multiplies."""
        factor = math.prod(each.factor for each in self._slow[phase] if each.lasts(self._step))
        if factor > 1:
            time.sleep(self._last_busy_s * (factor - 1.0))
