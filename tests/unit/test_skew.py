"""Detectors on synthetic traces: who is named, for what, how soon; and that noise names nobody."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from monitoring.skew import (
    MAX_WINDOW_STEPS,
    WINDOW_STEPS,
    Detector,
    News,
    RankAccount,
    SkewFinding,
    Window,
    Windows,
    fastest,
    standard_error,
)
from tests.selection import nightly

STEP_S = 1.0
WORKERS = tuple("abcdefgh")


def account(
    name: str,
    *,
    busy: float = 0.8,
    data: float = 0.01,
    cost: float = 4.0,
    node: str | None = None,
    stage: int = 0,
    share: float = 1.0,
    held: int = 4,
) -> RankAccount:
    return RankAccount(
        node=node or f"node of {name}", busy=busy, data=data, wait=0.1, cost=cost, held=held, tokens=int(100 * cost),
        stage=stage, share=share,
    )  # fmt: skip


class Trace:
    """Windows of made-up steps; `step(number)` gives the accounts of a step."""

    def __init__(self, step: Callable[[int], dict[str, RankAccount]], seconds: float = STEP_S) -> None:
        self._step, self._seconds = step, seconds
        self._windows, self.detector = Windows(), Detector()
        self.steps = 0

    def window(self) -> tuple[Window, News]:
        """The next one, and what it changes."""
        while True:
            window = self._windows.add(self._seconds, dict(self._step(self.steps)))
            self.steps += 1
            if window is not None:
                return window, self.detector.look(window)

    def until_named(self, most: int) -> tuple[int, SkewFinding]:
        """After how many windows something is named, and what."""
        for number in range(1, most + 1):
            _, news = self.window()
            if news.opened:
                return number, news.opened[0]
        raise AssertionError(f"nothing was found in {most} windows")


def noisy(rng: random.Random, share: float) -> float:
    return rng.uniform(1 - share, 1 + share)


# ---------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("num_workers", [2, 8, *nightly([4, 64])])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("windows", [1_000, *nightly([20_000])])
def test_noise_of_ten_percent_names_nobody(num_workers: int, kind: str, windows: int) -> None:
    rng = random.Random(f"{num_workers} {kind}")
    names = [f"w{number}" for number in range(num_workers)]

    def swing() -> float:
        return noisy(rng, 0.1) if kind == "uniform" else max(0.5, rng.gauss(1.0, 0.1))

    trace = Trace(lambda _: {name: account(name, busy=0.8 * swing(), data=0.01 * swing()) for name in names})
    for number in range(windows):
        _, news = trace.window()
        assert not news.opened, f"{news.opened} after {number} windows of {num_workers} workers, {kind}"


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_takes_one_and_a_half_times_as_long_is_named_within_five_windows(seed: int) -> None:
    rng = random.Random(seed)
    slow, onset = rng.choice(WORKERS), rng.randrange(40)

    def step(number: int) -> dict[str, RankAccount]:
        return {
            name: account(name, busy=0.8 * noisy(rng, 0.1) * (1.5 if name == slow and number >= onset else 1.0))
            for name in WORKERS
        }

    trace = Trace(step)
    while trace.steps + WINDOW_STEPS <= onset:
        assert not trace.window()[1].opened, f"seed {seed}"
    windows, found = trace.until_named(5)
    assert (found.kind, found.workers) == ("slow device", (slow,)), f"seed {seed}: {found}"
    assert windows <= 5, f"seed {seed}"


def test_hiccups_of_single_steps_name_nobody() -> None:
    """One step in six of one worker takes three times as long."""
    rng = random.Random(7)
    trace = Trace(
        lambda number: {
            name: account(name, busy=0.8 * noisy(rng, 0.05) * (3.0 if name == "c" and number % 6 == 0 else 1.0))
            for name in WORKERS
        }
    )
    for _ in range(1_000):
        assert not trace.window()[1].opened


def test_windows_are_longer_where_steps_are_less_certain() -> None:
    """Rates that swing by half need more steps to mean anything."""

    def lengths(share: float) -> set[int]:
        rng = random.Random(3)
        trace = Trace(lambda _: {name: account(name, busy=noisy(rng, share)) for name in WORKERS})
        return {trace.window()[0].steps for _ in range(50)}

    assert min(lengths(0.02)) == max(lengths(0.02)) == WINDOW_STEPS
    assert min(lengths(0.5)) > WINDOW_STEPS
    assert max(lengths(0.5)) <= MAX_WINDOW_STEPS


def test_a_window_takes_a_second_however_short_its_steps() -> None:
    trace = Trace(lambda _: {name: account(name) for name in WORKERS}, seconds=0.125)
    assert trace.window()[0].steps == 8


# ---------------------------------------------------------------------------------------- causes


def steady(**changes: RankAccount) -> Callable[[int], dict[str, RankAccount]]:
    return lambda _: {name: changes.get(name, account(name)) for name in WORKERS}


def test_a_slow_worker_is_let_off_when_it_is_fast_again() -> None:
    trace = Trace(lambda number: {n: account(n, busy=1.6 if n == "b" and number < 40 else 0.8) for n in WORKERS})
    _, found = trace.until_named(5)
    assert "computes at 0.50 of the fastest's speed" in found.detail
    while trace.steps < 40:
        assert not trace.window()[1].closed
    closed = [finding for _ in range(4) for finding in trace.window()[1].closed]
    assert [finding.workers for finding in closed] == [("b",)]
    assert not trace.detector.open


def test_between_the_two_limits_nothing_opens_and_nothing_closes() -> None:
    """0.8 of the fastest's speed is too fast to be called slow, and too slow to be let off."""
    quiet = Trace(steady(b=account("b", busy=1.0)))
    assert not [finding for _ in range(20) for finding in quiet.window()[1].opened]
    trace = Trace(
        lambda number: {n: account(n, busy=(1.6 if number < 20 else 1.0) if n == "b" else 0.8) for n in WORKERS}
    )
    trace.until_named(5)
    for _ in range(20):
        assert not trace.window()[1].closed


