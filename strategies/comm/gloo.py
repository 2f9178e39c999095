"""Gloo, and what breaking out of its collectives takes.

Gloo's `abort()` does nothing to ranks that wait for a living but silent peer; shutting down the group's connected
sockets does, from any thread, in milliseconds and without harming the process. For reading only, as long as the rank is
inside: what gloo cannot write any more it keeps in a queue, and when it then finds the connection at its end it tells
all waiting operations but those in that queue, which would wait for ever. The other direction, which tells the
neighbours, ends when the group is left. We keep duplicates of those descriptors from the moment they appear, so that a
number reused by the kernel can never be shut down by mistake; because the duplicates keep a connection alive, leaving a
group always goes through `drop`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from strategies.comm.group_errors import PeerLost
from strategies.comm.transport import PATIENCE, Transport

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


class Gloo(Transport):
    """Tensors in host memory over TCP."""

    def __init__(self) -> None:
        self._group: Any = None
        self._own: set[Endpoint] = set()
        self._peers: set[Endpoint] = set()
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._is_aborted = False
        self._woken = threading.Event()
        """The group is connected, or nobody waits for it any more."""

    def form(self, store: Any, rank: int, world_size: int, host: str, timeout_s: float) -> Any:
        before = _listening()
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        # Every rank tells where it listens, so that a connection of this group is known for certain among all the
        # sockets of a process (Ray has many), and so that nobody starts to connect before all are here.
        self._own = _listening() - before
        store.set(f"listen/{rank}", ",".join(f"{address} {port}" for address, port in self._own))
        for other in range(world_size):
            if other != rank:
                for entry in store.get(f"listen/{other}").decode().split(","):
                    address, _, port = entry.partition(" ")
                    self._peers.add((address, int(port)))
        group = self._connect(lambda: dist.ProcessGroupGloo(store, rank, world_size, options))  # type: ignore[call-overload]
        group._set_default_timeout(PATIENCE)
        with self._lock:
            self._group = group
            self._connections += self._find_connections()
            if self._is_aborted:
                raise PeerLost("the process group was aborted")
        return group

    def _connect(self, make: Callable[[], Any]) -> Any:
        """What `make` returns, in a thread of its own: where a peer should connect to this rank, and is gone before it
        did, gloo waits for it until its time is over, and there is no connection yet to shut down."""
        made: list[Any] = []
        failed: list[BaseException] = []

        def connect() -> None:
            try:
                made.append(make())
            except BaseException as error:
                failed.append(error)
            finally:
                self._woken.set()

        thread = threading.Thread(target=connect, name="gloo forming", daemon=True)
        thread.start()
        self._woken.wait()
        if self._is_aborted:
            raise PeerLost("the process group was aborted")
        thread.join()
        if failed:
            raise failed[0]
        return made[0]

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

    def wait(self, work: Any) -> None:
        work.wait(PATIENCE)

    def has_lost_a_peer(self) -> bool:
        """Whether a peer's end of a connection is closed: its process is gone, or it has left the group. Looks, and
        takes nothing; only to be asked of a group that nobody leaves while others are in it."""
        poll = select.poll()
        with self._lock:
            for connection in self._connections:
                poll.register(connection, select.POLLRDHUP)
            return bool(poll.poll(0))

    def abort(self) -> None:
        with self._lock:
            self._is_aborted = True
            if self._group is None and self._peers:
                self._connections += self._find_connections()
            self._stop_reading()
        self._woken.set()

    def drop(self) -> None:
        with self._lock:
            self._is_aborted = True
            self._stop_reading()
            group, self._group = self._group, None
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
