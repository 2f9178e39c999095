"""What a rank says it spent: measured where it works, and told in the vote."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from strategies.gradient.stopwatch import Stopwatch
from strategies.update.timing import HEADER, RankTimes, from_row, rounded, to_row
from strategies.update.warm_up import calibrate
from tests.unit.test_step import engine


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_stretches_of_a_virtual_worker_add_up(clock: Clock) -> None:
    watch = Stopwatch(torch.device("cpu"))
    for index, seconds in ((3, 1.0), (4, 2.0), (3, 0.5)):
        with watch.on(index):
            clock.pass_(seconds)
        clock.pass_(10.0)
    assert watch.seconds() == {3: 1.5, 4: 2.0}
    watch.reset()
    assert watch.seconds() == {}


def test_waiting_for_others_is_no_work(clock: Clock) -> None:
    watch = Stopwatch()
    waited = [5.0]
    watch.waited = lambda: waited[0]
    with watch.on(0):
        clock.pass_(1.0)
        waited[0] += 3.0
        clock.pass_(3.0)
    assert watch.seconds() == {0: 1.0}


def test_an_interrupted_stretch_counts_and_a_slow_device_makes_it_longer(clock: Clock) -> None:
    watch = Stopwatch()
    watch.drag = lambda busy: clock.pass_(2 * busy)

    def interrupted() -> None:
        with watch.on(7):
            clock.pass_(1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert watch.seconds() == {7: 3.0}


def test_an_account_survives_its_row() -> None:
    account = RankTimes((0.25, 0.5), 0.125, 1.5, 0.0625, 2.25, 4096, 17)
    row = to_row(account)
    assert len(row) == HEADER + 2
    assert from_row(np.array(row).tolist()) == account
    assert account.work == 0.875
    assert rounded(RankTimes((1 / 3,), 1 / 3, 0.0, 0.0, 1.0, 1, 0)).busy == (0.333333,)


def test_a_step_says_what_it_was_spent_on() -> None:
    """One rank with all four virtual workers; its batch has 2 samples of 4 tokens for each."""
    (record,), _ = engine().run(0)
    (account,) = record.ranks
    assert len(account.busy) == 4
    assert min(account.busy) > 0
    assert 0 < sum(account.busy) <= record.phase_seconds["compute"]
    assert account.data == pytest.approx(record.phase_seconds["data"], rel=0.5)
    assert account.cost == 4.0
    assert account.tokens == record.tokens == 32
    assert account.padding == record.padding == 0


def test_a_deal_is_in_force_from_the_step_after_the_vote_that_knows_it() -> None:
    """With one rank there is nothing to deal, but an offer is numbered all the same."""
    ours = engine()
    everything = (tuple(range(4)),)
    assert ours.run(0)[0][0].deal == 0
    ours.offer(7, everything)
    (record,), agreement = ours.run(1)
    assert (record.deal, agreement.deal) == (0, 7)
    ours.offer(3, everything)
    (record,), agreement = ours.run(2)
    assert (record.deal, agreement.deal) == (7, 7), "an older offer is none"
    assert ours.newest_assignment == everything


def test_calibration_takes_time_and_changes_nothing() -> None:
    ours, other = engine(), engine()
    assert calibrate(ours) > 0
    assert ours.run(0)[0][0].loss == other.run(0)[0][0].loss
