"""Transports for GPUs, on a CPU: called in a rank's process before it makes its groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from strategies.comm import transports
from strategies.comm.staged import StagedGloo
from tests.ranks.laid_out import train_each
from tests.ranks.local_ranks import Endpoint


def stage_everything() -> None:
    """All tensors go through copies, as those of GPUs would."""
    transports.choose = lambda device, asked, control: lambda: StagedGloo(device)


def train_each_over(rank: int, address: Endpoint, install: Callable[[], None], *arguments: Any) -> list[Any]:
    """`train_each` over another transport."""
    install()
    return train_each(rank, address, *arguments)
