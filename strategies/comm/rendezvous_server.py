"""The serving end of a rendezvous store (`strategies.comm.rendezvous`): one thread, which nothing that is received can
end.

Until a connection has proved that it is of this run (`strategies.comm.rendezvous_proof`) a few hundred bytes of it are
kept, for a few seconds, and only of a bounded number at once. The values of a scope (one group of one generation) live
as long as one of its ranks is connected, which it is until it leaves the group: a generation leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from strategies.comm.rendezvous_proof import ServerSide

log = logging.getLogger(__name__)

REQUEST = struct.Struct("<cII")
ANSWER = struct.Struct("<I")
NUMBER = struct.Struct("<q")
SET, GET, ADD, CHECK = b"S", b"G", b"A", b"C"

LARGEST_KEY_BYTES = 4096
LARGEST_VALUE_BYTES = 16 << 20
LARGEST_STORE_BYTES = 256 << 20
"""Of all keys and values at once. What gloo writes is some hundred bytes for every pair of ranks."""
MOST_STRANGERS = 512
"""Connections at once that have not proved anything yet; when there are more, the oldest is ended."""
PROOF_S = 5.0
"""How long a connection may take to prove that it is of this run."""
_PAUSE_S = 0.1
"""How long nobody is let in after the process has run out of file descriptors."""
_READ_BYTES = 1 << 16


class _Refused(Exception):
    """This connection is to be ended; says why."""


@dataclass
class _Scope:
    """What the ranks of one group write and wait for."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    waiting: dict[bytes, list[_Connection]] = field(default_factory=dict)
    members: int = 0
    num_bytes: int = 0


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    side: ServerSide
    deadline: float
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    name: bytes = b""
    scope: _Scope | None = None
    """None for a stranger."""
    awaited: bytes | None = None


