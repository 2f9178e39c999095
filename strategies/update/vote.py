"""The vote at the end of a step: what every rank says, and what all agree on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from strategies.comm.groups import Groups
from strategies.update.timing import RankTimes

PAUSE, SAVE, SAVING = 1, 2, 4

Deal = tuple[int, tuple[tuple[int, ...], ...]]
"""A number, and the virtual workers of each replica."""


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
    hashes of all virtual workers, what happens after this step, and what each rank has spent on it."""

    norm: float
    losses: list[float]
    hashes: tuple[int, ...]
    agreement: Agreement
    ranks: tuple[RankTimes, ...]


def exchange(world: Groups, row: np.ndarray, sizes: list[int], device: torch.device) -> np.ndarray:
    """Everyone's int64 `row`s, end to end in the order of ranks; `sizes` are their lengths. Raises PeerLost."""
    if world.world_size == 1:
        return row
    sent = torch.from_numpy(np.tile(row, world.world_size)).to(device)
    received = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    world.all_to_all(received, sent, sizes, [len(row)] * world.world_size)
    return received.cpu().numpy()
