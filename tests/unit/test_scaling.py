"""How a run takes in nodes that come and go, and what it asks of a cluster that has no room."""

from __future__ import annotations

import random

import pytest

from orchestrator.control.core.config import ScalingRules
from orchestrator.control.core.protocol import (
    Died,
    DrainNotice,
    NodesStarting,
    ReleaseWorker,
    RequestWorker,
    Resize,
    Start,
    Stop,
    TellShortage,
)
from orchestrator.control.core.scale_up import ScaleUpBackoff
from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.protocol import Action
from orchestrator.control.training.views import RunState, WorkerView
from orchestrator.training.orders import Pause
from tests.unit.events_in_tests import event_with
from tests.unit.test_controller import W0, W1, W2, W3, Stage, of, records


def training(**scaling: object) -> Stage:
    """Two of three wanted workers train; the third is on its way."""
    stage = Stage(max_workers=3, scaling=ScalingRules(**scaling))  # type: ignore[arg-type]
    stage.tell(Start())
    stage.ready(W0, W1)
    stage.wait(4.0, W0, W1)
    stage.join()
    stage.train(3)
    return stage


def gone(stage: Stage) -> tuple[WorkerId, ...]:
    return tuple(worker for worker in stage.members if not stage.controller.workers[worker].alive)


def test_a_newcomer_joins_at_once_when_nothing_has_changed_for_long() -> None:
    stage = training(settle_s=2.0)
    assert of(Pause, stage.ready(W2))


def test_a_newcomer_waits_while_the_run_settles() -> None:
    stage = training(settle_s=10.0)
    assert not of(Pause, stage.ready(W2)), "the last change is 3 s ago, and 10 s are wanted"
    assert of(Pause, stage.wait(12.0, W0, W1, W2))


def test_a_user_who_resizes_does_not_wait() -> None:
    stage = Stage(max_workers=3, scaling=ScalingRules(settle_s=1000.0))
    stage.tell(Start())
    stage.ready(W0, W1)
    stage.wait(4.0, W0, W1)
    stage.join()
    stage.tell(Resize(2))
    stage.train(1)
    (request,) = of(RequestWorker, stage.tell(Resize(3)))
    assert of(Pause, stage.ready(request.worker))


def a_view(joined_at: float | None) -> WorkerView:
    return WorkerView(WorkerId(5, 0), requested_at=0.0, joined_at=joined_at)


