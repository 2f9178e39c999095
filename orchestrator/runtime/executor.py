"""What a machine's decisions mean: everything but the processes of workers, which the actor around both sees to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from monitoring.clock import RunClock
from monitoring.events import RunEvent
from monitoring.logs import LogContext
from orchestrator.control.core.machine import Machine
from orchestrator.control.core.orders import Order
from orchestrator.control.core.protocol import Placed
from orchestrator.control.core.workers import WorkerId
from orchestrator.job import Job
from orchestrator.job.sections.faults import Fault
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.lease import Lease


@dataclass(frozen=True)
class ExecutorContext:
    """What an executor is given by the actor that it works in.

    `spec` is what every incarnation of the controller is made from, `job` the job in it, `node` the cluster's name of
    this one. An event for the machine goes to `tell`, at the present time; `end_workers` ends all workers.
    """

    spec: Mapping[str, Any]
    job: Job
    directory: RunDirectory
    lease: Lease
    about: LogContext
    node: str
    tell: Callable[[Any], None]
    end_workers: Callable[[], None]


class Executor(Protocol):
    """Keeps the record of one run or service, speaks the language of its workers, and ends it. Training's is
    `orchestrator.runtime.training_executor.TrainingExecutor`.

    Methods are called on the thread that handles events, unless they say otherwise.
    """

    clock: RunClock
    unit: int
    """Workers of this many slots share a node."""
    warm: frozenset[WorkerId]
    """Those that earlier controllers knew to be warm."""
    heartbeat_timeout_s: float

    @property
    def machine(self) -> Machine:
        """What decides."""

    @property
    def faults(self) -> Sequence[Fault]:
        """Those to inject, by their numbers."""

    @property
    def result(self) -> dict[str, Any] | None:
        """How it ended; None while it has not. From any thread."""

    # ---- beginning and end

    def open(self, host: str, targets: Any) -> None:
        """Lets others see from outside how it goes: at `host`, told to Prometheus in the directory `targets`."""

    def begin(self) -> bool:
        """The first thing; False when all is over already."""

    def resume(self, statuses: Sequence[Any], starting: Sequence[Placed]) -> Any:
        """The event that these workers of an earlier controller were found: those that spoke, and those that start."""

    def must_end(self) -> str:
        """Why it cannot go on, whatever the machine thinks; "": it can."""

    def end(self, status: str, reason: str, digest: str | None) -> None:
        """Writes the result and ends all workers, once."""

    def close(self) -> None:
        """Nothing is written after this."""

    # ---- events and actions

    def before(self, event: Any) -> None:
        """An event is about to be handled."""

    def after(self, event: Any) -> None:
        """It has been, and so have the actions that followed from it."""

    def log_action(self, action: Any) -> None:
        """Says in the log what is going to be done."""

    def carry_out(self, action: Any) -> None:
        """An action that does not concern the processes of workers."""

    def probed_by(self, order: Order) -> Mapping[WorkerId, tuple[str, int]]:
        """The workers of which one may be gone, by this order, and where each listened (host and port)."""

    def record(self, event: RunEvent) -> None:
        """Puts something on record. From any thread."""

    # ---- others

    def dated(self, message: Any, shift: float) -> Any:
        """A worker's message with its times on the run's line, of which the worker's own clock is `shift` behind. The
        status with which a worker introduces itself must have the attribute `ready`: the message, for the machine, that
        it has become warm. From any thread."""

    def progress_of(self, message: Any) -> int | None:
        """How much a worker says is done; None when it says nothing of that. From any thread."""

    def reply(self) -> Any:
        """What a worker is answered at once. From any thread."""

    def event_of(self, request: Mapping[str, Any]) -> Any:
        """The event that a request from the command line is; None for an unknown one. From any thread."""

    def snapshot(self) -> dict[str, Any]:
        """How it is, for those who follow it. From any thread."""

    def look(self) -> None:
        """Looks after its record. Called now and then, on a thread of its own, as the run directory may be far away and
        slow."""

    def publish(self) -> None:
        """Tells how things are; on the same thread."""

    def worker_spec(self) -> dict[str, Any]:
        """What a worker is made from."""
