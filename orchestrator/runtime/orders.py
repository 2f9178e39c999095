"""What the controller wants of a worker, kept until the worker has fetched it.

Workers ask for their orders and are never called: the main thread of a Ray actor whose methods are called wakes a
hundred times a second and takes Python's lock each time, which costs a training step 2 to 3 %. A worker's main thread
trains instead, and a call that waits here costs nothing until there is an order.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any, NamedTuple

from monitoring.clock import Reading
from orchestrator.training.messages import Status, WorkerId


class Order(NamedTuple):
    """A method of `Worker` to call, numbered from 1 in the order given."""

    number: int
    command: str
    arguments: tuple[Any, ...]


class Orders(NamedTuple):
    """The orders of the controller of `epoch` that a worker has not fetched yet."""

    epoch: int
    pending: tuple[Order, ...]


class Introduction(NamedTuple):
    """What a worker tells a controller that it has not met, and when, by its own clock. `status` is None while it is
    still being built."""

    worker: WorkerId
    node: str
    pid: int
    status: Status | None
    sent: Reading


class OrderBook:
    """The orders for one worker. `put` from any thread; `fetch` on one event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Order] = deque()
        self._given = 0
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, command: str, *arguments: Any) -> None:
        with self._lock:
            self._given += 1
            self._pending.append(Order(self._given, command, arguments))
            if self._waiting is not None:
                loop, event = self._waiting
                loop.call_soon_threadsafe(event.set)

    async def fetch(self, after: int, wait_s: float) -> tuple[Order, ...]:
        """All orders with numbers above `after`, which says that those up to it have arrived; waits up to `wait_s`
        seconds while there are none."""
        event = asyncio.Event()
        with self._lock:
            while self._pending and self._pending[0].number <= after:
                self._pending.popleft()
            if self._pending:
                return tuple(self._pending)
            self._waiting = asyncio.get_running_loop(), event
        try:
            async with asyncio.timeout(wait_s):
                await event.wait()
        except TimeoutError:
            pass
        with self._lock:
            if self._waiting is not None and self._waiting[1] is event:
                self._waiting = None
            return tuple(self._pending)
