"""Runs that wait for room on one cluster: who is first, who gives way, and that nobody waits for ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from orchestrator.control.core.config import ScalingRules
from orchestrator.control.core.protocol import Died, GiveWay, Placed, ReleaseWorker, RequestWorker, Start
from orchestrator.control.training.views import RunState
from orchestrator.runtime.ray import run_queue as turns
from orchestrator.runtime.ray.resource_request import Need
from orchestrator.runtime.ray.run_queue import SILENCE_S, RunQueue, Wish, in_order
from tests.unit.test_controller import W0, W1, W2, Stage, of, records, the

NEED = Need({"CPU": 1.0}, 1, {})
TURN_S = 120.0


class Store:
    """Ray's key-value store, as far as it is used."""

    def __init__(self) -> None:
        self.content: dict[bytes, bytes] = {}

    def _internal_kv_put(self, key: str, value: str, *, namespace: bytes) -> None:
        self.content[key.encode()] = value.encode()

    def _internal_kv_get(self, key: bytes, *, namespace: bytes) -> bytes | None:
        return self.content.get(key)

    def _internal_kv_list(self, prefix: str, *, namespace: bytes) -> list[bytes]:
        return [key for key in self.content if key.startswith(prefix.encode())]

    def _internal_kv_del(self, key: str, *, namespace: bytes) -> None:
        self.content.pop(key.encode(), None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(turns, "_store", lambda: store)
    return store


def look(
    run: RunQueue, now: float, *, firm: bool = False, could_use: Callable[[Need], bool] = lambda need: True
) -> str:  # fmt: skip
    """A fixed time and some seconds more."""
    return run.look(NEED, 1e9 + now, firm=firm, could_use=could_use)


# ---------------------------------------------------------------------------------------- the queue


def test_who_cannot_give_way_is_first_then_who_has_waited_longest() -> None:
    wishes = [
        Wish("late", 30.0, 100.0, False, NEED),
        Wish("early", 10.0, 100.0, False, NEED),
        Wish("firm", 50.0, 100.0, True, NEED),
        Wish("dead", 1.0, 100.0 - SILENCE_S, False, NEED),
    ]
    assert [wish.run for wish in in_order(wishes, 100.0)] == ["firm", "early", "late"]


def test_a_wish_survives_the_store() -> None:
    wish = Wish("a", 1.5, 2.5, True, Need({"CPU": 1.0, "GPU": 8.0}, 8, {"zone": "in(a,b)"}))
    assert Wish.read(json.loads(json.dumps(asdict(wish)))) == wish


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_clocks_that_differ_by_an_hour_neither_hide_a_run_nor_keep_it_first(store: Store, ahead: float) -> None:
    first, second = RunQueue("first", TURN_S), RunQueue("second", TURN_S)
    now, had, undecided = 0.0, set(), 0
    for _ in range(300):
        gives_way = {"first": look(first, now), "second": look(second, now + ahead)}
        undecided += sorted(gives_way.values()) not in (["", "first"], ["", "second"])
        had |= {run for run, to in gives_way.items() if not to}
        now += 1.0
    assert had == {"first", "second"}
    assert undecided <= 4, "but for the looks at which a turn ends, one of them is first, and only one"
    # One that ends without a word is missed by its silence, however far its clock is ahead.
    quiet_since = now
    while look(first, now):
        now += 1.0
    for _ in range(round(SILENCE_S) + 2):
        look(first, now)
        now += 1.0
    assert look(first, now + TURN_S + 1.0) == look(first, now + 2 * TURN_S + 2.0) == "", "nobody else waits"
    assert now - quiet_since < 2 * SILENCE_S + TURN_S


def test_two_runs_take_turns_until_one_has_what_it_needs(store: Store) -> None:
    first, second = RunQueue("first", TURN_S), RunQueue("second", TURN_S)
    assert look(first, 0.0) == ""
    assert look(second, 1.0) == "first"
    held = {look(first, now) + look(second, now) for now in range(2, int(TURN_S))}
    assert held == {"first"}, "the first goes on waiting, and the second gives way"
    for now in range(int(TURN_S), int(TURN_S) + 4):
        look(first, now), look(second, now)
    assert look(second, TURN_S + 5) == "", "its turn"
    assert look(first, TURN_S + 5) == "second"
    second.leave()
    assert look(first, TURN_S + 6) == "", "the second has what it needs"
    first.leave()
    assert not store.content


def test_nobody_gives_way_to_a_run_that_has_no_use_for_it_or_is_gone(store: Store) -> None:
    first, second = RunQueue("first", TURN_S), RunQueue("second", TURN_S)
    look(first, 0.0)
    assert look(second, 1.0, could_use=lambda need: False) == ""
    assert look(second, SILENCE_S + 1.0) == "", "it has ended without a word"


def test_a_run_whose_state_would_be_lost_gives_way_to_nobody(store: Store) -> None:
    first, firm = RunQueue("first", TURN_S), RunQueue("firm", TURN_S)
    look(first, 0.0)
    assert look(firm, 1.0, firm=True) == ""
    assert look(first, 2.0) == "firm"
    assert all(look(firm, now, firm=True) == "" for now in range(3, 3 * int(TURN_S)))


def test_what_others_wrote_there_is_passed_over(store: Store) -> None:
    store.content[b"waiting/other"] = b"{}"
    store.content[b"waiting/broken"] = b"not json"
    assert look(RunQueue("mine", TURN_S), 0.0) == ""


# ---------------------------------------------------------------------------------------- the controller


def short(**config: Any) -> Stage:
    """A run that needs two workers, has one, and has been told long ago that there is no room for another."""
    stage = Stage(min_workers=2, max_workers=2, scaling=ScalingRules(shortage_after_s=5.0), **config)
    stage.tell(Start())
    stage.ready(W0)
    stage.wait(6.0, W0)
    assert stage.controller.wants_room == "yes"
    return stage


def test_a_run_gives_all_its_places_back_and_asks_again_when_nobody_is_before_it() -> None:
    stage = short()
    told = stage.tell(GiveWay("other"))
    assert {action.worker for action in of(ReleaseWorker, told)} == {W0, W1}
    assert records(told, "gave_way") == [{"to": "other", "workers": [0, 1]}]
    assert stage.controller.gives_way_to == "other"
    assert not stage.wait(20.0), "it asks for nothing meanwhile, and says nothing"
    assert stage.controller.wants_room == "yes", "and still stands in the queue"
    told = stage.tell(GiveWay(""))
    assert len(of(RequestWorker, told)) == 2
    for action in of(RequestWorker, told):
        stage.ready(action.worker)
    assert stage.controller.state is RunState.FORMING
    stage.wait(0.5)
    assert stage.controller.wants_room == "no"


def test_a_run_that_holds_state_keeps_its_places() -> None:
    stage = Stage(min_workers=2, max_workers=2, scaling=ScalingRules(shortage_after_s=5.0))
    stage.running(W0, W1).train(3)
    stage.tell(Died(W1, "SIGKILL"))
    stage.leave(W0, "peer")
    stage.wait(6.0, W0)
    assert stage.controller.wants_room == "firmly"
    assert not of(ReleaseWorker, stage.tell(GiveWay("other")))
    newest = the(RequestWorker, [action for action in stage.told if isinstance(action, RequestWorker)][-1:]).worker
    assert stage.ready(newest), "it goes on asking"
    assert stage.controller.state is RunState.FORMING


def test_a_run_that_trains_does_not_wait_for_room_however_many_it_could_use() -> None:
    stage = Stage(min_workers=1, max_workers=2, scaling=ScalingRules(shortage_after_s=5.0)).running(W0)
    stage.wait(10.0, W0)
    assert stage.controller.wants_room == "no"


def test_a_place_found_in_time_ends_the_wait() -> None:
    stage = short()
    stage.tell(Placed(W1, "node-1"))
    stage.wait(1.0, W0)
    assert stage.controller.wants_room == "no"


def test_who_has_found_room_by_the_time_it_is_told_keeps_it() -> None:
    stage = short()
    stage.tell(Placed(W1, "node-1"))
    assert not stage.tell(GiveWay("other"))
    assert not stage.controller.gives_way_to


def test_who_has_room_enough_and_only_warms_up_gives_no_way() -> None:
    stage = Stage(min_workers=2, max_workers=4, scaling=ScalingRules(shortage_after_s=5.0))
    stage.tell(Start())
    for worker in (W0, W1, W2):
        stage.tell(Placed(worker, f"node-{worker.slot}"))
    stage.wait(30.0)
    assert stage.controller.state is RunState.WAITING
    assert stage.controller.wants_room == "no"
    assert not stage.tell(GiveWay("other"))


def test_a_run_that_gives_way_turns_to_its_next_market_no_later_for_that() -> None:
    rules = ScalingRules(shortage_after_s=5.0, fallback_after_s=100.0, markets=("spot", "on-demand"))
    stage = Stage(min_workers=2, max_workers=2, scaling=rules)
    stage.tell(Start())
    for _ in range(4):
        stage.wait(15.0)
        stage.tell(GiveWay("other"))
        stage.wait(15.0)
        stage.tell(GiveWay(""))
    (changed,) = stage.recorded("market_changed")
    assert changed["waited_seconds"] == pytest.approx(100.0, abs=1.0), "of which it asked for half"
    assert of(RequestWorker, stage.told)[-1].market == "on-demand"
