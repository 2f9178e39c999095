"""A run whose controller is being restarted is under way: commands wait for the successor, or are told why not."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitoring.records import RecordFile
from orchestrator import succession
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.runtime.lease import Lease
from orchestrator.runtime.ray.preparation import clear_result
from orchestrator.succession import NoAnswer, ask, awaits_controller, wait_for_controller


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.create("", {"name": "a"})
    return directory


def put(directory: RunDirectory, kind: str, **fields: Any) -> None:
    RecordFile(directory.events).append({"time": time.time(), "kind": kind, **fields})


def in_background(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_when_a_controller_is_to_be_expected(directory: RunDirectory) -> None:
    assert not awaits_controller(directory), "nobody has begun it"
    put(directory, "controller", epoch=1, session="a", own_cluster=False)
    assert awaits_controller(directory), "its controller is gone and has not ended it"
    RecordFile(directory.events).append({"time": time.time() - 3600, "kind": "noted"})
    assert not awaits_controller(directory), "that was long ago"
    put(directory, "controller", epoch=2, session="a", own_cluster=True)
    assert not awaits_controller(directory), "its driver is gone, and its cluster with it"
    with directory.driving():
        assert awaits_controller(directory)
        directory.write_json("result.json", {"status": "stopped"})
        assert not awaits_controller(directory), "it has ended"
    (directory.path / "result.json").unlink()
    put(directory, "controller", epoch=3, session="b", own_cluster=False)
    assert awaits_controller(directory)
    put(directory, "run_finished", status="stopped", reason="")
    assert not awaits_controller(directory)


def test_only_one_driver_has_a_run(directory: RunDirectory) -> None:
    with directory.driving(), pytest.raises(RunDirectoryError, match="is being run right now"), directory.driving():
        pass
    assert not directory.is_driven


def _succeed(path: Path, may_begin: Any) -> None:
    """The successor, in a process of its own: answers what was asked of it and ends the run when told to stop."""
    directory = RunDirectory(path)
    may_begin.wait(60)
    lease = Lease(directory, "a")
    put(directory, "controller", epoch=lease.term, session="a", own_cluster=False)
    while True:
        for request in directory.take_requests():
            put(directory, "request_answered", id=request["id"], request=request["kind"])
            if request["kind"] == "stop":
                directory.write_json("result.json", {"status": "stopped"})
                lease.end()
                return
        time.sleep(0.02)


def test_commands_wait_for_the_successor(directory: RunDirectory) -> None:
    put(directory, "controller", epoch=directory.next_term(), session="a", own_cluster=False)
    context = multiprocessing.get_context("fork")
    may_begin = context.Event()
    successor = context.Process(target=_succeed, args=(directory.path, may_begin))
    successor.start()
    try:
        assert not directory.is_steered
        said: list[str] = []

        def tell(text: str) -> None:
            said.append(text)
            may_begin.set()  # only what waits long enough to say so lets the successor begin

        assert ask(directory, tell, "checkpoint")["request"] == "checkpoint"
        assert ask(directory, tell, "stop", reason="test")["request"] == "stop"
        assert len(said) == 1
        assert "being started or restarted; waiting" in said[0]
        successor.join(30)
        with pytest.raises(RunDirectoryError, match=r"is not running now \(it was stopped\); nothing to checkpoint"):
            ask(directory, tell, "checkpoint")
    finally:
        successor.kill()
        successor.join()


def test_a_request_that_nobody_answered_is_not_obeyed_later(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "ANSWER_PATIENCE_S", 0.2)
    steering = directory.lock()
    with pytest.raises(NoAnswer, match="did not answer"):
        ask(directory, print, "stop")
    os.close(steering)
    assert directory.take_requests() == []


def test_a_run_that_ends_before_it_could_be_asked_says_how(directory: RunDirectory) -> None:
    put(directory, "controller", epoch=1, session="a", own_cluster=False)
    steering = directory.lock()

    def end() -> None:
        while not list((directory.path / "control").glob("*.json")):
            time.sleep(0.01)
        directory.write_json("result.json", {"status": "finished"})
        os.close(steering)

    ending = in_background(end)
    with pytest.raises(RunDirectoryError, match=r"has ended \(it has finished\); nothing to checkpoint"):
        ask(directory, print, "checkpoint")
    ending.join(10)
    assert directory.take_requests() == []


def test_a_successor_that_never_comes_is_not_waited_for_for_ever(directory: RunDirectory) -> None:
    with directory.driving():
        assert not wait_for_controller(directory, print, patience_s=0.3)


def test_the_result_of_a_finished_run_is_never_cleared(directory: RunDirectory) -> None:
    directory.write_json("result.json", {"status": "stopped"})
    steering = directory.lock()
    assert clear_result(directory) is None
    assert (directory.path / "result.json").exists(), "somebody has the run"
    os.close(steering)
    assert clear_result(directory) is None
    assert not (directory.path / "result.json").exists()
    directory.write_json("result.json", {"status": "finished", "steps": 300})
    assert clear_result(directory) == {"status": "finished", "steps": 300}
    assert (directory.path / "result.json").exists()
    assert not directory.is_steered
