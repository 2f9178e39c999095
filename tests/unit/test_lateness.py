"""What a process sees of a busy machine, and that a process which is stopped says so when it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from orchestrator.control.core.detection import MOST_STRETCH, stretched_s
from orchestrator.lateness import WINDOW_S, Lateness

STOPPED = """
import sys, time
from orchestrator.lateness import Lateness
lateness = Lateness()
lateness.watch()
print("watching", flush=True)
sys.stdin.readline()
while lateness.recent_s() < 1.0:
    time.sleep(0.01)
print("late", flush=True)
"""


def test_the_worst_of_the_last_seconds_counts() -> None:
    lateness = Lateness()
    assert lateness.recent_s(0.0) == 0.0
    for at, late_s in ((0.0, 0.5), (1.0, 2.0), (2.0, 0.1), (3.0, -1.0)):
        lateness.note(late_s, at)
    assert lateness.recent_s(3.0) == 2.0
    assert lateness.recent_s(1.0 + WINDOW_S) == 2.0
    assert lateness.recent_s(1.5 + WINDOW_S) == 0.1
    assert lateness.recent_s(2.5 + WINDOW_S) == 0.0
    assert lateness.recent_s(100.0) == 0.0


def test_a_deadline_is_never_shorter_than_configured_and_bounded() -> None:
    limits = [stretched_s(3.0, late_s / 10) for late_s in range(1000)]
    assert limits[0] == limits[1] == 3.0
    assert limits == sorted(limits)
    assert limits[-1] == 3.0 * (1 + MOST_STRETCH)


def test_a_process_that_was_kept_from_running_sees_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        signal.sigtimedwait([], 1.5)
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "late\n"
    finally:
        process.kill()
        process.wait()