def test_slowness_in_comparison_with_its_own_best_is_told() -> None:
    """It was as fast as the others once; a device of a slower kind never was."""
    fell = Trace(lambda number: {n: account(n, busy=1.6 if n == "b" and number >= 8 else 0.8) for n in WORKERS})
    _, found = fell.until_named(8)
    assert found.detail == "computes at 0.50 of the fastest's speed, at 0.50 of its own best"
    _, found = Trace(steady(b=account("b", busy=1.6))).until_named(8)
    assert found.detail == "computes at 0.50 of the fastest's speed"


def test_when_all_workers_of_a_node_are_slow_it_is_the_node() -> None:
    nodes = {name: f"node-{index // 4}" for index, name in enumerate(WORKERS)}
    trace = Trace(lambda _: {n: account(n, node=nodes[n], busy=1.6 if nodes[n] == "node-1" else 0.8) for n in WORKERS})
    trace.window()
    _, news = trace.window()
    assert {(finding.kind, finding.workers) for finding in news.opened} == {("slow node", (n,)) for n in "efgh"}
    assert {finding.node for finding in news.opened} == {"node-1"}
    one = Trace(lambda _: {n: account(n, node=nodes[n], busy=1.6 if n == "e" else 0.8) for n in WORKERS})
    assert one.until_named(5)[1].kind == "slow device"


def test_a_worker_that_waits_for_its_input_has_a_slow_input() -> None:
    _, found = Trace(steady(d=account("d", data=0.9))).until_named(5)
    assert (found.kind, found.workers) == ("slow input", ("d",))


def test_when_all_wait_for_input_it_is_nobodys() -> None:
    _, found = Trace(lambda _: {name: account(name, data=0.4) for name in WORKERS}).until_named(5)
    assert (found.kind, found.workers) == ("input starvation", ())


def test_virtual_workers_that_cost_more_than_others_are_uneven_data() -> None:
    """It takes longer because it has more to do, and is not called slow for that."""
    _, found = Trace(steady(a=account("a", busy=1.2, cost=6.0))).until_named(5)
    assert (found.kind, found.workers) == ("uneven data", ("a",))


def test_more_virtual_workers_are_no_uneven_data() -> None:
    trace = Trace(steady(a=account("a", busy=1.6, cost=8.0, held=8)))
    for _ in range(10):
        window, news = trace.window()
        assert not news.opened
    assert window.data_skew == pytest.approx(8 / (8 + 7 * 4) * 8)


def test_a_stage_with_too_much_of_the_model_is_an_imbalance_of_the_pipeline() -> None:
    """Its devices are as fast as the others: seconds for a share of the model are the same."""
    stages = {name: index % 2 for index, name in enumerate(WORKERS)}
    shares = (0.3, 0.7)
    trace = Trace(
        lambda _: {n: account(n, stage=stages[n], share=shares[stages[n]], busy=shares[stages[n]]) for n in WORKERS}
    )
    _, found = trace.until_named(5)
    assert (found.kind, found.workers) == ("pipeline imbalance", tuple("bdfh"))
    assert found.value == pytest.approx(1.4)


def test_a_slow_device_is_told_from_an_imbalance_by_its_fellows() -> None:
    stages = {name: index % 2 for index, name in enumerate(WORKERS)}
    trace = Trace(lambda _: {n: account(n, stage=stages[n], share=0.5, busy=0.8 if n == "b" else 0.4) for n in WORKERS})
    _, found = trace.until_named(5)
    assert (found.kind, found.workers) == ("slow device", ("b",))


# ---------------------------------------------------------------------------------------- statistics


def test_who_comes_or_goes_begins_a_window() -> None:
    windows = Windows()
    for _ in range(WINDOW_STEPS - 1):
        assert windows.add(1.0, {n: account(n) for n in WORKERS}) is None
    assert windows.add(1.0, {n: account(n) for n in WORKERS[:4]}) is None
    found = [windows.add(1.0, {n: account(n) for n in WORKERS[:4]}) for _ in range(WINDOW_STEPS - 1)]
    assert found[-1] is not None
    assert set(found[-1].workers) == set(WORKERS[:4])


def test_a_worker_without_measured_work_has_no_rating() -> None:
    window, _ = Trace(steady(a=account("a", busy=0.0))).window()
    assert set(window.workers) == set(WORKERS[1:])


def test_the_fastest_of_many_is_no_outlier() -> None:
    assert fastest([3.0, 1.0, 2.0]) == 1.0
    assert fastest([0.1, *([1.0] * 99)]) == 1.0


def test_the_standard_error_is_that_of_a_median() -> None:
    """Against the spread of medians that are drawn anew, over many draws."""
    rng = random.Random(11)
    draws = [[rng.gauss(10.0, 1.0) for _ in range(25)] for _ in range(2_000)]
    medians = [sorted(draw)[12] for draw in draws]
    mean = sum(medians) / len(medians)
    spread = (sum((each - mean) ** 2 for each in medians) / len(medians)) ** 0.5 / mean
    estimated = sum(standard_error(draw) for draw in draws) / len(draws)
    assert estimated == pytest.approx(spread, rel=0.15)
