"""What a sink is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from monitoring.errors import UserError
from monitoring.redaction import redact
from monitoring.sinks.stream import Item


class SinkProblem(UserError, ValueError):
    """A sink that the job asks for cannot be had; says what to install or to change."""


@dataclass
class SinkRun:
    """The run as a sink sees it. `memory` is what the sink wants to know again when the run is resumed."""

    run: str
    name: str
    directory: Path
    job: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """All may raise anything: the feeder tries again, then gives the sink up."""

    name: str

    def open(self, run: SinkRun) -> None:
        """Connects, for the first time or again."""

    def write(self, items: Sequence[Item]) -> None:
        """Hands items over. After a failure the same items come again, maybe with more."""

    def close(self, status: str) -> None:
        """The run is over (finished, failed, stopped), or this process stops feeding it (interrupted)."""


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    """What of a job describes a run elsewhere: flat names, plain values."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{prefix}.{key}", item)
        elif value is not None:
            flat[prefix] = value if isinstance(value, bool | int | float) else redact(str(value))

    for part in ("model", "data", "train", "strategy", "elastic", "resources"):
        add(part, job.get(part, {}))
    return flat
