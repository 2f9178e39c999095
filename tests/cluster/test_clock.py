"""Clocks that jump, stop and differ, in real runs: nothing dies of it, and every duration is right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from monitoring.goodput import read_ledger
from monitoring.records import read_records
from tests.cluster.command_line import FEW, CommandLine
from tests.cluster.conftest import PATIENCE_S, wait_for
from tests.cluster.other_clocks import OtherClocks

KILL = "step=20,worker=1,kind=kill"
SMALL = ("--set", "elastic.workers.max=2", "--set", "train.steps=60")


@pytest.fixture
def line(tmp_path: Path, cache: Path) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path, cache)
    yield line
    line.nothing_left()


def result_of(line: CommandLine, process: subprocess.Popen[str]) -> dict[str, Any]:
    out = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, out
    return dict(json.loads((line.run_dir / "result.json").read_text()))


def check_times(line: CommandLine, result: dict[str, Any], lasted_s: float) -> None:
    """The run took about as long as it did, and every second is accounted for."""
    events = list(read_records(line.run_dir / "events.jsonl"))
    account = read_ledger(events, read_records(line.run_dir / "metrics.jsonl")).account()
    assert 1.0 < result["wall_seconds"] <= lasted_s
    assert account.wall_seconds == pytest.approx(result["wall_seconds"], abs=0.5)
    assert all(seconds < lasted_s for seconds in account.badput_seconds.values())
    clocks = [event["clock"] for event in events]
    assert max(clocks) - min(clocks) <= lasted_s


def check_recovery(result: dict[str, Any]) -> None:
    """Only what was injected was an incident, and its times are right."""
    failures = [each for each in result["recoveries"] if each["kind"] not in ("grow", "rebalance")]
    assert [(each["kind"], each["worker"]) for each in failures] == [("kill", 1)]
    assert 0.0 <= failures[0]["detect_seconds"] < 5.0
    assert 0.0 < failures[0]["stall_seconds"] < 60.0


@pytest.mark.nightly
def test_the_wall_clock_jumps_an_hour_forward_and_two_back(line: CommandLine, tmp_path: Path) -> None:
    clocks = OtherClocks(tmp_path / "clocks")
    began = time.monotonic()
    process = line.start(*FEW, *SMALL, "--fault", KILL, environment=clocks.environment)
    line.until_step(process, 10)
    clocks.jump_to(3600.0)
    line.until_step(process, 30)
    clocks.jump_to(-3600.0)
    result = result_of(line, process)
    walls = [event["time"] for event in read_records(line.run_dir / "events.jsonl")]
    assert max(walls) - min(walls) > 3600.0, "the clock did jump"
    check_times(line, result, time.monotonic() - began)
    check_recovery(result)


@pytest.mark.nightly
def test_processes_whose_clocks_differ_by_hours_train_and_recover(line: CommandLine, tmp_path: Path) -> None:
    clocks = OtherClocks(tmp_path / "clocks", apart=True)
    began = time.monotonic()
    process = line.start(*FEW, *SMALL, "--fault", KILL, environment=clocks.environment)
    line.until_step(process, 10)
    assert len(list(clocks.claims.iterdir())) >= 2, "they do differ"
    result = result_of(line, process)
    check_times(line, result, time.monotonic() - began)
    check_recovery(result)


@pytest.mark.nightly
def test_a_machine_that_is_suspended_for_longer_than_the_heartbeat_timeout(line: CommandLine) -> None:
    process = line.start(*FEW, *SMALL)
    line.until_step(process, 10)
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everybody:
        os.kill(one.pid, signal.SIGSTOP)
    try:
        # Three heartbeat timeouts, and as long as nothing may move.
        wait_for(lambda: all(one.status() == psutil.STATUS_STOPPED for one in everybody), what="their stop")
        time.sleep(6.5)
        assert line.steps() < 60
    finally:
        for one in everybody:
            os.kill(one.pid, signal.SIGCONT)
    result = result_of(line, process)
    assert [each["kind"] for each in result["recoveries"] if each["kind"] not in ("grow", "rebalance")] == []
