"""The vote at the end of a step: what every rank says, and what all agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from strategies.comm.groups import Groups
from strategies.comm.traffic import KINDS
from strategies.layout.parallel import ParallelLayout
from strategies.layout.schedule import parts_of
from strategies.reduction.norm import WORDS, from_words, norm_of, to_words
from strategies.update.timing import HEADER, RankTimes, from_row, to_row

PAUSE, SAVE, SAVING = 1, 2, 4
_HEAD = 2 + WORDS + len(KINDS)
"""Whole numbers of a row before the hashes."""


@dataclass(frozen=True)
class Agreement:
    """What any rank wants to happen after a step, and so happens on all: leave the generation, save the state; and
    whether any of them is still busy with an earlier save. `deal` is the number of the deal that all of them know to be
    the newest; 0 while they do not agree, or know of none."""

    pause: bool = False
    save: bool = False
    saving: bool = False
    deal: int = 0

    @classmethod
    def of(cls, flags: int, deals: set[int]) -> Agreement:
        return cls(bool(flags & PAUSE), bool(flags & SAVE), bool(flags & SAVING), deals.pop() if len(deals) == 1 else 0)


@dataclass(frozen=True)
class Vote:
    """What all ranks agreed on at the end of a step: the gradient's norm (NaN when it is not finite), the losses and
    hashes of all virtual workers, what happens after this step, what each rank has spent on it, and the bytes that all
    have sent in it, by kind (`strategies.comm.traffic.KINDS`)."""

    norm: float
    losses: list[float]
    hashes: tuple[int, ...]
    agreement: Agreement
    ranks: tuple[RankTimes, ...]
    sent: tuple[int, ...]


@dataclass(frozen=True)
class Ballot:
    """What one rank says. `square_sum` is of the part of the reduced gradient that it speaks for, None when that is not
    finite; `losses` and `hashes` are of the virtual workers it tells about."""

    flags: int
    deal: int
    square_sum: int | None
    losses: Sequence[float]
    hashes: Sequence[int]
    times: RankTimes
    sent: Sequence[int] = (0,) * len(KINDS)


class Polls:
    """The votes of one layout: which virtual workers each rank tells about, and which it has."""

    def __init__(self, layout: ParallelLayout) -> None:
        ranks = range(layout.world_size)
        self.told = [told_by(layout, rank) for rank in ranks]
        self.held = [_held_by(layout, rank) for rank in ranks]
        self._virtual_workers = layout.virtual_workers
        self._sizes = [
            _HEAD + 2 * len(told) + HEADER + len(held) for told, held in zip(self.told, self.held, strict=True)
        ]

    def hold(self, control: Groups, ballot: Ballot) -> Vote:
        """Tells everyone, and learns what all others say. Raises PeerLost."""
        floats = np.array([*ballot.losses, *to_row(ballot.times)], dtype=np.float64)
        head = [ballot.flags, ballot.deal, *to_words(ballot.square_sum), *ballot.sent]
        whole = np.array([*head, *ballot.hashes], dtype=np.int64)
        row = np.concatenate([whole, floats.view(np.int64)])
        return self._count(exchange(control, row, self._sizes))

    def _count(self, everyone: np.ndarray) -> Vote:
        sums: list[int | None] = []
        loss_of: dict[int, float] = {}
        hash_of: dict[int, int] = {}
        flags, deals, ranks, sent = 0, set(), [], [0] * len(KINDS)
        for told, part in zip(self.told, np.split(everyone, np.cumsum(self._sizes)[:-1]), strict=True):
            ints, values = np.split(part, [_HEAD + len(told)])
            flag, deal, *rest = ints.tolist()
            flags |= flag
            deals.add(deal)
            sums.append(from_words(rest[:WORDS]))
            sent = [total + more for total, more in zip(sent, rest[WORDS : WORDS + len(KINDS)], strict=True)]
            hash_of |= dict(zip(told, rest[WORDS + len(KINDS) :], strict=True))
            numbers = values.view(np.float64).tolist()
            loss_of |= dict(zip(told, numbers, strict=False))
            ranks.append(from_row(numbers[len(told) :]))
        order = range(self._virtual_workers)
        losses, hashes = [loss_of[i] for i in order], tuple(hash_of[i] for i in order)
        return Vote(norm_of(sums), losses, hashes, Agreement.of(flags, deals), tuple(ranks), tuple(sent))


def told_by(layout: ParallelLayout, rank: int) -> tuple[int, ...]:
    """The virtual workers whose loss and hash a rank tells: its replica's, if it has the end of the model."""
    place = layout.place(rank)
    if place is None or place.tensor:
        return ()
    last = max(len(layout.parts) - 1, 0)
    if layout.pipeline > 1 and last not in parts_of(layout.schedule, layout.pipeline, last + 1, place.stage):
        return ()
    return layout.assignment[place.data]


def _held_by(layout: ParallelLayout, rank: int) -> tuple[int, ...]:
    """The virtual workers that a rank computes, or a part of the model for."""
    place = layout.place(rank)
    return () if place is None else layout.assignment[place.data]


def exchange(control: Groups, row: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Everyone's int64 `row`s, end to end in the order of ranks; `sizes` are their lengths. Raises PeerLost."""
    if control.world_size == 1:
        return row
    sent = torch.from_numpy(np.tile(row, control.world_size))
    received = torch.empty(sum(sizes), dtype=torch.int64)
    control.all_to_all(received, sent, sizes, [len(row)] * control.world_size)
    return received.numpy()
