"""The same faults on every layout: whatever is split, and whatever happens to it, the result is the job's alone.

Plain data parallelism has its own tests (`test_worker_faults`); here the model, its state or its gradients are cut up,
so that no rank has everything, and ranks need one another while they compute.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.core.protocol import Resize
from orchestrator.control.training.views import RunState
from tests.ranks.local_cluster import (
    Hook,
    LocalCluster,
    Outcome,
    at_barrier,
    die,
    miss_the_news,
    stop_for_good,
    tiny_job,
    vote_by_pairs,
    when_forming,
    when_moving_state,
)
from tests.selection import nightly

STEPS = 8


@dataclass(frozen=True)
class Split:
    """A layout of a number of workers; the data-parallel degree is what is left."""

    workers: int
    tensor: int = 1
    pipeline: int = 1
    shard: str = "none"
    schedule: str = "1f1b"
    virtual_workers: int = 0
    """0: 8, or 4 with tensor parallelism, which computes this model, far too small for it, slowly."""

    @property
    def shares(self) -> int:
        return self.virtual_workers or (8 if self.tensor == 1 else 4)

    @property
    def overrides(self) -> list[str]:
        return [
            f"strategy.tensor={self.tensor}",
            f"strategy.pipeline={self.pipeline}",
            f"strategy.shard={self.shard}",
            f"strategy.schedule={self.schedule}",
            f"elastic.workers.min={self.tensor}",
            f"elastic.workers.max={self.workers}",
            f"elastic.virtual_workers={self.shares}",
            f"train.global_batch={self.shares}",
            "elastic.heartbeat_timeout_s=2",
        ]

    def __str__(self) -> str:
        data = self.workers // (self.tensor * self.pipeline)
        degrees = {"d": data, "t": self.tensor, "p": self.pipeline}
        return "".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1) + f" {self.shard}"


Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"))


Undisturbed = Callable[[Split, int], Outcome]


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What the fewest workers make of the job of a layout in `steps` steps when nothing happens."""
    known: dict[tuple[int, int, int], Outcome] = {}

    def outcome(split: Split, steps: int) -> Outcome:
        key = (split.tensor, split.shares, steps)
        if key not in known:
            alone = Split(split.tensor, split.tensor, virtual_workers=split.shares)
            overrides = [*alone.overrides, f"train.steps={steps}"]
            directory = tmp_path_factory.mktemp("undisturbed") / "run"
            known[key] = LocalCluster(job_text, directory, overrides=overrides).run()
            assert len(known[key].steps) == len(set(known[key].samples)) == steps
        return known[key]

    return outcome


@pytest.fixture
def train(job_text: str, tmp_path: Path, undisturbed: Undisturbed) -> Train:
    """Runs the tiny job in a layout, on a cluster of its own. The result is the same as when nothing happens, and
    nothing is left behind."""

    def start(split: Split, *, steps: int = STEPS, overrides: tuple[str, ...] = (), **arguments: Any) -> Outcome:
        overrides = (*split.overrides, f"train.steps={steps}", *overrides)
        cluster = LocalCluster(job_text, tmp_path / "run", overrides=overrides, **arguments)
        outcome = cluster.run(timeout_s=240.0)
        for recovery in outcome.recoveries:
            print(
                f"{split}: {recovery['kind']} detected after {recovery['detect_seconds']:.3f} s, "
                f"stall {recovery['stall_seconds']:.3f} s, {recovery['bytes_moved']} bytes from {recovery['source']}"
            )
        expected = undisturbed(split, steps)
        assert outcome.status == "finished", outcome.reason
        assert outcome.digest == expected.digest
        assert outcome.samples == expected.samples
        assert outcome.losses == expected.losses
        assert outcome.grad_norms == expected.grad_norms
        left = {worker: outcome.exits.get(worker) for worker in outcome.members(-1)}
        assert set(left.values()) == {0}, "every worker ends by itself when the run is over"
        assert not any(_exists(pid) for pid in outcome.pids.values())
        return outcome

    return start


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def assert_nothing_lost(outcome: Outcome) -> None:
    assert outcome.rollbacks == []
    assert outcome.steps_lost == 0
    assert {recovery["source"] for recovery in outcome.recoveries} <= {"peers"}


def whole_at_every_step(split: Split, steps: int) -> dict[int, Callable[[LocalCluster], bool]]:
    """Holds every step until all workers are there again. A loss takes up to three generations to make good (without
    the lost, without those who only handed over state, with the successor), so three steps."""
    return {
        step: lambda cluster, step=step: cluster.committed == step and cluster.is_whole(split.workers)  # type: ignore[misc]
        for step in range(steps)
    }


# ---------------------------------------------------------------------------------------- one fault after the other


