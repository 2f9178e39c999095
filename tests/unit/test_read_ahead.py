"""Batches fetched ahead: the same ones, in bounded number, and never a step too far."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from orchestrator.data import read_ahead
from orchestrator.data.read_ahead import ReadAhead

Key = tuple[int, int]


class Source:
    """A function to be read ahead of, with a clock that only it moves; every read can be held up."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.reads: list[tuple[Key, str]] = []
        self.failing: dict[Key, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self.local = threading.local()

    def clock(self) -> float:
        return float(getattr(self.local, "now", 0.0))

    def __call__(self, step: int, virtual_worker: int) -> np.ndarray:
        key = (step, virtual_worker)
        if threading.current_thread() is not threading.main_thread():
            assert self.gate.wait(30)
        self.local.now = self.clock() + self.seconds
        with self._lock:
            self.reads.append((key, threading.current_thread().name))
            if key in self.failing:
                raise self.failing.pop(key)
        return batch_of(key)

    @property
    def keys(self) -> list[Key]:
        return [key for key, _ in self.reads]

    def ahead(self) -> list[Key]:
        return [key for key, thread in self.reads if thread == "read-ahead"]


def batch_of(key: Key) -> np.ndarray:
    return np.array(key, dtype=np.int64)


Make = Callable[..., ReadAhead[np.ndarray]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[ReadAhead[np.ndarray], Source]] = []

    def build(source: Source, **options: int) -> ReadAhead[np.ndarray]:
        made.append((ReadAhead(source, clock=source.clock, **options), source))
        return made[-1][0]

    yield build
    for one, source in made:
        source.gate.set()
        one.close()
        if one._thread is not None:
            one._thread.join(30)
            assert not one._thread.is_alive(), "close ends the thread"


def _settle(one: ReadAhead[np.ndarray]) -> None:
    """Waits until all that is to be ahead is there."""
    with one._change:
        assert one._change.wait_for(lambda: one._first_missing() is None and one._at_work is None, 30)


def _train(one: ReadAhead[np.ndarray], steps: range, held: list[int]) -> None:
    for step in steps:
        for worker in held:
            assert one(step, worker).tolist() == [step, worker]


def test_fast_reads_have_no_thread(make: Make) -> None:
    source = Source(0.001)
    one = make(source)
    one.expect([0, 1])
    _train(one, range(20), [0, 1])
    assert one._thread is None
    assert not source.ahead()
    assert len(source.keys) == 40


def test_slow_reads_are_done_ahead_once_each_and_not_beyond_the_end(make: Make) -> None:
    source = Source(0.003)
    one = make(source, num_steps=10)
    one.expect([3, 1])
    for step in range(10):
        for worker in (3, 1):
            assert one(step, worker).tolist() == [step, worker]
            if one.is_slow:
                _settle(one)
    assert sorted(source.keys) == [(step, worker) for step in range(10) for worker in (1, 3)]
    # Three reads show that it is slow; the third call begins to read ahead only after having read by itself.
    assert source.ahead() == [(step, worker) for step in range(10) for worker in (3, 1)][4:]


def test_at_most_two_steps_and_so_many_bytes_are_ahead(make: Make) -> None:
    for max_bytes, most in ((1 << 20, 6), (16 * 4, 4), (1, 1)):
        source = Source(0.003)
        one = make(source, max_bytes=max_bytes)
        one.expect([0, 1, 2])
        for worker in (0, 1, 2, 0, 1, 2):
            one(worker // 3, worker)
            if one.is_slow:
                _settle(one)
                assert len(one._ready) <= most
        assert len(one._ready) == most


def test_it_stops_when_reading_becomes_fast(make: Make) -> None:
    source = Source(0.003)
    one = make(source)
    one.expect([0])
    _train(one, range(5), [0])
    assert one.is_slow
    source.seconds = 0.0001
    _train(one, range(5, 30), [0])
    assert not one.is_slow
    before = len(source.ahead())
    _train(one, range(30, 40), [0])
    assert len(source.ahead()) == before


def test_what_fails_ahead_is_raised_where_it_is_needed_and_then_read_again(make: Make) -> None:
    source = Source(0.003)
    one = make(source)
    one.expect([0, 1])
    source.failing[3, 1] = OSError("the shard is gone")
    _train(one, range(2), [0, 1])
    _settle(one)
    _train(one, range(2, 3), [0, 1])
    assert one(3, 0).tolist() == [3, 0]
    _settle(one)
    assert (3, 1) in source.ahead()
    with pytest.raises(OSError, match="the shard is gone"):
        one(3, 1)
    assert one(3, 1).tolist() == [3, 1]
    _train(one, range(4, 6), [0, 1])


def test_another_assignment_drops_what_is_no_longer_needed(make: Make) -> None:
    source = Source(0.003)
    one = make(source)
    one.expect([0, 1])
    _train(one, range(3), [0, 1])
    _settle(one)
    assert {worker for _, worker in one._ready} == {0, 1}
    one.expect([1, 5])
    assert {worker for _, worker in one._ready} == {1}
    one.expect([5, 6])
    assert not one._ready
    _train(one, range(3, 6), [5, 6])
    _settle(one)
    assert {worker for _, worker in one._ready} == {5, 6}


def test_a_batch_on_its_way_is_waited_for_also_across_a_change(make: Make) -> None:
    source = Source(0.003)
    one = make(source)
    one.expect([0])
    source.gate.clear()
    _train(one, range(3), [0])
    assert one.is_slow
    one(2, 0)  # the thread is held up in the read of (3, 0) from now on
    results: list[list[int]] = []
    caller = threading.Thread(target=lambda: results.append(one(3, 0).tolist()))
    caller.start()
    one.expect([1])
    one.close()
    source.gate.set()
    caller.join(30)
    assert results == [[3, 0]]
    assert one(4, 1).tolist() == [4, 1], "it still reads when closed"


def test_random_orders_assignments_and_failures_give_the_right_batches(make: Make) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(30):
        source = Source(0.0)
        one = make(source, num_steps=40, max_bytes=rng.choice([1, 64, 1 << 20]))
        step, held = 0, [0]
        while step < 40:
            if rng.random() < 0.2:
                held = rng.sample(range(8), rng.randint(1, 8))
                one.expect(held)
                step = max(0, step - rng.randint(0, 2))
            source.seconds = rng.choice([0.0001, 0.005])
            if rng.random() < 0.1:
                source.failing[step, rng.choice(held)] = OSError("once")
            for worker in held if rng.random() < 0.8 else rng.sample(held, len(held)):
                try:
                    batch = one(step, worker)
                except OSError:
                    batch = one(step, worker)
                assert batch.tolist() == [step, worker]
            step += 1
        assert all(key[0] < 40 for key in source.ahead())


def test_bytes_of_a_batch_of_any_make() -> None:
    @dataclasses.dataclass(frozen=True)
    class Batch:
        tokens: np.ndarray
        lengths: tuple[np.ndarray, ...]
        digest: int

    array = np.zeros((2, 3), dtype=np.int64)
    assert read_ahead.num_bytes(array) == 48
    assert read_ahead.num_bytes((array, array, 7)) == 96
    assert read_ahead.num_bytes(Batch(array, (array, array), 7)) == 144
    assert read_ahead.num_bytes({"a": [array], "b": None}) == 48
