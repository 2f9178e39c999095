"""Process groups of our own making, as torch's own parts (DTensor, FSDP2, pipelining) call them.

Torch has two names for some operations, an older and a newer one (from 2.13 on), and calls either; both are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from strategies.compat import Work


class Over(Work):
    """Work that `wait` ends, once; `result` is what it leaves its results in."""

    def __init__(self, result: Sequence[torch.Tensor], end: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._result = list(result)
        self._end: Callable[[], None] | None = end

    def wait(self, timeout: Any = None) -> bool:
        """Returns when the results are there. Raises what the operation raised."""
        end, self._end = self._end, None
        if end is not None:
            end()
        return True

    def get_future(self) -> Any:
        self.wait()
        future: Any = torch.futures.Future()
        future.set_result(self._result)
        return future


_ProcessGroup: Any = dist.ProcessGroup


class Face(_ProcessGroup):  # type: ignore[misc]
    """A group whose operations are methods here. `shutdown` and `abort` do nothing: groups of ours are left by their
    transport."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self._name = self._about = ""

    supports_coalescing = False

    def _get_backend(self, device: torch.device) -> Any:
        """Torch asks from 2.14 on, before it sends several messages at a time."""
        return self

    def getBackendName(self) -> str:
        return "elastic"

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, text: str) -> None:
        self._about = text

    def getGroupDesc(self) -> str:
        return self._about

    def abort(self) -> None:
        """By its transport only."""

    def shutdown(self) -> None:
        """By its transport only."""
