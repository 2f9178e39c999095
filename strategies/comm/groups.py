"""Process groups of one generation: formed together, left together, and never waited on for ever.

`form` is the one place where ranks become a group, so that an in-place reconfiguration of the backend can replace it.
Groups are plain `ProcessGroup` objects, not registered under torch's global names: dropping the last reference frees
them, and one process can join generation after generation. What differs between backends is in
`strategies.comm.transport` and its kinds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from strategies.comm.group_errors import PeerLost as PeerLost
from strategies.comm.group_errors import raise_of_group
from strategies.comm.rendezvous import StoreClient
from strategies.comm.rendezvous_proof import StoreAddress
from strategies.comm.rendezvous_server import StoreServer
from strategies.comm.traffic import Traffic
from strategies.comm.transport import PATIENCE as PATIENCE
from strategies.comm.transport import Transport


def serve_store(
    host: str, secret: bytes, on_end: Callable[[str], None] = lambda reason: None
) -> tuple[StoreServer, StoreAddress]:
    """Starts this process's rendezvous store on a free port of `host`, for those who have `secret`; returns it and its
    address. `on_end` is told if it ends by itself."""
    server = StoreServer(host, secret, on_end)
    return server, StoreAddress(host, server.port, secret)


Message = tuple[Literal["send", "recv"], torch.Tensor, int]
"""What is sent, or where it is received, and the other rank."""


class Groups:
    """The process group of one rank in one generation; tensors are on `device`.

    `abort` may be called from any thread at any time, also while `form` runs; it makes collectives in flight raise.
    `drop` leaves the group and must be called once the rank is out of its collectives, which in turn frees every
    neighbour that still waits for this rank. `waited_s` is how long this rank has waited in exchanges with all others,
    but for those that a device waits for by itself.

    What fails raises PeerLost when a peer is gone or the group was aborted, and the other errors of
    `strategies.comm.group_errors` when it is this rank's device, its memory, or what was asked for.
    """

    def __init__(
        self, *, rank: int, world_size: int, device: torch.device, transport: Transport,
        traffic: Traffic | None = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.traffic = Traffic() if traffic is None else traffic
        self.world_size = world_size
        self.device = device
        self.transport = transport
        self._group: Any = None
        self._store: StoreClient | None = None
        self._lock = threading.Lock()
        self._aborted = False
        self._queued: Any = None
        """The last work that was not waited for."""
        self.moves = 0
        self.waited_s = 0.0

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
            raise_of_group(error, f"could not form the process group {prefix}", is_aborted=self._aborted)

    def form_on(self, store: Any, host: str, timeout_s: float) -> Any:
        """Like `form`, over a store that is connected; returns torch's process group. Raises RuntimeError."""
        group = self.transport.form(store, self.rank, self.world_size, host, timeout_s)
        with self._lock:
            self._group = group
            self.check()
        return group

    def check(self) -> None:
        """Raises PeerLost when the group was aborted or left. Called again and again, it counts as a `move`."""
        self.moves += 1
        if self._aborted:
            raise PeerLost("the process group was aborted")

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: list[int],
        input_sizes: list[int],
        *,
        at_once: bool = True,
    ) -> None:
        """`input` [sum(input_sizes)] cut by destination rank, `output` [sum(output_sizes)] by source rank.

        Where it need not be waited for `at_once`, a device that can do that goes on by itself: what is queued there
        afterwards comes after it, but nothing may be relied on before `settle`.

        Raises PeerLost when a peer is gone or the group was aborted.
        """
        self._exchange(lambda: self._launch("alltoall_base", output, input, output_sizes, input_sizes), at_once)
        self.traffic.add((sum(input_sizes) - input_sizes[self.rank]) * input.element_size())

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, at_once: bool = True) -> None:
        """The `input` [n] of every rank, in order of ranks, in `output` [world_size * n]. Like `all_to_all`."""
        self._exchange(lambda: self._gather(output, input), at_once)
        self.traffic.add((self.world_size - 1) * input.numel() * input.element_size())

    def _gather(self, output: torch.Tensor, input: torch.Tensor) -> Any:
        group = self._begin()
        try:
            return self.transport.all_gather(group, output, input, self.world_size)
        except RuntimeError as error:
            raise_of_group(error, is_aborted=self._aborted)

    def _exchange(self, launch: Callable[[], Any], at_once: bool) -> None:
        if at_once or not self.transport.can_order:
            started = time.perf_counter()
            try:
                self.finish(launch())
            finally:
                self.waited_s += time.perf_counter() - started
            return
        work = launch()
        try:
            self.transport.order(work)
        except RuntimeError as error:
            raise_of_group(error, is_aborted=self._aborted)
        # They come one after the other; and each keeps what it brought.
        self._queued = work

    def settle(self) -> None:
        """Until exchanges that were not waited for at once are over. Raises like them."""
        work, self._queued = self._queued, None
        if work is not None:
            self.finish(work)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """The backend's own sum, in whatever order it likes. Raises PeerLost like `all_to_all`."""
        if self.world_size > 1:
            self.finish(self._launch("allreduce", [tensor]))
            # What any way of doing it has to send (Patarasuk and Yuan 2009).
            self.traffic.add(2 * (self.world_size - 1) * tensor.numel() * tensor.element_size() // self.world_size)

    def send(self, tensor: torch.Tensor, target: int, tag: int) -> Any:
        """Starts sending `tensor` to rank `target`; to be ended with `finish`."""
        self.traffic.add(tensor.numel() * tensor.element_size())
        return self._launch("send", [tensor], target, tag)

    def receive(self, tensor: torch.Tensor, source: int, tag: int) -> Any:
        """Starts receiving into `tensor` from rank `source`; like `send`."""
        return self._launch("recv", [tensor], source, tag)

    def _begin(self) -> Any:
        """Torch's group, for something to be launched in."""
        group = self._group
        if group is None:
            raise PeerLost("the process group was left")
        self.check()
        return group

    def start_together(self, messages: Sequence[Message]) -> list[Any]:
        """Starts messages that go side by side; the works to `finish`."""
        group = self._begin()
        launches = [partial(getattr(group, way), [tensor], peer, 0) for way, tensor, peer in messages]
        self.traffic.add(sum(each.numel() * each.element_size() for way, each, _ in messages if way == "send"))
        try:
            return self.transport.together(group, launches)
        except RuntimeError as error:
            raise_of_group(error, is_aborted=self._aborted)

    def _launch(self, call: str, *arguments: Any) -> Any:
        group = self._begin()
        try:
            return getattr(group, call)(*arguments)
        except RuntimeError as error:
            raise_of_group(error, is_aborted=self._aborted)

    def finish(self, work: Any, what: str = "") -> None:
        """Until `work` is over; `what` it is, for the error. Raises PeerLost like `all_to_all`."""
        try:
            self.transport.wait(work)
        except RuntimeError as error:
            raise_of_group(error, what, is_aborted=self._aborted)
        self.check()

    def mark_aborted(self) -> None:
        """From here on every collective of this rank raises when it is over: what is aborted may look like a
        success."""
        with self._lock:
            self._aborted = True
            if self._store is not None:
                self._store.abort()

    def abort(self) -> None:
        """Makes every collective of this rank in flight, and every later one, raise PeerLost."""
        self.mark_aborted()
        self.transport.abort()

    def drop(self) -> None:
        """Leaves the group for good; neighbours still waiting for this rank see an error at once."""
        self.mark_aborted()
        with self._lock:
            self._group = self._store = None
        self.transport.drop()
