"""The command line as a user has it, in a process of its own with a Ray of its own; and what it leaves behind."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from monitoring.records import read_records
from tests.cluster.command_line import FEW, CommandLine
from tests.cluster.conftest import PATIENCE_S, Outcome, wait_for
from tests.in_process import orchestrator


@pytest.fixture
def command(tmp_path: Path, cache: Path) -> CommandLine:
    return CommandLine(tmp_path, cache)


@pytest.mark.nightly
def test_lost_node_and_drained_node_on_a_cluster_of_three(command: CommandLine, undisturbed: Outcome) -> None:
    process = command.start(
        "--local-nodes", "3", "--set", "elastic.workers.max=3", "--json",
        "--fault", "step=10,worker=1,kind=node", "--fault", "step=20,worker=2,kind=drain,seconds=20",
    )  # fmt: skip
    command.until_step(process, 5)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    result = json.loads(output.splitlines()[-1])
    assert result["status"] == "finished"
    assert result["state_digest"] == undisturbed.result.state_digest
    assert result["data_digest"] == undisturbed.result.data_digest
    assert all(r["steps_lost"] == 0 for r in result["recoveries"])
    kinds = {r["kind"] for r in result["recoveries"]}
    assert {"node", "drain"} <= kinds, result["recoveries"]
    nodes = [{w["node"] for w in g["workers"]} for g in result["generations"]]
    assert len(nodes[0]) > 1, "the first generation spans several nodes"
    command.nothing_left()

    audit = orchestrator("audit", str(command.run_dir))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert result["data_digest"] in audit.stdout
    status = json.loads(orchestrator("status", str(command.run_dir), "--json").stdout)
    assert (status["state"], status["step"]) == ("finished", 40)
    assert '"run_finished"' in orchestrator("events", str(command.run_dir), "--json").stdout


@pytest.mark.nightly
def test_a_hopeless_worker_is_replaced_on_another_node(command: CommandLine) -> None:
    process = command.start(
        "--local-nodes", "3", "--set", "elastic.workers={min: 2, max: 2}", "--set", "train.steps=100000",
        "--set", "elastic.rebalance={evict_after_s: 1.0}", "--fault", "step=5,worker=1,kind=slow,factor=8",
    )  # fmt: skip
    command.until_step(process, 5)

    def of(kind: str) -> list[dict[str, Any]]:
        return [event for event in read_records(command.run_dir / "events.jsonl") if event["kind"] == kind]

    wait_for(lambda: any(e["incident"] == "evict" for e in of("recovery")), what="a replaced worker")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, output
    (eviction,) = of("eviction")
    assert eviction["worker"] == 1
    assert eviction["speed"] < 0.5
    last = of("generation")[-1]["workers"]
    assert {worker["worker"] for worker in last} == {0, 2}
    assert next(worker["node"] for worker in last if worker["worker"] == 2) != eviction["node"]
    assert all(recovery["steps_lost"] == 0 for recovery in of("recovery"))
    assert "worker 1 is to be replaced: at 0." in output
    command.nothing_left()
    audit = orchestrator("audit", str(command.run_dir))
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_others_are_refused_while_it_runs_and_one_signal_stops_in_good_order(command: CommandLine) -> None:
    process = command.start("--set", "elastic.workers.max=2", "--set", "train.steps=100000")
    command.until_step(process, 5)
    second = command.start("--set", "elastic.workers.max=2", "--set", "train.steps=100000")
    output, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 2
    assert "is being run right now" in output
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, output
    result = json.loads((command.run_dir / "result.json").read_text())
    assert result["status"] == "stopped"
    assert result["state_digest"].startswith("sha256:")
    checkpoint = command.run_dir / "checkpoints" / f"step-{result['steps']:08d}"
    assert (checkpoint / "MANIFEST.json").exists(), "stopping saves, so that nothing is lost"
    command.nothing_left()
    other = command.start("--set", "elastic.workers.max=2", "--set", "train.steps=100000", "--set", "train.seed=8")
    output, _ = other.communicate(timeout=PATIENCE_S)
    assert other.returncode == 2
    assert "train.seed (7 there, 8 here)" in output


@pytest.mark.nightly
def test_two_signals_stop_at_once(command: CommandLine) -> None:
    process = command.start("--set", "elastic.workers.max=2", "--set", "train.steps=100000")
    command.until_step(process, 5)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, output
    assert (command.run_dir / "result.json").exists()
    command.nothing_left()


def test_a_driver_that_is_killed_takes_its_own_cluster_with_it(command: CommandLine) -> None:
    process = command.start("--set", "elastic.workers.max=2", "--set", "train.steps=100000")
    command.until_step(process, 5)
    process.kill()
    process.wait()
    command.nothing_left()


@pytest.mark.nightly
def test_a_signal_before_the_run_began_ends_its_preparation(command: CommandLine) -> None:
    process = command.start("--set", "elastic.workers.max=1")
    wait_for(lambda: command.remember(process.pid) or len(command.family) > 2, what="Ray's processes")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, output
    result = json.loads((command.run_dir / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("stopped", 0)
    command.nothing_left()
    again = command.start("--set", "elastic.workers.max=1", "--set", "train.steps=5", *FEW)
    assert again.wait(timeout=PATIENCE_S) == 0, "a run that never began may be begun with another job"


FAILS_ONCE = """
import sys
from pathlib import Path
import ray._private.services as services
from orchestrator.runtime import reaper
from orchestrator.cli import main

homes, start, get_node = Path(sys.argv.pop(1)), reaper.start, services.get_node

def started(home):
    with homes.open("a") as file:
        file.write(home + chr(10))
    return start(home)

def late(*arguments):
    services.get_node = get_node
    raise Exception("The current node timed out during startup.")

reaper.start, services.get_node = started, late
sys.exit(main())
"""
"""The command line, but that Ray gives its first node up when all of its processes are there."""


@pytest.mark.nightly
def test_a_ray_that_does_not_come_up_is_started_again_and_leaves_nothing(command: CommandLine) -> None:
    homes = command.home / "homes"
    process = command.spawn(
        [sys.executable, "-c", FAILS_ONCE, str(homes), "run", str(command.job), "--run-dir", str(command.run_dir),
         "--set", f"data.cache={command.cache}", "--set", "elastic.workers.max=1", "--set", "train.steps=3", *FEW]
    )  # fmt: skip
    while process.poll() is None:
        command.remember(process.pid)
        time.sleep(0.05)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert output.count("timed out during startup; trying once more") == 1, output
    command.nothing_left()
    first, second = map(Path, homes.read_text(encoding="utf-8").split())
    assert first != second
    assert not first.exists()
    assert not second.exists()