FAST_STALL = ("elastic.progress_timeout_s=3",)
EVERY_KIND = (
    ("kill", "compute", "kill"),
    ("segfault", "reduce", "kill"),
    ("exit", "gather", "kill"),
    ("raise", "compute", "crash"),
    ("hang", "compute", "hang"),
    ("deadlock", "compute", "stall"),
    ("drain", "compute", "drain"),
)
"""Kind, phase, and as what it is seen."""


@pytest.mark.parametrize(
    "split",
    [
        Split(4, pipeline=2, shard="parameters"),
        *nightly(
            [
                Split(4, tensor=2, shard="gradients"),
                Split(4, pipeline=2, shard="optimizer"),
                Split(4, tensor=2, pipeline=2),
            ]
        ),
    ],
    ids=str,
)
def test_every_kind_of_fault_costs_no_step_and_changes_nothing(train: Train, split: Split) -> None:
    steps = 3 * len(EVERY_KIND) + 3
    faults = ["step=0,worker=1,kind=slow,factor=2,seconds=1", "step=0,worker=2,kind=nan"]
    for number, (kind, phase, _) in enumerate(EVERY_KIND):
        faults.append(f"step={3 * number + 1},worker={(number + 1) % 4},kind={kind},phase={phase}")
    outcome = train(split, steps=steps, faults=faults, overrides=FAST_STALL, holds=whole_at_every_step(split, steps))
    assert_nothing_lost(outcome)
    assert len(outcome.of("fault_injected")) == len(faults)
    seen = [recovery["kind"] for recovery in outcome.recoveries if recovery["kind"] != "grow"]
    assert seen == [seen_as for _, _, seen_as in EVERY_KIND]
    assert not any(step.skipped for step in outcome.steps)


@pytest.mark.nightly
def test_any_rank_of_a_layout_with_every_axis_may_be_killed_in_any_phase(train: Train) -> None:
    split = Split(8, tensor=2, pipeline=2, shard="optimizer")
    phases = ("refresh", "data", "compute", "reduce", "gather", "vote", "compute", "commit")
    steps = 3 * len(phases) + 3
    faults = [f"step={3 * rank + 1},worker={rank},kind=kill,phase={phase}" for rank, phase in enumerate(phases)]
    outcome = train(split, steps=steps, faults=faults, holds=whole_at_every_step(split, steps))
    assert_nothing_lost(outcome)
    assert sorted(r["worker"] for r in outcome.recoveries if r["kind"] == "kill") == list(range(8))
    assert [r for r in outcome.recoveries if r["kind"] not in ("kill", "grow")] == []


# ---------------------------------------------------------------------------------------- several at once


CHECKPOINTS = ("checkpoint.every_steps=4",)


def kill_together(*slots: int, step: int = 5) -> dict[str, Any]:
    """All of these workers die at one moment, in the given step, when there is a checkpoint of the step before."""

    def is_time(cluster: LocalCluster) -> bool:
        saved = not cluster.job.checkpoint.every_steps or step - 1 in cluster.controller.checkpoints
        return cluster.committed == step and saved and cluster.controller.state is RunState.RUNNING

    def kill(cluster: LocalCluster) -> None:
        for slot in slots:
            cluster.kill(slot)

    def is_done(cluster: LocalCluster) -> bool:
        return cluster.committed == step and any(process.is_gone for process in cluster.processes.values())

    return {"script": [(is_time, kill)], "holds": {step: is_done}}


@pytest.mark.parametrize(
    ("split", "slots", "copies"),
    [
        (Split(2, pipeline=2), (0,), 2),
        (Split(4, pipeline=2, shard="optimizer"), (0, 2), 2),
        (Split(4, shard="parameters"), (2, 3), 3),
        *nightly(
            [
                (Split(4, pipeline=2), (0, 3), 2),
                (Split(4, pipeline=2), (0, 1), 2),
                (Split(4, tensor=2, pipeline=2), (0, 1), 2),
                (Split(4, shard="gradients"), (0, 1), 3),
                (Split(4, tensor=2, shard="optimizer"), (1, 2), 3),
            ]
        ),
    ],
    ids=[
        "a whole stage of the only replica", "a whole stage, sharded", "two of four, three copies of parameter shards",
        "different stages of different replicas", "a whole replica",
        "a whole stage of the only replica, with its tensor-parallel group",
        "two of four, three copies of gradient shards", "one of each tensor-parallel group, three copies",
    ],
)  # fmt: skip
def test_losses_at_once_cost_no_step_while_every_part_has_a_holder(
    train: Train, split: Split, slots: tuple[int, ...], copies: int
) -> None:
    outcome = train(split, overrides=(f"elastic.state_copies={copies}",), **kill_together(*slots))
    assert_nothing_lost(outcome)
    assert {r["worker"] for r in outcome.recoveries if r["kind"] == "kill"} == set(slots)


