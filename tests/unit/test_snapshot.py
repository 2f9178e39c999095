"""A share of the state is saved as it was, whatever is done while it is being copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from strategies.layout.statemap import whole
from strategies.state import host_copies
from strategies.state.buffers import Buffer
from strategies.state.host_copies import HostMemory, SideCopies
from strategies.state.snapshot import Snapshot
from strategies.state.training_state import TrainingState
from strategies.update.engine import StepEngine
from tests.unit.test_step import engine
from tests.unit.tiny_model import CPU, make, settle


class LateCopies(SideCopies):
    """Copies nothing before it has to, as a stream of a GPU may."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._queued: list[tuple[torch.Tensor, Buffer, int]] = []

    def copy(self, target: torch.Tensor, source: Buffer, offset: int) -> None:
        target.fill_(torch.nan)
        self._queued.append((target, source, offset))

    def before_change(self) -> None:
        self.finish()

    def finish(self) -> None:
        for target, source, offset in self._queued:
            target.copy_(source.read(offset, len(target)))
        self._queued = []


def contents(snapshot: Snapshot) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    return {(each.name, each.box.offsets): each.values.clone() for each in snapshot.contents()}


def everything(state: TrainingState) -> Snapshot:
    snapshot = Snapshot(state.space, CPU)
    snapshot.take(state, whole(state.space.size, 1), buffers=True)
    return snapshot


def train_on(made: StepEngine) -> None:
    made.run(1)


def move(made: StepEngine) -> None:
    """The same place again is the same memory, in which somebody else's step is then put."""
    made.state.start_over()
    settle(made.state)


@pytest.mark.parametrize("change", [train_on, move])
def test_what_is_saved_is_what_was_there(change: Callable[[StepEngine], None]) -> None:
    made = engine()
    made.run(0)
    expected = contents(everything(made.state))
    made.state.reads = LateCopies()
    snapshot = everything(made.state)
    change(made)
    found = contents(snapshot)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    now = contents(everything(made.state))
    assert not all(torch.equal(now[key], expected[key]) for key in expected), "it did change"


def test_memory_is_used_again_and_grows_with_what_there_is_to_copy() -> None:
    state = make()
    settle(state)
    snapshot = Snapshot(state.space, CPU)
    half = state.space.size // 2
    sizes = []
    for size in (half, state.space.size, half):
        snapshot.take(state, whole(size, 1), buffers=False)
        sizes.append(snapshot._memory.values.numel())
    kinds = 1 + len(state.spec.moments)
    assert sizes == [kinds * half, kinds * state.space.size, kinds * state.space.size], "of exactly that size"


@pytest.mark.parametrize("error", [0, 801])
def test_memory_that_cannot_be_page_locked_is_memory_all_the_same(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """801 is "operation not supported", which CUDA keeps until somebody asks for it."""
    asked: list[str] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            asked.append(f"{size} bytes")
            return error

        def cudaHostUnregister(self, address: int) -> int:
            asked.append("given back")
            return 0

    monkeypatch.setattr(host_copies, "_runtime", Runtime)
    monkeypatch.setattr(host_copies, "_forget_error", lambda device: asked.append("forgotten"))
    memory = HostMemory(1000, torch.device("cuda", 0))
    memory.values.fill_(1.0)
    assert memory.values.sum() == 1000
    memory.close()
    assert asked == (["4000 bytes", "forgotten"] if error else ["4000 bytes", "given back"])


def test_memory_of_a_cpu_is_plain() -> None:
    memory = HostMemory(5, CPU)
    assert (memory.values.numel(), memory.values.dtype) == (5, torch.float32)
    memory.close()
    assert memory.values.numel() == 0
