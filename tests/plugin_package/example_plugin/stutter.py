"""A kind of fault: a device that is slow for one step."""

from __future__ import annotations

from orchestrator.faults import FaultKind, Site, Told


class Stutter(FaultKind):
    name = "stutter"
    details = ("factor",)
    slows_down = True

    def happen(self, told: Told, step: int, site: Site) -> None:
        site.slow_down("compute", told.factor or 3.0, 1, None)


STUTTER = Stutter()