@pytest.mark.parametrize(
    ("split", "slots", "copies"),
    [
        (Split(4, pipeline=2, shard="optimizer"), (0, 1), 2),
        (Split(2, pipeline=2), (1,), 1),
        *nightly(
            [
                (Split(4, pipeline=2), (0, 2), 2),
                (Split(4, shard="parameters"), (0, 1), 2),
                (Split(4, tensor=2), (0, 2), 2),
                (Split(4, pipeline=2, shard="optimizer"), (2,), 1),
            ]
        ),
    ],
    ids=[
        "a shard and its mirror", "a stage without a copy", "a stage of all replicas", "rows and their mirror",
        "a tensor-parallel coordinate of all replicas", "a shard without a copy",
    ],
)  # fmt: skip
def test_a_part_without_a_living_holder_comes_from_the_newest_checkpoint(
    train: Train, split: Split, slots: tuple[int, ...], copies: int
) -> None:
    """And the steps since are replayed to the same bits."""
    overrides = (f"elastic.state_copies={copies}", *CHECKPOINTS)
    outcome = train(split, overrides=overrides, **kill_together(*slots))
    assert outcome.rollbacks == [4]
    assert outcome.steps_lost == 1
    killed = [r for r in outcome.recoveries if r["kind"] == "kill"]
    assert {r["source"] for r in killed} == {"checkpoint"}
    assert [generation.committed for generation in outcome.generations if generation.restore] == [4]


def test_without_a_checkpoint_a_lost_part_means_the_beginning(train: Train) -> None:
    outcome = train(Split(4, pipeline=2), **kill_together(0, 2))
    assert (outcome.rollbacks, outcome.steps_lost) == ([0], 5)


@pytest.mark.parametrize("shard", ["gradients", "optimizer"])
def test_the_last_rank_of_a_sharded_layout_goes_on_as_a_plain_one(train: Train, shard: str) -> None:
    """It computes with the same model as before, and in another way: dropout is not to notice."""
    outcome = train(Split(2, shard=shard), faults=["step=6,worker=1,kind=kill"])
    assert_nothing_lost(outcome)


# ---------------------------------------------------------------------------------------- trouble in a reshard


RELAYOUT = "step=2,worker=1,kind=kill"
"""Generation 1 is formed without this worker: all its ranks change what they hold."""


@pytest.mark.parametrize(
    "hook",
    [
        partial(when_forming, 1, 2, stop_for_good),
        partial(when_moving_state, 1, 2),
        *nightly(
            [
                partial(when_forming, 1, 0, die),
                partial(when_moving_state, 1, 0),
                partial(at_barrier, 1, 1, die),
                partial(at_barrier, 1, 1, die, passed=True),
            ]
        ),
    ],
    ids=["forming, silent", "moving, last", "forming", "moving, first", "at the barrier", "after the barrier"],
)
@pytest.mark.parametrize(
    "split", [Split(4, pipeline=2, shard="parameters"), *nightly([Split(4, shard="optimizer")])], ids=str
)
def test_a_second_loss_while_the_first_is_made_good(train: Train, split: Split, hook: Hook) -> None:
    """The first loss leaves one holder of some parts, and the second may be that one; with three copies it is not."""
    outcome = train(split, faults=[RELAYOUT], hooks=[hook], overrides=("elastic.state_copies=3",))
    assert_nothing_lost(outcome)


# ---------------------------------------------------------------------------------------- the news of the vote


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize(
    "split",
    [
        Split(3, shard="parameters"),
        *nightly([Split(4, pipeline=2, shard="optimizer"), Split(3, shard="gradients"), Split(4, pipeline=2)]),
    ],
    ids=str,
)
def test_a_rank_that_missed_the_news_of_the_vote_rolls_its_part_forward(train: Train, split: Split, slot: int) -> None:
    """In the step after a checkpoint, for which rank 0 was given the whole state: that is older than its own part."""
    outcome = train(split, hooks=[partial(miss_the_news, 3, slot)], overrides=("checkpoint.every_steps=3",))
    assert_nothing_lost(outcome)
    after = outcome.generations[1]
    assert (after.committed, after.roll_forward) == (4, (slot,))
    assert after.norm == outcome.grad_norms[3]
    assert len(after.members) == split.workers
    assert [recovery["kind"] for recovery in outcome.recoveries] == ["network"]


