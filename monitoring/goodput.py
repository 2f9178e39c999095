"""How much of the wall time was training: a pure function of what a run recorded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def goodput_ratio(steps: Iterable[dict[str, Any]], wall_seconds: float) -> float:
    """The share of `wall_seconds` spent in committed steps (each counted once: replayed steps count their last run).

    Every step's `seconds` is that of one rank, from its first micro-batch to its commit.
    """
    latest = {record["step"]: float(record["seconds"]) for record in steps}
    return min(1.0, sum(latest.values()) / wall_seconds) if wall_seconds > 0 else 0.0
