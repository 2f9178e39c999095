"""While Ray restarts a run's controller: commands wait for the successor, and a run that has finished stays so."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from monitoring.records import read_records
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.ray import driver
from orchestrator.runtime.ray.driver import drive
from tests.cluster.command_line import CommandLine
from tests.cluster.conftest import PATIENCE_S, Runner, wait_for
from tests.in_process import orchestrator
from tests.selection import nightly


@pytest.mark.nightly
def test_commands_while_the_controller_is_restarted(tmp_path: Path, cache: Path) -> None:
    command = CommandLine(tmp_path, cache)
    run = str(command.run_dir)
    directory = RunDirectory(command.run_dir)
    process = command.start("--set", "elastic.workers.max=2", "--set", "train.steps=100000")

    def controllers() -> list[dict[str, Any]]:
        return [e for e in read_records(directory.events) if e["kind"] == "controller"]

    def lose_controller() -> None:
        os.kill(controllers()[-1]["pid"], signal.SIGKILL)
        wait_for(lambda: not directory.is_steered, what="the end of the controller")

    command.until_step(process, 5)
    lose_controller()
    other = command.spawn([sys.executable, "-m", "orchestrator", "resume", run])
    saved = orchestrator("checkpoint", run)
    assert saved.returncode == 0, saved.stdout + saved.stderr
    output, _ = other.communicate(timeout=PATIENCE_S)
    assert other.returncode == 2, output
    assert "is being run right now" in output
    lose_controller()
    stopped = orchestrator("stop", run)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, output
    assert [event["epoch"] for event in controllers()] == [1, 2, 3]
    generations = [e for e in read_records(directory.events) if e["kind"] == "generation"]
    assert len(generations) == 1, "the workers trained on"
    late = orchestrator("stop", run)
    assert late.returncode == 2
    assert "is not running now (it was stopped)" in late.stderr
    command.nothing_left()


@pytest.mark.parametrize("is_seen_by", ["controller", *nightly(["driver"])])
def test_a_run_that_finished_after_its_driver_looked_is_not_steered_again(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, is_seen_by: str
) -> None:
    """The driver looked while the controller was being restarted; its successor finished the run meanwhile."""
    few = ("train.steps=5", "train.schedule.warmup_steps=1", "elastic.workers.max=1")
    outcome = runner(*few)
    assert outcome.result.status == "finished"
    before = (outcome.directory.path / "result.json").read_bytes()
    if is_seen_by == "controller":
        monkeypatch.setattr(driver, "clear_result", lambda directory: None)
    result = drive(runner.job(*few), outcome.directory, job_text="")
    assert (result["status"], result["steps"]) == ("finished", 5)
    assert (outcome.directory.path / "result.json").read_bytes() == before
    assert [e["kind"] for e in outcome.events].count("generation") == 1
    assert [e["kind"] for e in outcome.events].count("controller") == 1
