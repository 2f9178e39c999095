"""What an update rule is given to set up the work of one rank in one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from strategies.comm.fabric import Fabric
from strategies.gradient.compute import Fetch, LocalGradients
from strategies.gradient.spec import StepSpec
from strategies.gradient.stopwatch import Stopwatch
from strategies.gradient.work import GradientWork, work_for
from strategies.layout.parallel import ParallelLayout
from strategies.state.training_state import Arrangement, TrainingState


@dataclass(frozen=True)
class Setting:
    """`local` is what is kept of an interrupted step, and `kept` anything else that the rule has kept, from one layout
    to the next; `expect` is told of the virtual workers whose batches are asked for next, `is_nan` whether the gradient
    of a step is to be not finite (fault injection)."""

    state: TrainingState
    layout: ParallelLayout
    fabric: Fabric
    spec: StepSpec
    fetch: Fetch
    watch: Stopwatch
    local: LocalGradients | None
    kept: dict[str, Any] = field(default_factory=dict)
    expect: Callable[[tuple[int, ...]], None] = lambda held: None
    is_nan: Callable[[int], bool] = lambda step: False

    def plain(self) -> GradientWork:
        """Gradients of the whole step, summed over all ranks."""
        return self.in_layout(self.state.arrangement, self.layout, self.fabric)

    def in_layout(self, arrangement: Arrangement, layout: ParallelLayout, fabric: Fabric) -> GradientWork:
        """The same among some ranks."""
        routers = self.state.blueprint.routers
        return work_for(arrangement, layout, fabric, self.spec, self.fetch, self.watch, self.local, routers)
