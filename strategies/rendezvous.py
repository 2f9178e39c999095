"""Where the ranks of a generation find each other: a key-value store served by one of them.

It stands in for c10d's TCPStore, which asks the resolver for the name of every peer, on both ends of every connection
(a resolver that does not answer costs each join 5 s), and whose waits nothing can end. Here an address is an address,
and `StoreClient.abort` ends a wait at once, from any thread.

A request is a header (operation, length of the key, length of the value), the key and the value; an answer is a length
and a value. The answer to GET comes when the key is there.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

_REQUEST = struct.Struct("<cII")
_ANSWER = struct.Struct("<I")
_NUMBER = struct.Struct("<q")
_LARGEST_BYTES = 16 << 20
_SET, _GET, _ADD, _CHECK = b"S", b"G", b"A", b"C"


class PeerLost(RuntimeError):
    """A collective or rendezvous failed because of another rank, or was aborted; this rank itself is well."""


class StoreServer:
    """Serves a store on a free port of `host`, from a thread of its own, until `close`."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._values: dict[bytes, bytes] = {}
        self._received: dict[socket.socket, bytearray] = {}
        self._waiting: dict[bytes, list[socket.socket]] = {}
        threading.Thread(target=self._serve, name="rendezvous", daemon=True).start()

    def close(self) -> None:
        """Ends the thread and every connection."""
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    for connection in (*self._received, self._listener, self._wake, self._woken):
                        connection.close()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._received[connection] = bytearray()
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        if connection not in self._received:
            return
        try:
            data = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(connection)
            return
        buffer = self._received[connection]
        buffer += data
        while len(buffer) >= _REQUEST.size:
            operation, key_length, value_length = _REQUEST.unpack_from(buffer)
            if key_length > _LARGEST_BYTES or value_length > _LARGEST_BYTES:
                self._forget(connection)  # a stranger
                return
            end = _REQUEST.size + key_length + value_length
            if len(buffer) < end:
                break
            name = bytes(buffer[_REQUEST.size : _REQUEST.size + key_length])
            value = bytes(buffer[_REQUEST.size + key_length : end])
            del buffer[:end]
            self._handle(connection, operation, name, value)

    def _handle(self, connection: socket.socket, operation: bytes, name: bytes, value: bytes) -> None:
        if operation == _GET:
            if name in self._values:
                self._answer(connection, self._values[name])
            else:
                self._waiting.setdefault(name, []).append(connection)
        elif operation == _CHECK:
            self._answer(connection, b"1" if name in self._values else b"")
        elif operation in (_SET, _ADD):
            if operation == _ADD:
                value = _NUMBER.pack(int(self._values.get(name, b"0")) + _NUMBER.unpack(value)[0])
            # c10d reads the counters that `add` made as decimal digits.
            self._values[name] = value if operation == _SET else str(_NUMBER.unpack(value)[0]).encode()
            self._answer(connection, value if operation == _ADD else b"")
            for waiting in self._waiting.pop(name, ()):
                self._answer(waiting, self._values[name])
        else:
            self._forget(connection)

    def _answer(self, connection: socket.socket, value: bytes) -> None:
        if connection not in self._received:
            return
        try:
            # Answers are small and a client has one request at a time, so they fit the socket's buffer.
            connection.sendall(_ANSWER.pack(len(value)) + value)
        except OSError:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        if self._received.pop(connection, None) is not None:
            self._selector.unregister(connection)
            connection.close()


class StoreClient(Store):
    """The store at `address` as c10d's process groups use it, every key under `prefix`.

    Every call raises PeerLost when the server is gone, does not answer for `timeout_s`, or `abort` was called.
    """

    def __init__(self, address: tuple[str, int], prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._address = address
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._aborted = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Connects; a refusal is final, because the store is served before its address is told."""
        deadline = time.monotonic() + self._timeout_s
        host, port = self._address
        while self._socket is None:
            self._check_aborted()
            try:
                connection = socket.create_connection(self._address, timeout=0.5)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket = connection
            except ConnectionRefusedError as error:
                raise PeerLost(f"nobody serves the rendezvous store {host}:{port} any more") from error
            except OSError as error:
                if time.monotonic() > deadline:
                    raise PeerLost(f"no way to the rendezvous store {host}:{port}: {error}") from error
        if self._aborted.is_set():
            self.close()

    def abort(self) -> None:
        """Makes the call in flight, and every later one, raise PeerLost; from any thread."""
        self._aborted.set()
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def set(self, key: str, value: Any) -> None:
        self._ask(_SET, key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._ask(_GET, key)

    def add(self, key: str, value: int) -> int:
        return int(_NUMBER.unpack(self._ask(_ADD, key, _NUMBER.pack(value)))[0])

    def check(self, keys: list[str]) -> bool:
        return all(self._ask(_CHECK, key) for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._ask(_GET, key, timeout_s=None if timeout is None else timeout.total_seconds())

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise PeerLost("the forming of the process group was aborted")

    def _ask(self, operation: bytes, key: str, value: bytes = b"", timeout_s: float | None = None) -> bytes:
        name = f"{self._prefix}/{key}".encode()
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        with self._lock:
            connection = self._socket
            self._check_aborted()
            if connection is None:
                raise PeerLost("the rendezvous store is not connected")
            try:
                connection.settimeout(limit_s)
                connection.sendall(_REQUEST.pack(operation, len(name), len(value)) + name + value)
                (length,) = _ANSWER.unpack(_receive(connection, _ANSWER.size, deadline))
                return _receive(connection, length, deadline)
            except OSError as error:
                # The answer may still come: whatever is asked next must not take it for its own.
                self.close()
                self._check_aborted()
                what = (
                    f"no peer wrote {key!r} within {limit_s:.0f} s" if isinstance(error, TimeoutError) else str(error)
                )
                raise PeerLost(f"rendezvous store {self._address[0]}:{self._address[1]}: {what}") from error

    def __del__(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _receive(connection: socket.socket, length: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < length:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(length - len(received))
        if not part:
            raise ConnectionResetError("the connection was closed")
        received += part
    return bytes(received)
