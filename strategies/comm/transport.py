"""What carries the collectives of one group of ranks, on one rank: the seam between `Groups` and a backend of torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

PATIENCE = timedelta(hours=24)
"""Collectives wait for as long as it takes: hangs are found by heartbeats and progress, which abort."""


class Transport(ABC):
    """One group, from its forming until it is left. What torch raises comes out as it is: see
    `strategies.comm.group_errors`."""

    @abstractmethod
    def form(self, store: Any, rank: int, world_size: int, host: str, timeout_s: float) -> Any:
        """Joins the other ranks over `store`; torch's process group. `host` is this machine's address for peers,
        `timeout_s` bounds the forming. Raises RuntimeError when a peer does not come, dies meanwhile, or `abort` is
        called."""

    def all_gather(self, group: Any, output: torch.Tensor, input: torch.Tensor, ranks: int) -> Any:
        """Brings the `input` [n] of all ranks together in `output` [ranks * n]; the work to wait for. With gloo sending
        each rank a copy of its own is much faster than its all-gather."""
        copies = input.reshape(1, -1).expand(ranks, -1).reshape(-1)
        sizes = [input.numel()] * ranks
        return group.alltoall_base(output, copies, sizes, sizes)

    def together(self, group: Any, launches: Sequence[Callable[[], Any]]) -> list[Any]:
        """Launches messages of `group` that go side by side; the works that are to be waited for."""
        return [launch() for launch in launches]

    @abstractmethod
    def wait(self, work: Any) -> None:
        """Until a collective or transfer is over, and the host may rely on it. Raises RuntimeError when it failed or
        was aborted; a backend that calls an aborted one a success is told apart by `Groups.check`."""

    @property
    def can_order(self) -> bool:
        """Whether what is queued on the device can be made to come after a collective without the host's waiting for
        it, by `order`."""
        return False

    def order(self, work: Any) -> None:
        """Whatever is queued on the device from here on comes after `work`. Whether that succeeded `wait` says later:
        the results of one that was aborted are rubbish."""
        self.wait(work)

    @abstractmethod
    def abort(self) -> None:
        """Makes what is in flight end, from any thread, also while `form` runs. Does not wait for anything."""

    @abstractmethod
    def drop(self) -> None:
        """Leaves the group for good; neighbours still waiting for this rank see an error at once."""

    def is_gone(self, timeout_s: float) -> bool:
        """Waits for what `abort` and `drop` began; whether all of the group is gone, so that another can be formed."""
        return True
