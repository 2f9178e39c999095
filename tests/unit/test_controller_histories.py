"""Random histories of the controller in a simulated world. One seed is one history.

Run one again, with everything that was said, by its seed:

    CONTROLLER_SEED=1234 .venv/bin/python -m pytest tests/unit/test_controller_histories.py -k one_seed -s

There are 400 in every run and 4,000 at night.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from monitoring.goodput import VOLUNTARY
from orchestrator.control.training.views import ControllerConfig, RebalanceRules
from orchestrator.training.messages import Generation
from tests.selection import nightly
from tests.unit.layouts_in_tests import MODEL, layouts
from tests.unit.simulation import Node, World

TIME_LIMIT_S = 900.0


def make_world(seed: int) -> World:
    """A cluster, a job and a list of misfortunes, drawn from the seed."""
    world = World(seed, ControllerConfig(total_steps=1, chooser=layouts(), min_workers=1, max_workers=1), [])
    random = world.random
    tensor, pipeline = random.choice([(1, 1), (1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
    shard = random.choice(["none", "optimizer", "parameters"])
    world.copies = random.choice([1, 2, 2])
    least = random.randint(1, 3)
    most = random.randint(max(least, tensor * pipeline), 6 if tensor * pipeline == 1 else 8)
    virtual_workers = most + random.choice([0, 0, 2, 5])
    saves = random.random() < 0.7
    world.config = ControllerConfig(
        total_steps=random.choice([4, 8, 12, 20, 40, 80]),
        chooser=layouts(virtual_workers, tensor, pipeline, shard),
        min_workers=least,
        max_workers=most,
        standby=random.choice([0, 0, 1, 2]),
        progress_timeout_s=random.choice([6.0, 15.0]),
        start_timeout_s=20.0,
        finalize_timeout_s=5.0,
        max_failures_per_step=4,
        rebalance=RebalanceRules(enabled=random.random() < 0.8, evict_after_s=random.choice([3.0, 60.0])),
    )
    places = most + world.config.standby + random.choice([-2, 0, 0, 1, 2])
    while places > 0:
        world.nodes.append(Node(f"node-{len(world.nodes)}", min(places, random.randint(1, 3))))
        places -= world.nodes[-1].places
    world.checkpoint_every = random.choice([2, 3, 5]) if saves else 0
    world.step_s = random.choice([0.2, 0.5, 1.0])
    world.transfer_s = random.choice([0.05, 0.3, 1.0])
    world.slow_news = random.choice([0.0, 0.0, 0.1, 0.4])
    world.rude = random.choice([0.0, 0.0, 0.1])
    world.start_failures = random.choice([0.0, 0.0, 0.1])
    world.cruel_end = random.choice([0.0, 0.0, 0.5])
    world.quiet_from = random.uniform(5.0, 35.0)
    for _ in range(random.choice([0, 1, 2, 3, 4, 6, 9, 14])):
        at = random.uniform(0.5, world.quiet_from)
        world.after(at, lambda: disturb(world))
        if random.random() < 0.3:
            # Troubles like company: while the last one is being dealt with.
            world.after(at + random.uniform(0.0, 1.5), lambda: disturb(world))
    if random.random() < 0.06:
        world.after(random.uniform(0.0, 40.0), world.stop)
    world.after(world.quiet_from + 2.0, lambda: world.restore_capacity(most + world.config.standby))
    return world


def disturb(world: World) -> None:
    """One misfortune of any kind."""
    random = world.random
    world.num_disturbances += 1
    members = world.members()
    living = [worker for worker in world.workers.values() if worker.alive]
    nodes = [node for node in world.nodes if not node.gone and not node.draining]
    kind = random.choices(
        ["kill", "kill two", "kill any", "hang", "deadlock", "raise", "node", "drain", "resize", "controller",
         "half-said", "add node", "spoil checkpoint", "hang any", "sleep", "slow"],
        [6, 2, 2, 3, 3, 3, 2, 3, 3, 3, 3, 2, 2, 1, 1, 4],
    )[0]  # fmt: skip
    if world.trace is not None:
        world.trace(f"{world.now:8.3f} *** {kind}")
    if kind in ("kill", "hang", "deadlock", "raise") and members and random.random() < 0.5:
        members = [random.choice(members)]
        world.announce_fault(members[0])
    if kind == "kill" and members:
        world.kill(random.choice(members))
    elif kind == "kill two":
        for worker in random.sample(members, min(2, len(members))):
            world.kill(worker)
    elif kind == "kill any" and living:
        world.kill(random.choice(living))
    elif kind == "hang" and members:
        world.hang(random.choice(members))
    elif kind == "hang any" and living:
        world.hang(random.choice(living))
    elif kind == "deadlock" and members:
        random.choice(members).will_deadlock = True
    elif kind == "raise" and members:
        random.choice(members).will_raise = True
    elif kind == "slow" and members:
        slowed, slowness = random.choice(members), random.choice([1.5, 2.5, 4.0])
        slowed.slowness = slowness
        world.after(random.uniform(2.0, 30.0), lambda: setattr(slowed, "slowness", 1.0))
    elif kind == "node" and nodes:
        world.lose_node(random.choice(nodes))
    elif kind == "drain" and nodes:
        world.drain(random.choice(nodes), random.choice([1.0, 4.0, 8.0, 20.0]))
    elif kind == "resize":
        world.resize(random.randint(1, 7))
    elif kind == "controller":
        world.lose_controller()
    elif kind == "sleep":
        world.sleep_controller(random.choice([1.0, 4.0, 10.0]))
    elif kind == "half-said":
        world.die_deciding()
    elif kind == "add node":
        world.nodes.append(Node(f"added-{len(world.nodes)}", random.randint(1, 3)))
        world.place()
    elif kind == "spoil checkpoint" and world.valid_checkpoints:
        world.valid_checkpoints.discard(max(world.valid_checkpoints))


def live(world: World) -> None:
    """Lets the history happen, and looks at the size of the run once everything has been quiet for a while."""
    world.begin()
    settled_at = world.quiet_from + 75.0
    world.run(settled_at)
    if world.outcome is None and world.training:
        controller = world.controller
        assert controller is not None
        assert controller.generation is not None
        best = world.config.chooser.choose(controller.target, MODEL, 0, controller.generation.layout)
        assert best is not None
        # It may have more than that, from a layout that is predicted to be as fast.
        assert best.num_placed <= len(controller.generation.members) <= controller.target, (
            f"{len(controller.generation.members)} members, {controller.target} wanted, all quiet for 75 s"
        )
    world.run(TIME_LIMIT_S)


def check(world: World) -> None:
    """What must hold at the end of every history."""
    outcome = world.outcome
    assert outcome is not None, f"still {world.controller.state if world.controller else None} after {world.now:.0f} s"
    assert outcome.reason
    records = world.records
    incidents = [r for r in records if r["kind"] == "incident"]
    recoveries = [r for r in records if r["kind"] == "recovery"]
    if outcome.status == "failed":
        # Nothing in these histories is worth giving up for, but a step that was hit again and again.
        expected = (" failed ", "while starting", "could not be saved: ")
        assert any(text in outcome.reason for text in expected), outcome
        unsaved = expected[-1] in outcome.reason  # Who was told to stop does not wait for a storage that refuses.
        assert world.num_disturbances >= 4 or world.start_failures or unsaved, outcome
    else:
        # I6: one recovery for each incident.
        def named(record: dict[str, object]) -> tuple[object, ...]:
            return record["incident"], record["worker"], record["at"]

        assert Counter(map(named, incidents)) == Counter(map(named, recoveries))
        assert max(Counter(map(named, incidents)).values(), default=0) <= 1
        assert sum(r["steps_lost"] for r in recoveries) == sum(world.rollbacks)
    if outcome.status == "finished":
        assert len(world.steps) == world.config.total_steps
        assert outcome.digest == f"sha256:{world.config.total_steps}"
        reported = {
            (r["worker"], r["incarnation"])
            for r in incidents
            if r["incident"] not in VOLUNTARY or r["worker"] is not None
        }
        for worker, at, generation in world.failures:
            if any(r["incident"] == "node" and f" {worker[0]}" in r["cause"].replace(",", " ") for r in incidents):
                continue  # One incident tells of a lost node, with all the workers that were on it.
            assert worker in reported, f"{worker} failed at {at:.2f} in generation {generation}: no incident"
    assert [report.step for report in world.steps] == list(range(len(world.steps)))
    # Every member of a generation got its start once (or not at all: it died, or its controller did).
    for worker in world.workers.values():
        assert max(worker.started.values(), default=0) <= 1
    for number in {report.generation for report in world.steps}:
        assert all(world.workers[m.worker].started[number] == 1 for m in world.generations[number].members)
    # A process that lives is still counted, or was told to leave.
    controller = world.controller
    for worker in world.workers.values():
        if worker.alive and controller is not None and worker.id not in world.dealt_with:
            assert worker.id in controller.workers, f"{worker.id} is forgotten"
            assert controller.workers[worker.id].alive, f"{worker.id} was written off and not told"
    causes = world.num_placed + 3 * world.num_disturbances + 2 * world.num_controllers + 3
    assert len(world.generations) <= causes, f"{len(world.generations)} generations for {causes} causes"


def kinds_of(generation: Generation) -> list[str]:
    """What there is to a generation."""
    layout = generation.layout
    if generation.collect:
        return ["collect"]
    said = {
        "hands over": layout.spares > 0,
        "rolls": bool(generation.roll_forward),
        "rolls a part": bool(generation.roll_forward) and not layout.is_replicated,
        "whole": layout.is_replicated,
        "parts": not layout.is_replicated,
        "restore": generation.restore is not None,
        "tensor": layout.tensor > 1,
        "pipeline": layout.pipeline > 1,
    }
    return [kind for kind, is_so in said.items() if is_so]


def history(seed: int, *, loud: bool = False) -> World:
    world = make_world(seed)
    if loud:
        world.trace = print
        world.trace(f"{world.config} {world.nodes} quiet from {world.quiet_from:.1f}")
    try:
        live(world)
        check(world)
    except Exception as error:
        error.add_note(f"CONTROLLER_SEED={seed}: rerun with -k one_seed -s")
        raise
    return world


@pytest.mark.parametrize("histories", [150, *nightly([4_000])])
def test_random_histories(histories: int) -> None:
    """Whatever happens: no step lost that somebody holds, every failure on the books, and the run comes to its end."""
    ends: Counter[str] = Counter()
    incidents: Counter[str] = Counter()
    met: Counter[str] = Counter()
    failed = []
    for seed in range(histories):
        try:
            world = history(seed)
        except Exception as error:
            failed.append(seed)
            if len(failed) == 1:
                first = error
            if len(failed) >= int(os.environ.get("CONTROLLER_MAX_FAILED", "1")):
                break
            continue
        assert world.outcome is not None
        ends[world.outcome.status] += 1
        incidents.update(r["incident"] for r in world.records if r["kind"] == "incident")
        met.update(kind for generation in world.generations.values() for kind in kinds_of(generation))
        met["rollback"] += len(world.rollbacks)
    print(f"{sum(ends.values())} histories: {dict(ends)}, incidents {dict(incidents)}, generations {dict(met)}")
    if failed:
        print(f"failed seeds: {failed}")
        raise first
    assert ends["finished"] > 0.8 * histories
    # A history that never meets a kind of trouble proves nothing about it; the more there are the more it must be met.
    least = histories // 150
    for kind in ("collect", "hands over", "rolls", "rolls a part", "whole", "parts", "restore", "tensor", "pipeline"):
        assert met[kind] >= least, f"few histories had a generation that {kind}"
    for kind in ("kill", "node", "hang", "stall", "crash", "drain", "grow", "shrink", "controller"):
        assert incidents[kind] >= least, f"few histories had a {kind}"


@pytest.mark.skipif("CONTROLLER_SEED" not in os.environ, reason="set CONTROLLER_SEED to see one history")
def test_one_seed() -> None:
    history(int(os.environ["CONTROLLER_SEED"]), loud=True)
