"""What can be made to happen to a run (docs/faults.md): one class a kind, for tests and for users' game days. A real
signal, a real crash, a real hang, a real wait.

Another package can bring kinds: entry points of the group `elastic_orchestrator.faults` (docs/contributing.md).
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from abc import ABC
from typing import ClassVar, Protocol


class InjectedFault(RuntimeError):
    """Raised by the fault kind `raise`."""


class Planned(Protocol):
    """What the job file says of a fault (`orchestrator.job.sections.faults.Fault`)."""

    @property
    def phase(self) -> str: ...

    @property
    def seconds(self) -> float | None: ...

    @property
    def steps(self) -> int | None: ...

    @property
    def factor(self) -> float | None: ...


class FaultyWorker(Protocol):
    """The worker that a fault happens to, in its own process."""

    def make_gradient_nan(self) -> None:
        """The gradient of the step under way is not finite."""

    def fail_device(self) -> None:
        """Its device computes no more. Raises what torch then raises."""

    def exhaust_memory(self) -> None:
        """Its device has too little memory. Raises what torch then raises."""

    def hang_in_collective(self) -> None:
        """It waits in a collective for what never comes, until the controller has it break out of there."""

    def slow_down(self, phase: str, factor: float, steps: int | None, seconds: float | None) -> None:
        """The phase, data or compute, takes `factor` times as long: for some steps, for a time, or from now on."""


class FaultKind(ABC):
    """Something that can happen. It is on record before it happens, and happens once."""

    name: ClassVar[str]
    needs_worker: ClassVar[bool] = True
    details: ClassVar[tuple[str, ...]] = ()
    """Of the fields seconds, steps and factor those that say something about it."""
    phases: ClassVar[tuple[str, ...]] = ()
    """Those in which it can happen; (): in any."""
    why_there: ClassVar[str] = ""
    """Why only in those, for the error."""

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:  # noqa: B027
        """In the worker's process, at the start of the phase. Ours of nodes and controllers do nothing here: the
        controller carries them out by their names, which kinds of other packages cannot."""


class Kill(FaultKind):
    name = "kill"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Segfault(FaultKind):
    name = "segfault"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        ctypes.string_at(0)


class Raise(FaultKind):
    name = "raise"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        raise InjectedFault(f"injected at step {step}")


class Exit(FaultKind):
    name = "exit"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        os._exit(17)


class Hang(FaultKind):
    name = "hang"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class Deadlock(FaultKind):
    name = "deadlock"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        threading.Event().wait()


class Device(FaultKind):
    name = "device"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        worker.fail_device()


class Memory(FaultKind):
    name = "oom"
    phases = ("data", "compute")
    why_there = "is about what the model computes, so its phase is data or compute"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        worker.exhaust_memory()


class CollectiveHang(FaultKind):
    name = "nccl-hang"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        worker.hang_in_collective()


class Slow(FaultKind):
    name = "slow"
    details = ("seconds", "factor", "steps")
    phases = ("data", "compute")
    why_there = "is about reading (data) or the device (compute), so its phase is one of these"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        worker.slow_down(
            "data" if planned.phase == "data" else "compute", planned.factor or 2.0, planned.steps, planned.seconds
        )


class Nan(FaultKind):
    name = "nan"
    phases = ("data", "compute")
    why_there = "spoils the gradient before it is reduced, so its phase is data or compute"

    def happen(self, planned: Planned, step: int, worker: FaultyWorker) -> None:
        worker.make_gradient_nan()


class Drain(FaultKind):
    """Carried out by the controller, which can reach the cluster; and so are the next two."""

    name = "drain"
    details = ("seconds",)


class Node(FaultKind):
    name = "node"


class Controller(FaultKind):
    name = "controller"
    needs_worker = False


KINDS: dict[str, FaultKind] = {
    kind.name: kind
    for kind in (
        Kill(), Segfault(), Raise(), Exit(), Hang(), Deadlock(), Device(), Memory(), CollectiveHang(), Slow(), Nan(),
        Drain(), Node(), Controller(),
    )
}  # fmt: skip
"""Those that come with this package, by the name that a job file has for them."""
