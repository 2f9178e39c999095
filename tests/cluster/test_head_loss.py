"""The head of a cluster loses its GCS while a run trains: with tables on disk it is started again, else it is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitoring.records import read_records
from tests.cluster.conftest import JOB, PATIENCE_S, Outcome, wait_for
from tests.cluster.durable_cluster import DurableCluster

ROOT = Path(__file__).parents[2]


class Run:
    """One run on a cluster, by its directory."""

    def __init__(self, cluster: DurableCluster, home: Path, cache: Path, *more: str) -> None:
        self.path = home / "run"
        job = home / "job.yaml"
        job.write_text(JOB)
        self.command = ("run", str(job), "--run-dir", str(self.path), "--set", f"data.cache={cache}",
                        "--set", "elastic.workers.max=2",
                        "--fault", "step=5,worker=0,kind=slow,factor=10", *more)  # fmt: skip
        self.cluster = cluster

    def steps(self) -> int:
        return sum(1 for _ in read_records(self.path / "metrics.jsonl"))

    def has_trained(self, steps: int, driver: subprocess.Popen[str]) -> bool:
        assert driver.poll() is None, driver.communicate()[0]
        return self.steps() >= steps

    def describe(self) -> str:
        """How far it is, by what was put on record last."""
        return f"{self.steps()} steps on record, {list(read_records(self.path / 'events.jsonl'))[-8:]}"

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_records(self.path / "events.jsonl") if event["kind"] == kind]

    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "result.json").read_text()))


UNHURRIED = ("--set", "elastic.lease_s=600", "--set", "elastic.heartbeat_timeout_s=30",
             "--set", "elastic.progress_timeout_s=60")  # fmt: skip
"""However slow this machine is, no worker is taken for lost while there is no controller, nor when there is again."""

BOTH_FROM_THE_START = ("--set", "elastic.workers.min=2")


@pytest.fixture
def cluster() -> Iterator[DurableCluster]:
    """Patient: on a busy machine six steps may take the 40 s that drivers would give its head."""
    cluster = DurableCluster(RAY_gcs_rpc_server_reconnect_timeout_s="600")
    try:
        yield cluster
    finally:
        cluster.remove()


@pytest.mark.nightly
def test_the_gcs_is_killed_and_started_again_on_the_same_tables(
    cluster: DurableCluster, tmp_path: Path, cache: Path, undisturbed: Outcome
) -> None:
    """And the controller dies meanwhile, when nobody can start another: the workers train on without both."""
    cluster.start()
    run = Run(cluster, tmp_path, cache, *UNHURRIED, *BOTH_FROM_THE_START)
    driver = cluster.start_driver(*run.command, settings=True)
    wait_for(lambda: run.has_trained(6, driver), what=run.describe)
    command = cluster.lose_gcs()
    wait_for(lambda: run.has_trained(12, driver), what=run.describe)
    os.kill(run.events("controller")[-1]["pid"], signal.SIGKILL)
    cluster.start_gcs(command)
    output, _ = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, output
    result = run.result()
    assert (result["status"], result["steps"]) == ("finished", 40)
    assert result["state_digest"] == undisturbed.result.state_digest
    assert result["data_digest"] == undisturbed.result.data_digest
    assert len(result["generations"]) == 1, "the workers trained on"
    assert result["recoveries"] == []
    assert [event["epoch"] for event in run.events("controller")] == [1, 2]


@pytest.mark.nightly
def test_a_worker_that_dies_while_there_is_no_gcs_costs_no_step_and_is_replaced_when_there_is(
    cluster: DurableCluster, tmp_path: Path, cache: Path
) -> None:
    """Nobody can be asked for another until the GCS is back; the one that is left trains on at once."""
    cluster.start()
    run = Run(cluster, tmp_path, cache, *UNHURRIED)
    driver = cluster.start_driver(*run.command, "--set", "train.steps=100000", settings=True)

    def both() -> bool:
        assert driver.poll() is None, driver.communicate()[0]
        generations, running = run.events("generation"), run.events("generation_running")
        return len(generations) == len(running) > 0 and len(generations[-1]["workers"]) == 2

    wait_for(both, what=run.describe)
    command, before = cluster.lose_gcs(), len(run.events("recovery"))
    os.kill(run.events("generation")[-1]["workers"][1]["pid"], signal.SIGKILL)
    wait_for(lambda: len(run.events("recovery")) > before, what=run.describe)
    at = run.steps()
    wait_for(lambda: run.has_trained(at + 3, driver), what=run.describe)
    cluster.start_gcs(command)
    wait_for(both, what=run.describe)
    stopped = cluster.orchestrator("stop", str(run.path))
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    output, _ = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 3, output
    result = run.result()
    assert [each["steps_lost"] for each in result["recoveries"] if each["kind"] == "kill"] == [0]
    sizes = [len(generation["workers"]) for generation in result["generations"]]
    assert sizes[-3:] == [2, 1, 2], sizes
    assert [event["epoch"] for event in run.events("controller")] == [1]
    assert run.events("shortage") == []
    audit = cluster.orchestrator("audit", str(run.path))
    assert audit.returncode == 0, audit.stdout + audit.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["cluster.yaml", "examples/clusters/gcp.yaml"])
def test_a_head_of_a_cluster_file_that_dies_is_started_again_and_the_run_goes_on(
    launcher: str, tmp_path: Path, cache: Path, undisturbed: Outcome
) -> None:
    """All of its processes go, as `ray start --block` ends them when the GCS dies."""
    cluster = DurableCluster(durable=False, RAY_gcs_rpc_server_reconnect_timeout_s="600")
    try:
        cluster.start_head_of(ROOT / launcher)
        cluster.start_node()
        run = Run(cluster, tmp_path, cache, *UNHURRIED)
        driver = cluster.start_driver(*run.command, settings=True)
        wait_for(lambda: run.has_trained(6, driver), what=run.describe)
        raylets = cluster.raylets()
        cluster.lose_gcs()
        wait_for(lambda: run.steps() >= 12, what=run.describe)
        wait_for(lambda: cluster.raylets() - raylets, what="another head")
        output, _ = driver.communicate(timeout=PATIENCE_S)
        if driver.returncode != 0:  # It was connected through the head's own raylet.
            done = cluster.orchestrator("attach", str(run.path))
            output += done.stdout + done.stderr
        result = run.result()
        assert (result["status"], result["steps"]) == ("finished", 40), output
        assert result["state_digest"] == undisturbed.result.state_digest
        assert result["data_digest"] == undisturbed.result.data_digest
        assert [each["steps_lost"] for each in result["recoveries"]] in ([], [0])
    finally:
        cluster.remove()


@pytest.mark.nightly
def test_without_tables_the_driver_says_what_happened_and_from_where_the_run_goes_on(
    tmp_path: Path, cache: Path
) -> None:
    cluster = DurableCluster(durable=False, RAY_gcs_rpc_server_reconnect_timeout_s="40")
    try:
        cluster.start()
        run = Run(cluster, tmp_path, cache)
        driver = cluster.start_driver(
            *run.command, "--set", "train.steps=100000", "--set", "checkpoint.every_steps=10", settings=True
        )

        def saved() -> bool:
            assert driver.poll() is None, driver.communicate()[0]
            return bool(run.events("checkpoint_saved"))

        wait_for(saved, what="a checkpoint")
        cluster.lose_gcs()
        output, _ = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 1, output
        assert f":{cluster.port} has not answered for 1" in output, output
        (last,) = [line for line in output.splitlines() if line.startswith("orchestrator: ")]
        assert "the same command goes on from the checkpoint of " in last
        assert "Failed to connect to GCS" not in output, "Ray's own line, with which it ends this process"
    finally:
        cluster.remove()
