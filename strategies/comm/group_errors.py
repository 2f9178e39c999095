"""What can go wrong with a group of ranks, by what is to be done about it.

Torch says all of it in RuntimeErrors. Which of them means what is told by class where torch has one, else by the texts
of NCCL (its `ncclResult_t` names), gloo and CUDA.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.distributed as dist


class PeerLost(RuntimeError):
    """A collective or rendezvous failed because of another rank, or was aborted; this rank itself is well."""


class DeviceFailed(RuntimeError):
    """This rank's device, or its context in this process, computes no more; what it held is gone with it."""


class OutOfMemory(RuntimeError):
    """This rank's device has not enough memory for what it was asked to do."""


class Misconfigured(RuntimeError):
    """A group that cannot be as it was asked for, however often it is tried."""


OURS = (DeviceFailed, OutOfMemory, Misconfigured, PeerLost)
"""A peer is the last to be suspected: NCCL puts a device that fails, or that two ranks were given, in the same words as
a connection that ends."""
_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
_CONFIGURATION = (
    "ncclinvalidusage", "ncclinvalidargument", "nccl error 4:", "nccl error 5:", "duplicate gpu",
    "no backend type associated with",
)  # fmt: skip
_DEVICE = (
    "cuda error", "cuda driver error", "hip error", "cublas_status_", "cudnn_status_", "unspecified launch failure",
    "ncclunhandledcudaerror", "device-side assert", "illegal memory access", "uncorrectable ecc",
)  # fmt: skip
_CONNECTION = ("gloo", "connection", "broken pipe", "socket closed", "nccl")


def chain(error: BaseException) -> list[BaseException]:
    """An error and those that it was made of, the outermost first."""
    found: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in found:
        found.append(seen)
        seen = seen.__cause__ or seen.__context__
    return found


def kind_of(error: BaseException) -> type[RuntimeError] | None:
    """Which of OURS it comes down to; None when it is about something else."""
    errors = chain(error)
    for kind in OURS:
        if any(isinstance(each, kind) for each in errors):
            return kind
    texts = [str(each).lower() for each in errors]

    def says(words: tuple[str, ...]) -> bool:
        return any(word in text for text in texts for word in words)

    if any(isinstance(each, torch.OutOfMemoryError) for each in errors) or says(_MEMORY):
        return OutOfMemory
    accelerator = getattr(torch, "AcceleratorError", None)
    if (accelerator is not None and any(isinstance(each, accelerator) for each in errors)) or says(_DEVICE):
        return DeviceFailed
    if says(_CONFIGURATION):
        return Misconfigured
    network = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    if any(isinstance(each, network) for each in errors) or says(_CONNECTION):
        return PeerLost
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in a line. Torch begins some with an empty one, names the cause of others elsewhere, and has
    what NCCL knows of its errors in the last."""
    innermost, seen = error, [error]
    while innermost.__cause__ is not None and innermost.__cause__ not in seen:
        innermost = innermost.__cause__
        seen.append(innermost)
    lines = str(innermost).strip().splitlines() or [type(innermost).__name__]
    knows = f": {lines[-1].strip()}" if "Last error:" in lines[1:-1] else ""
    return f"{lines[0][:300]}{knows[:300]}"


def is_of_nccl(error: BaseException) -> bool:
    """Whether NCCL said it: a peer's death, or an abort, may be behind whatever that is, also a call of CUDA's that
    failed."""
    return any("nccl" in str(each).lower() for each in chain(error))


def _while_aborted(error: BaseException, kind: type[RuntimeError] | None) -> type[RuntimeError]:
    """What an error comes down to that was raised while groups were aborted: they are the cause of all but what a
    device, or its memory, says by itself."""
    if kind is not None and kind in (DeviceFailed, OutOfMemory) and not is_of_nccl(error):
        return kind
    return PeerLost


def raise_of_group(error: RuntimeError, what: str = "", *, is_aborted: bool = False) -> NoReturn:
    """Raises the error of ours for one out of a group's collective, with `what` failed in front: what is not known to
    be anything else is a peer's. An abort has NCCL call anything an invalid argument."""
    if isinstance(error, OURS):
        raise error
    kind = kind_of(error) or PeerLost
    if is_aborted:
        kind = _while_aborted(error, kind)
    raise kind(f"{what}: {first_line(error)}" if what else first_line(error)) from error


def raise_of_step(error: RuntimeError, *, is_aborted: bool) -> NoReturn:
    """Raises the error of ours for one out of a step, where torch's own collectives, inside a model that is split, may
    have failed; and `error` itself where it has nothing to do with them. What is raised while groups are aborted, they
    are the cause of."""
    kind = kind_of(error)
    if is_aborted:
        kind = _while_aborted(error, kind)
    if kind is None or isinstance(error, kind):
        raise error
    raise kind(first_line(error)) from error
