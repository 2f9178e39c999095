"""What goes wrong with a worker's device, its memory or its groups: each is met by what helps against it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.core.workers import WorkerId
from orchestrator.training import gpu_watch
from tests.fake_nvml import Card, FakeNvml
from tests.ranks.local_cluster import Hook, LocalCluster, Outcome, tiny_job


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
    # A machine that is short of time may cost it another worker.
    assert outcome.rollbacks[0] == 0


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


# ---------------------------------------------------------------------------------------- what the driver says


def goes_wrong(change: str, value: int, at_step: int, worker: Any) -> None:
    """The card of the first worker 1 is watched, and something happens to it at a step."""
    if worker.worker != WorkerId(1, 0):
        return
    gpu_watch.READ_S, gpu_watch.LISTEN_S = 0.0, 0.01
    nvml = FakeNvml(Card())
    worker.gpu = gpu_watch.GpuWatch(gpu_watch.Gpu(nvml, nvml.card.uuid), worker._tell_of_gpu)
    worker.gpu.start()
    fetch = worker.engine.loads.source

    def fetch_and_fail(step: int, virtual_worker: int) -> Any:
        if step == at_step:
            if change == "xid":
                nvml.xids.put(value)
            else:
                setattr(nvml.card, change, value)
        return fetch(step, virtual_worker)

    worker.engine.loads.source = fetch_and_fail


def test_a_worker_is_replaced_when_the_driver_gives_its_gpu_up(
    job_text: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    """It is held at the step meanwhile: by itself it would notice nothing."""
    hook: Hook = partial(goes_wrong, "xid", 79, 3)
    outcome = LocalCluster(
        job_text, tmp_path / "run", hooks=[hook], holds={4: lambda cluster: bool(cluster.records_of("gpu_faulty"))}
    ).run()
    assert_same(outcome, undisturbed)
    assert outcome.recoveries[0]["kind"] == "device"
    (told,) = outcome.of("gpu_faulty")
    assert (told["worker"], told["action"], told["detail"]) == (1, "replace", "Xid 79: it has fallen off the bus")
    assert [each["node"] for each in outcome.of("node_suspected")] == ["local"]
    assert "its GPU: Xid 79" in next(each["reason"] for each in outcome.of("worker_killed"))


def another_is_ready(cluster: LocalCluster) -> bool:
    """Or has joined already: a rank that is held would keep it from that."""
    return cluster.committed > 3 and (bool(cluster.idle()) or len(cluster.generations) > 1)


def test_a_worker_leaves_a_gpu_that_is_to_be_reset_when_another_has_come(
    job_text: str, undisturbed: Outcome, tmp_path: Path
) -> None:
    hook: Hook = partial(goes_wrong, "pending", 1, 3)
    outcome = LocalCluster(
        job_text, tmp_path / "run", hooks=[hook],
        holds={4: another_is_ready},
    ).run()  # fmt: skip
    assert_same(outcome, undisturbed)
    (told,) = outcome.of("gpu_faulty")
    assert (told["worker"], told["action"]) == (1, "retire")
    assert "has to be reset" in told["detail"]
    assert outcome.of("worker_killed") == []
    sizes = [len(generation.members) for generation in outcome.generations]
    assert sizes == [3, 3], "nobody was missing at any time"
    assert outcome.recoveries[0]["kind"] == "evict"
    assert WorkerId(1, 0) not in outcome.members(1)


def test_errors_of_programs_change_nothing(job_text: str, undisturbed: Outcome, tmp_path: Path) -> None:
    hook: Hook = partial(goes_wrong, "xid", 13, 3)
    outcome = LocalCluster(
        job_text, tmp_path / "run", hooks=[hook], holds={4: lambda cluster: bool(cluster.records_of("gpu_faulty"))}
    ).run()
    assert_same(outcome, undisturbed)
    assert [(told["action"], told["detail"]) for told in outcome.of("gpu_faulty")] == [("none", "Xid 13")]
    assert outcome.recoveries == []
