"""Which transport the groups of a generation get, by their device and the job's `strategy.transport`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from strategies.comm.gloo import Gloo
from strategies.comm.group_errors import Misconfigured
from strategies.comm.transport import Transport

HOST = torch.device("cpu")


def choose(device: torch.device, asked: str) -> Callable[[], Transport]:
    """What makes the transport of a group whose tensors are on `device`; `asked` is "auto", "nccl" or "gloo".

    Raises Misconfigured for one that cannot be.
    """
    if device.type == "cpu":
        if asked == "nccl":
            raise Misconfigured(
                "strategy.transport is nccl, which is for GPUs, and the workers have none (resources.gpu)"
            )
        return Gloo
    raise Misconfigured("unknown device")
