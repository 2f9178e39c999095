"""Why a worker leaves its generation, in the words of the protocol: by what is to be done about what was raised."""

from __future__ import annotations

import gc
import threading
from contextlib import suppress

import torch

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.manifest import CheckpointError, UnusableCheckpoint
from orchestrator.models.problems import ModelError
from orchestrator.training.messages import Generation, LeftCause
from orchestrator.training.restoring import StorageFailed
from strategies.comm.group_errors import (
    DeviceFailed,
    Misconfigured,
    OutOfMemory,
    PeerLost,
    first_line,
    is_of_nccl,
    kind_of,
)
from strategies.trial.trial import ModelChanged

WORKS_S = 10.0
"""How long a device may take to show that it still works."""


def cause_of(
    error: Exception, generation: Generation, catalog: Catalog, device: torch.device
) -> tuple[LeftCause, str]:  # fmt: skip
    """The cause, and what is told of it. Errors of `strategies.comm.group_errors` are found under others, too, and
    those of a device in whatever torch raised: if they stay, which is tried out. Groups are aborted by then, so that
    nothing of theirs holds the device up."""
    match error:
        case PeerLost():
            return "peer", str(error)
        case UnusableCheckpoint():
            return "unusable", str(error)
        case StorageFailed():
            return "storage", str(error)
        case CheckpointError():
            # What a fork begins with is another run's: there is none before it to fall back to.
            origin = catalog.origin
            is_ours = origin is None or generation.restore != origin[1].locate(generation.committed)
            return ("restore" if is_ours else "unusable"), str(error)
        case ModelChanged() | ModelError():
            return "job", str(error)
    kind = kind_of(error) if isinstance(error, RuntimeError) else None
    if kind is DeviceFailed and still_works(device):
        # A kernel that this device cannot run, or what NCCL makes of a peer that went.
        return ("peer" if is_of_nccl(error) else "exception"), first_line(error)
    if kind is DeviceFailed:
        return "device", first_line(error)
    if kind is OutOfMemory:
        return "memory", first_line(error)
    if kind is Misconfigured:
        return "job", first_line(error)
    return "exception", f"{type(error).__name__}: {error}"


def still_works(device: torch.device) -> bool:
    """Whether a GPU computes after an error. (A CPU does not fail by itself: there it is one that was injected.)"""
    if device.type != "cuda":
        return False
    found: list[float] = []

    def compute() -> None:
        with suppress(Exception):
            torch.cuda.synchronize(device)
            found.append(torch.ones(1, device=device).sum().item())

    trying = threading.Thread(target=compute, name="device", daemon=True)
    trying.start()
    trying.join(WORKS_S)
    return found == [1.0]


def release_memory(device: torch.device) -> None:
    """Gives back what this process keeps of its device's memory and does not use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
