"""What a controller writes down, and what its successor makes of it, also when the disk is bad."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from monitoring.goodput import read_ledger
from monitoring.records import read_records
from orchestrator.job import Job
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.presence import LOST_AFTER_S, Presence
from orchestrator.runtime.run_log import Chronicle
from orchestrator.training.messages import StepReport
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


def begun(directory: RunDirectory) -> Chronicle:
    chronicle = Chronicle(directory, Job.loads(JOB))
    chronicle.record("controller", {"epoch": 1, "session": "s"})
    chronicle.record("run_started", {"run": directory.run_id, "steps": 50, "min_workers": 1})
    chronicle.record("generation", {"generation": 0, "start_step": 0, "cause": "start", "workers": [], "layout": {}})
    return chronicle


def train(chronicle: Chronicle, first: int, last: int) -> None:
    assert chronicle.started_at is not None
    for number in range(first, last):
        at = chronicle.started_at + 1.0 + 0.5 * number
        chronicle.step(StepReport(number, 0, 2.0, 1.0, 0.1, 100, "x", False, at, 0.5))


def status(**changes: Any) -> dict[str, Any]:
    return {"state": "running", "steps": 50, "median_step_seconds": 0.5, "target": 1, "min": 1, "workers": [],
            "checkpoint_interval_seconds": 0.0} | changes  # fmt: skip


def shown(chronicle: Chronicle, name: str) -> float:
    value = chronicle.metrics.registry.get_sample_value(f"orchestrator_{name}", {"run": chronicle._directory.run_id})
    assert value is not None
    return value


def test_a_successor_sums_up_what_its_predecessor_had_not(directory: RunDirectory) -> None:
    first = begun(directory)
    train(first, 0, 5)
    first.close()
    assert not [e for e in read_records(directory.events) if e["kind"] == "steps"]
    second = Chronicle(directory, Job.loads(JOB))
    assert (second.recorded, second.tokens, shown(second, "tokens_total")) == (5, 500, 500)
    (stretch,) = [e for e in read_records(directory.events) if e["kind"] == "steps"]
    assert (stretch["first"], stretch["last"]) == (0, 4)
    train(second, 5, 8)
    second.record("run_finished", {"status": "stopped", "reason": "test"})
    account = read_ledger(read_records(directory.events)).account()
    assert account.productive_seconds == pytest.approx(8 * 0.5)


def test_steps_that_are_taken_off_the_record_stay_in_the_counters(directory: RunDirectory) -> None:
    chronicle = begun(directory)
    train(chronicle, 0, 6)
    chronicle.roll_back(2)
    assert (chronicle.recorded, chronicle.tokens, shown(chronicle, "tokens_total")) == (2, 200, 600)
    assert [record["step"] for record in read_records(directory.metrics)] == [0, 1]
    chronicle.close()
    successor = Chronicle(directory, Job.loads(JOB))
    assert (successor.recorded, successor.tokens, shown(successor, "tokens_total")) == (2, 200, 600)


@pytest.mark.parametrize("text", ["", "[1]", '{"counters": [1]}', '{"counters": {"wall": "x"}}', '{"counters": null}'])
def test_a_damaged_status_file_stops_nobody(directory: RunDirectory, text: str) -> None:
    begun(directory).close()
    (directory.path / "status.json").write_text(text)
    assert Chronicle(directory, Job.loads(JOB)).recorded == 0


def test_counters_go_on_from_what_was_shown(directory: RunDirectory) -> None:
    chronicle = begun(directory)
    train(chronicle, 0, 6)
    assert chronicle.started_at is not None
    chronicle.publish(status(), chronicle.started_at + 100.0)
    before = shown(chronicle, "run_wall_seconds_total")
    chronicle.close()
    assert json.loads((directory.path / "status.json").read_text())["counters"]["wall"] >= before
    successor = Chronicle(directory, Job.loads(JOB))
    successor.publish(status(), chronicle.started_at + 4.0)
    assert shown(successor, "run_wall_seconds_total") >= before


def test_a_full_disk_leaves_nothing_lying_about_and_keeps_the_metrics_fresh(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    chronicle = begun(directory)
    train(chronicle, 0, 6)
    honest = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        honest(path, "half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert chronicle.started_at is not None
    for number in range(3):
        with pytest.raises(OSError, match="No space left"):
            chronicle.publish(status(target=number), chronicle.started_at + 10.0 + number)
        assert shown(chronicle, "world_target") == number
    assert shown(chronicle, "goodput_seconds_total") == pytest.approx(6 * 0.5)
    assert [path.name for path in directory.path.iterdir() if "status" in path.name] == []


def test_steps_that_wait_for_room_are_not_told_to_be_on_record(directory: RunDirectory) -> None:
    """Workers keep the reports of what is not in the file, for a successor of this controller."""
    chronicle = begun(directory)
    train(chronicle, 0, 3)
    with limited(directory.metrics.stat().st_size + 10):
        train(chronicle, 3, 9)
        assert (chronicle.committed, chronicle.recorded) == (9, 3)
        waiting = chronicle.unwritten()
        assert waiting is not None
        assert waiting["steps"] == 6
        now = chronicle.clock.now()
        assert not chronicle.flush(now)
        assert [record["step"] for record in read_records(directory.metrics)] == [0, 1, 2]
    assert chronicle.flush(now + 60.0)
    assert (chronicle.committed, chronicle.recorded, chronicle.unwritten()) == (9, 9, None)
    assert [record["step"] for record in read_records(directory.metrics)] == list(range(9))
    (told,) = [event for event in read_records(directory.events) if event["kind"] == "records_delayed"]
    assert told["seconds"] == pytest.approx(60.0, abs=5.0)
    assert told["records"] >= 6


def test_a_disk_that_is_full_for_a_moment_only_is_told_too(directory: RunDirectory) -> None:
    """The next step writes what waited, before anybody has looked."""
    chronicle = begun(directory)
    train(chronicle, 0, 3)
    with limited(directory.metrics.stat().st_size + 10):
        train(chronicle, 3, 6)
    train(chronicle, 6, 7)
    assert chronicle.unwritten() is None
    assert chronicle.flush(chronicle.clock.now())
    assert chronicle.flush(chronicle.clock.now())
    (told,) = [event for event in read_records(directory.events) if event["kind"] == "records_delayed"]
    assert told["records"] >= 3


def test_a_run_directory_that_is_deleted_is_noticed_but_not_at_once(directory: RunDirectory) -> None:
    chronicle = begun(directory)
    presence = Presence(directory, chronicle)
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
