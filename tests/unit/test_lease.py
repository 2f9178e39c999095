"""Two controllers never both steer a run: locks, epochs and sessions."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from monitoring.records import RecordFile
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.runtime import lease as lease
from orchestrator.runtime.lease import Lease


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 0.1)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def begin(directory: RunDirectory, session: str) -> Lease:
    """A controller that has said who it is, as the first thing it does."""
    begun = Lease(directory, session)
    record = {"time": time.time(), "kind": "controller", "epoch": begun.term, "session": session}
    RecordFile(directory.events).append(record)
    return begun


def test_another_drivers_controller_is_refused_while_the_first_lives(directory: RunDirectory) -> None:
    first = begin(directory, "a")
    with pytest.raises(RunDirectoryError, match="steered by another controller"):
        Lease(directory, "b")
    assert not first.is_over(), "and claims no epoch by it"
    first.end()
    second = begin(directory, "b")
    assert (first.term, second.term, second.is_successor) == (1, 2, False)


def test_a_successor_takes_over_though_the_lock_of_the_lost_one_outlives_it(directory: RunDirectory) -> None:
    """The lost one's machine may be cut off, with its lock, and it may even live on: it steps down."""
    lost = begin(directory, "a")
    successor = begin(directory, "a")
    assert successor.is_successor
    assert successor.term == 2
    assert lost.is_over()
    assert not successor.is_over()
    lost.end()
    assert not successor.is_over()
    assert directory.is_steered, "it has got the lock meanwhile"
    successor.end()
    assert not directory.is_steered


def test_who_was_taken_over_by_another_driver_does_not_come_back(directory: RunDirectory) -> None:
    begin(directory, "a").end()
    newer = begin(directory, "b")
    with pytest.raises(RunDirectoryError, match="taken over"):
        Lease(directory, "a")
    assert not newer.is_over()


def test_a_run_begun_again_by_the_same_driver_is_no_succession(directory: RunDirectory) -> None:
    begin(directory, "a").end()
    again = begin(directory, "c")
    assert not again.is_successor


def test_what_has_ended_is_not_taken_again(directory: RunDirectory) -> None:
    """Its poller may still ask whether it is over."""
    ended = begin(directory, "a")
    ended.end()
    assert not ended.is_over()
    assert not directory.is_steered


def test_a_result_counts_only_for_the_session_that_ended_the_run(directory: RunDirectory) -> None:
    finished = {"time": time.time(), "kind": "run_finished", "status": "stopped", "reason": "x"}
    begin(directory, "a").end()
    RecordFile(directory.events).append(finished)
    again = begin(directory, "b")
    assert not again.has_ended
    again.end()
    assert not Lease(directory, "b").has_ended, "the end on record is that of an earlier attempt"
    RecordFile(directory.events).append(finished)
    assert Lease(directory, "b").has_ended


def test_a_run_that_has_finished_is_not_steered_again(directory: RunDirectory) -> None:
    first = begin(directory, "a")
    directory.write_json("result.json", {"status": "finished", "steps": 300})
    first.end()
    with pytest.raises(RunDirectoryError, match="has finished already"):
        Lease(directory, "b")
    assert directory.newest_term() == 1
    assert not directory.is_steered


def test_a_run_that_finishes_while_another_driver_waits_for_it_is_not_steered_again(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other looked when nobody had the run, as its controller was being restarted."""
    monkeypatch.setattr(lease, "PATIENCE_S", 30.0)
    begin(directory, "a").end()
    successor = begin(directory, "a")
    outcome: list[str] = []

    def resume() -> None:
        try:
            Lease(directory, "b")
        except RunDirectoryError as error:
            outcome.append(str(error))

    other = threading.Thread(target=resume)
    other.start()
    directory.write_json("result.json", {"status": "finished", "steps": 300})
    successor.end()
    other.join(30.0)
    (said,) = outcome
    assert "has finished already" in said
    assert directory.newest_term() == 2
