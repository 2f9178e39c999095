"""A worker that takes the place of one that died waits until the driver has given back what that had of their GPU."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from orchestrator.job import Job
from orchestrator.training import build

GPU = torch.device("cuda", 0)
TOTAL = 80_000_000_000
JOB = """
name: test
model: {hf: {model_type: llama}}
data: {source: python-stdlib, sequence_length: 64}
train: {steps: 10, global_batch: 8}
"""


class Card:
    """Says what is free of it, the last for ever; `asked` counts how often. Sleep takes no time here."""

    def __init__(self, patch: pytest.MonkeyPatch, *free: int) -> None:
        self.free = list(free)
        self.asked = 0
        self.now = 0.0
        patch.setattr(time, "monotonic", lambda: self.now)
        patch.setattr(time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> tuple[int, int]:
        self.asked += 1
        return self.free.pop(0) if len(self.free) > 1 else self.free[0], TOTAL


def job(*overrides: str) -> Job:
    return Job.loads(JOB, overrides=["resources.gpu=1", *overrides])


def test_it_waits_until_the_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, 2_000_000_000, 2_000_000_000, 30_000_000_000, 79_000_000_000, 1)
    build.wait_for_memory(job(), GPU, card)
    assert card.asked == 4


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    card = Card(monkeypatch, 70_000_000_000)
    with caplog.at_level(logging.WARNING):
        build.wait_for_memory(job(), GPU, card)
    assert build.GIVEN_BACK_S < card.now < build.GIVEN_BACK_S + 1
    assert "other processes have 10.0 of the 80.0 GB of this GPU" in caplog.text


def test_a_gpu_with_no_memory_to_ask_it_anything_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, 79_000_000_000)
    errors = [RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError("CUDA out of memory")]

    def measure() -> tuple[int, int]:
        if errors:
            raise errors.pop()
        return card()

    build.wait_for_memory(job(), GPU, measure)
    assert (card.asked, errors) == (1, [])
    errors.append(RuntimeError("CUDA error: no device"))
    with pytest.raises(RuntimeError, match="no device"):
        build.wait_for_memory(job(), GPU, measure)


@pytest.mark.parametrize(
    ("device", "overrides"),
    [(torch.device("cpu"), ()), (GPU, ("resources.gpu=0.5", "strategy.transport=gloo"))],
    ids=["a CPU", "a shared GPU"],
)
def test_who_has_no_gpu_for_itself_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, overrides: tuple[str, ...]
) -> None:
    card = Card(monkeypatch, 0)
    build.wait_for_memory(job(*overrides), device, card)
    assert card.asked == 0
