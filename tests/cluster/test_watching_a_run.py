"""What an operator is told of a run with a killed worker: by its logs, its report and its status file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Outcome, Runner
from tests.in_process import orchestrator


def records(run_dir: str, *options: str) -> list[dict[str, Any]]:
    done = orchestrator("logs", run_dir, "--json", *options)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.nightly
def test_the_story_of_a_kill_is_in_the_logs_of_all_who_took_part(runner: Runner) -> None:
    outcome = runner(
        "elastic.workers={min: 2, max: 2}", "train.steps=40", "monitoring.logs=json", "monitoring.tensorboard=true",
        faults=("step=20,worker=1,kind=kill",),
    )  # fmt: skip
    assert outcome.result.status == "finished", outcome.result.reason
    path = str(outcome.directory.path)
    ours = [record for record in records(path) if record["level"]]
    assert {record["run"] for record in ours} == {outcome.directory.run_id}
    assert [record["time"] for record in ours] == sorted(record["time"] for record in ours)
    processes = {record["process"] for record in ours}
    assert {"driver", "controller-1", "worker-0.0", "worker-1.0", "worker-1.1"} <= processes, processes

    kill = next(e for e in outcome.events if e["kind"] == "incident" and e["incident"] == "kill")
    after = next(e for e in outcome.events if e["kind"] == "generation" and e["time"] > kill["time"])
    (fault,) = [record for record in records(path, "--worker", "1") if "injected fault 0 fires" in record["message"]]
    assert (fault["process"], fault["rank"], fault["generation"], fault["step"]) == ("worker-1.0", 1, 0, 20)
    joined = [record for record in ours if record["message"].startswith(f"joined generation {after['generation']}")]
    assert {record["process"] for record in joined} >= {"worker-0.0"}
    assert all((record["generation"], record["step"]) == (after["generation"], 20) for record in joined)
    controller = [record for record in ours if record["process"] == "controller-1"]
    told = [record for record in controller if record["message"].startswith("incident: kill: worker 1")]
    assert [(record["level"], record["generation"]) for record in told] == [("WARNING", 0)]
    assert 0 < told[0]["step"] <= 20, "as far as it has heard: workers report their steps a little later"
    assert any(record["message"].startswith("the run ends: finished") for record in controller)
    assert any("part 0 of" in record["message"] for record in ours), "checkpoints"
    assert list((outcome.directory.path / "tensorboard").glob("events.out.tfevents.*"))
    goodput_adds_up(outcome)


def goodput_adds_up(outcome: Outcome) -> None:
    """From events.jsonl alone, to the wall time that result.json has, with the kill among what it lost."""
    path = outcome.directory.path
    for name in ("metrics.jsonl", "status.json"):
        (path / name).rename(path / f"{name}.away")
    done = orchestrator("report", str(path), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    goodput = report["goodput"]
    lost = goodput["badput_seconds"]
    assert goodput["productive_seconds"] + sum(lost.values()) == pytest.approx(goodput["wall_seconds"], rel=0.005)
    assert goodput["wall_seconds"] == pytest.approx(outcome.result.wall_seconds, rel=0.005)
    assert report["goodput_ratio"] == pytest.approx(outcome.result.goodput_ratio, abs=0.005)
    assert lost["initialisation"] > 0
    assert lost["detection"] > 0
    (kill,) = [incident for incident in report["incidents"] if incident["incident"] == "kill"]
    assert kill["seconds"].keys() >= {"detection", "recovery"}
    assert kill["stall_seconds"] is not None
    assert "worker 1 died" in Path(report["page"]).read_text()
    for name in ("metrics.jsonl", "status.json"):
        (path / f"{name}.away").rename(path / name)
    status = json.loads((path / "status.json").read_text())
    assert (status["over"], status["status"], status["step"]) == (True, "finished", 40)
    assert status["goodput"]["wall_seconds"] == pytest.approx(goodput["wall_seconds"], rel=0.005)
