"""Why a worker leaves its generation, in the words of the protocol: by what is to be done about what was raised."""

from __future__ import annotations

import gc

import torch

from orchestrator.checkpoint.catalog import Catalog
from orchestrator.checkpoint.manifest import CheckpointError, UnusableCheckpoint
from orchestrator.training.messages import Generation, LeftCause
from orchestrator.training.restoring import StorageFailed
from strategies.comm.group_errors import DeviceFailed, Misconfigured, OutOfMemory, PeerLost, first_line, kind_of
from strategies.trial.trial import ModelChanged


def cause_of(error: Exception, generation: Generation, catalog: Catalog) -> tuple[LeftCause, str]:
    """The cause, and what is told of it. Errors of `strategies.comm.group_errors` are found under others, too, and
    those of a device in whatever torch raised."""
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
        case ModelChanged():
            return "job", str(error)
    kind = kind_of(error) if isinstance(error, RuntimeError) else None
    if kind is DeviceFailed:
        return "device", first_line(error)
    if kind is OutOfMemory:
        return "memory", first_line(error)
    if kind is Misconfigured:
        return "job", first_line(error)
    return "exception", f"{type(error).__name__}: {error}"


def release_memory(device: torch.device) -> None:
    """Gives back what this process keeps of its device's memory and does not use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
