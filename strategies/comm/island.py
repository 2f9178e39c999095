"""The fabric of an island: ranks that compute the same virtual replicas, as if there were no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from strategies.comm.fabric import Fabric
from strategies.comm.groups import Groups, Message
from strategies.layout.parallel import ParallelLayout


class IslandFabric(Fabric):
    """What `base` is in the layout of a virtual replica. `ranks` are the numbers in `base` of those of the island."""

    def __init__(self, base: Fabric, layout: ParallelLayout, ranks: Sequence[int]) -> None:
        assert base.island is not None
        self._base = base
        self.rank = ranks.index(base.rank)
        self.layout = layout
        self.device = base.device
        self.nodes = ()
        self.hierarchy = None
        self.island = None
        self.traffic = base.traffic
        self.control = base.island.control
        self.data_group = base.island.inner
        self.world = _Renumbered(base.world, ranks)  # type: ignore[assignment]
        self.mesh = base.mesh
        self._axes = base._axes
        self._by_group = base._by_group

    @property
    def is_aborted(self) -> bool:
        return self._base.is_aborted

    @property
    def waited_s(self) -> float:
        return self._base.waited_s

    @property
    def moves(self) -> int:
        return self._base.moves

    def check(self) -> None:
        self._base.check()

    def look(self) -> None:
        self._base.look()


class _Renumbered:
    """Messages between ranks of an island, in the group of all."""

    def __init__(self, world: Groups, ranks: Sequence[int]) -> None:
        self._world, self._ranks = world, ranks

    def start_together(self, messages: Sequence[Message]) -> list[Any]:
        """See `Groups`."""
        return self._world.start_together([(way, tensor, self._ranks[peer]) for way, tensor, peer in messages])

    def finish(self, work: Any, what: str = "") -> None:
        """See `Groups`."""
        self._world.finish(work, what)
