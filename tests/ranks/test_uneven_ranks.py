"""Real workers of uneven speed under the real controller: work moves, and not a bit of the result with it.

What ranks say of their speeds is set by the tests, so that nothing here depends on how fast a machine is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitoring.skew import Windows
from orchestrator.control.core.workers import WorkerId
from tests.ranks.local_cluster import LLAMA, LocalCluster, Outcome, at_phase, die, partial, tiny_job
from tests.selection import nightly

STEPS = 44
LAYOUTS = {
    "d3": (3, []),
    "d3 optimizer": (3, ["strategy.shard=optimizer"]),
    "d3 gradients": (3, ["strategy.shard=gradients"]),
    "d3 parameters": (3, ["strategy.shard=parameters"]),
    "d2p2": (4, ["strategy.pipeline=2"]),
    "d2p2 zero-bubble": (4, ["strategy.pipeline=2", "strategy.schedule=zero-bubble"]),
}
SIZES = ["elastic.virtual_workers=12", "train.global_batch=12"]
LAYERS = "model.args.layers=6"
SHORT_ROUNDS = "d3 parameters"
"""Where work that is made up takes as long as real work, there is no use in dealing anew; a Llama's need not."""


def pace(slot: int, factor: float, first: int, last: int, worker: Any) -> None:
    """Worker `slot` says that its virtual workers take `factor` seconds each from step `first` to `last`; all others,
    and it at other times, that theirs take one; and nobody's input any time."""
    watch, rank_times = worker.engine.watch, worker.engine.rank_times
    usual = watch.seconds
    worker.engine.rank_times = lambda: rank_times()._replace(data=0.0)

    def seconds() -> dict[int, float]:
        slow = worker.worker.slot == slot and first <= worker._phase_step < last
        return dict.fromkeys(usual(), factor if slow else 1.0)

    watch.seconds = seconds


def polled(times: int) -> Callable[[LocalCluster], bool]:
    """True once it was asked so often: some ticks later."""
    left = [times]

    def is_over(cluster: LocalCluster) -> bool:
        left[0] -= 1
        return left[0] <= 0

    return is_over


def has(kind: str, times: int = 1) -> Callable[[LocalCluster], bool]:
    return lambda cluster: sum(found == kind for found, _ in cluster.records) >= times


def cluster(job_text: str, directory: Path, name: str, **arguments: Any) -> LocalCluster:
    workers, overrides = LAYOUTS[name]
    made = LocalCluster(
        job_text,
        directory,
        overrides=[
            *SIZES, *([] if name == SHORT_ROUNDS else [LAYERS]), *overrides, f"elastic.workers.max={workers}",
            f"train.steps={STEPS}", *arguments.pop("overrides", []),
        ],
        **arguments,
    )  # fmt: skip
    # Steps take milliseconds here: a window is four of them, however short.
    made.controller._run.balance._windows = Windows(seconds=0.0)
    return made


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one worker makes of the job."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    overrides = [*SIZES, LAYERS, "elastic.workers.max=1", f"train.steps={STEPS}"]
    return LocalCluster(job_text, directory, overrides=overrides).run()


@pytest.fixture(scope="module")
def of_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Outcome]:
    """The text of a job with a Llama, and what one worker makes of it."""
    directory = tmp_path_factory.mktemp("llama")
    text = tiny_job(directory, LLAMA)
    overrides = [*SIZES, "elastic.workers.max=1", f"train.steps={STEPS}"]
    return text, LocalCluster(text, directory / "run", overrides=overrides).run()


@pytest.fixture
def made(request: pytest.FixtureRequest, name: str) -> tuple[str, Outcome]:
    """The text of the job for the layout of this `name`, and what one worker makes of it."""
    if name == SHORT_ROUNDS:
        found: tuple[str, Outcome] = request.getfixturevalue("of_llama")
        return found
    return request.getfixturevalue("job_text"), request.getfixturevalue("undisturbed")