class StoreServer:
    """Serves a store on a free port of `host`, from a thread of its own, until `close`.

    Only those who have the `secret` are served. `on_end` is called with the reason, from that thread, if it ends for
    any other reason than `close`; all connections, and the port, are closed then.
    """

    def __init__(self, host: str, secret: bytes, on_end: Callable[[str], None] = lambda reason: None) -> None:
        if len(secret) < 16:
            raise ValueError(f"the secret of a rendezvous store must have at least 16 bytes, this has {len(secret)}")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._secret = secret
        self._on_end = on_end
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._scopes: dict[bytes, _Scope] = {}
        self._connections: set[_Connection] = set()
        self._strangers: dict[_Connection, None] = {}
        """In the order in which they came."""
        self._closed_until: float | None = None
        self._num_bytes = 0
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and every connection."""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    @property
    def num_bytes(self) -> int:
        """What all keys and values take at the moment."""
        return self._num_bytes

    def _run(self) -> None:
        reason: str | None = None
        try:
            self._serve()
        except BaseException as error:
            log.exception("the rendezvous store on port %d ends", self.port)
            reason = f"{type(error).__name__}: {error}"
        for connection in self._connections:
            connection.socket.close()
        for end in (self._listener, self._wake, self._woken, self._selector):
            end.close()
        if reason is not None:
            self._on_end(reason)

    def _serve(self) -> None:
        while True:
            for key, events in self._selector.select(self._time_left()):
                if key.fileobj is self._woken:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data in self._connections:
                    self._attend(key.data, events)
            self._look_at_the_clock(time.monotonic())

    # ------------------------------------------------------------------------------------ connections come and go

    def _time_left(self) -> float | None:
        """Until something is to be done though nobody says anything."""
        times = [self._closed_until] if self._closed_until is not None else []
        if self._strangers:
            times.append(next(iter(self._strangers)).deadline)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _look_at_the_clock(self, now: float) -> None:
        for stranger in list(self._strangers):
            if stranger.deadline > now:
                break
            self._end(stranger, f"it proved nothing within {PROOF_S:.0f} s")
        if self._closed_until is not None and self._closed_until <= now:
            self._closed_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _take(self) -> socket.socket:
        accepted, _ = self._listener.accept()
        accepted.setblocking(False)
        return accepted

    def _accept(self) -> None:
        try:
            accepted = self._take()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning("the rendezvous store can take nobody in: %s", error)
                if self._strangers:
                    self._end(next(iter(self._strangers)), "there are too many open files")
                # The listener stays readable; looking at it again at once would do nothing else any more.
                self._selector.unregister(self._listener)
                self._closed_until = time.monotonic() + _PAUSE_S
            return
        if len(self._strangers) >= MOST_STRANGERS:
            self._end(next(iter(self._strangers)), f"there are {MOST_STRANGERS} that have proved nothing")
        connection = _Connection(accepted, ServerSide(self._secret), time.monotonic() + PROOF_S)
        self._connections.add(connection)
        self._strangers[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # A lost machine says no goodbye.
            self._send(connection, connection.side.hello)
        except OSError as error:
            self._end(connection, str(error))

    def _end(self, connection: _Connection, why: str = "") -> None:
        if connection not in self._connections:
            return
        if why:
            log.info("a connection to the rendezvous store is ended: %s", why)
        self._connections.discard(connection)
        self._strangers.pop(connection, None)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if (scope := connection.scope) is None:
            return
        if connection.awaited is not None and connection in (waiting := scope.waiting.get(connection.awaited, [])):
            waiting.remove(connection)
        scope.members -= 1
        if scope.members == 0:
            self._num_bytes -= scope.num_bytes
            del self._scopes[connection.name]

    def _welcome(self, connection: _Connection, name: bytes) -> None:
        del self._strangers[connection]
        connection.name = name
        connection.scope = self._scopes.setdefault(name, _Scope())
        connection.scope.members += 1

    # ------------------------------------------------------------------------------------ what they say

    def _attend(self, connection: _Connection, events: int) -> None:
        """Whatever goes wrong with a connection ends that connection, and nothing else."""
        try:
            if events & selectors.EVENT_WRITE:
                self._send(connection, b"")
            if events & selectors.EVENT_READ:
                self._read(connection)
        except BlockingIOError:
            return
        except (_Refused, ValueError) as error:
            self._end(connection, str(error))
        except OSError:
            self._end(connection)
        except Exception as error:
            log.exception("a request to the rendezvous store failed")
            self._end(connection, f"{type(error).__name__}: {error}")

    def _read(self, connection: _Connection) -> None:
        data = connection.socket.recv(_READ_BYTES)
        if not data:
            self._end(connection)
            return
        buffer = connection.received
        buffer += data
        if connection.scope is None:
            accepted = connection.side.accept(bytes(buffer))
            if accepted is None:
                return
            name, proof, used = accepted
            del buffer[:used]
            self._welcome(connection, name)
            self._send(connection, proof)
        while len(buffer) >= REQUEST.size and connection in self._connections:
            operation, key_length, value_length = REQUEST.unpack_from(buffer)
            if key_length > LARGEST_KEY_BYTES or value_length > LARGEST_VALUE_BYTES:
                raise _Refused(f"it asks to keep {key_length} + {value_length} bytes")
            end = REQUEST.size + key_length + value_length
            if len(buffer) < end:
                return
            name = bytes(buffer[REQUEST.size : REQUEST.size + key_length])
            value = bytes(buffer[REQUEST.size + key_length : end])
            del buffer[:end]
            self._handle(connection, operation, name, value)

    def _handle(self, connection: _Connection, operation: bytes, name: bytes, value: bytes) -> None:
        scope = connection.scope
        assert scope is not None
        if connection.awaited is not None or connection.unsent:
            raise _Refused("it asks before it has its answer")
        if operation == GET:
            if name in scope.values:
                self._answer(connection, scope.values[name])
            else:
                connection.awaited = name
                scope.waiting.setdefault(name, []).append(connection)
        elif operation == CHECK:
            self._answer(connection, b"1" if name in scope.values else b"")
        elif operation == SET:
            self._keep(scope, name, value)
            self._answer(connection, b"")
        elif operation == ADD:
            try:
                total = int(scope.values.get(name, b"0")) + NUMBER.unpack(value)[0]
                packed = NUMBER.pack(total)
            except (ValueError, struct.error) as error:
                raise _Refused(f"{name!r} or what is to be added to it is no number: {error}") from error
            # c10d reads the counters that `add` made as decimal digits.
            self._keep(scope, name, str(total).encode())
            self._answer(connection, packed)
        else:
            raise _Refused(f"there is no operation {operation!r}")

    def _keep(self, scope: _Scope, name: bytes, value: bytes) -> None:
        known = scope.values.get(name)
        more = len(value) - len(known) if known is not None else len(name) + len(value)
        if self._num_bytes + more > LARGEST_STORE_BYTES:
            raise _Refused(f"the store is full: it keeps {self._num_bytes} of {LARGEST_STORE_BYTES} bytes")
        scope.values[name] = value
        scope.num_bytes += more
        self._num_bytes += more
        for waiting in scope.waiting.pop(name, ()):
            waiting.awaited = None
            try:
                self._answer(waiting, value)
            except OSError:
                self._end(waiting)

    def _answer(self, connection: _Connection, value: bytes) -> None:
        self._send(connection, ANSWER.pack(len(value)) + value)

    def _send(self, connection: _Connection, data: bytes) -> None:
        """Sends what the socket takes; the rest follows when it takes more. Raises OSError."""
        unsent = connection.unsent
        unsent += data
        with contextlib.suppress(BlockingIOError):
            while unsent:
                del unsent[: connection.socket.send(unsent)]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
        if self._selector.get_key(connection.socket).events != events:
            self._selector.modify(connection.socket, events, connection)
