"""Who waits in an NCCL group, who aborts it, and what is left of it: without NCCL, whose group is a few lines here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from strategies import compat
from strategies.comm.group_errors import PeerLost
from strategies.comm.nccl import Nccl

CPU = torch.device("cpu")


class FakeWork:
    """Over when it is told; `failed` is what it ended with."""

    def __init__(self, failed: Exception | None = None, is_over: bool = False) -> None:
        self.failed = failed
        self.is_over = is_over
        self.was_waited_for = False

    def is_completed(self) -> bool:
        return self.is_over

    def exception(self) -> Exception | None:
        return self.failed

    def wait(self) -> None:
        self.was_waited_for = True


class FakeGroup:
    """All its works are over at once; `abort` does what it is given."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self.abort = abort

    def eager_connect_single_device(self, device: torch.device) -> None:
        """It is connected."""

    def allreduce(self, tensors: Any) -> FakeWork:
        return FakeWork(is_over=True)

    def alltoall_base(self, *arguments: Any) -> FakeWork:
        return FakeWork(is_over=True)

    def _allgather_base(self, *arguments: Any) -> FakeWork:
        return FakeWork(is_over=True)


def formed(monkeypatch: pytest.MonkeyPatch, abort: Callable[[], None]) -> Nccl:
    monkeypatch.setattr(compat, "make_nccl", lambda store, rank, ranks, timeout: FakeGroup(abort))
    nccl = Nccl(CPU, lambda: False)
    nccl.form(None, 0, 2, "host", 10.0)
    return nccl


def test_nobody_waits_for_an_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    nccl = formed(monkeypatch, lambda: may_end.wait(60.0) and None)
    nccl.abort()
    with pytest.raises(PeerLost, match="the process group was aborted"):
        nccl.wait(FakeWork())
    assert not nccl.is_gone(0.0), "it is being aborted all the while"
    may_end.set()
    assert nccl.is_gone(60.0)


def test_who_waits_when_an_abort_begins_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    nccl = formed(monkeypatch, lambda: may_end.wait(60.0) and None)
    threading.Timer(0.05, nccl.abort).start()
    with pytest.raises(PeerLost, match="the process group was aborted"):
        nccl.wait(FakeWork())
    may_end.set()


def test_a_group_that_could_not_be_aborted_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Future for ProcessGroup abort timed out after 20000 ms")

    nccl = formed(monkeypatch, fails)
    nccl.drop()
    assert not nccl.is_gone(5.0)


def test_a_group_that_is_aborted_before_it_is_there_is_aborted_when_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    aborted: list[float] = []
    nccl = Nccl(CPU, lambda: False)
    nccl.abort()
    monkeypatch.setattr(
        compat, "make_nccl", lambda store, rank, ranks, timeout: FakeGroup(lambda: aborted.append(time.monotonic()))
    )
    with pytest.raises(PeerLost):
        nccl.form(None, 0, 2, "host", 10.0)
    nccl.drop()
    assert nccl.is_gone(5.0)
    assert len(aborted) == 1


def test_what_the_network_says_of_a_peer_is_raised_and_the_group_is_left_to_be_aborted_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nccl = formed(monkeypatch, lambda: None)
    work = FakeWork(RuntimeError("NCCL error: remote process exited"), is_over=True)
    with pytest.raises(RuntimeError, match="remote process exited"):
        nccl.wait(work)
    assert not work.was_waited_for
    good = FakeWork(is_over=True)
    nccl.wait(good)
    assert good.was_waited_for
