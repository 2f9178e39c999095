"""`orchestrator node-watcher -- COMMAND`: what the command sees of a signal, with a child that writes down what reaches
it and a node that is a stand-in. Real processes, no Ray."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHILD = """
import signal, sys, time
def note(number, frame):
    print("child got", signal.Signals(number).name, flush=True)
    if number != signal.SIGHUP:
        sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, note)
print("child up", flush=True)
while True:
    time.sleep(0.02)
"""

WRAPPER = """
import sys, time
from orchestrator.runtime.ray.nodes import GcsError, HeadNodeError
from orchestrator.runtime.ray.node_watcher.wrapper import Wrapped
class Node:
    is_head, busy_s, away_s = {is_head}, {busy_s}, {away_s}
    asked = drained = None
    def drain(self, reason, deadline):
        self.asked = self.asked or time.monotonic()
        if self.is_head:
            raise HeadNodeError("it is the head")
        if time.monotonic() < self.asked + self.away_s:
            raise GcsError("GCS away")
        self.drained = time.monotonic()
        print("drain for", reason, round(deadline - time.time(), 1), flush=True)
        return "drained"
    def busy(self):
        return ["run/worker-0.0"] if time.monotonic() < self.drained + self.busy_s else []
sys.exit(Wrapped([sys.executable, "-c", {child!r}], {grace_s}).run(Node()))
"""

Start = Callable[..., "Running"]


class Running:
    """The wrapper as a process; `lines` are what it and its child said."""

    def __init__(self, child: str = CHILD, grace_s: float = 20, is_head: bool = False, busy_s: float = 0.5,
                 away_s: float = 0) -> None:  # fmt: skip
        code = WRAPPER.format(child=child, grace_s=grace_s, is_head=is_head, busy_s=busy_s, away_s=away_s)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.signalled_at = 0.0

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def send(self, number: int) -> None:
        self.signalled_at = time.monotonic()
        self.process.send_signal(number)

    def end(self) -> tuple[int, float]:
        """The exit code, and how many seconds after the last signal it came."""
        return self.process.wait(timeout=20), time.monotonic() - self.signalled_at


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Running] = []

    def begin(**options: object) -> Running:
        started.append(Running(**options))  # type: ignore[arg-type]
        assert started[-1].line() == "child up"
        return started[-1]

    yield begin
    for running in started:
        if running.process.poll() is None:
            running.process.send_signal(signal.SIGTERM)
            running.process.send_signal(signal.SIGTERM)
            running.process.wait(timeout=20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_node_is_drained_before_the_command_hears_of_it(start: Start, number: signal.Signals) -> None:
    running = start(busy_s=0.6)
    running.send(number)
    assert running.line() == f"drain for {number.name}: this node shuts down 20.0"
    assert running.line() == f"child got {number.name}"
    code, seconds = running.end()
    assert code == 7, "the child's own"
    assert 0.6 <= seconds < 5


def test_the_grace_period_is_the_most(start: Start) -> None:
    running = start(busy_s=60, grace_s=1)
    running.send(signal.SIGTERM)
    assert running.line().startswith("drain for SIGTERM")
    assert running.line() == "child got SIGTERM"
    assert 1 <= running.end()[1] < 5


def test_a_second_signal_passes_on_at_once(start: Start) -> None:
    running = start(busy_s=60)
    running.send(signal.SIGHUP)
    assert running.line().startswith("drain for SIGHUP")
    running.send(signal.SIGTERM)
    assert running.line() == "child got SIGHUP"
    assert running.line() == "child got SIGTERM"
    assert running.end()[0] == 7
    assert running.end()[1] < 3


def test_a_head_is_not_kept_waiting(start: Start) -> None:
    running = start(is_head=True)
    running.send(signal.SIGTERM)
    assert running.line() == "child got SIGTERM"
    assert running.end()[1] < 3


def test_a_gcs_that_is_away_is_asked_again(start: Start) -> None:
    running = start(away_s=0.7, busy_s=0)
    running.send(signal.SIGTERM)
    assert running.line().startswith("drain for SIGTERM")
    assert running.line() == "child got SIGTERM"
    assert running.end()[1] >= 0.7


def test_the_command_may_end_by_itself_or_by_a_signal(start: Start) -> None:
    assert start(child="print('child up', flush=True); raise SystemExit(5)").end()[0] == 5
    killed = "import os; print('child up', flush=True); os.kill(os.getpid(), 9)"
    assert start(child=killed).end()[0] == 128 + 9


ORPHANS = """
import os
from orchestrator.runtime.ray.node_watcher.wrapper import reap_orphans
def ended(code):
    pid = os.fork()
    if pid == 0:
        os._exit(code)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid
orphan = ended(0)
reap_orphans(child=-1)
try:
    os.waitpid(orphan, 0)
except ChildProcessError:
    print("the orphan is gone")
child = ended(3)
reap_orphans(child)
print("the child's code is", os.waitpid(child, 0)[1] >> 8)
"""


def test_orphans_are_reaped_and_the_child_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == ["the orphan is gone", "the child's code is 3"]
