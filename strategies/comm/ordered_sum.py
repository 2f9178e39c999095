"""A sum over ranks in the order of ranks, whatever the backend: the tensor-parallel axis rides on it.

A backend's own all-reduce adds in an order of its choice, which may differ with the kind of card, the network and the
size of the tensor. (Between two ranks there is only one order.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from strategies.comm.faces import Over

Exchange = Callable[[torch.Tensor, torch.Tensor], None]
"""(output, input), both [ranks, n]: row r of the input goes to rank r, row r of the output came from it."""


def sum_in_order(tensor: torch.Tensor, ranks: int, exchange: Exchange) -> None:
    """Adds `tensor` up over all ranks, in place: each adds a share of it, in the order of ranks, and all get all of
    them. Numbers of less than 32 bits are added as fp32 and rounded once."""
    flat = tensor.detach().reshape(-1)
    share = -(-flat.numel() // ranks)
    padded = torch.nn.functional.pad(flat, (0, share * ranks - flat.numel())).view(ranks, share)
    received = torch.empty_like(padded)
    exchange(received, padded)
    wide = received.float() if received.is_floating_point() and received.element_size() < 4 else received
    total = wide[0].clone()
    for other in range(1, ranks):
        total += wide[other]
    padded.copy_(total.to(padded.dtype).expand(ranks, share))
    exchange(received, padded)
    tensor.copy_(received.view(-1)[: flat.numel()].view(tensor.shape))


_ProcessGroup: Any = dist.ProcessGroup


class OrderedGroup(_ProcessGroup):  # type: ignore[misc]
    """A group of torch's for tensors on `device`, but that it adds up in the order of ranks. What is not a sum is done
    by the group `inner`."""

    def __init__(self, inner: Any, rank: int, world_size: int, device: torch.device) -> None:
        super().__init__(rank, world_size)
        kind = dist.ProcessGroup.BackendType.CUSTOM
        self._register_backend(device, kind, inner)
        self._set_default_backend(kind)
        self._inner = inner

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:
        """Sums are over when this returns, as far as the device's current stream is concerned."""
        if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
            return self._inner.allreduce(tensors, opts)
        for tensor in tensors:
            sum_in_order(tensor, self.size(), self._exchange)
        return Over(tensors)

    def _exchange(self, output: torch.Tensor, input: torch.Tensor) -> None:
        self._inner.alltoall_base(output, input, [], []).wait()
