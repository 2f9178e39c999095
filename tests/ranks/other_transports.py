"""Transports for GPUs, on a CPU: called in a rank's process before it makes its groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from strategies import compat
from strategies.comm import nccl, transports
from strategies.comm.staged import StagedGloo
from tests.ranks.fake_nccl import FakeNccl
from tests.ranks.laid_out import train_each
from tests.ranks.local_ranks import Endpoint


def stage_everything() -> None:
    """All tensors go through copies, as those of GPUs would."""
    transports.choose = lambda device, asked, control: lambda: StagedGloo(device)


def pretend_nccl(
    *, settles: bool = True, network_tells: bool = False, duplicate_gpu: bool = False, orders: bool = False
) -> None:
    """All tensors go over the fake NCCL; where nobody `settles` the environment it is torch's own choice. Where it
    `orders`, errors come out as late as where a GPU's stream does the waiting."""
    if orders:
        nccl.Nccl.can_order = True  # type: ignore[assignment, method-assign]
    FakeNccl.network_tells, FakeNccl.duplicate_gpu = network_tells, duplicate_gpu
    nccl.ENVIRONMENT["TORCH_NCCL_NONBLOCKING_TIMEOUT"] = "1"
    if settles:
        nccl.settle_environment()
    dist.batch_isend_irecv = batched
    compat.make_nccl = lambda store, rank, ranks, timeout: FakeNccl(store, rank, ranks, timeout, blocking=False)
    transports.choose = lambda device, asked, control: lambda: nccl.Nccl(device, control.has_lost_a_peer)


def batched(messages: list[dist.P2POp]) -> list[Any]:
    """What torch does with messages of an NCCL group, if only it is not one of Python's (torch 2.13)."""
    group: Any = messages[0].group
    group._start_coalescing()
    for message in messages:
        way = group.send if message.op is dist.isend else group.recv
        way([message.tensor], message.group_peer, message.tag)
    return [group._end_coalescing()]


def train_each_over(rank: int, address: Endpoint, install: Callable[[], None], *arguments: Any) -> list[Any]:
    """`train_each` over another transport."""
    install()
    return train_each(rank, address, *arguments)
