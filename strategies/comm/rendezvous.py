"""Where the ranks of a generation find each other: a key-value store served by one of them.

It stands in for c10d's TCPStore, which asks the resolver for the name of every peer, on both ends of every connection
(a resolver that does not answer costs each join 5 s), and whose waits nothing can end. Here an address is an address,
and `StoreClient.abort` ends a wait at once, from any thread.

A connection begins with both ends proving that they are of this run (`strategies.comm.rendezvous_proof`). Then a
request is a header (operation, length of the key, length of the value), the key and the value; an answer is a length
and a value. The answer to GET comes when the key is there. `strategies.comm.rendezvous_server` is the other end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from datetime import timedelta
from typing import Any

from strategies.comm.group_errors import PeerLost
from strategies.comm.rendezvous_proof import HELLO_BYTES, PROOF_BYTES, ClientSide, StoreAddress
from strategies.comm.rendezvous_server import ADD, ANSWER, CHECK, GET, NUMBER, REQUEST, SET
from strategies.compat import Store


class StoreClient(Store):
    """The store at `address` as c10d's process groups use it. Ranks that give the same `prefix` see each other's
    values, as long as one of them is connected.

    Every call raises PeerLost when the server is gone, does not answer for `timeout_s`, or `abort` was called.
    """

    def __init__(self, address: StoreAddress, prefix: str, timeout_s: float) -> None:
        super().__init__()
        self._address = address
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._aborted = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._obstacle = ""

    def connect(self) -> None:
        """Connects; a refusal is final, because the store is served before its address is told, and so is a server that
        cannot show that it is of this run."""
        deadline = time.monotonic() + self._timeout_s
        while not self._connected(deadline):
            if time.monotonic() > deadline:
                raise PeerLost(f"no way to the rendezvous store {self._address!r}: {self._obstacle}")
            self._aborted.wait(0.02)  # What fails at once would fail as often as a processor can try.

    def _connected(self, deadline: float) -> bool:
        """Tries once. Raises PeerLost for what will not be better the next time."""
        self._check_aborted()
        self.close()
        where, self._obstacle = (self._address.host, self._address.port), ""
        side = ClientSide(self._address.secret, self._prefix.encode())
        has_answered = False
        try:
            connection = socket.create_connection(where, timeout=0.5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = connection
            self._check_aborted()
            answer = side.answer(_receive(connection, HELLO_BYTES, deadline))
            has_answered = True
            connection.sendall(answer)
            side.check(_receive(connection, PROOF_BYTES, deadline))
        except ConnectionRefusedError as error:
            raise PeerLost(f"nobody serves the rendezvous store {self._address!r} any more") from error
        except ValueError as error:
            self.close()
            raise PeerLost(f"rendezvous store {self._address!r}: {error}") from error
        except OSError as error:
            self._check_aborted()
            self._obstacle = str(error) or "the connection was closed"
            if has_answered and isinstance(error, ConnectionError):
                raise PeerLost(
                    f"the rendezvous store {self._address!r} ended the connection: it is of another run, or ends"
                ) from error
            return False
        if self._aborted.is_set():
            self.close()
        return True

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
        self._ask(SET, key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._ask(GET, key)

    def add(self, key: str, value: int) -> int:
        return int(NUMBER.unpack(self._ask(ADD, key, NUMBER.pack(value)))[0])

    def check(self, keys: list[str]) -> bool:
        return all(self._ask(CHECK, key) for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._ask(GET, key, timeout_s=None if timeout is None else timeout.total_seconds())

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise PeerLost("the forming of the process group was aborted")

    def _ask(self, operation: bytes, key: str, value: bytes = b"", timeout_s: float | None = None) -> bytes:
        name = key.encode()
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        with self._lock:
            connection = self._socket
            self._check_aborted()
            if connection is None:
                raise PeerLost("the rendezvous store is not connected")
            try:
                connection.settimeout(limit_s)
                connection.sendall(REQUEST.pack(operation, len(name), len(value)) + name + value)
                (length,) = ANSWER.unpack(_receive(connection, ANSWER.size, deadline))
                return _receive(connection, length, deadline)
            except OSError as error:
                # The answer may still come: whatever is asked next must not take it for its own.
                self.close()
                self._check_aborted()
                what = (
                    f"no peer wrote {key!r} within {limit_s:.0f} s" if isinstance(error, TimeoutError) else str(error)
                )
                raise PeerLost(f"rendezvous store {self._address!r}: {what}") from error

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
