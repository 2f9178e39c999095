"""Gloo for tensors on a device: each is copied to page-locked host memory, sent from there, and copied back.

Several ranks can share a GPU so, which NCCL refuses; and it is a second opinion on what NCCL computes, and a way out
where NCCL does not work. What is computed is the same, as no sum is left to the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from strategies.comm.faces import Face, Over
from strategies.comm.gloo import Gloo
from strategies.comm.ordered_sum import sum_in_order
from strategies.comm.transport import PATIENCE, Transport


class StagedGloo(Transport):
    """Tensors on `device`, over host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gloo = Gloo()

    def form(self, store: Any, rank: int, world_size: int, host: str, timeout_s: float) -> Any:
        inner = self._gloo.form(store, rank, world_size, host, timeout_s)
        return StagedGroup(inner, rank, world_size, self._device)

    def wait(self, work: Any) -> None:
        work.wait()

    def abort(self) -> None:
        self._gloo.abort()

    def drop(self) -> None:
        self._gloo.drop()


class StagedGroup(Face):
    """A process group for tensors on `device` over one for tensors on the host. Sums are in the order of ranks."""

    def __init__(self, inner: Any, rank: int, world_size: int, device: torch.device) -> None:
        super().__init__(rank, world_size)
        self._inner = inner
        self._device = device

    # ------------------------------------------------------------------------------------ between device and host

    def _room(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory for the bytes of a tensor."""
        return torch.empty(
            tensor.numel() * tensor.element_size(), dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )

    def _staged(self, tensor: torch.Tensor) -> torch.Tensor:
        """The bytes of a tensor, on the host."""
        room = self._room(tensor)
        room.copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        return room

    @staticmethod
    def _take(tensor: torch.Tensor, room: torch.Tensor) -> None:
        """Fills a tensor with bytes of the host's."""
        with torch.no_grad():
            tensor.copy_(room.view(tensor.dtype).view(tensor.shape))

    # ------------------------------------------------------------------------------------ by the names of torch's

    def alltoall_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> Over:
        room, staged = self._room(output), self._staged(input)
        work = self._inner.alltoall_base(
            room, staged, _in_bytes(output, output_sizes), _in_bytes(input, input_sizes)
        )  # fmt: skip

        def end() -> None:
            work.wait(PATIENCE)
            self._take(output, room)

        return Over([output], end)

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Over:
        if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
            raise RuntimeError(f"ranks with a staged transport add up, and cannot {opts.reduceOp}")
        for tensor in tensors:
            sum_in_order(tensor, self.size(), self._exchange)
        return Over(tensors)

    def _exchange(self, output: torch.Tensor, input: torch.Tensor) -> None:
        self.alltoall_base(output, input, [], []).wait()

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Over:
        (tensor,) = tensors
        room = self._staged(tensor)
        self._inner.broadcast([room], opts).wait(PATIENCE)
        self._take(tensor, room)
        return Over(tensors)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Over:
        room = self._room(output)
        self._inner._allgather_base(room, self._staged(input)).wait(PATIENCE)
        self._take(output, room)
        return Over([output])

    def all_gather_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> Over:
        for output, input in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, input)
        return Over(outputs)

    def scatter(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any = None
    ) -> Over:
        (output,) = outputs
        room = self._room(output)
        self._inner.scatter([room], [[self._staged(part) for part in parts] for parts in inputs], opts).wait(PATIENCE)
        self._take(output, room)
        return Over(outputs)

    def barrier(self, opts: Any = None) -> Over:
        self._inner.barrier().wait(PATIENCE)
        return Over([])

    def send(self, tensors: Sequence[torch.Tensor], peer: int, tag: int) -> Over:
        (tensor,) = tensors
        work = self._inner.send([self._staged(tensor)], peer, tag)
        return Over(tensors, lambda: work.wait(PATIENCE))

    def recv(self, tensors: Sequence[torch.Tensor], peer: int, tag: int) -> Over:
        (tensor,) = tensors
        room = self._room(tensor)
        work = self._inner.recv([room], peer, tag)

        def end() -> None:
            work.wait(PATIENCE)
            self._take(tensor, room)

        return Over(tensors, end)

    all_to_all_single = alltoall_base
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced


def _in_bytes(tensor: torch.Tensor, sizes: Sequence[int]) -> list[int]:
    """Splits of a tensor along its first dimension, in bytes; none where the parts are equal."""
    row = tensor.element_size() * (tensor.numel() // len(tensor) if len(tensor) else 0)
    return [row * size for size in sizes]
