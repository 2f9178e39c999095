"""Who may keep a connection to the page, and for how long.

A web server that trusts its clients keeps what they have half said for as long as they like. Here a connection on which
no request is being answered ends after a while, whether nothing was said or only a part, and there is a bound to how
many there are at once: when more come, the one that has waited longest without a request makes room.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CONNECTIONS = 300
IDLE_S = 15.0
"""How long a connection may be without a request that is whole, or without taking any of its answer."""


class _Guarded(asyncio.Protocol):
    """A connection: everything is passed on to the protocol that speaks HTTP."""

    def __init__(self, door: Door, inner: Any) -> None:
        self._door = door
        self._inner = inner
        self.transport: Any = None
        self.since = time.monotonic()
        self.requests = 0
        """How many are being answered."""
        self._unsent = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._inner.connection_made(transport)
        self._door.enter(self)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> Any:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._door.leave(self)
        self._inner.connection_lost(error)

    def idle_s(self, now: float) -> float | None:
        """For how long nothing has come of this connection; None while a request is being answered."""
        unsent = self.transport.get_write_buffer_size()
        if unsent < self._unsent:
            self.since = now
        self._unsent = unsent
        return None if self.requests else now - self.since


class Door:
    """Makes the protocols of an asyncio server by `make`, and ends those connections that only take up room."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._connections: dict[Any, _Guarded] = {}

    def __call__(self) -> asyncio.Protocol:
        return _Guarded(self, self._make())

    def __len__(self) -> int:
        return len(self._connections)

    def enter(self, connection: _Guarded) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            now = time.monotonic()
            idle = [(seconds, each) for each in self._connections.values() if (seconds := each.idle_s(now)) is not None]
            # Nobody to make room: all are being answered.
            longest = max(idle, key=lambda found: found[0])[1] if idle else connection
            self._connections.pop(longest.transport, None)
            longest.transport.abort()
            if longest is connection:
                return
        self._connections[connection.transport] = connection

    def leave(self, connection: _Guarded) -> None:
        self._connections.pop(connection.transport, None)

    @contextmanager
    def answering(self, transport: Any) -> Iterator[None]:
        """While a request that came over `transport` is being answered."""
        connection = self._connections.get(transport)
        if connection is not None:
            connection.requests += 1
        try:
            yield
        finally:
            if connection is not None:
                connection.requests -= 1
                connection.since = time.monotonic()

    async def watch(self) -> None:
        """Ends idle connections, until cancelled."""
        while True:
            await asyncio.sleep(IDLE_S / 4)
            now = time.monotonic()
            for connection in list(self._connections.values()):
                if (connection.idle_s(now) or 0.0) > IDLE_S:
                    with suppress(Exception):
                        connection.transport.abort()
