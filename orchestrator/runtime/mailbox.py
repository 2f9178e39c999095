"""What controllers and workers leave for each other.

A worker asks for its orders and is never called: the main thread of a Ray actor whose methods are called wakes a
hundred times a second and takes Python's lock each time, which costs a training step 2 to 3 %. A worker's main thread
trains instead, and a call that waits in its mailbox costs nothing until there is an order. A worker that a controller
has not met introduces itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Collection
from typing import Any, NamedTuple

from monitoring.clock import Reading
from orchestrator.control.core.orders import Order
from orchestrator.control.core.workers import WorkerId


class Numbered(NamedTuple):
    """An order, numbered from 1 as they are given to one worker."""

    number: int
    order: Order


class Delivery(NamedTuple):
    """The orders of the controller of `term` that a worker has not fetched yet."""

    term: int
    pending: tuple[Numbered, ...]


class Introduction(NamedTuple):
    """What a worker tells a controller that it has not met, and when, by its own clock. `status` is its account of
    itself (in training an `orchestrator.training.messages.Status`); None while it is still being built."""

    worker: WorkerId
    node: str
    pid: int
    status: Any
    sent: Reading


class Mailbox:
    """The orders for one worker. `put` from any thread; `fetch` on one event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Numbered] = deque()
        self._given = 0
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def put(self, order: Order) -> None:
        with self._lock:
            self._given += 1
            self._pending.append(Numbered(self._given, order))
            if self._waiting is not None:
                loop, event = self._waiting
                loop.call_soon_threadsafe(event.set)

    async def fetch(self, after: int, wait_s: float) -> tuple[Numbered, ...]:
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


class Mailboxes:
    """Those of all workers. May be used from several threads."""

    def __init__(self) -> None:
        self._boxes: dict[WorkerId, Mailbox] = {}
        self._lock = threading.Lock()

    def of(self, worker: WorkerId) -> Mailbox:
        with self._lock:
            return self._boxes.setdefault(worker, Mailbox())

    def send(self, order: Order) -> None:
        """Leaves an order for those it is for. A worker that does not come for it is dead or silent, which is noticed
        by itself."""
        sent = order.sent()
        for worker in order.recipients:
            self.of(worker).put(sent)

    def forget(self, worker: WorkerId) -> None:
        with self._lock:
            self._boxes.pop(worker, None)


class Introductions:
    """Which workers a controller has met, and when it heard of them. May be used from several threads."""

    def __init__(self) -> None:
        self._met: dict[WorkerId, Introduction] = {}
        self._change = threading.Condition()
        self._heard: dict[WorkerId, float] = {}
        self._committed: int | None = None
        self._moved_at = float("-inf")

    def add(self, introduction: Introduction) -> None:
        with self._change:
            self._met[introduction.worker] = introduction
            self._change.notify_all()

    def forget(self, worker: WorkerId) -> None:
        with self._change:
            self._met.pop(worker, None)

    def hear(self, worker: WorkerId | None, committed: int | None = None) -> None:
        """A worker says something, met or not; also, perhaps, how many steps are committed."""
        now = time.monotonic()
        with self._change:
            if worker is not None:
                self._heard[worker] = now
            if committed is not None:
                if self._committed is not None and committed > self._committed:
                    self._moved_at = now
                self._committed = max(committed, self._committed or 0)

    def show_life(self, workers: Collection[WorkerId], within_s: float) -> bool:
        """Whether any of these was heard in the last `within_s` seconds, or a step was committed, which none is
        without every member."""
        since = time.monotonic() - within_s
        with self._change:
            return self._moved_at > since or any(self._heard.get(worker, since) > since for worker in workers)

    def wait_for(self, workers: Collection[WorkerId], patience_s: float) -> dict[WorkerId, Introduction]:
        """Those that have been met, of any; returns as soon as all of these have, and after `patience_s` at the
        latest."""
        deadline = time.monotonic() + patience_s
        with self._change:
            while not self._met.keys() >= set(workers) and (left := deadline - time.monotonic()) > 0:
                self._change.wait(left)
            return dict(self._met)