@pytest.mark.parametrize("split", [Split(4, pipeline=2, shard="optimizer"), Split(4, shard="parameters")], ids=str)
def test_a_death_between_two_votes_leaves_shards_that_roll_forward(train: Train, split: Split) -> None:
    """Rank 2 dies when only rank 0 has its vote: rank 0 commits, the others (and what mirrors rank 2) are prepared."""
    outcome = train(split, hooks=[partial(vote_by_pairs, 3, 2, 0)])
    assert_nothing_lost(outcome)
    after = outcome.generations[1]
    assert after.committed == 4
    assert sorted(after.members[rank].worker.slot for rank in after.roll_forward) == [1, 3]


# ---------------------------------------------------------------------------------------- sizes on request


def walk_over_all_changes(sizes: list[int]) -> list[int]:
    """Every ordered pair of different sizes follows one another exactly once (an Eulerian circuit, by Hierholzer)."""
    left = {size: [other for other in reversed(sizes) if other != size] for size in sizes}
    stack, walk = [sizes[0]], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        (Split(3, shard="optimizer"), [1, 2, 3]),
        *nightly(
            [
                (Split(4, shard="optimizer"), [1, 2, 3, 4]),
                (Split(8, pipeline=2, shard="parameters"), [2, 4, 8]),
                (Split(8, shard="optimizer"), list(range(1, 9))),
                (Split(8, pipeline=2, shard="parameters"), [2, 4, 6, 8]),
                (Split(8, tensor=2, pipeline=2, shard="gradients", virtual_workers=8), [2, 4, 6, 8]),
            ]
        ),
    ],
    ids=str,
)
def test_growing_and_shrinking_between_any_two_sizes_changes_nothing(
    train: Train, split: Split, sizes: list[int]
) -> None:
    """A change takes one step or two (the second without those who only handed over state), the next is asked for when
    it is done. With pipelines the planner leaves some workers of other sizes idle."""
    walk = walk_over_all_changes(sizes[::-1])  # a run begins with all it may have
    assert len(walk) == len(sizes) * (len(sizes) - 1) + 1
    ahead = walk[::-1]

    def is_there(cluster: LocalCluster) -> bool:
        layout = None if cluster.controller.generation is None else cluster.controller.generation.layout
        settled = cluster.controller.state is RunState.RUNNING and layout is not None and not layout.spares
        return settled and layout is not None and layout.num_placed == ahead[-1] and not cluster.idle()

    def go_on(cluster: LocalCluster) -> None:
        ahead.pop()
        if ahead:
            cluster.feed(Resize(ahead[-1]))
            cluster.script.append((is_there, go_on))

    def may_end(step: int) -> Callable[[LocalCluster], bool]:
        return lambda c: not ahead or (c.committed == step and c.controller.state is RunState.SETTLING)

    steps = 2 * len(walk)
    outcome = train(
        split,
        steps=steps,
        holds={step: may_end(step) for step in range(steps)},
        script=[(is_there, go_on)],
        all_ready_at_once=True,
    )
    assert not ahead
    assert_nothing_lost(outcome)
    placed = [g.layout.num_placed for g in outcome.generations if not g.collect]
    assert [size for index, size in enumerate(placed) if index == 0 or size != placed[index - 1]] == walk


# ---------------------------------------------------------------------------------------- anything at all


@pytest.mark.parametrize("seed", [0, 1, *nightly(range(2, 32))])
def test_any_mixture_of_layouts_and_faults_gives_the_same_result(train: Train, seed: int) -> None:
    rng = random.Random(seed)
    tensor = 2 if seed % 5 == 4 else 1
    split = Split(
        workers=tensor * rng.choice([2, 3, 4]),
        tensor=tensor,
        pipeline=rng.choice([1, 2]),
        shard=rng.choice(["none", "optimizer", "gradients", "parameters"]),
        schedule=rng.choice(["1f1b", "gpipe"]),
    )
    kinds = ["kill", "kill", "kill", "exit", "raise", "hang", "nan", "drain"]
    phases = ["refresh", "data", "compute", "reduce", "gather", "vote", "commit"]
    faults = [
        f"step={rng.randrange(STEPS)},worker={rng.randrange(split.workers)},kind={kind},"
        f"phase={'compute' if kind in ('nan', 'drain') else rng.choice(phases)}"
        for kind in rng.choices(kinds, k=rng.randrange(1, 5))
    ]
    copies, standby, every = rng.choice([1, 2, 2, 3]), tensor * rng.randrange(2), rng.choice([2, 3, None])
    print(f"seed {seed}: {split}, state_copies {copies}, standby {standby}, checkpoints {every}, faults {faults}")
    overrides = [f"elastic.state_copies={copies}", f"elastic.standby={standby}"]
    overrides += [f"checkpoint.every_steps={every}"] if every else []
    outcome = train(split, faults=faults, overrides=tuple(overrides))
    assert outcome.steps_lost == 0 or outcome.rollbacks
