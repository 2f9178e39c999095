"""What goes wrong with a worker's device, its memory or its groups: each is met by what helps against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.core.workers import WorkerId
from tests.ranks.local_cluster import LocalCluster, Outcome, tiny_job


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    return LocalCluster(job_text, directory, overrides=["elastic.workers.max=1"]).run()


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.status == "finished", outcome.reason
    assert (outcome.digest, outcome.losses) == (expected.digest, expected.losses)
    assert (outcome.rollbacks, outcome.steps_lost) == ([], 0)


@pytest.mark.parametrize("phase", ["compute", "reduce", "commit"])
def test_a_worker_whose_device_fails_is_replaced(
    job_text: str, undisturbed: Outcome, tmp_path: Path, phase: str
) -> None:
    faults = [f"step=3,worker=1,kind=device,phase={phase}"]
    outcome = LocalCluster(job_text, tmp_path / "run", faults=faults).run()
    assert_same(outcome, undisturbed)
    assert outcome.recoveries[0]["kind"] == "device"
    (incident,) = [each for each in outcome.of("incident") if each["incident"] == "device"]
    assert "the device of worker 1 failed: CUDA error: device-side assert triggered" in incident["cause"]
    assert WorkerId(1, 0) not in outcome.members(1)
    others = {worker: pid for worker, pid in outcome.members(0).items() if worker.slot != 1}
    assert others.items() <= outcome.members(1).items()


def test_the_last_holder_of_a_shard_is_not_spared_when_its_device_fails(
    job_text: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    """What it held was on that device, so the run goes back to a checkpoint; there is none, and it begins again."""
    overrides = ["strategy.shard=optimizer", "elastic.state_copies=1", "elastic.workers.max=2"]
    faults = ["step=3,worker=1,kind=device"]
    outcome = LocalCluster(job_text, tmp_path / "run", overrides=overrides, faults=faults).run()
    assert outcome.status == "finished", outcome.reason
    assert (outcome.digest, outcome.losses) == (undisturbed.digest, undisturbed.losses)
    assert outcome.rollbacks == [0]


def test_too_little_memory_once_costs_nobody_its_process(job_text: str, undisturbed: Outcome, tmp_path: Path) -> None:
    faults = ["step=3,worker=1,kind=oom"]
    outcome = LocalCluster(job_text, tmp_path / "run", faults=faults).run()
    assert_same(outcome, undisturbed)
    assert [recovery["kind"] for recovery in outcome.recoveries] == ["memory"]
    assert outcome.members(1) == outcome.members(0)
    assert outcome.of("worker_killed") == []


def test_too_little_memory_again_ends_the_run_with_what_to_do(job_text: str, tmp_path: Path) -> None:
    faults = ["step=3,worker=1,kind=oom,phase=data", "step=3,worker=1,kind=oom"]
    outcome = LocalCluster(job_text, tmp_path / "run", faults=faults).run()
    assert outcome.status == "failed"
    assert "step 3 failed 2 times" in outcome.reason
    assert "ran out of memory: CUDA out of memory" in outcome.reason
    assert "take a smaller train.micro_batch" in outcome.reason


@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_a_collective_that_hangs_is_left_by_all_and_costs_nobody_its_process(
    job_text: str, undisturbed: Outcome, tmp_path: Path, shard: str
) -> None:
    """The hung rank is inside a collective, like those that wait for it: it leaves as they do when they are told to."""
    overrides = [f"strategy.shard={shard}", "elastic.progress_timeout_s=1.5"]
    faults = ["step=3,worker=1,kind=nccl-hang,phase=reduce"]
    outcome = LocalCluster(job_text, tmp_path / "run", overrides=overrides, faults=faults).run()
    assert_same(outcome, undisturbed)
    assert [recovery["kind"] for recovery in outcome.recoveries] == ["stall"]
    assert outcome.members(1) == outcome.members(0)
    assert outcome.of("worker_killed") == []
