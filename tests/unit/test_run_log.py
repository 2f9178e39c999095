"""What a controller writes down, and what its successor makes of it, also when the disk is bad."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from monitoring import shapes
from monitoring.clock import this_boot
from monitoring.events import VERSION, ControllerBegan, FaultInjected, RunStarted
from monitoring.goodput import read_ledger
from monitoring.records import read_records
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.presence import LOST_AFTER_S, Presence
from orchestrator.runtime.run_log import RunLog
from orchestrator.training.messages import StepReport
from tests.unit.events_in_tests import event_with
from tests.unit.test_full_disk import limited

JOB = """
name: tiny
model: {hf: {model_type: llama}}
data: {source: nowhere.txt, sequence_length: 16}
train: {steps: 50, global_batch: 8}
"""


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(tmp_path / "run")
    found.create(JOB, Job.loads(JOB).resolved())
    return found


def begun(directory: RunDirectory) -> RunLog:
    run_log = RunLog(directory, Job.loads(JOB))
    run_log.record(event_with("controller", epoch=1, session="s"))
    run_log.record(event_with("run_started", run=directory.run_id, steps=50, min_workers=1))
    run_log.record(event_with("generation", generation=0, start_step=0, cause="start", workers=[], layout={}))
    return run_log


def train(run_log: RunLog, first: int, last: int) -> None:
    assert run_log.started_at is not None
    for number in range(first, last):
        at = run_log.started_at + 1.0 + 0.5 * number
        run_log.step(StepReport(number, 0, 2.0, 1.0, 0.1, 100, "x", False, at, 0.5))


def status(**changes: Any) -> dict[str, Any]:
    return {"state": "running", "steps": 50, "median_step_seconds": 0.5, "target": 1, "min": 1, "workers": [],
            "checkpoint_interval_seconds": 0.0} | changes  # fmt: skip


def shown(run_log: RunLog, name: str) -> float:
    value = run_log.metrics.registry.get_sample_value(f"orchestrator_{name}", {"run": run_log._directory.run_id})
    assert value is not None
    return value


def test_a_successor_sums_up_what_its_predecessor_had_not(directory: RunDirectory) -> None:
    first = begun(directory)
    train(first, 0, 5)
    first.close()
    assert not [e for e in read_records(directory.events) if e["kind"] == "steps"]
    second = RunLog(directory, Job.loads(JOB))
    assert (second.recorded, second.tokens, shown(second, "tokens_total")) == (5, 500, 500)
    (stretch,) = [e for e in read_records(directory.events) if e["kind"] == "steps"]
    assert (stretch["first"], stretch["last"]) == (0, 4)
    train(second, 5, 8)
    second.record(event_with("run_finished", status="stopped", reason="test"))
    account = read_ledger(read_records(directory.events)).account()
    assert account.productive_seconds == pytest.approx(8 * 0.5)


def test_steps_that_are_taken_off_the_record_stay_in_the_counters(directory: RunDirectory) -> None:
    run_log = begun(directory)
    train(run_log, 0, 6)
    run_log.roll_back(2)
    assert (run_log.recorded, run_log.tokens, shown(run_log, "tokens_total")) == (2, 200, 600)
    assert [record["step"] for record in read_records(directory.metrics)] == [0, 1]
    run_log.close()
    successor = RunLog(directory, Job.loads(JOB))
    assert (successor.recorded, successor.tokens, shown(successor, "tokens_total")) == (2, 200, 600)


@pytest.mark.parametrize("text", ["", "[1]", '{"counters": [1]}', '{"counters": {"wall": "x"}}', '{"counters": null}'])
def test_a_damaged_status_file_stops_nobody(directory: RunDirectory, text: str) -> None:
    begun(directory).close()
    (directory.path / "status.json").write_text(text)
    assert RunLog(directory, Job.loads(JOB)).recorded == 0


def test_counters_go_on_from_what_was_shown(directory: RunDirectory) -> None:
    run_log = begun(directory)
    train(run_log, 0, 6)
    assert run_log.started_at is not None
    run_log.publish(status(), run_log.started_at + 100.0)
    before = shown(run_log, "run_wall_seconds_total")
    run_log.close()
    assert json.loads((directory.path / "status.json").read_text())["counters"]["wall"] >= before
    successor = RunLog(directory, Job.loads(JOB))
    successor.publish(status(), run_log.started_at + 4.0)
    assert shown(successor, "run_wall_seconds_total") >= before


def test_a_full_disk_leaves_nothing_lying_about_and_keeps_the_metrics_fresh(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_log = begun(directory)
    train(run_log, 0, 6)
    honest = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        honest(path, "half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert run_log.started_at is not None
    for number in range(3):
        with pytest.raises(OSError, match="No space left"):
            run_log.publish(status(target=number), run_log.started_at + 10.0 + number)
        assert shown(run_log, "world_target") == number
    assert shown(run_log, "goodput_seconds_total") == pytest.approx(6 * 0.5)
    assert [path.name for path in directory.path.iterdir() if "status" in path.name] == []


def test_steps_that_wait_for_room_are_not_told_to_be_on_record(directory: RunDirectory) -> None:
    """Workers keep the reports of what is not in the file, for a successor of this controller."""
    run_log = begun(directory)
    train(run_log, 0, 3)
    with limited(directory.metrics.stat().st_size + 10):
        train(run_log, 3, 9)
        assert (run_log.committed, run_log.recorded) == (9, 3)
        waiting = run_log.unwritten()
        assert waiting is not None
        assert waiting["steps"] == 6
        now = run_log.clock.now()
        assert not run_log.flush(now)
        assert [record["step"] for record in read_records(directory.metrics)] == [0, 1, 2]
    assert run_log.flush(now + 60.0)
    assert (run_log.committed, run_log.recorded, run_log.unwritten()) == (9, 9, None)
    assert [record["step"] for record in read_records(directory.metrics)] == list(range(9))
    (told,) = [event for event in read_records(directory.events) if event["kind"] == "records_delayed"]
    assert told["seconds"] == pytest.approx(60.0, abs=5.0)
    assert told["records"] >= 6


def test_a_disk_that_is_full_for_a_moment_only_is_told_too(directory: RunDirectory) -> None:
    """The next step writes what waited, before anybody has looked."""
    run_log = begun(directory)
    train(run_log, 0, 3)
    with limited(directory.metrics.stat().st_size + 10):
        train(run_log, 3, 6)
    train(run_log, 6, 7)
    assert run_log.unwritten() is None
    assert run_log.flush(run_log.clock.now())
    assert run_log.flush(run_log.clock.now())
    (told,) = [event for event in read_records(directory.events) if event["kind"] == "records_delayed"]
    assert told["records"] >= 3


def test_a_run_directory_that_is_deleted_is_noticed_but_not_at_once(directory: RunDirectory) -> None:
    run_log = begun(directory)
    presence = Presence(directory, run_log)
    assert presence.look(0.0) == ""
    away = directory.path.with_name("away")
    directory.path.rename(away)
    assert (presence.look(10.0), presence.look(12.0)) == ("", "")
    away.rename(directory.path)
    assert presence.look(20.0) == "", "it was away for a moment"
    shutil.rmtree(directory.path)
    assert presence.look(30.0) == ""
    assert "was deleted or moved away in mid-run" in presence.look(30.0 + LOST_AFTER_S)
    directory.create(JOB, Job.loads(JOB).resolved())
    begun(directory)
    assert "events.jsonl and metrics.jsonl" in presence.look(40.0), "another run's files are not this run's"


def test_what_a_controller_adds_to_events_is_what_readers_ask_for(directory: RunDirectory) -> None:
    job = Job.loads(JOB, faults=["step=3,worker=0,kind=kill"])
    run_log = RunLog(directory, job)
    run_log.record(ControllerBegan(epoch=1, pid=2, session="s", node="n", own_cluster=True))
    run_log.record(RunStarted(run="r", job=job.digest(), steps=50, min_workers=1, loss_unit="nats per token"))
    run_log.record(FaultInjected(fault=0, worker=0, at=run_log.clock.now()))
    controller, started, fault = [json.loads(line) for line in directory.events.read_text().splitlines()]
    assert [shapes.event(record) for record in (controller, started, fault)] == [None, None, None]
    assert controller["boot"] == this_boot()
    assert controller["clock_shift"] == pytest.approx(run_log.clock.now() - time.monotonic(), abs=1.0)
    assert started["events"] == VERSION
    assert fault["what"] == job.faults[0].model_dump()
