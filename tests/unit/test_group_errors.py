"""What torch, NCCL, gloo and CUDA say, and which of our errors it comes down to."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from strategies.comm.group_errors import (
    DeviceFailed,
    Misconfigured,
    OutOfMemory,
    PeerLost,
    first_line,
    kind_of,
    raise_of_group,
    raise_of_step,
)
from tests.ranks.fake_nccl import DUPLICATE_GPU, REMOTE_ERROR

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24470. This is "
    "typically caused by a remote worker crashing."
)
ASSERT = (
    "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in the documentation\nCUDA kernel errors "
    "might be asynchronously reported at some other API call"
)
UNHANDLED = (
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.30.7\nncclUnhandledCudaError: Call to CUDA "
    "function failed.\nLast error:\n"
)
SAID = [
    (RuntimeError(GLOO), PeerLost),
    (dist.DistBackendError(REMOTE_ERROR), PeerLost),
    (dist.DistBackendError("NCCL communicator was aborted on rank 1. "), PeerLost),
    (dist.DistBackendError("NCCL timeout in: NCCLUtils.cpp:52"), PeerLost),
    (RuntimeError("NCCL Error 6: remote process exited or there was a network error"), PeerLost),
    (dist.DistStoreError("wait timeout after 300000ms"), PeerLost),
    (dist.DistBackendError(DUPLICATE_GPU), Misconfigured),
    (RuntimeError("NCCL Error 5: invalid usage (run with NCCL_DEBUG=WARN for details)"), Misconfigured),
    (RuntimeError(ASSERT), DeviceFailed),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceFailed),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), DeviceFailed),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), DeviceFailed),
    (dist.DistBackendError(f"{UNHANDLED}Cuda failure 719 'unspecified launch failure'"), DeviceFailed),
    (RuntimeError("NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"), DeviceFailed),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OutOfMemory),
    (RuntimeError("CUDA error: out of memory"), OutOfMemory),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfMemory),
    (dist.DistBackendError(f"{UNHANDLED}Cuda failure 2 'out of memory'"), OutOfMemory),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), None),
    (ValueError("the model has no head"), None),
]


@pytest.mark.parametrize(("error", "kind"), SAID, ids=[str(error)[:40] for error, _ in SAID])
def test_errors_are_told_apart(error: Exception, kind: type[Exception] | None) -> None:
    assert kind_of(error) is kind
    wrapped = RuntimeError("\nthe schedule of a pipeline failed")
    wrapped.__cause__ = error
    assert kind_of(wrapped) is kind
    assert first_line(wrapped) == first_line(error)


def test_what_nccl_knows_of_an_error_is_told() -> None:
    assert first_line(dist.DistBackendError(DUPLICATE_GPU)).endswith(
        "NCCL version 2.30.7: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
    )
    assert first_line(RuntimeError(ASSERT)) == "CUDA error: device-side assert triggered"
    assert first_line(RuntimeError()) == "RuntimeError"


def test_what_a_group_raises_is_a_peers_unless_it_is_known_to_be_something_else() -> None:
    with pytest.raises(PeerLost, match="state copies: something else"):
        raise_of_group(RuntimeError("something else"), "state copies")
    with pytest.raises(DeviceFailed, match=r"^CUDA error: device-side assert triggered$"):
        raise_of_group(RuntimeError(ASSERT))
    mine = PeerLost("mine")
    with pytest.raises(PeerLost) as caught:
        raise_of_group(mine, "again")
    assert caught.value is mine


def test_what_a_step_raises_is_its_own_unless_groups_failed_or_were_aborted() -> None:
    own = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught:
        raise_of_step(own, is_aborted=False)
    assert caught.value is own
    with pytest.raises(PeerLost, match="mat1 and mat2"):
        raise_of_step(own, is_aborted=True)
    with pytest.raises(DeviceFailed):
        raise_of_step(RuntimeError(ASSERT), is_aborted=True)


CORRUPT = (
    "NCCL error in: NCCLUtils.cpp:94, invalid argument, NCCL version 2.30.7\nncclInvalidArgument: Invalid value for an "
    "argument."
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (dist.DistBackendError(CORRUPT), PeerLost),
        (dist.DistBackendError(f"{UNHANDLED}Cuda failure 719 'unspecified launch failure'"), PeerLost),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), PeerLost),
        (RuntimeError(ASSERT), DeviceFailed),
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory),
    ],
)
def test_what_is_raised_while_groups_are_aborted_is_the_aborts(error: RuntimeError, kind: type[Exception]) -> None:
    """NCCL calls a communicator that is being aborted an invalid argument."""
    for raise_it in (raise_of_group, raise_of_step):
        with pytest.raises(kind):
            raise_it(error, is_aborted=True)
    with pytest.raises(kind_of(error) or PeerLost):
        raise_of_group(error)
