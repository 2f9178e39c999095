"""The phases of a step, and how long each took. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable

PHASES = ("refresh", "data", "compute", "reduce", "gather", "vote", "commit")
"""In order: "refresh" is a collective, where weights are gathered from those who train them; the next two are taken in
turns for every virtual worker, and local unless the model is split; the next three are collectives; the last is local.
"""


class PhaseTimes:
    """`seconds` are those of this step, `before` those of the step before it. `on_phase(phase, step)` is called at the
    start of every phase (heartbeats, fault injection)."""

    def __init__(self, on_phase: Callable[[str, int], None]) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.before: dict[str, float] = {}
        self.on_phase = on_phase
        self._phase: str | None = None
        self._entered = 0.0

    def begin(self) -> None:
        """Another step."""
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str, step: int) -> None:
        """Leaves the phase before."""
        now = time.perf_counter()
        self.leave(now)
        self._phase, self._entered = phase, now
        self.on_phase(phase, step)

    def leave(self, now: float | None = None) -> None:
        """In no phase, from `now` on (a reading of `time.perf_counter`)."""
        if self._phase is not None and self._phase in self.seconds:
            self.seconds[self._phase] += (time.perf_counter() if now is None else now) - self._entered
        self._phase = None