def check_same(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.status == "finished", outcome.reason
    assert outcome.digest == undisturbed.digest
    assert outcome.samples == undisturbed.samples
    assert outcome.losses == undisturbed.losses
    assert outcome.grad_norms == undisturbed.grad_norms
    assert outcome.steps_lost == 0


def all_there(name: str) -> Callable[[LocalCluster], bool]:
    workers, _ = LAYOUTS[name]
    return lambda cluster: cluster.is_whole(workers)


@pytest.mark.parametrize("name", ["d3 optimizer", *nightly(["d3", "d3 gradients", "d3 parameters"])])
def test_work_is_dealt_anew_and_back_without_changing_a_bit(
    name: str, made: tuple[str, Outcome], tmp_path: Path
) -> None:
    job_text, undisturbed = made
    run = cluster(
        job_text, tmp_path / "run", name, hooks=[partial(pace, 1, 2.0, 0, 14)],
        holds={1: all_there(name), 13: has("rebalance"), 14: polled(6), 39: has("rebalance", 2), 40: polled(6)},
        all_ready_at_once=True,
    )  # fmt: skip
    outcome = run.run(240.0)
    check_same(outcome, undisturbed)
    first, second = outcome.of("rebalance")
    assert first["to"][1] < first["from"][1]
    assert second["to"][1] > first["to"][1]
    deals = [report.deal for report in outcome.steps]
    assert deals == sorted(deals)
    assert set(deals) == {0, first["deal"], second["deal"]}
    # Each rank accounts for the virtual workers of the deal that was in force.
    dealt = {0: first["from"], first["deal"]: first["to"], second["deal"]: second["to"]}
    told = [report for report in outcome.steps if report.ranks]
    # Rank 0 alone knows what all took: where another tells of the last steps of a generation first, they go without.
    assert {0, first["deal"]} <= {report.deal for report in told}
    for report in told:
        if len(report.ranks) == 3:
            assert [len(times.busy) for times in report.ranks] == dealt[report.deal], report.step
            assert sum(times.tokens for times in report.ranks) == report.tokens
    assert [record["finding"] for record in outcome.of("skew_found")] == ["slow device"]


def test_replicas_of_a_pipeline_are_dealt_to_anew(job_text: str, undisturbed: Outcome, tmp_path: Path) -> None:
    """The second stage of the first replica is slow; moving state is made too dear to be the answer."""
    run = cluster(
        job_text, tmp_path / "run", "d2p2", hooks=[partial(pace, 1, 2.0, 0, STEPS)],
        holds={1: all_there("d2p2"), 13: has("rebalance"), 14: polled(6)}, all_ready_at_once=True,
    )  # fmt: skip
    run.controller._run.balance._move_s = 1e9
    outcome = run.run(240.0)
    check_same(outcome, undisturbed)
    first = outcome.of("rebalance")[0]
    assert (first["change"], first["from"], first["to"]) == ("deal", [6, 6], [4, 8])
    assert outcome.steps[-1].deal
    assert len([generation for generation in outcome.generations if generation.layout.pipeline == 2]) == 1


@pytest.mark.parametrize("name", ["d2p2", *nightly(["d2p2 zero-bubble"])])
def test_stages_are_cut_anew_without_changing_a_bit(
    name: str, job_text: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    """Both replicas are slow in their second stage, so that dealing virtual workers anew would not help."""
    run = cluster(
        job_text, tmp_path / "run", name,
        hooks=[partial(pace_stages, (1.0, 4.0))],
        holds={1: all_there(name), 13: has("rebalance"), 14: lambda c: all_there(name)(c) or polled(6)(c)},
        all_ready_at_once=True,
    )  # fmt: skip
    # What a change costs is not to be weighed against steps of milliseconds.
    run.controller._run.balance._move_s = 0.0
    outcome = run.run(240.0)
    check_same(outcome, undisturbed)
    change = outcome.of("rebalance")[0]
    assert change["change"] == "stages"
    cuts = [generation.layout.parts for generation in outcome.generations if generation.layout.pipeline == 2]
    assert tuple(map(tuple, change["stages"])) in cuts
    layouts = [generation.layout for generation in outcome.generations if generation.layout.parts == cuts[-1]]
    slow = sum(stop - start for start, stop in layouts[0].blocks_of(1) or ())
    fast = sum(stop - start for start, stop in layouts[0].blocks_of(0) or ())
    assert slow < fast
    assert any(recovery["kind"] == "rebalance" for recovery in outcome.recoveries)


def pace_stages(factors: tuple[float, ...], worker: Any) -> None:
    """Seconds for a virtual worker by stage, for as many blocks as it has at first: with others, in proportion."""
    watch = worker.engine.watch
    usual = watch.seconds

    def seconds() -> dict[int, float]:
        engine = worker.engine
        if engine.place is None:
            return {}
        blocks = sum(stop - start for start, stop in engine.layout.blocks_of(engine.place.stage) or ((0, 8),))
        return dict.fromkeys(usual(), factors[engine.place.stage] * blocks / 4)

    watch.seconds = seconds


@pytest.mark.parametrize(
    ("name", "phase"),
    [("d3", "vote"), *nightly([("d3", "compute"), ("d3 parameters", "compute"), ("d3 parameters", "vote")])],
)
def test_a_worker_lost_while_work_is_dealt_anew(
    name: str, phase: str, made: tuple[str, Outcome], tmp_path: Path
) -> None:
    """The slow one dies in the first steps of the new deal, or while ranks agree on it."""
    job_text, undisturbed = made
    run = cluster(
        job_text, tmp_path / "run", name,
        hooks=[partial(pace, 1, 2.0, 0, STEPS), partial(at_phase, phase, 14, 1, die)],
        holds={1: all_there(name), 13: has("rebalance")}, all_ready_at_once=True,
    )  # fmt: skip
    outcome = run.run(240.0)
    check_same(outcome, undisturbed)
    assert [recovery["kind"] for recovery in outcome.recoveries].count("kill") == 1


def test_a_worker_too_slow_for_too_long_is_replaced_without_losing_a_step(
    job_text: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    run = cluster(
        job_text, tmp_path / "run", "d3",
        overrides=["elastic.rebalance.evict_after_s=0.001"],
        hooks=[partial(pace, 1, 4.0, 0, STEPS)],
        # The one that takes its place starts while the others wait at a step; all leave at the end of it.
        holds={1: all_there("d3"), 16: lambda c: c.controller.state.name == "SETTLING" or len(c.generations) > 2},
        all_ready_at_once=True,
    )  # fmt: skip
    outcome = run.run(240.0)
    check_same(outcome, undisturbed)
    (eviction,) = outcome.of("eviction")
    assert eviction["worker"] == 1
    assert eviction["speed"] == pytest.approx(0.25, abs=0.01)
    assert "evict" in [recovery["kind"] for recovery in outcome.recoveries]
    last = {member.worker for member in outcome.generations[-1].members}
    assert last == {WorkerId(0, 0), WorkerId(2, 0), WorkerId(3, 0)}


def test_kinds_of_devices_are_dealt_to_by_their_calibration(
    job_text: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    run = cluster(
        job_text, tmp_path / "run", "d3", hooks=[slow_kind], holds={1: all_there("d3")}, all_ready_at_once=True
    )  # fmt: skip
    outcome = run.run(240.0)
    check_same(outcome, undisturbed)
    first = next(generation for generation in outcome.generations if len(generation.members) == 3)
    counts = {
        member.worker.slot: len(held) for member, held in zip(first.members, first.layout.assignment, strict=True)
    }
    assert counts[2] < counts[0]


def slow_kind(worker: Any) -> None:
    """Worker 2 has a device of a kind that is three times as slow."""
    from dataclasses import replace

    worker.ready = replace(worker.ready, unit_seconds=3.0 if worker.worker.slot == 2 else 1.0)
