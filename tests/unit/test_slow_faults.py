"""The fault kind `slow`: what it makes wait, by how much, and until when."""

from __future__ import annotations

import time

import pytest

from orchestrator.job import Job
from orchestrator.training.fault_injector import FaultInjector
from tests.victims import Bystander

TEXT = """
name: slow
model: {hf: {model_type: llama}}
data: {source: python-stdlib, sequence_length: 16}
train: {steps: 100, global_batch: 8}
"""


class Slowed:
    """An injector of worker 1, and for how long it has waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *faults: str) -> None:
        self.slept = 0.0
        monkeypatch.setattr(time, "sleep", self._sleep)
        self.announced: list[int] = []
        self.injector = FaultInjector(Job.loads(TEXT, faults=faults), 1, self.announced.append, Bystander())

    def _sleep(self, seconds: float) -> None:
        self.slept += seconds

    def step(self, number: int, busy_s: float = 1.0) -> float:
        """A step with one virtual worker; the seconds it was made to wait."""
        before = self.slept
        self.injector.on_phase("data", number)
        self.injector.delay()
        self.injector.on_phase("compute", number)
        self.injector.drag(busy_s)
        return self.slept - before


def test_a_device_is_slow_for_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed = Slowed(monkeypatch, "step=3,worker=1,kind=slow,factor=2.5,steps=2")
    assert [slowed.step(number) for number in range(7)] == [0.0, 0.0, 0.0, 1.5, 1.5, 0.0, 0.0]
    assert slowed.announced == [0]


def test_slowness_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed = Slowed(monkeypatch, "step=0,worker=1,kind=slow,factor=4", "step=1,worker=1,kind=slow,factor=2,steps=1")
    assert [slowed.step(number) for number in range(3)] == [3.0, 7.0, 3.0]


def test_slow_reading_takes_as_long_as_it_makes_a_virtual_worker_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed = Slowed(monkeypatch, "step=2,worker=1,kind=slow,factor=3,phase=data,steps=1")
    assert [slowed.step(number, busy_s=0.5) for number in range(4)] == [0.0, 0.0, 1.0, 0.0]


def test_another_worker_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed = Slowed(monkeypatch, "step=0,worker=2,kind=slow")
    assert not slowed.injector.may_be_slow
    assert slowed.step(0) == 0.0


def test_what_a_slow_fault_cannot_be_is_refused() -> None:
    for fault, reason in (
        ("step=1,worker=1,kind=slow,phase=vote", "its phase is one of these, not vote"),
        ("step=1,worker=1,kind=kill,steps=2", "says nothing about kind kill, only about slow"),
        ("step=1,worker=1,kind=slow,factor=0.5", "more than 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            Job.loads(TEXT, faults=[fault])
