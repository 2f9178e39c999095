"""NCCL's process group as far as it hurts, over gloo and without a GPU.

Like torch's ProcessGroupNCCL (what is known of it is in `strategies.comm.nccl`), this one

- runs its operations one after the other behind the caller's back, and a peer that is gone or silent leaves the one
  under way running for ever, unless it is told that the network reports such things;
- calls an operation that was aborted a success, and leaves rubbish in its results;
- forms its communicator when it is told to, or with the first operation, or one for each pair with the first message;
  what is missing a peer stays there, for ever, or until its time is over when it forms without blocking, and an abort
  waits for that;
- has an abort wait for every operation of this process that is under way in a group that was not aborted yet;
- connects ranks for each kind of operation with the first of it, which waits for all of them, within the same limit;
- knows no tags: messages of a pair are taken in their order;
- must not be asked about an operation while it is aborted;
- has a watchdog that ends the process after an error, unless the environment says otherwise.

What takes torch a minute takes a fraction of a second here.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from strategies.comm.faces import Face
from strategies.comm.gloo import Gloo
from strategies.compat import Work
from tests.ranks.local_ranks import HOST

REMOTE_ERROR = (
    "NCCL error: remote process exited or there was a network error, NCCL version 2.30.7\nncclRemoteError: A call "
    "failed possibly due to a network error or a remote process exiting prematurely."
)
DUPLICATE_GPU = (
    "NCCL error in: NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.30.7\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
)
WATCHDOG_S = 0.1
"""From an error to what the watchdog does about it; torch takes a minute."""
MONITOR_S = 0.5
"""From there to what the monitor does; torch takes eight."""
ASKED_WHILE_ABORTING = 97
"""The exit code of a process whose interpreter would have stood still."""


def _setting(name: str, otherwise: str) -> int:
    return int(os.environ.get(f"TORCH_NCCL_{name}", otherwise))


class FakeWork(Work):
    """An operation under way. `result` is what it leaves its results in."""

    def __init__(self, group: FakeNccl, operation: Callable[[], None], result: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.group = group
        self.operation = operation
        self.result = list(result)
        self.is_over = threading.Event()
        self.error: BaseException | None = None

    def is_completed(self) -> bool:
        group = self.group
        if group.is_aborting:
            os._exit(ASKED_WHILE_ABORTING)
        if not group.is_aborted and self.error is None:
            self.error = group.async_error
        return self.error is not None or self.is_over.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        # Without a limit torch has the device wait, not the host: for those who read on the host it is the same.
        limit = None if timeout is None or not timeout else time.monotonic() + timeout.total_seconds()
        while not self.is_over.wait(0.001) and self.error is None:
            if limit is not None:
                if not self.group.is_aborting and not self.group.is_aborted and self.group.async_error is not None:
                    self.error = self.group.async_error
                elif time.monotonic() > limit:
                    self.error = dist.DistBackendError("Watchdog caught collective operation timeout")
        if self.error is not None:
            self.group.abort()
            raise self.error
        return True

    def get_future(self) -> Any:
        self.wait()
        future: Any = torch.futures.Future()
        future.set_result(self.result)
        return future


class FakeNccl(Face):
    """See the module. `network_tells` says whether a peer that is gone is noticed; inside a node it is not."""

    everywhere: ClassVar[list[FakeNccl]] = []
    should_dump: ClassVar[bool] = False
    network_tells: ClassVar[bool] = False
    duplicate_gpu: ClassVar[bool] = False
    abort_s: ClassVar[float] = 0.0
    """What an abort takes at least."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: timedelta, *, blocking: bool) -> None:
        super().__init__(rank, world_size)
        self.number = len(self.everywhere)
        self.everywhere.append(self)
        self.is_aborted = self.is_aborting = False
        self.async_error: BaseException | None = None
        self._store = store
        self._rank, self._ranks = rank, world_size
        self._blocking = blocking
        self._mutex = threading.Lock()
        self._connected: set[str] = set()
        self._stop = threading.Event()
        self._gloo = Gloo()
        self._inner: Any = None
        self._queue: queue.Queue[FakeWork] = queue.Queue()
        self._running: FakeWork | None = None
        self._batch: list[tuple[Callable[[], Any], Sequence[torch.Tensor]]] | None = None
        self._mode = _setting("ASYNC_ERROR_HANDLING", "3")
        self._monitors = bool(_setting("ENABLE_MONITORING", "1") and _setting("DUMP_ON_TIMEOUT", "1"))
        threading.Thread(target=self._stream, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def getBackendName(self) -> str:
        return "nccl"

    # ------------------------------------------------------------------------------------ forming

    def eager_connect_single_device(self, device: torch.device) -> None:
        """The communicator of all ranks."""
        self._connect("all", range(self._ranks))

    def _connect(self, what: str, ranks: Sequence[int]) -> None:
        if self.duplicate_gpu:
            raise dist.DistBackendError(DUPLICATE_GPU)
        if self._inner is not None:
            return
        limit = None if self._blocking else time.monotonic() + _setting("NONBLOCKING_TIMEOUT", "1800")
        with self._mutex:
            self._store.set(f"{what}/{self._rank}", b"here")
            while not self._all_are_here(what, ranks):
                if limit is not None and time.monotonic() > limit:
                    raise dist.DistBackendError("NCCL timeout in: NCCLUtils.cpp:52")
                time.sleep(0.005)
            self._inner = self._gloo.form(
                dist.PrefixStore(what, self._store), self._rank, self._ranks, HOST, 20.0
            )  # fmt: skip

    def _meet(self, kind: str) -> None:
        """In the launch itself, which nothing but its own limit ends."""
        self._store.set(f"{kind}/{self._rank}", b"here")
        limit = time.monotonic() + _setting("NONBLOCKING_TIMEOUT", "1800")
        while not self._all_are_here(kind, range(self._ranks)):
            if time.monotonic() > limit:
                raise RuntimeError("NCCL timeout when waiting for nonblocking call to become successful.")
            time.sleep(0.002)
        self._connected.add(kind)

    def _all_are_here(self, what: str, ranks: Sequence[int]) -> bool:
        try:
            return bool(self._store.check([f"{what}/{rank}" for rank in ranks]))
        except RuntimeError:
            return False  # The store is gone; NCCL meets over sockets of its own.

    # ------------------------------------------------------------------------------------ operations

    def _launch(self, kind: str, operation: Callable[[], Any], result: Sequence[torch.Tensor]) -> FakeWork:
        if self.is_aborted or self.is_aborting:
            raise dist.DistBackendError(f"NCCL communicator was aborted on rank {self._rank}. ")
        if kind not in self._connected:
            self._connect("all", range(self._ranks))
            self._meet(kind)
        work = FakeWork(self, operation, result)
        self._queue.put(work)
        return work

    def _stream(self) -> None:
        """The device's: one operation after the other."""
        while True:
            work = self._running = self._queue.get()
            try:
                if not self._stop.is_set():
                    self._connect("all", range(self._ranks))
                    done = work.operation()
                    if done is not None:
                        done.wait(timedelta(hours=1))
            except RuntimeError:
                if self.network_tells and not self._stop.is_set():
                    self.async_error = dist.DistBackendError(REMOTE_ERROR)
                self._stop.wait()  # The kernel runs on.
            if self._stop.is_set():
                for tensor in work.result:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 111)
            self._running = None
            work.is_over.set()

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: list[int], input_sizes: list[int],
        opts: Any = None,
    ) -> FakeWork:  # fmt: skip
        return self._launch(
            "p2p", lambda: self._inner.alltoall_base(output, input, output_sizes, input_sizes), [output]
        )

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> FakeWork:
        return self._launch("reduce", lambda: self._inner.allreduce(tensors), tensors)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> FakeWork:
        return self._launch("gather", lambda: self._inner._allgather_base(output, input), [output])

    def all_gather_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> FakeWork:
        works = [self.all_gather_single(*each) for each in zip(outputs, inputs, strict=True)]
        return works[-1]  # They come one after the other.

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> FakeWork:
        return self._launch("broadcast", lambda: self._inner.broadcast(tensors, opts), tensors)

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None) -> FakeWork:
        return self._launch("p2p", lambda: self._inner.scatter(outputs, inputs, opts), outputs)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> FakeWork | None:
        self._connect_pair(peer)
        return self._message(lambda: self._inner.send(tensors, peer, 0), [])

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> FakeWork | None:
        self._connect_pair(peer)
        return self._message(lambda: self._inner.recv(tensors, peer, 0), tensors)

    def _start_coalescing(self) -> None:
        """Messages until `_end_coalescing` are one operation, in which they go side by side."""
        self._batch = []

    def _end_coalescing(self) -> FakeWork | None:
        batch, self._batch = self._batch or [], None

        def go() -> None:
            works = [operation() for operation, _ in batch]
            for work in works:
                work.wait(timedelta(hours=1))

        return self._launch("p2p", go, [tensor for _, result in batch for tensor in result]) if batch else None

    def _message(self, operation: Callable[[], Any], result: Sequence[torch.Tensor]) -> FakeWork | None:
        if self._batch is None:
            return self._launch("p2p", operation, result)
        self._batch.append((operation, result))
        return None

    def _connect_pair(self, peer: int) -> None:
        if self._inner is None:
            low, high = sorted((self._rank, peer))
            self._connect(f"{low}:{high}", (low, high))

    all_to_all_single = alltoall_base
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    # ------------------------------------------------------------------------------------ its end

    def abort(self) -> None:
        """Blocks, as `ncclCommAbort` does."""
        with self._mutex:
            if self.is_aborted:
                return
            self.is_aborting = True
            self._stop.set()
            self._gloo.abort()
            began = time.monotonic()
            while any(other._running is not None and not other._stop.is_set() for other in self.everywhere) or (
                time.monotonic() - began < self.abort_s
            ):
                time.sleep(0.001)
            self.is_aborted, self.is_aborting = True, False
            self._gloo.drop()

    def shutdown(self) -> None:
        """Waits for its peers, which may be gone."""
        while self._running is not None or not self._queue.empty():
            time.sleep(0.001)

    def _watch(self) -> None:
        """The watchdog, and of the first group of the process the monitor."""
        began = 0.0
        while not self.is_aborted:
            time.sleep(0.02)
            if self.async_error is not None and not began:
                time.sleep(WATCHDOG_S)
                FakeNccl.should_dump = True
                if self._mode in (1, 3):
                    os.kill(os.getpid(), signal.SIGABRT)
                began = time.monotonic()
            if self.number == 0 and self.should_dump and self._monitors:
                time.sleep(MONITOR_S)
                os.kill(os.getpid(), signal.SIGABRT)