def test_each_flap_doubles_the_wait_up_to_the_window_until_it_is_quiet_for_so_long() -> None:
    pace = ScaleUpBackoff(ScalingRules(settle_s=2.0, flap_window_s=60.0))
    waits = []
    for number in range(7):
        now = 100.0 + 10 * number
        pace.lost(a_view(now - 5.0), now)
        waits.append(pace.wait_s(now))
    assert waits == [4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    # They may come after 60 s, and have stayed as long after 120.
    assert pace.wait_s(160.0 + 119.0) == 60.0
    assert pace.wait_s(160.0 + 121.0) == 2.0
    pace.lost(a_view(300.0), 305.0)
    assert pace.wait_s(305.0) == 4.0, "it begins anew"


@pytest.mark.parametrize("joined_at", [None, 10.0])
def test_old_members_and_those_of_the_beginning_do_not_flap(joined_at: float | None) -> None:
    pace = ScaleUpBackoff(ScalingRules(settle_s=2.0, flap_window_s=60.0))
    pace.lost(a_view(joined_at), 100.0)
    assert pace.wait_s(100.0) == 2.0


def test_a_notice_and_the_death_after_it_are_one_flap() -> None:
    pace = ScaleUpBackoff(ScalingRules(settle_s=2.0, flap_window_s=60.0))
    view = a_view(95.0)
    pace.lost(view, 100.0)
    pace.lost(view, 101.0)
    assert pace.wait_s(101.0) == 4.0


def test_growth_that_costs_much_is_rare() -> None:
    """No more than a twentieth of the time, whatever else happens meanwhile; but the longest wait is the window."""
    pace = ScaleUpBackoff(ScalingRules(settle_s=2.0, flap_window_s=100.0))
    grown = event_with("recovery", incident="grow", pause_seconds=3.0)
    pace.learn([grown], 100.0)
    pace.changed(150.0)
    assert not pace.may_grow(159.0)
    assert pace.may_grow(160.0), "a loss at 150 s does not begin it anew"
    pace.learn([event_with("recovery", incident="grow", pause_seconds=30.0)], 200.0)
    assert not pace.may_grow(299.0)
    assert pace.may_grow(300.0)


def test_workers_that_go_together_flap_once() -> None:
    pace = ScaleUpBackoff(ScalingRules(settle_s=2.0, flap_window_s=60.0))
    for slot in range(8):
        pace.lost(WorkerView(WorkerId(slot, 0), requested_at=0.0, joined_at=95.0), 100.0 + slot / 100)
    assert pace.wait_s(101.0) == 4.0


def live(stage: Stage, seconds: float, *beside: WorkerId) -> list[Action]:
    """Time goes by in which the run trains, and does as it is told; `beside` it others stand by."""
    actions = []
    for _ in range(round(seconds / 0.5)):
        now = stage.wait(0.5, *{*stage.members, *beside} - set(gone(stage)))
        if stage.controller.state is RunState.SETTLING:
            now += stage.leave_all("pause") + stage.join()
        actions += now + stage.train(1, seconds=0.0)
    return actions


def test_a_node_that_comes_and_goes_all_the_time_does_not_make_the_job_do_so() -> None:
    """A third worker whose node lasts for 4 s and is back 1 s later, for ten minutes."""
    stage = training(settle_s=2.0, flap_window_s=120.0)
    worker, until, comings = W2, stage.now + 600.0, 0
    while stage.now < until:
        comings += 1
        stage.ready(worker, node="flaky")
        live(stage, 4.0, worker)
        is_member = worker in stage.members
        stage.tell(Died(worker, "its node is gone", node_lost=True))
        if is_member:
            stage.leave_all("peer", but=(worker,))
            stage.join()
        live(stage, 1.0)
        worker = of(RequestWorker, stage.told)[-1].worker
    growths = len([record for record in stage.recorded("incident") if record["incident"] == "grow"])
    assert comings > 100
    assert 4 <= growths <= 12, "2, 4, 8, 16, ... 120 s after one another"


def test_a_shortage_is_told_once_and_its_end_too() -> None:
    stage = training(shortage_after_s=30.0)
    told = [(action.workers, round(action.waited_s)) for action in of(TellShortage, live(stage, 300.0))]
    assert told == [((W2,), 30)]
    stage.ready(W2)
    (over,) = records(live(stage, 1.0, W2), "shortage_over")
    assert 295 < over["seconds"] < 315


def test_no_shortage_is_told_when_there_is_room_in_time() -> None:
    stage = training(shortage_after_s=30.0)
    stage.ready(W2)
    actions = live(stage, 100.0, W2)
    assert not of(TellShortage, actions)
    assert not records(actions, "shortage_over")


def markets(**rules: float) -> Stage:
    """Two are wanted, one trains; spot is asked for first."""
    stage = Stage(max_workers=2, scaling=ScalingRules(markets=("spot", "on-demand"), **rules))
    first = of(RequestWorker, stage.tell(Start()))
    assert [request.market for request in first] == ["spot", "spot"]
    stage.ready(W0)
    stage.wait(4.0, W0)
    stage.join()
    return stage


def asked(stage: Stage) -> list[str]:
    return [request.market for request in of(RequestWorker, stage.told)][2:]


def test_what_one_market_does_not_have_is_asked_of_the_next_and_of_the_first_again_after_a_while() -> None:
    stage = markets(fallback_after_s=20.0, fallback_hold_s=100.0)
    live(stage, 20.0)
    assert [action.worker for action in of(ReleaseWorker, stage.told)] == [W1]
    assert asked(stage) == ["on-demand"]
    assert stage.recorded("market_changed") == [
        {"from": "spot", "to": "on-demand", "workers": 1, "waited_seconds": pytest.approx(20, abs=1)}
    ]
    (second,) = of(RequestWorker, stage.told)[2:]
    stage.ready(second.worker)
    live(stage, 5.0, second.worker)
    assert len(stage.members) == 2
    # While it is held, others are asked for there too; after that the first is tried again.
    stage.tell(Died(second.worker, "its process ended unexpectedly"))
    stage.leave_all("peer", but=(second.worker,))
    stage.join()
    assert asked(stage) == ["on-demand", "on-demand"]
    stage.ready(of(RequestWorker, stage.told)[-1].worker)
    live(stage, 120.0)
    lost = stage.members[-1]
    stage.tell(Died(lost, "its process ended unexpectedly"))
    assert asked(stage)[-1] == "spot"


def test_nodes_that_are_starting_are_waited_for() -> None:
    stage = markets(fallback_after_s=20.0)
    for _ in range(10):
        stage.tell(NodesStarting(1))
        live(stage, 10.0)
    assert asked(stage) == []
    live(stage, 60.0)
    assert asked(stage)[:1] == ["on-demand"], "none is on its way any more"


def test_when_no_market_has_any_each_round_takes_longer() -> None:
    stage = markets(fallback_after_s=20.0, fallback_hold_s=1e6, shortage_after_s=10.0)
    live(stage, 3600.0)
    changes = len(stage.recorded("market_changed"))
    assert 8 <= changes <= 14, "20, 20, 40, 40, 80, 80, ... s after one another"
    told = of(TellShortage, stage.told)
    assert [action.market for action in told] == ["spot", "on-demand"], "once for each"


def test_one_market_is_insisted_on() -> None:
    stage = Stage(max_workers=1, scaling=ScalingRules(markets=("spot",), fallback_after_s=5.0))
    (request,) = of(RequestWorker, stage.tell(Start()))
    assert request.market == "spot"
    assert not of(RequestWorker, stage.wait(60.0))


def test_who_would_have_no_work_is_given_back() -> None:
    """Five workers may come, but four replicas are the best layout for five: a fifth would idle on a costly node. That
    is known as soon as one of them says what the model costs."""
    stage = Stage(max_workers=5, pipeline=2, virtual_workers=4)
    assert len(of(RequestWorker, stage.tell(Start()))) == 5
    stage.ready(W0, W1, W2, W3)
    assert [action.worker.slot for action in of(ReleaseWorker, stage.told)] == [4]
    assert len(stage.members) == 4
    live(stage, 30.0)
    assert len(of(RequestWorker, stage.told)) == 5, "and it is not asked for again"


def test_who_ends_asks_for_nobody() -> None:
    stage = training()
    stage.tell(Stop("enough"))
    actions = stage.wait(1.0, W0, W1)
    assert [action.worker for action in of(ReleaseWorker, actions)] == [W2]
    assert not of(RequestWorker, actions)


def test_notice_of_a_newcomer_counts_as_a_flap() -> None:
    stage = training(settle_s=2.0, flap_window_s=120.0)
    stage.ready(W2)
    stage.leave_all("pause")
    stage.join()
    stage.tell(DrainNotice((W2,), "node drains", stage.now + 60))
    assert stage.controller._run.scale_up.wait_s(stage.now) == 4.0


def test_random_comings_and_goings_never_stop_growth_for_longer_than_the_window() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    pace = ScaleUpBackoff(ScalingRules(settle_s=1.0, flap_window_s=50.0))
    now = 0.0
    for _ in range(1000):
        now += dice.uniform(0.0, 30.0)
        if dice.random() < 0.5:
            pace.lost(a_view(now - dice.uniform(0.0, 100.0)), now)
        pace.changed(now)
        assert pace.may_grow(now + 50.001)
        assert not pace.may_grow(now + 0.5)
