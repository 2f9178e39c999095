"""NCCL, made so that it can be left and formed again in the same process.

Left to itself torch ends the process some time after a collective fails, from one of several threads of its own; all of
them are told not to (`settle_environment`), before the first group. What remains to be done here:

- A collective that was aborted looks like a success: only a mark of ours, set first, tells (`Groups.mark_aborted`).
- An abort waits for kernels of communicators that have not been aborted yet, so all groups are aborted at once, each
  in a thread of its own, and nobody waits for them but `is_gone`.
- Asking a work whether it is over holds Python's lock, and waits for an abort that is under way: never both at once.
- A communicator that forms cannot be broken out of, so that is done in a thread of its own too; one that is still
  inside when the group is left keeps `is_gone` from being true.
- A send or receive would form a communicator for its pair the first time, unless the group's own is formed eagerly.
- Nothing tells of a peer's death but the network, and inside a node not even that: the group's control connections do.

Sources: ProcessGroupNCCL.cpp and NCCLUtils.cpp of torch 2.11 to 2.13; NVIDIA/nccl issues 829, 863 and 1013; pytorch
issues 119797, 132291 and 153960.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch

from strategies import compat
from strategies.comm.group_errors import Misconfigured, PeerLost, first_line
from strategies.comm.transport import PATIENCE, Transport

log = logging.getLogger(__name__)

FORM_LIMIT_S = 20
"""How long a communicator may form, or an abort wait for one that does: whole seconds, the same for the whole process.
"""
ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    "TORCH_NCCL_DESYNC_DEBUG": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_NAN_CHECK": "0",
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(FORM_LIMIT_S),
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""What torch reads when it makes a group, and what it must find for a worker to outlive the loss of another. The last
is four times how long the watchdog sleeps, with a lock, after each collective that failed."""
_OFF = ("0", "n", "no", "f", "false", "off")
LOOK_EVERY_S = 0.005
"""How often a wait looks whether a peer's process is gone."""


def settle_environment() -> None:
    """Sets ENVIRONMENT; to be called before the process makes its first group. Raises Misconfigured for a variable that
    says otherwise, and for a mode of torch's that overrules them."""
    for name, value in ENVIRONMENT.items():
        found = os.environ.get(name)
        if found is not None and found != value and not (value == "0" and found.lower() in _OFF):
            raise Misconfigured(
                f"the environment has {name}={found}: with that a worker would not outlive the loss of another. "
                f"Unset it, or set it to {value}"
            )
        os.environ[name] = value
    if os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        raise Misconfigured(
            "the environment has TORCH_DISTRIBUTED_DEBUG=DETAIL, with which torch ends a worker that loses another. "
            "Unset it, or set it to INFO"
        )


class Nccl(Transport):
    """Tensors on GPUs, one GPU for each rank."""

    def __init__(self, device: torch.device, is_a_peer_lost: Callable[[], bool]) -> None:
        self._device = device
        self._is_a_peer_lost = is_a_peer_lost
        self._group: Any = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        """Held while a work is asked whether it is over, and while the group is aborted."""
        self._is_aborted = self._is_ending = self._is_left_over = False

    def form(self, store: Any, rank: int, world_size: int, host: str, timeout_s: float) -> Any:
        group = compat.make_nccl(store, rank, world_size, PATIENCE)
        with self._lock:
            self._group = group
            was_aborted = self._is_aborted
        if was_aborted:
            self.abort()
            raise PeerLost("the process group was aborted")
        failed: list[BaseException] = []
        is_over = threading.Event()

        def connect() -> None:
            try:
                group.eager_connect_single_device(self._device)
                for work in self._try_out(group, world_size):
                    self.wait(work)
            except BaseException as error:
                failed.append(error)
            finally:
                is_over.set()

        self._in_a_thread("forming", connect)
        deadline = time.monotonic() + timeout_s
        while not is_over.wait(LOOK_EVERY_S):
            self._look()
            if time.monotonic() > deadline:
                raise PeerLost(f"NCCL did not form a communicator of {world_size} ranks within {timeout_s:.0f} s")
        if failed:
            raise failed[0]
        return group

    def _try_out(self, group: Any, ranks: int) -> Iterator[Any]:
        """One operation of each kind that is used. NCCL connects ranks for each with the first of it, which has all of
        them wait for the last: here, and not when one may be busy with something else for longer than the limit."""
        each, one = torch.zeros(ranks, device=self._device), torch.zeros(1, device=self._device)
        yield group.allreduce([one])
        yield group.alltoall_base(torch.empty_like(each), each, [], [])
        yield group._allgather_base(torch.empty_like(each), one)

    def _look(self) -> None:
        if self._is_aborted:
            raise PeerLost("the process group was aborted")
        if self._is_a_peer_lost():
            raise PeerLost("the process of a peer is gone")

    def all_gather(self, group: Any, output: torch.Tensor, input: torch.Tensor, ranks: int) -> Any:
        return group._allgather_base(output, input)

    def together(self, group: Any, launches: Sequence[Callable[[], Any]]) -> list[Any]:
        # By themselves they would go one after the other, and two that send to each other would wait for each other.
        group._start_coalescing()
        try:
            for launch in launches:
                launch()
        finally:
            work = group._end_coalescing()
        return [] if work is None else [work]

    def wait(self, work: Any) -> None:
        pause, looked = 0.00005, time.monotonic()
        while True:
            # An abort holds it for as long as that takes, which nobody waits for.
            while not self._asking.acquire(timeout=LOOK_EVERY_S):
                self._look()
            try:
                if self._is_aborted:
                    raise PeerLost("the process group was aborted")
                # It also finds what the network says of a peer; `wait` would abort this group alone for that.
                if work.is_completed():
                    if (error := _error_of(work)) is not None:
                        raise error
                    break
            finally:
                self._asking.release()
            if time.monotonic() - looked > LOOK_EVERY_S:
                self._look()
                looked = time.monotonic()
            time.sleep(pause)
            pause = min(0.001, pause * 1.5)
        work.wait()

    @property
    def can_order(self) -> bool:
        return self._device.type == "cuda"

    def order(self, work: Any) -> None:
        # Without a limit of time it is the present stream that waits, and the host goes on.
        work.wait()

    def abort(self) -> None:
        with self._lock:
            self._is_aborted = True
            group = None if self._is_ending else self._group
            self._is_ending = self._is_ending or group is not None
        if group is not None:
            self._in_a_thread("abort", lambda: self._abort(group))

    def _abort(self, group: Any) -> None:
        try:
            with self._asking:
                group.abort()
        except BaseException as error:
            # Its kernels may be there for ever.
            self._is_left_over = True
            log.error("a process group could not be aborted: %s", first_line(error))

    def drop(self) -> None:
        self.abort()
        with self._lock:
            self._group = None

    def is_gone(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not (self._is_left_over or any(thread.is_alive() for thread in self._threads))

    def _in_a_thread(self, what: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"nccl {what}", daemon=True)
        self._threads.append(thread)
        thread.start()


def _error_of(work: Any) -> BaseException | None:
    """What a work that is over failed with; None where it did not, or torch does not give that to Python."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = work.exception()
        return found if isinstance(found, BaseException) else None
    return None
