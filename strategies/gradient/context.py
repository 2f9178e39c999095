"""What the work of one rank in one layout is made of, whatever kind of layout it is."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.comm.fabric import Fabric
from strategies.gradient.compute import Fetch
from strategies.gradient.routing import RouterExchange
from strategies.gradient.spec import StepSpec
from strategies.gradient.stopwatch import Stopwatch
from strategies.layout.parallel import Coordinates, ParallelLayout
from strategies.model.routers import Routers


@dataclass(frozen=True)
class WorkContext:
    """A rank that computes, at `place` in `layout`, and communicates over `fabric`. `fetch` gives it what virtual
    workers compute, and `watch` is told what that takes."""

    layout: ParallelLayout
    place: Coordinates
    fabric: Fabric
    spec: StepSpec
    fetch: Fetch
    watch: Stopwatch

    def router_exchange(self, routers: Routers | None) -> RouterExchange | None:
        """How ranks tell each other what their routers chose, in this layout; None where they need not."""
        return RouterExchange.where_needed(routers, self.spec, self.layout, self.fabric)

    @property
    def held(self) -> tuple[int, ...]:
        """The virtual workers of its replica."""
        return self.layout.assignment[self.place.data]
