"""Who gets how much work when ranks differ in speed: virtual workers for replicas, blocks of the model for stages.

Plain numbers: a *rate* is what a rank needs for an average virtual worker of the whole model, in seconds (or any unit
that is the same for all). What is computed here is only the part of a step that is work; exchanges are taken to stay as
they are. The same answer for the same question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from orchestrator.models.costs import ModelCosts
from orchestrator.planning.choose import blocks_of
from strategies.layout.assignment import deal, deal_in_turn, deal_subtrees
from strategies.layout.parallel import ParallelLayout
from strategies.layout.schedule import parts_of

Assignment = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Balance:
    """A deal of the virtual workers, and the seconds of work that a step has with it."""

    assignment: Assignment
    seconds: float


def stage_shares(layout: ParallelLayout, costs: ModelCosts | None) -> tuple[float, ...]:
    """What share of the model's arithmetic each stage has; equal shares where the costs are not known."""
    if layout.pipeline == 1:
        return (1.0,)
    if costs is None:
        return (1 / layout.pipeline,) * layout.pipeline
    flops = [block.training_flops_per_token for block in costs.blocks]
    runs = [layout.blocks_of(stage) or () for stage in range(layout.pipeline)]
    return tuple(sum(sum(flops[start:stop]) for start, stop in run) / sum(flops) for run in runs)


def replica_seconds(layout: ParallelLayout, rates: Sequence[float], shares: Sequence[float]) -> list[float]:
    """What each replica needs for an average virtual worker: as long as its slowest stage. `rates` are by rank."""
    return [
        max(
            rates[layout.rank_of(replica, stage, tensor)] * shares[stage]
            for stage in range(layout.pipeline)
            for tensor in range(layout.tensor)
        )
        for replica in range(layout.data)
    ]


def seconds_of(layout: ParallelLayout, assignment: Assignment, replicas: Sequence[float]) -> float:
    """Seconds of work in a step, when `replicas` need these times for a virtual worker each.

    Replicas work side by side, and the step takes as long as the last. Where gradients are reduced round by round they
    wait for one another in every round; a pipeline there also computes in rounds that it has no virtual worker for.
    """
    counts = [len(held) for held in assignment]
    if not _in_rounds(layout):
        return max(count * each for count, each in zip(counts, replicas, strict=True))
    if layout.pipeline > 1:
        return max(counts) * max(replicas)
    rounds = range(max(counts))
    return sum(max(each for count, each in zip(counts, replicas, strict=True) if count > number) for number in rounds)


def best_deal(layout: ParallelLayout, replicas: Sequence[float]) -> Balance:
    """The deal with the least work in a step; every replica gets a virtual worker at least, so that its speed can be
    seen. Equal speeds give the deal that the layout would have without any of this."""
    total = layout.virtual_workers
    if _in_rounds(layout):
        best = _balance(layout, deal_in_turn(total, layout.data), replicas)
        for counts in _round_counts(total, replicas) if layout.pipeline == 1 else ():
            if max(counts) * min(replicas) >= best.seconds:
                break  # Somebody is in every round, and from here on there are only more.
            other = _balance(layout, deal_in_turn(total, layout.data, counts), replicas)
            best = min(best, other, key=lambda each: each.seconds)
        return best
    plain = deal(total, [1.0] * layout.data)
    counts = [len(held) for held in deal(total, [1 / each for each in replicas], least=1)]
    dealt = deal_subtrees(counts)
    if seconds_of(layout, plain, replicas) <= seconds_of(layout, dealt, replicas):
        dealt = plain
    return _balance(layout, dealt, replicas)


def _balance(layout: ParallelLayout, dealt: Assignment, replicas: Sequence[float]) -> Balance:
    return Balance(dealt, seconds_of(layout, dealt, replicas))


def _in_rounds(layout: ParallelLayout) -> bool:
    return layout.data > 1 and layout.shard in ("gradients", "parameters")


def _round_counts(total: int, replicas: Sequence[float]) -> Iterator[list[int]]:
    """For every number of rounds: the fastest take part in all of them, the slowest in as few as can be."""
    slowest_first = sorted(range(len(replicas)), key=lambda replica: (-replicas[replica], replica))
    for rounds in range(-(-total // len(replicas)), total - len(replicas) + 2):
        counts = [rounds] * len(replicas)
        surplus = rounds * len(replicas) - total
        for replica in slowest_first:
            less = min(surplus, rounds - 1)
            counts[replica] -= less
            surplus -= less
        yield counts


def best_parts(layout: ParallelLayout, costs: ModelCosts, rates: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """The model cut anew, so that the part that takes longest takes as little as can be: stages of slow ranks get fewer
    blocks. `rates` are by rank; a stage is as slow as the slowest replica has it, as all are cut alike.

    A bound is lowered by bisection for as long as parts filled up to it have room for the whole model; the ends of a
    model stay with a layer each.
    """
    stages = [
        max(
            rates[layout.rank_of(replica, stage, tensor)]
            for replica in range(layout.data)
            for tensor in range(layout.tensor)
        )
        for stage in range(layout.pipeline)
    ]
    rate_of = dict.fromkeys(range(len(layout.parts)), 0.0)
    for stage, rate in enumerate(stages):
        for part in parts_of(layout.schedule, layout.pipeline, len(layout.parts), stage):
            rate_of[part] = rate
    flops = [block.training_flops_per_token for block in costs.blocks]
    units = [flops[0] + flops[1], *flops[2:-2], flops[-2] + flops[-1]] if costs.layers > 1 else [sum(flops)]
    ordered = [rate_of[part] for part in range(len(layout.parts))]
    low, high = 0.0, sum(units) * max(ordered)
    layers = _fill(units, ordered, high)
    assert layers is not None, "the layout has a layer for every part"
    for _ in range(60):
        middle = (low + high) / 2
        filled = _fill(units, ordered, middle)
        if filled is None:
            low = middle
        else:
            high, layers = middle, filled
    return blocks_of(tuple(layers))


def _fill(units: Sequence[int], rates: Sequence[float], bound: float) -> list[int] | None:
    """How many units each part takes in turn without taking longer than `bound`; None when units are left over. Every
    part takes one at least, and leaves one for each of those after it."""
    sums = [0, *accumulate(units)]
    taken, start = [], 0
    for number, rate in enumerate(rates):
        last = len(units) - (len(rates) - number - 1)
        stop = start + 1
        if (sums[stop] - sums[start]) * rate > bound:
            return None
        while stop < last and (sums[stop + 1] - sums[start]) * rate <= bound:
            stop += 1
        taken.append(stop - start)
        start = stop
    return taken if start == len(units) else None
