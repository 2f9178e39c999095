"""The vote at the end of a step: what every rank says, and what all agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from strategies.comm.groups import Groups
from strategies.comm.traffic import KINDS
from strategies.layout.parallel import ParallelLayout
from strategies.layout.replicas import island_of, replicas_at
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
    """What all ranks agreed on at the end of a round: the gradient's norm (NaN when it is not finite), for each step
    the losses and hashes of all virtual workers and the norms of virtual replicas that train by themselves; what
    happens after it, what each rank has spent on it, and the bytes that all have sent in it, by kind
    (`strategies.comm.traffic.KINDS`)."""

    norm: float
    losses: list[list[float]]
    hashes: list[tuple[int, ...]]
    norms: list[list[float]]
    agreement: Agreement
    ranks: tuple[RankTimes, ...]
    sent: tuple[int, ...]


@dataclass(frozen=True)
class Ballot:
    """What one rank says. `square_sum` is of the part of the reduced gradient that it speaks for, None when that is not
    finite; `losses` and `hashes` are of the virtual workers it tells about, step by step, and `norms` likewise of the
    virtual replicas."""

    flags: int
    deal: int
    square_sum: int | None
    losses: Sequence[float]
    hashes: Sequence[int]
    times: RankTimes
    norms: Sequence[float] = ()
    sent: Sequence[int] = (0,) * len(KINDS)


class Polls:
    """The votes of one layout about rounds of `steps` steps: which virtual workers each rank tells about, and which it
    has; and which virtual replicas it tells about, where they train by themselves (`apart`)."""

    def __init__(self, layout: ParallelLayout, steps: int = 1, *, apart: bool = False) -> None:
        ranks = range(layout.world_size)
        self.steps = steps
        self.led = [_led_by(layout, rank) if apart else () for rank in ranks]
        self.told = [told_by(layout, rank) for rank in ranks]
        self.held = [_held_by(layout, rank) for rank in ranks]
        self._virtual_workers = layout.virtual_workers
        self._sizes = [
            _HEAD + steps * (2 * len(told) + len(led)) + HEADER + len(held)
            for told, led, held in zip(self.told, self.led, self.held, strict=True)
        ]

    def hold(self, control: Groups, ballot: Ballot) -> Vote:
        """Tells everyone, and learns what all others say. Raises PeerLost."""
        floats = np.array([*ballot.losses, *ballot.norms, *to_row(ballot.times)], dtype=np.float64)
        head = [ballot.flags, ballot.deal, *to_words(ballot.square_sum), *ballot.sent]
        whole = np.array([*head, *ballot.hashes], dtype=np.int64)
        row = np.concatenate([whole, floats.view(np.int64)])
        return self._count(exchange(control, row, self._sizes))

    def _count(self, everyone: np.ndarray) -> Vote:
        sums: list[int | None] = []
        steps, workers = range(self.steps), range(self._virtual_workers)
        loss_of: dict[tuple[int, int], float] = {}
        hash_of: dict[tuple[int, int], int] = {}
        norm_at: dict[tuple[int, int], float] = {}
        flags, deals, ranks, sent = 0, set(), [], [0] * len(KINDS)
        parts = np.split(everyone, np.cumsum(self._sizes)[:-1])
        for told, led, part in zip(self.told, self.led, parts, strict=True):
            keys, led_keys = ([(s, index) for s in steps for index in each] for each in (told, led))
            ints, values = np.split(part, [_HEAD + len(keys)])
            flag, deal, *rest = ints.tolist()
            flags |= flag
            deals.add(deal)
            sums.append(from_words(rest[:WORDS]))
            sent = [total + more for total, more in zip(sent, rest[WORDS : WORDS + len(KINDS)], strict=True)]
            hash_of |= dict(zip(keys, rest[WORDS + len(KINDS) :], strict=True))
            numbers = values.view(np.float64).tolist()
            loss_of |= dict(zip(keys, numbers, strict=False))
            norm_at |= dict(zip(led_keys, numbers[len(keys) :], strict=False))
            ranks.append(from_row(numbers[len(keys) + len(led_keys) :]))
        losses = [[loss_of[s, i] for i in workers] for s in steps]
        hashes = [tuple(hash_of[s, i] for i in workers) for s in steps]
        norms = [[norm for (at, _), norm in sorted(norm_at.items()) if at == s] for s in steps]
        return Vote(norm_of(sums), losses, hashes, norms, Agreement.of(flags, deals), tuple(ranks), tuple(sent))


def told_by(layout: ParallelLayout, rank: int) -> tuple[int, ...]:
    """The virtual workers whose loss and hash a rank tells: its replica's, if it has the end of the model."""
    place = layout.place(rank)
    if place is None or place.tensor:
        return ()
    last = max(len(layout.parts) - 1, 0)
    if layout.pipeline > 1 and last not in parts_of(layout.schedule, layout.pipeline, last + 1, place.stage):
        return ()
    return layout.assignment[place.data]


def _led_by(layout: ParallelLayout, rank: int) -> tuple[int, ...]:
    """The virtual replicas whose norms a rank tells: it is the first of those that compute them."""
    place = layout.place(rank)
    if place is None or place.tensor or place.stage or island_of(layout, place.data)[0] != place.data:
        return ()
    return replicas_at(layout, place.data)


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
