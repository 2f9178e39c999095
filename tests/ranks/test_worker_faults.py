"""Real workers under the real controller, without Ray: whatever happens to them, the result is the job's alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.core.protocol import Resize, Stop
from orchestrator.control.core.workers import WorkerId, WorkerState
from orchestrator.control.training.views import RunState
from tests.ranks.local_cluster import (
    ONE_BY_ONE,
    Hook,
    LocalCluster,
    Outcome,
    at_phase,
    die,
    linger_and_die,
    miss_the_news,
    on_record,
    stop_for_good,
    tiny_job,
    vote_by_pairs,
    when_connecting,
    when_forming,
    when_moving_state,
)
from tests.selection import nightly

FAST_STALL = ("elastic.progress_timeout_s=1.5",)

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def run(job_text: str, tmp_path: Path) -> Run:
    """Runs the tiny job on a cluster of its own; arguments are those of `LocalCluster`."""

    def start(timeout_s: float = 240.0, **arguments: Any) -> Outcome:
        return LocalCluster(job_text, tmp_path / "run", **arguments).run(timeout_s)

    return start


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one worker makes of the job when nothing happens."""
    outcome = LocalCluster(
        job_text, tmp_path_factory.mktemp("undisturbed") / "run", overrides=["elastic.workers.max=1"]
    ).run()
    assert outcome.status == "finished", outcome.reason
    assert len(outcome.steps) == 8
    assert len(set(outcome.samples)) == 8
    return outcome


