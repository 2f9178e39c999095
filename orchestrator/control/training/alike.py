"""Whether workers compute the same bits, by what each found when it tried itself out."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.control.core.workers import WorkerId
from orchestrator.training.messages import Ready


@dataclass
class Alike:
    """All workers of a run are to give the `probe` of its first one, unless they may be `mixed`. `first` is who that
    was, and `device` what it computes on."""

    mixed: bool = False
    probe: str = ""
    device: str = ""
    first: str = ""

    def refusal(self, ready: Ready) -> str | None:
        """Why a worker that is ready cannot take part; None if it can. The first one can, and is what others are
        measured by."""
        if not ready.probe or self.mixed:
            return None
        if not self.probe:
            self.learn(ready.worker, ready.probe, ready.device)
            return None
        if ready.probe == self.probe:
            return None
        return (
            f"worker {ready.worker.slot} computes other bits than {self.first} (probe {ready.probe[:12]}, not "
            f"{self.probe[:12]}): it has {ready.device}, and that {self.device}. All workers of a run need the same "
            "kind of device, libraries and driver (resources.accelerators, resources.labels), or elastic.mixed_numerics"
        )

    def learn(self, worker: WorkerId, probe: str, device: str) -> None:
        """The first worker of the run, by its record."""
        if not self.probe:
            self.probe, self.device, self.first = probe, device, f"worker {worker.slot}"
