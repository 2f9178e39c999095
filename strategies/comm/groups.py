"""Process groups of one generation: formed together, left together, and never waited on for ever.

`form` is the one place where ranks become a group, so that an in-place reconfiguration of the backend can replace it.
Groups are plain `ProcessGroup` objects, not registered under torch's global names: dropping the last reference frees
them, and one process can join generation after generation.

What breaking out of a collective takes differs by backend. NCCL has `abort()`. Gloo's does nothing to ranks that wait
for a living but silent peer; shutting down the group's connected sockets does, from any thread, in milliseconds and
without harming the process. For reading only, as long as the rank is inside: what gloo cannot write any more it keeps
in a queue, and when it then finds the connection at its end it tells all waiting operations but those in that queue,
which would wait for ever. The other direction, which tells the neighbours, ends when the group is left. We keep
duplicates of those descriptors from the moment they appear, so that a number reused by the kernel can never be shut
down by mistake; because the duplicates keep a connection alive, leaving a group always goes through `drop`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from strategies.comm.rendezvous import PeerLost as PeerLost
from strategies.comm.rendezvous import StoreClient
from strategies.comm.rendezvous_proof import StoreAddress
from strategies.comm.rendezvous_server import StoreServer

PATIENCE = timedelta(hours=24)
"""Collectives wait for as long as it takes: hangs are found by heartbeats and progress, which abort."""


def serve_store(
    host: str, secret: bytes, on_end: Callable[[str], None] = lambda reason: None
) -> tuple[StoreServer, StoreAddress]:
    """Starts this process's rendezvous store on a free port of `host`, for those who have `secret`; returns it and its
    address. `on_end` is told if it ends by itself."""
    server = StoreServer(host, secret, on_end)
    return server, StoreAddress(host, server.port, secret)


Endpoint = tuple[str, int]


def _endpoint(address: Any) -> Endpoint:
    return str(address[0]).removeprefix("::ffff:"), int(address[1])


def _duplicate_sockets() -> list[socket.socket]:
    """A duplicate of every socket this process has open; the caller closes those it does not keep."""
    duplicates = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                duplicates.append(socket.socket(fileno=os.dup(int(name))))
    return duplicates


def _listening() -> set[Endpoint]:
    found = set()
    for duplicate in _duplicate_sockets():
        with duplicate, contextlib.suppress(OSError):
            internet = duplicate.family in (socket.AF_INET, socket.AF_INET6)
            if internet and duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(_endpoint(duplicate.getsockname()))
    return found


class Groups:
    """The process group of one rank in one generation.

    `abort` may be called from any thread at any time, also while `form` runs; it makes collectives in flight raise.
    `drop` leaves the group and must be called once the rank is out of its collectives, which in turn frees every
    neighbour that still waits for this rank. `waited_s` is how long this rank has been in exchanges with all others.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._group: Any = None
        self._store: StoreClient | None = None
        self._own: set[Endpoint] = set()
        self._peers: set[Endpoint] = set()
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._aborted = False
        self.moves = 0
        self.waited_s = 0.0
        self._patience = dist.AllToAllOptions()
        self._patience.timeout = PATIENCE

    def form(self, *, store_address: StoreAddress, prefix: str, host: str, timeout_s: float) -> None:
        """Joins the other ranks. `host` is this machine's address for peers; `timeout_s` bounds the forming.

        Raises PeerLost when a peer does not come, dies meanwhile, or `abort` is called.
        """
        if self.world_size == 1:
            return
        try:
            store = StoreClient(store_address, prefix, timeout_s)
            with self._lock:
                self.check()
                self._store = store
            store.connect()
            self.form_on(store, host, timeout_s)
        except RuntimeError as error:
            if isinstance(error, PeerLost):
                raise
            raise PeerLost(f"could not form the process group {prefix}: {_first_line(error)}") from error

    def form_on(self, store: Any, host: str, timeout_s: float) -> Any:
        """Like `form`, over a store that is connected; returns torch's process group. Raises RuntimeError."""
        if self.device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(store, self.rank, self.world_size, dist.ProcessGroupNCCL.Options())
        else:
            self._form_gloo(store, host, timeout_s)
        with self._lock:
            self.check()
        return self._group

    def _form_gloo(self, store: Any, host: str, timeout_s: float) -> None:
        before = _listening()
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        # Every rank tells where it listens, so that a connection of this group is known for certain among all the
        # sockets of a process (Ray has many), and so that nobody starts to connect before all are here.
        self._own = _listening() - before
        store.set(f"listen/{self.rank}", ",".join(f"{address} {port}" for address, port in self._own))
        for rank in range(self.world_size):
            if rank != self.rank:
                for entry in store.get(f"listen/{rank}").decode().split(","):
                    address, _, port = entry.partition(" ")
                    self._peers.add((address, int(port)))
        group = dist.ProcessGroupGloo(store, self.rank, self.world_size, options)  # type: ignore[call-overload]
        group._set_default_timeout(PATIENCE)
        with self._lock:
            self._group = group
            self._connections += self._find_connections()

    def _find_connections(self) -> list[socket.socket]:
        """Duplicates of this group's connected sockets, never of a listening one, whose end ends the process."""
        ports = {port for _, port in self._own}
        connections = []
        for duplicate in _duplicate_sockets():
            try:
                ours = duplicate.family in (socket.AF_INET, socket.AF_INET6) and (
                    _endpoint(duplicate.getpeername()) in self._peers or duplicate.getsockname()[1] in ports
                )
            except OSError:
                ours = False
            if ours:
                connections.append(duplicate)
            else:
                duplicate.close()
        return connections

    def check(self) -> None:
        """Raises PeerLost when the group was aborted or left. Called again and again, it counts as a `move`."""
        self.moves += 1
        if self._aborted:
            raise PeerLost("the process group was aborted")

    def all_to_all(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: list[int], input_sizes: list[int]
    ) -> None:
        """`input` [sum(input_sizes)] cut by destination rank, `output` [sum(output_sizes)] by source rank.

        Raises PeerLost when a peer is gone or the group was aborted.
        """
        group = self._group
        if group is None:
            raise PeerLost("the process group was left")
        started = time.perf_counter()
        try:
            group.alltoall_base(output, input, output_sizes, input_sizes, self._patience).wait()
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise PeerLost(_first_line(error)) from error
        finally:
            self.waited_s += time.perf_counter() - started
        self.check()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """The backend's own sum, in whatever order it likes. Raises PeerLost like `all_to_all`."""
        if self.world_size == 1:
            return
        group = self._group
        if group is None:
            raise PeerLost("the process group was left")
        try:
            group.allreduce([tensor]).wait()
        except RuntimeError as error:
            raise PeerLost(_first_line(error)) from error

    def send(self, tensor: torch.Tensor, target: int, tag: int) -> Any:
        """Starts sending `tensor` to rank `target`; `wait(PATIENCE)` on the work returned raises RuntimeError."""
        return self._point_to_point("send", tensor, target, tag)

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Any:
        """Starts receiving into `tensor` from rank `source`; like `send`."""
        return self._point_to_point("recv", tensor, source, tag)

    def _point_to_point(self, call: str, tensor: torch.Tensor, peer: int, tag: int) -> Any:
        group = self._group
        if group is None:
            raise PeerLost("the process group was left")
        try:
            return getattr(group, call)([tensor], peer, tag)
        except RuntimeError as error:
            raise PeerLost(_first_line(error)) from error

    def abort(self) -> None:
        """Makes every collective of this rank in flight, and every later one, raise PeerLost."""
        with self._lock:
            self._aborted = True
            if self._store is not None:
                self._store.abort()
            if self._group is None and self._peers:
                self._connections += self._find_connections()
            if self._group is not None and self.device.type == "cuda":
                self._group.abort()
            self._stop_reading()

    def drop(self) -> None:
        """Leaves the group for good; neighbours still waiting for this rank see an error at once."""
        with self._lock:
            self._aborted = True
            self._stop_reading()
            if self._store is not None:
                self._store.abort()
            group, self._group, self._store = self._group, None, None
        if group is not None and self.device.type == "cuda":
            group.abort()
        del group
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _stop_reading(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