def assert_same_training(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.status == "finished", outcome.reason
    assert outcome.digest == expected.digest
    assert outcome.samples == expected.samples
    assert outcome.losses == expected.losses
    assert outcome.grad_norms == expected.grad_norms
    assert [step.lr for step in outcome.steps] == [step.lr for step in expected.steps]


def assert_nothing_lost(outcome: Outcome) -> None:
    assert outcome.rollbacks == []
    assert outcome.steps_lost == 0


def assert_survivors_kept_their_processes(outcome: Outcome, *lost: WorkerId) -> None:
    """All first members but the lost ones are members of every later generation, as the same processes."""
    survivors = {worker: pid for worker, pid in outcome.members(0).items() if worker not in lost}
    for index in range(1, len(outcome.generations)):
        assert survivors.items() <= outcome.members(index).items()
    killed = {WorkerId(r["worker"], 0) for r in outcome.of("worker_killed")}
    assert killed.isdisjoint(survivors), f"survivors were killed: {outcome.of('worker_killed')}"


def show_stalls(name: str, outcome: Outcome) -> None:
    for recovery in outcome.recoveries:
        print(
            f"{name}: {recovery['kind']} detected after {recovery['detect_seconds']:.3f} s, "
            f"stall {recovery['stall_seconds']:.3f} s, {recovery['bytes_moved']} bytes moved"
        )


# ---------------------------------------------------------------------------------------- nothing happens


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_the_result_does_not_depend_on_the_number_of_workers(run: Run, undisturbed: Outcome, workers: int) -> None:
    outcome = run(overrides=[f"elastic.workers.max={workers}"])
    assert_same_training(outcome, undisturbed)
    assert outcome.sizes == [workers]
    assert outcome.recoveries == []
    assert set(outcome.exits.values()) == {0}, "every worker ends by itself when the run is over"


def test_sgd_with_momentum_does_not_depend_on_the_number_of_workers(run: Run, job_text: str, tmp_path: Path) -> None:
    overrides = ["train.optimizer.name=sgd", "train.optimizer.momentum=0.9", "elastic.virtual_workers=4"]
    alone = LocalCluster(job_text, tmp_path / "alone", overrides=[*overrides, "elastic.workers.max=1"]).run()
    assert_same_training(run(overrides=overrides, faults=["step=2,worker=0,kind=kill,phase=vote"]), alone)


# ---------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("phase", ["data", "compute", "reduce", "gather", "vote", "commit"])
def test_a_kill_in_any_phase_costs_no_step(run: Run, undisturbed: Outcome, phase: str) -> None:
    outcome = run(faults=[f"step=3,worker=1,kind=kill,phase={phase}"])
    show_stalls(f"kill in {phase}", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert_survivors_kept_their_processes(outcome, WorkerId(1, 0))
    assert outcome.sizes[:2] == [3, 2]
    assert (outcome.recoveries[0]["kind"], outcome.recoveries[0]["worker"]) == ("kill", 1)
    assert outcome.recoveries[0]["bytes_moved"] == 0
    assert len(outcome.of("fault_injected")) == 1


@pytest.mark.parametrize("phase", ["data", "compute", "reduce", "gather", "vote", "commit"])
def test_with_a_standby_a_kill_in_any_phase_leaves_the_run_at_full_strength(
    run: Run, undisturbed: Outcome, phase: str
) -> None:
    outcome = run(
        overrides=["elastic.standby=1"],
        faults=[f"step=3,worker=1,kind=kill,phase={phase}"],
        holds={2: lambda cluster: cluster.controller.generation is not None and len(cluster.idle()) == 1},
    )
    show_stalls(f"kill in {phase}, with a standby", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert_survivors_kept_their_processes(outcome, WorkerId(1, 0))
    assert outcome.sizes == [3, 3]
    assert outcome.recoveries[0]["bytes_moved"] > 0


@pytest.mark.parametrize("phase", ["compute", "gather", "commit"])
def test_the_first_rank_is_no_different(run: Run, undisturbed: Outcome, phase: str) -> None:
    """It serves the rendezvous store and reports the steps."""
    outcome = run(faults=[f"step=3,worker=0,kind=kill,phase={phase}"])
    show_stalls(f"kill of the first rank in {phase}", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert_survivors_kept_their_processes(outcome, WorkerId(0, 0))


def test_a_kill_in_the_first_step_and_in_the_last(run: Run, undisturbed: Outcome) -> None:
    outcome = run(faults=["step=0,worker=1,kind=kill,phase=vote", "step=7,worker=2,kind=kill,phase=reduce"])
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)


@pytest.mark.parametrize("phases", [("compute", "compute"), ("gather", "gather"), ("compute", "vote")])
def test_two_kills_in_the_same_step(run: Run, undisturbed: Outcome, phases: tuple[str, str]) -> None:
    outcome = run(
        overrides=["elastic.workers.max=4"],
        faults=[f"step=3,worker={slot},kind=kill,phase={phase}" for slot, phase in zip((1, 2), phases, strict=True)],
    )
    show_stalls(f"two kills in {phases}", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert_survivors_kept_their_processes(outcome, WorkerId(1, 0), WorkerId(2, 0))
    assert len([r for r in outcome.recoveries if r["kind"] == "kill"]) == 2


def test_all_but_one_killed_at_once(run: Run, undisturbed: Outcome) -> None:
    outcome = run(faults=["step=4,worker=0,kind=kill,phase=commit", "step=4,worker=1,kind=kill,phase=commit"])
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)


# ---------------------------------------------------------------------------------------- other troubles


@pytest.mark.parametrize(
    ("kind", "phase", "seen_as"),
    [
        ("exit", "reduce", "kill"),
        ("segfault", "compute", "kill"),
        ("raise", "compute", "crash"),
        ("raise", "vote", "crash"),
        ("raise", "commit", "crash"),
        ("hang", "compute", "hang"),
        ("hang", "gather", "hang"),
        ("hang", "commit", "hang"),
        ("deadlock", "compute", "stall"),
        ("deadlock", "commit", "stall"),
    ],
)
def test_a_worker_in_trouble_is_replaced_and_costs_no_step(
    run: Run, undisturbed: Outcome, kind: str, phase: str, seen_as: str
) -> None:
    outcome = run(overrides=FAST_STALL, faults=[f"step=3,worker=1,kind={kind},phase={phase}"])
    show_stalls(f"{kind} in {phase}", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert_survivors_kept_their_processes(outcome, WorkerId(1, 0))
    troubles = [r for r in outcome.recoveries if r["kind"] != "grow"]
    assert [(r["kind"], r["worker"]) for r in troubles] == [(seen_as, 1)]


def test_a_gradient_spoilt_once_is_computed_again(run: Run, undisturbed: Outcome) -> None:
    outcome = run(faults=["step=3,worker=1,kind=nan"])
    assert_same_training(outcome, undisturbed)
    assert len(outcome.of("fault_injected")) == 1
    assert outcome.sizes == [3]
    assert not any(step.skipped for step in outcome.steps)


def test_a_slow_worker_changes_nothing_but_the_time(run: Run, undisturbed: Outcome) -> None:
    outcome = run(faults=["step=2,worker=1,kind=slow,factor=5"])
    assert_same_training(outcome, undisturbed)
    assert outcome.sizes == [3]


def test_a_worker_with_notice_leaves_at_a_step_boundary(run: Run, undisturbed: Outcome) -> None:
    outcome = run(faults=["step=3,worker=1,kind=drain"])
    show_stalls("drain", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert outcome.recoveries[0]["kind"] == "drain"
    assert all(WorkerId(1, 0) not in outcome.members(index) for index in range(1, len(outcome.generations)))


def test_a_stopped_run_ends_at_a_step_boundary_with_the_state_of_that_step(run: Run, undisturbed: Outcome) -> None:
    outcome = run(
        holds={3: lambda cluster: cluster.controller.state is RunState.SETTLING},
        script=[(lambda cluster: cluster.committed == 3, lambda cluster: cluster.feed(Stop("enough")))],
    )
    assert (outcome.status, outcome.reason) == ("stopped", "enough")
    assert outcome.losses == undisturbed.losses[:4]
    assert outcome.digest is not None


# ---------------------------------------------------------------------------------------- the news of the vote


@pytest.mark.parametrize("slot", [0, 1])
def test_a_rank_that_missed_the_news_of_the_vote_rolls_forward(run: Run, undisturbed: Outcome, slot: int) -> None:
    """It held the reduced gradient when the others committed, so it needs nobody's help to be where they are."""
    outcome = run(hooks=[partial(miss_the_news, 3, slot)])
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert outcome.sizes == [3, 3]
    after = outcome.generations[1]
    assert (after.committed, after.roll_forward) == (4, (slot,))
    assert all(after.held)
    assert {outcome.moved[1, worker] for worker in outcome.members(1)} == {0}
    assert_survivors_kept_their_processes(outcome)


def test_a_rank_that_missed_the_news_of_the_last_vote_keeps_nobody_from_saving_the_end(
    run: Run, undisturbed: Outcome
) -> None:
    """The others began to save with it as one of the writers, and it has nothing to write."""
    outcome = run(hooks=[partial(miss_the_news, 7, 1)])
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert outcome.of("checkpoint_saved")[-1]["committed"] == 8
    (failed,) = outcome.of("checkpoint_failed")
    assert failed["error"] == "worker 1 was out of the generation before it had the state to save"


def test_a_death_between_two_peers_votes_leaves_some_committed_and_all_roll_forward(
    run: Run, undisturbed: Outcome
) -> None:
    """Rank 2 of 4 dies when only rank 0 has its vote: rank 0 commits, ranks 1 and 3 are only prepared."""
    outcome = run(overrides=["elastic.workers.max=4"], hooks=[partial(vote_by_pairs, 3, 2, 0)])
    show_stalls("kill between two votes", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    after = outcome.generations[1]
    assert after.committed == 4
    assert all(after.held)
    assert [after.members[rank].worker.slot for rank in after.roll_forward] == [1, 3]
    assert {outcome.moved[1, worker] for worker in outcome.members(1)} == {0}
    assert_survivors_kept_their_processes(outcome, WorkerId(2, 0))


def test_a_step_on_record_is_not_lost_with_the_only_rank_that_committed_it(run: Run, undisturbed: Outcome) -> None:
    """Rank 0 alone commits step 3, reports it and dies; the others hold the reduced gradient of that very step."""
    outcome = run(
        hooks=[partial(vote_by_pairs, 3, 2, 0), partial(at_phase, "data", 4, 0, partial(linger_and_die, 0.5))]
    )
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)


def test_kills_at_the_commit_of_step_after_step_cost_nothing(run: Run, undisturbed: Outcome) -> None:
    """Whether some ranks miss the news of a vote is left to the race; it is rare, and does not matter. Every step waits
    for four ranks and a standby, as else the kills could outrun the workers that come instead of the lost."""

    def has_a_spare(cluster: LocalCluster, step: int) -> bool:
        idle = [view for view in cluster.controller.workers.values() if view.state is WorkerState.IDLE]
        runs = cluster.controller.state is RunState.RUNNING and len(cluster.generations) == step
        return runs and cluster.committed == step and len(idle) == 1

    killed = range(1, 6)
    outcome = run(
        overrides=["elastic.workers.max=4", "elastic.standby=1"],
        faults=[f"step={step},worker={step % 4},kind=kill,phase=commit" for step in killed],
        holds={step: partial(has_a_spare, step=step) for step in killed},
        all_ready_at_once=True,
    )
    rolled = [(g.number, g.roll_forward) for g in outcome.generations if g.roll_forward]
    print(f"{len(outcome.of('incident'))} incidents, {len(outcome.generations)} generations, rolled forward: {rolled}")
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert outcome.sizes == [4] * 6
    assert [recovery["kind"] for recovery in outcome.recoveries] == ["kill"] * len(killed)


# ---------------------------------------------------------------------------------------- trouble while joining


LOSE_ONE = "step=2,worker=1,kind=kill"


def newcomer_is_ready(cluster: LocalCluster) -> bool:
    """The generation without the lost one gives way to the one with its successor."""
    return len(cluster.generations) == 2 and cluster.controller.state is RunState.SETTLING


NEWCOMER_READY = {5: newcomer_is_ready}


@pytest.mark.parametrize(
    "hook",
    [partial(when_forming, 2, 1, die), partial(when_moving_state, 2, 1)],
    ids=["before the group is formed", "while it receives the state"],
)
def test_a_newcomer_killed_while_it_joins_costs_no_step(run: Run, undisturbed: Outcome, hook: Hook) -> None:
    outcome = run(faults=[LOSE_ONE], holds=NEWCOMER_READY, hooks=[hook])
    show_stalls("newcomer killed", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert outcome.sizes[:4] == [3, 2, 3, 2]
    assert_survivors_kept_their_processes(outcome, WorkerId(1, 0))


def test_the_source_killed_while_it_sends_is_replaced_by_another(run: Run, undisturbed: Outcome) -> None:
    outcome = run(faults=[LOSE_ONE], holds=NEWCOMER_READY, hooks=[partial(when_moving_state, 2, 0)])
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert_survivors_kept_their_processes(outcome, WorkerId(0, 0), WorkerId(1, 0))


def test_a_newcomer_with_half_a_state_counts_as_one_with_none(run: Run, undisturbed: Outcome) -> None:
    """The only holder dies in the middle of handing over; no checkpoint: all begins again, from a whole state."""
    outcome = run(
        overrides=["elastic.workers.max=2"],
        faults=[LOSE_ONE],
        holds=NEWCOMER_READY,
        hooks=[partial(when_moving_state, 2, 0)],
    )
    assert_same_training(outcome, undisturbed)
    assert outcome.rollbacks == [0]


@pytest.mark.parametrize("when", [when_forming, when_connecting], ids=["before it comes", "before it connects"])
@pytest.mark.parametrize("action", [die, stop_for_good], ids=["dies", "hangs"])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_survive_a_rank_that_fails_while_the_group_forms(
    run: Run, undisturbed: Outcome, action: Callable[[], None], rank: int, when: Callable[..., None]
) -> None:
    """Rank 0 also serves the store where the others wait for each other."""
    outcome = run(
        overrides=["elastic.workers.max=4"],
        faults=["step=2,worker=2,kind=kill"],
        hooks=[partial(when, 1, rank, action)],
        holds={1: lambda cluster: cluster.is_whole(4)},
    )
    show_stalls("failure while forming", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert_survivors_kept_their_processes(outcome, WorkerId(2, 0), WorkerId(rank, 0))


# ---------------------------------------------------------------------------------------- sizes on request


def test_shrinking_and_growing_on_request_change_nothing(run: Run, undisturbed: Outcome) -> None:
    outcome = run(
        holds={
            3: lambda cluster: cluster.controller.state is RunState.SETTLING,
            5: lambda cluster: cluster.committed == 5 and len(cluster.idle()) == 2,
        },
        script=[
            (lambda cluster: cluster.committed == 3, lambda cluster: cluster.feed(Resize(1))),
            (lambda cluster: cluster.committed == 5, lambda cluster: cluster.feed(Resize(3))),
        ],
    )
    show_stalls("resize", outcome)
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert outcome.sizes == [3, 1, 3]
    assert [recovery["kind"] for recovery in outcome.recoveries] == ["shrink", "grow"]
    assert outcome.members(0).items() >= outcome.members(1).items()
    assert outcome.members(2).items() >= outcome.members(1).items()


# ---------------------------------------------------------------------------------------- everybody dies


KILL_ALL = tuple(f"step=5,worker={slot},kind=kill" for slot in range(3))
SAVED_BEFORE_ALL_DIE = {3: ONE_BY_ONE[3], 5: partial(on_record, 5, 4)}


def test_when_all_die_the_newest_checkpoint_is_replayed_to_the_same_bits(run: Run, undisturbed: Outcome) -> None:
    outcome = run(
        overrides=["checkpoint.every_steps=2"],
        faults=KILL_ALL,
        holds=SAVED_BEFORE_ALL_DIE,
    )
    show_stalls("all killed", outcome)
    assert_same_training(outcome, undisturbed)
    assert outcome.rollbacks == [4]
    restored = [generation for generation in outcome.generations if generation.restore is not None]
    assert [generation.committed for generation in restored] == [4]
    assert outcome.steps_lost == 1
    assert {r["source"] for r in outcome.recoveries if r["kind"] == "kill"} == {"checkpoint"}


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(run: Run, undisturbed: Outcome, tmp_path: Path) -> None:
    def damage(cluster: LocalCluster) -> None:
        data = max(Path(cluster.controller.checkpoints[4]).glob("*.safetensors"), key=lambda path: path.stat().st_size)
        content = bytearray(data.read_bytes())
        content[-100] ^= 1
        data.write_bytes(content)
        damaged.append(True)

    damaged: list[bool] = []
    outcome = run(
        overrides=["checkpoint.every_steps=2"],
        faults=KILL_ALL,
        holds={**SAVED_BEFORE_ALL_DIE, 5: lambda cluster: bool(damaged)},
        script=[(partial(on_record, 5, 4), damage)],
    )
    assert_same_training(outcome, undisturbed)
    assert outcome.rollbacks == [4, 2]
    assert len(outcome.of("checkpoint_invalid")) == 1


def test_when_all_die_without_a_checkpoint_the_run_begins_again(run: Run, undisturbed: Outcome) -> None:
    outcome = run(faults=KILL_ALL, holds={5: lambda cluster: cluster.committed == 5})
    assert_same_training(outcome, undisturbed)
    assert (outcome.rollbacks, outcome.steps_lost) == ([0], 5)


# ---------------------------------------------------------------------------------------- anything at all


@pytest.mark.parametrize("seed", [0, 1, 2, *nightly(range(3, 24))])
def test_any_mixture_of_faults_gives_the_same_result(run: Run, undisturbed: Outcome, seed: int) -> None:
    rng = random.Random(seed)
    kinds = ["kill", "kill", "exit", "raise", "hang"]
    phases = ["data", "compute", "reduce", "gather", "vote", "commit"]
    faults = [
        f"step={rng.randrange(8)},worker={rng.randrange(4)},kind={rng.choice(kinds)},phase={rng.choice(phases)}"
        for _ in range(rng.randrange(2, 6))
    ]
    standby = rng.randrange(2)
    print(f"seed {seed}: standby {standby}, faults {faults}")
    outcome = run(overrides=["elastic.workers.max=4", f"elastic.standby={standby}"], faults=faults)
    show_stalls(f"seed {seed}", outcome)
    assert_same_training(outcome, undisturbed)
    assert outcome.steps_lost == 0 or len(outcome.rollbacks) > 0
