"""Trouble with a worker's device and its groups, made on purpose. On a GPU it is the real thing; a CPU has none of it,
and there the errors are raised that torch would raise."""

from __future__ import annotations

import time

import torch

from strategies.comm.fabric import Fabric

_TAG = 0x0F
"""Of a message that nobody sends."""


def fail_device(device: torch.device) -> None:
    """The device, and its context in this process, computes no more."""
    if device.type == "cuda":
        torch._assert_async(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)
    raise RuntimeError("CUDA error: device-side assert triggered (injected, on a CPU)")


def exhaust_memory(device: torch.device) -> None:
    """More is asked for than the device has."""
    if device.type == "cuda":
        torch.empty(2 * torch.cuda.get_device_properties(device).total_memory, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("CUDA out of memory (injected, on a CPU)")


def hang_in_collective(fabric: Fabric) -> None:
    """Waits in a group for what never comes, until the group is aborted. Raises PeerLost."""
    world = fabric.world
    if world.world_size == 1:
        raise RuntimeError("injected: there is nobody to wait for")
    peer = (world.rank + 1) % world.world_size
    world.finish(world.receive(torch.empty(1, device=world.device), peer, _TAG), "injected")
    # NCCL knows no tags, and takes whatever comes from there.
    while True:
        fabric.check()
        time.sleep(0.01)
