"""How fast each worker was over time, from the accounts of ranks in metrics.jsonl. Pure.

A rank's rate is its seconds of computing for a virtual worker of average cost: `sum(busy) / cost` of its account. Rates
are medians of windows of steps, each compared with the fastest of the window that computes the same part of the model,
since parts of a pipeline cost differently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from monitoring.events import GenerationFormed

WINDOWS = 120
"""At most about this many windows in a run."""
MIN_STEPS = 4
"""A window has at least this many steps with accounts: hiccups of a machine are shorter."""


@dataclass
class Speeds:
    """Of one worker: (start, stop, speed) of each window, in seconds since the epoch; 1.0 is the fastest."""

    worker: int
    node: str
    windows: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(speed for *_, speed in self.windows)

    @property
    def lowest(self) -> float:
        return min(speed for *_, speed in self.windows)


def rank_speeds(events: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]]) -> list[Speeds]:
    """The speeds of every worker that trained, in order of workers."""
    generations = {event["generation"]: event for event in events if event["kind"] == GenerationFormed.kind}
    told = [step for step in steps if step.get("ranks") and step.get("generation") in generations]
    length = max(MIN_STEPS, -(-len(told) // WINDOWS))
    found: dict[int, Speeds] = {}
    window: list[Mapping[str, Any]] = []
    for index, step in enumerate(told):
        window.append(step)
        is_last = index + 1 == len(told) or told[index + 1]["generation"] != step["generation"]
        if len(window) == length or is_last:
            if len(window) >= MIN_STEPS or is_last:
                _rate(window, generations[step["generation"]], found)
            window = []
    return [found[worker] for worker in sorted(found)]


def _rate(window: list[Mapping[str, Any]], generation: Mapping[str, Any], found: dict[int, Speeds]) -> None:
    """Adds one window, all of one generation."""
    workers, layout = generation["workers"], generation.get("layout") or {}
    tensor, pipeline = int(layout.get("tensor", 1)), int(layout.get("pipeline", 1))
    samples: dict[int, list[float]] = defaultdict(list)
    for step in window:
        for rank, (busy, *_between, cost, _tokens, _padding) in enumerate(step["ranks"]):
            if rank < len(workers) and cost and sum(busy) > 0:
                samples[rank].append(sum(busy) / cost)
    rates = {rank: median(values) for rank, values in samples.items()}
    # Ranks go through the tensor-parallel group first, then the stages, then the replicas.
    stages = {rank: rank // tensor % pipeline for rank in rates}
    fastest = {stage: min(rate for rank, rate in rates.items() if stages[rank] == stage) for stage in stages.values()}
    start = float(window[0]["committed_at"]) - float(window[0]["seconds"])
    stop = float(window[-1]["committed_at"])
    for rank, rate in rates.items():
        entry = workers[rank]
        speeds = found.setdefault(int(entry["worker"]), Speeds(int(entry["worker"]), str(entry.get("node", ""))))
        speeds.node = str(entry.get("node", speeds.node))
        speeds.windows.append((start, stop, fastest[stages[rank]] / rate))
