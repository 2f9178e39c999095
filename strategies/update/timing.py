"""What a rank spent a step on. Plain numbers: no torch."""

from __future__ import annotations

from typing import NamedTuple


class RankTimes(NamedTuple):
    """One rank's account of a step, as it stands at the step's vote; times in seconds.

    `busy` is its forward and backward passes by virtual worker, in the order that it holds them, without waiting for
    others as far as that can be told. `wait` is exchanges with other ranks, with what it waited in them. The vote and
    the optimizer are those of the step before. `cost` is what its virtual workers were predicted to cost, 1 being the
    average; `tokens` counts the targets they were trained on, `padding` the positions computed for nothing.
    """

    busy: tuple[float, ...]
    data: float
    wait: float
    optimizer: float
    cost: float
    tokens: int
    padding: int

    @property
    def work(self) -> float:
        """Seconds that grow with the virtual workers it holds."""
        return sum(self.busy) + self.data


def rounded(times: RankTimes) -> RankTimes:
    """To the microsecond, for records that are read by people and kept for long."""
    busy = tuple(round(each, 6) for each in times.busy)
    data, wait, optimizer = (round(each, 6) for each in (times.data, times.wait, times.optimizer))
    return RankTimes(busy, data, wait, optimizer, round(times.cost, 4), times.tokens, times.padding)


HEADER = len(RankTimes._fields) - 1
"""Numbers beside those of virtual workers."""


def to_row(times: RankTimes) -> list[float]:
    """All its numbers, those of virtual workers last."""
    busy, *rest = times
    return [*(float(each) for each in rest), *busy]


def from_row(row: list[float]) -> RankTimes:
    data, wait, optimizer, cost, tokens, padding = row[:HEADER]
    return RankTimes(tuple(row[HEADER:]), data, wait, optimizer, cost, int(tokens), int(padding))
