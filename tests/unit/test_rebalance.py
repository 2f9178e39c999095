"""What is done about uneven speeds, by the real controller in a simulated world: when, how much, and when not."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.layouts import Layouts
from orchestrator.control.training.views import ControllerConfig, RebalanceRules, WorkerView
from orchestrator.planning.balance import best_deal, best_parts, replica_seconds, seconds_of, stage_shares
from orchestrator.planning.choose import LayoutChooser
from orchestrator.training.messages import GpuReading, Ready
from orchestrator.training.orders import Deal
from strategies.layout.assignment import deal, deal_in_turn
from strategies.layout.parallel import ParallelLayout
from tests.selection import nightly
from tests.unit.layouts_in_tests import MODEL, layouts
from tests.unit.simulation import Node, World

NEVER = 1e9


def test_stages_are_compared_by_what_they_compute_in_training() -> None:
    """Frozen layers take two thirds of what others take, and their stages are no slower for it."""
    first = [replace(block, frozen_flops_per_token=block.flops_per_token) for block in MODEL.blocks[:5]]
    costs = replace(MODEL, blocks=(*first, *MODEL.blocks[5:]))
    layout = ParallelLayout(1, deal(8, [1.0]), 1, 2, "none", "1f1b", ((0, 5), (5, 10)))
    shares = stage_shares(layout, costs)
    assert shares[0] / shares[1] == pytest.approx(2 / 3, rel=0.01)
    assert best_parts(layout, costs, [1.0, 1.0])[0][1] > 5


def make(
    chooser: LayoutChooser | None = None,
    *,
    workers: int = 4,
    steps: int = 10_000,
    places: int = 8,
    noise: float = 0.03,
    standby: int = 0,
    seed: int = 1,
    rules: RebalanceRules | None = None,
    nodes: list[Node] | None = None,
) -> World:
    config = ControllerConfig(
        total_steps=steps, chooser=chooser or layouts(32), min_workers=1, max_workers=workers, standby=standby,
        rebalance=rules or RebalanceRules(evict_after_s=NEVER),
    )  # fmt: skip
    world = World(seed, config, nodes or [Node(f"node-{number}", 1) for number in range(places)])
    world.noise = noise
    world.begin()
    return world


def until_step(world: World, step: int) -> None:
    for _ in range(100_000):
        if len(world.steps) >= step or world.outcome is not None:
            return
        world.run(world.now + 0.25)
    raise AssertionError(f"step {step} never came: {len(world.steps)}")


def of(world: World, kind: str) -> list[dict[str, Any]]:
    return [record for record in world.records if record["kind"] == kind]


def slow_down(world: World, slot: int, factor: float) -> None:
    for worker in world.workers.values():
        if worker.alive and worker.id.slot == slot:
            worker.slowness = factor


def seconds(world: World, first: int, last: int) -> float:
    """The median step of a range."""
    return statistics.median(report.seconds for report in world.steps[first:last])


# ---------------------------------------------------------------------------------------- dealing anew


@pytest.mark.parametrize("seed", range(5))
def test_work_follows_speed_within_twenty_steps_and_comes_back(seed: int) -> None:
    world = make(seed=seed)
    until_step(world, 40)
    undisturbed = seconds(world, 10, 40)
    slow_down(world, 2, 2.0)
    until_step(world, 100)
    (change,) = of(world, "rebalance")
    assert change["change"] == "deal"
    assert change["from"] == [8, 8, 8, 8]
    assert change["to"][2] in (4, 5)
    assert min(change["to"][:2] + change["to"][3:]) >= 9
    assert change["speeds"]["2"] == pytest.approx(0.5, abs=0.06)
    in_force = next(report.step for report in world.steps if report.deal)
    assert in_force <= 60, f"seed {seed}"
    # The sum of the speeds is 3.5 workers'; 32 virtual workers do not divide so that all of it can be had.
    assert undisturbed * 4 / 3.5 / seconds(world, in_force, 100) >= 0.88
    (measured,) = of(world, "rebalance_measured")
    assert measured["measured_gain"] == pytest.approx(change["predicted_gain"], abs=0.06)
    slow_down(world, 2, 1.0)
    until_step(world, 160)
    assert [record["to"] for record in of(world, "rebalance")][1:] == [[8, 8, 8, 8]]
    assert seconds(world, 130, 160) == pytest.approx(undisturbed, rel=0.05)
    # All of it in the generation that there was.
    assert len(world.generations) == 1
    assert [report.step for report in world.steps] == list(range(len(world.steps)))


@pytest.mark.parametrize(("noise", "most"), [(0.2, 0), *nightly([(0.1, 0), (0.4, 1)])])
@pytest.mark.parametrize("seed", [0, *nightly(range(1, 10))])
def test_noise_moves_no_work(noise: float, most: int, seed: int) -> None:
    """2,000 steps of equal workers."""
    world = make(noise=noise, seed=seed)
    until_step(world, 2_000)
    assert len(of(world, "rebalance")) <= most, f"seed {seed}: {of(world, 'rebalance')}"


@pytest.mark.parametrize("noise", [0.2, *nightly([0.1])])
def test_with_noise_a_change_is_made_once(noise: float) -> None:
    for seed in range(3):
        world = make(noise=noise, seed=seed)
        until_step(world, 20)
        slow_down(world, 1, 1.7)
        until_step(world, 1_500)
        changes = of(world, "rebalance")
        assert 1 <= len(changes) <= 3, f"seed {seed}: {changes}"
        counts = changes[-1]["to"]
        assert counts[1] < min(counts[:1] + counts[2:]), f"seed {seed}"


@pytest.mark.parametrize("period", [3, 6, 12, 30])
def test_following_a_speed_that_goes_up_and_down_costs_nothing(period: int) -> None:
    """Slow for some steps, fast for as many: whether it is followed or not, training is no slower for it."""

    def time_of(rules: RebalanceRules) -> float:
        world = make(rules=rules)
        for number in range(600 // period):
            until_step(world, 20 + period * number)
            slow_down(world, 0, 2.5 if number % 2 == 0 else 1.0)
        return world.steps[619].committed_at - world.steps[19].committed_at if len(world.steps) > 619 else world.now

    follows = time_of(RebalanceRules(evict_after_s=NEVER))
    assert follows <= 1.02 * time_of(RebalanceRules(enabled=False))


def test_skew_is_told_and_nothing_moves_where_that_is_not_wanted() -> None:
    world = make(rules=RebalanceRules(enabled=False))
    until_step(world, 20)
    slow_down(world, 1, 3.0)
    until_step(world, 100)
    assert not of(world, "rebalance")
    assert [record["finding"] for record in of(world, "skew_found")] == ["slow device"]
    assert of(world, "skew_found")[0]["workers"] == [1]


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        (GpuReading(celsius=91, slowed_by=("heat (hardware)",), at_power_limit=True),
         "; its GPU is slowed down by heat (hardware) (91 degrees)"),
        (GpuReading(watts=250.4, at_power_limit=True), "; its GPU is at its power limit (250 W)"),
        (GpuReading(celsius=60), ""),
        (None, ""),
    ],
)  # fmt: skip
def test_who_is_slow_is_told_with_what_its_gpus_driver_says(gpu: GpuReading | None, told: str) -> None:
    world = make(rules=RebalanceRules(enabled=False))
    until_step(world, 20)
    for worker in world.workers.values():
        worker.gpu = gpu if worker.id.slot == 1 else GpuReading(slowed_by=("heat (software)",))
    slow_down(world, 1, 3.0)
    until_step(world, 100)
    (found,) = of(world, "skew_found")
    assert found["detail"].endswith(told)
    assert ("GPU" in found["detail"]) == bool(told)


def test_a_new_generation_deals_by_what_is_known() -> None:
    world = make(workers=4)
    until_step(world, 20)
    slow_down(world, 1, 2.0)
    until_step(world, 60)
    world.kill(next(worker for worker in world.members() if worker.id.slot == 3))
    until_step(world, 62)
    after = world.generations[1]
    dealt = {m.worker.slot: len(held) for m, held in zip(after.members, after.layout.assignment, strict=False)}
    assert dealt[1] < dealt[0] == dealt[2], dealt


def test_a_restarted_controller_knows_the_deal_and_makes_others() -> None:
    world = make()
    until_step(world, 20)
    slow_down(world, 1, 2.0)
    until_step(world, 60)
    world.lose_controller()
    until_step(world, 100)
    assert world.num_controllers == 2
    assert len(world.generations) == 1
    slow_down(world, 1, 1.0)
    until_step(world, 150)
    changes = of(world, "rebalance")
    assert [change["to"][1] for change in changes] == [changes[0]["to"][1], 8]
    assert changes[0]["to"][1] in (4, 5)
    assert changes[1]["from"] == changes[0]["to"]
    assert changes[1]["deal"] > changes[0]["deal"]


def test_gradients_in_rounds_give_the_slow_one_fewer_rounds() -> None:
    world = make(layouts(32, shard="gradients"))
    until_step(world, 20)
    slow_down(world, 0, 3.0)
    until_step(world, 60)
    change = of(world, "rebalance")[0]
    assert change["to"][0] < 8
    assert sum(change["to"]) == 32


# ---------------------------------------------------------------------------------------- cutting anew


def test_a_slow_stage_is_given_fewer_layers() -> None:
    world = make(layouts(8, pipeline=4), workers=4)
    until_step(world, 30)
    undisturbed = seconds(world, 10, 30)
    assert world.generations[0].layout.parts == ((0, 3), (3, 5), (5, 7), (7, 10))
    slow_down(world, world.generations[0].members[1].worker.slot, 2.0)
    until_step(world, 90)
    (change,) = of(world, "rebalance")
    assert change["change"] == "stages"
    assert world.generations[1].layout.parts == tuple(map(tuple, change["stages"])) != world.generations[0].layout.parts
    start, stop = world.generations[1].layout.parts[1]
    assert stop - start == 1
    # Twice as slow with one layer of two: as long as before, where the others have three.
    assert seconds(world, 60, 90) < 1.6 * undisturbed
    (incident,) = of(world, "incident")
    assert incident["incident"] == "rebalance"
    (recovery,) = of(world, "recovery")
    assert recovery["steps_lost"] == 0
    (measured,) = of(world, "rebalance_measured")
    assert measured["measured_gain"] > 0.5 * change["predicted_gain"] > 0
    # Its replacement knows nothing of it; a lost worker does not undo the cut.
    world.kill(world.members()[0])
    until_step(world, 95)


def test_a_cut_that_would_win_less_than_it_costs_is_not_made() -> None:
    world = make(layouts(8, pipeline=4), workers=4, steps=36)
    until_step(world, 25)
    slow_down(world, 1, 2.0)
    until_step(world, 36)
    assert not of(world, "rebalance")


# ---------------------------------------------------------------------------------------- replacing

HASTY = RebalanceRules(evict_after_s=10.0)


def test_a_worker_far_behind_is_replaced_by_a_standby() -> None:
    world = make(standby=1, rules=HASTY)
    until_step(world, 20)
    slow_down(world, 2, 3.0)
    until_step(world, 120)
    (eviction,) = of(world, "eviction")
    assert (eviction["worker"], eviction["node"]) == (2, "node-2")
    assert eviction["speed"] == pytest.approx(1 / 3, abs=0.05)
    assert eviction["seconds"] >= 10
    (incident,) = [record for record in of(world, "incident") if record["incident"] == "evict"]
    assert incident["cause"] == "worker 4 takes the place of worker 2, which is too slow"
    assert all(record["steps_lost"] == 0 for record in of(world, "recovery"))
    assert {member.worker.slot for member in world.generations[1].members} == {0, 1, 3, 4}
    assert (2, 0) in {(record["worker"], record["incarnation"]) for record in of(world, "worker_released")}
    assert not world.rollbacks
    # The standby that is asked for instead is not placed where the slow one was.
    assert "node-2" not in {worker.node.name for worker in world.workers.values() if worker.alive}


def test_without_a_standby_another_is_asked_for_and_it_works_until_that_is_there() -> None:
    world = make(rules=HASTY, places=4)
    until_step(world, 20)
    slow_down(world, 2, 3.0)
    until_step(world, 120)
    assert of(world, "eviction")
    # There is no room but where it is: it stays, and has the work that it can do.
    assert len(world.generations) == 1
    assert {member.worker.slot for member in world.generations[0].members} == {0, 1, 2, 3}
    assert of(world, "rebalance")[0]["to"][2] == min(of(world, "rebalance")[0]["to"])
    world.nodes.append(Node("late", 1))
    world.place()
    until_step(world, 160)
    slots = {member.worker.slot for member in world.generations[max(world.generations)].members}
    assert slots == {0, 1, 3, 4}


def test_one_that_is_fast_again_may_stay() -> None:
    world = make(rules=HASTY, places=4)
    until_step(world, 20)
    slow_down(world, 2, 3.0)
    until_step(world, 100)
    slow_down(world, 2, 1.0)
    until_step(world, 200)
    assert len(of(world, "eviction")) == len(of(world, "eviction_withdrawn")) == 1
    world.nodes.append(Node("late", 1))
    world.place()
    until_step(world, 260)
    assert len(world.generations) == 1
    assert world.controller is not None
    assert len([view for view in world.controller.workers.values() if view.alive]) == 4


def test_a_slow_worker_is_used_where_there_is_nobody_else() -> None:
    world = make(rules=HASTY, places=4)
    until_step(world, 20)
    slow_down(world, 2, 3.0)
    until_step(world, 100)
    world.kill(next(worker for worker in world.members() if worker.id.slot == 0))
    until_step(world, 140)
    # Who takes the place of the dead one was asked for to take that of the slow one, which is needed again.
    last = world.generations[max(world.generations)]
    assert {member.worker.slot for member in last.members} == {1, 2, 3, 4}


def test_a_restarted_controller_remembers_whom_to_replace_and_where_not_to_go() -> None:
    world = make(rules=HASTY, places=4)
    until_step(world, 20)
    slow_down(world, 2, 3.0)
    until_step(world, 100)
    assert of(world, "eviction")
    world.lose_controller()
    until_step(world, 140)
    assert world.num_controllers == 2
    assert len(of(world, "eviction")) == 1
    world.nodes.append(Node("late", 1))
    world.place()
    until_step(world, 200)
    slots = {member.worker.slot for member in world.generations[max(world.generations)].members}
    assert 2 not in slots
    assert len(slots) == 4


@pytest.mark.parametrize("lost", [0, 2])
def test_where_there_is_but_one_node_a_lost_worker_is_replaced_all_the_same(lost: int) -> None:
    """Nobody can be had instead of the slow one; that must not keep the place of another empty, nor its own."""
    world = make(rules=HASTY, nodes=[Node("only", 16)])
    until_step(world, 20)
    slow_down(world, 2, 3.0)
    until_step(world, 100)
    assert of(world, "eviction")
    world.kill(next(worker for worker in world.members() if worker.id.slot == lost))
    until_step(world, 160)
    assert len(world.generations[max(world.generations)].members) == 4


def test_a_node_stays_avoided_while_another_worker_on_it_is_too_slow() -> None:
    world = make(rules=HASTY, nodes=[Node("a", 2), Node("b", 2)])
    until_step(world, 20)
    slots = [worker.id.slot for worker in world.members() if worker.node.name == "b"]
    for slot in slots:
        slow_down(world, slot, 3.0)
    until_step(world, 120)
    assert len(of(world, "eviction")) == 2
    slow_down(world, slots[0], 1.0)
    until_step(world, 200)
    assert len(of(world, "eviction_withdrawn")) == 1
    world.nodes[1].places += 2
    world.place()
    until_step(world, 260)
    assert len(world.generations) == 1, "room on the slow node is no room for the replacement"


def test_a_recut_stage_stays_with_the_worker_it_was_cut_for() -> None:
    """After a replacement ranks are not in the order of their slots."""
    world = make(layouts(8, pipeline=4), workers=4, standby=1)
    until_step(world, 10)
    world.kill(next(worker for worker in world.members() if worker.id.slot == 0))
    until_step(world, 40)
    before = [member.worker for member in world.generations[max(world.generations)].members]
    assert before != sorted(before)
    slow_down(world, before[2].slot, 2.0)
    until_step(world, 120)
    after = world.generations[max(world.generations)]
    assert [member.worker for member in after.members] == before
    start, stop = after.layout.parts[2]
    assert stop - start == 1


def test_a_deal_half_heard_when_the_controller_dies_is_made_again() -> None:
    world = make()
    until_step(world, 20)
    deaf = world.members()[3]
    usual = deaf.take
    deaf.take = lambda command, term: None if isinstance(command, Deal) else usual(command, term)  # type: ignore[method-assign]
    slow_down(world, 1, 2.0)
    until_step(world, 42)
    assert of(world, "rebalance")
    world.lose_controller()
    deaf.take = usual  # type: ignore[method-assign]
    until_step(world, 120)
    assert world.num_controllers == 2
    assert world.steps[-1].deal == of(world, "rebalance")[-1]["deal"]
    assert len({report.deal for report in world.steps}) > 1


# ---------------------------------------------------------------------------------------- kinds of devices


def test_two_kinds_of_devices_start_with_work_by_their_speed() -> None:
    world = make(workers=4)
    world.calibrate = lambda worker: 0.2 if worker.id.slot >= 2 else 0.1
    until_step(world, 1)
    assert [len(held) for held in world.generations[0].layout.assignment] == [11, 11, 5, 5]


def test_small_differences_of_a_short_calibration_mean_nothing() -> None:
    world = make(workers=4)
    world.calibrate = lambda worker: 0.1 + 0.02 * (worker.id.slot % 2)
    until_step(world, 1)
    assert [len(held) for held in world.generations[0].layout.assignment] == [8, 8, 8, 8]


def test_a_newcomer_is_measured_beside_those_that_have_trained() -> None:
    """They have a rate in seconds of training, it has one of calibration; who has both gives the scale."""
    world = make(workers=4, places=3)
    world.calibrate = lambda worker: 0.3 if worker.id.slot == 3 else 0.1
    until_step(world, 30)
    assert len(world.generations[0].members) == 3
    world.nodes.append(Node("late", 1))
    world.place()
    until_step(world, 60)
    counts = [len(held) for held in world.generations[1].layout.assignment]
    slots = [member.worker.slot for member in world.generations[1].members]
    assert slots == [3, 0, 1, 2] or slots == [0, 1, 2, 3]
    assert counts[slots.index(3)] == 3


def test_a_slower_kind_of_device_is_not_hopeless() -> None:
    """Where a job names several kinds each is compared with its own; where it does not, slow is slow."""
    for has_kinds in (True, False):
        world = make(places=4, rules=RebalanceRules(evict_after_s=10.0, has_kinds=has_kinds))
        world.calibrate = lambda worker: 0.4 if worker.id.slot == 3 else 0.1
        until_step(world, 1)
        slow_down(world, 3, 4.0)
        until_step(world, 100)
        assert len(of(world, "eviction")) == (0 if has_kinds else 1)


def test_a_deal_that_somebody_did_not_hear_of_is_made_again() -> None:
    world = make()
    until_step(world, 20)
    deaf = world.members()[3]
    usual = deaf.take

    def take(command: Any, term: int) -> None:
        if not isinstance(command, Deal) or len(of(world, "rebalance")) > 1:
            usual(command, term)

    deaf.take = take  # type: ignore[method-assign]
    slow_down(world, 1, 2.0)
    until_step(world, 100)
    first, second, *_ = of(world, "rebalance")
    assert {report.deal for report in world.steps} == {0, second["deal"]}
    assert first["deal"] < second["deal"]


# ---------------------------------------------------------------------------------------- the arithmetic


def brute_force(total: int, replicas: list[float]) -> float:
    """The least time that the last replica can take under any assignment in which each has at least one."""

    def best(left: int, rest: list[float]) -> float:
        if len(rest) == 1:
            return left * rest[0] if left else float("inf")
        return min(
            (max(count * rest[0], best(left - count, rest[1:])) for count in range(1, left - len(rest) + 2)),
            default=float("inf"),
        )

    return best(total, replicas)


@pytest.mark.parametrize("replicas", [[1.0, 1.0], [1.0, 3.0], [1.0, 1.5, 2.0], [0.5, 1.0, 4.0], [1.0, 1.0, 1.0, 9.0]])
@pytest.mark.parametrize("total", [4, 7, 12])
def test_the_best_deal_is_the_best(total: int, replicas: list[float]) -> None:
    layout = ParallelLayout(len(replicas), deal(total, [1.0] * len(replicas)))
    found = best_deal(layout, replicas)
    assert found.seconds == pytest.approx(brute_force(total, replicas))
    assert found.seconds == seconds_of(layout, found.assignment, replicas)


@pytest.mark.parametrize("replicas", [[1.0, 1.0, 1.0], [1.0, 1.0, 3.0], [1.0, 2.0, 3.0]])
def test_the_best_deal_in_rounds_is_the_best(replicas: list[float]) -> None:
    layout = ParallelLayout(3, deal_in_turn(9, 3), shard="gradients")
    counts = [(a, b, 9 - a - b) for a in range(1, 8) for b in range(1, 9 - a)]
    least = min(seconds_of(layout, deal_in_turn(9, 3, each), replicas) for each in counts)
    assert best_deal(layout, replicas).seconds == least


def test_a_pipeline_is_as_slow_as_its_slowest_stage() -> None:
    layout = ParallelLayout(2, ((0, 1), (2, 3)), pipeline=2, parts=((0, 5), (5, 10)))
    shares = stage_shares(layout, MODEL)
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] == pytest.approx(0.5)
    assert replica_seconds(layout, [1.0, 3.0, 2.0, 1.0], shares) == pytest.approx([1.5, 1.0])


def longest(parts: tuple[tuple[int, int], ...], rates: list[float]) -> float:
    flops = [block.flops_per_token for block in MODEL.blocks]
    return max(sum(flops[start:stop]) * rate for (start, stop), rate in zip(parts, rates, strict=True))


@pytest.mark.parametrize("rates", [[1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.1, 5.0]])
def test_the_best_cut_is_the_best(rates: list[float]) -> None:
    layout = ParallelLayout(1, ((0, 1),), pipeline=3, parts=((0, 4), (4, 7), (7, 10)))
    cuts = [((0, a), (a, b), (b, 10)) for a in range(2, 7) for b in range(a + 1, 9)]
    found = best_parts(layout, MODEL, rates)
    assert longest(found, rates) == pytest.approx(min(longest(cut, rates) for cut in cuts))
    assert found[0][0] == 0
    assert found[-1][1] == 10


def test_a_part_of_each_stage_counts_where_a_stage_has_two() -> None:
    """Zero bubble: stage 0 has the first and the last part."""
    layout = ParallelLayout(
        1, ((0, 1),), pipeline=2, schedule="zero-bubble", parts=((0, 3), (3, 5), (5, 7), (7, 10))
    )  # fmt: skip
    sizes = [stop - start for start, stop in best_parts(layout, MODEL, [3.0, 1.0])]
    assert sizes[0] + sizes[3] < sizes[1] + sizes[2]


def test_cuts_are_refused_where_they_do_not_fit_in_memory() -> None:
    layout = ParallelLayout(1, (tuple(range(8)),), pipeline=2, parts=((0, 5), (5, 10)))
    lopsided = ParallelLayout(1, (tuple(range(8)),), pipeline=2, parts=((0, 2), (2, 10)))
    chooser = layouts(8, pipeline=2, max_workers=2)
    assert chooser.fits(lopsided, MODEL, 0)
    sizes = range(100_000, 4_000_000, 50_000)
    tight = [size for size in sizes if chooser.fits(layout, MODEL, size) and not chooser.fits(lopsided, MODEL, size)]
    assert tight
    choice = Layouts(ControllerConfig(total_steps=9, chooser=chooser, min_workers=2, max_workers=2))
    for memory_bytes, wanted in ((0, lopsided), (tight[0], layout)):
        ready = Ready(WorkerId(0, 0), "n", 1, "h", 1, "i", 1, memory_bytes=memory_bytes, costs=MODEL)
        views = [WorkerView(WorkerId(slot, 0), 0.0, ready=ready) for slot in range(2)]
        recut = choice.recut(layout, views, [6.0, 1.0])
        assert (recut is not None) == (wanted is lopsided)
        choice.cut_like(lopsided)
        chosen = choice.choose(2, views)
        assert chosen is not None
        assert (chosen.parts == lopsided.parts) == (wanted is lopsided)
