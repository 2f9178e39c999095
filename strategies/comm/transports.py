"""Which transport the groups of a generation get, by their device and the job's `strategy.transport`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from strategies.comm.gloo import Gloo
from strategies.comm.group_errors import Misconfigured
from strategies.comm.nccl import Nccl
from strategies.comm.staged import StagedGloo
from strategies.comm.transport import Transport

HOST = torch.device("cpu")


def choose(device: torch.device, asked: str, control: Gloo) -> Callable[[], Transport] | None:
    """What makes the transports of groups whose tensors are on `device`, where `asked` is "auto", "nccl" or "gloo";
    None where tensors can go over the group that ranks agree over, whose transport is `control`, and others like it.

    Raises Misconfigured for what cannot be.
    """
    if device.type == "cpu":
        if asked == "nccl":
            raise Misconfigured("strategy.transport is nccl, but the workers have no GPUs (resources.gpu)")
        return None
    if asked == "gloo":
        return lambda: StagedGloo(device)
    return lambda: Nccl(device, control.has_lost_a_peer)
