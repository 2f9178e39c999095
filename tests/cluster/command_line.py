"""The command line in processes of its own, with a Ray of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from monitoring.records import read_records
from tests.cluster.conftest import JOB, wait_for

STANDSTILL_S = 180.0
FEW = ("--set", "train.schedule.warmup_steps=1")


class CommandLine:
    """Starts `python -m orchestrator` and knows every process that came of it."""

    def __init__(self, home: Path, cache: Path) -> None:
        self.home = home
        self.cache = cache
        self.run_dir = home / "run"
        self.job = home / "job.yaml"
        self.job.write_text(JOB)
        self.family: dict[int, psutil.Process] = {}

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        command = [
            sys.executable, "-m", "orchestrator", "run", str(self.job), "--run-dir", str(self.run_dir),
            "--set", f"data.cache={self.cache}", *arguments,
        ]  # fmt: skip
        return self.spawn(command, environment)

    @staticmethod
    def spawn(command: list[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | dict(more or {})
        return subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def steps(self) -> int:
        return sum(1 for _ in read_records(self.run_dir / "metrics.jsonl"))

    def until_step(self, process: subprocess.Popen[str], step: int) -> None:
        """Waits for it as long as the run gets on, however slowly: this machine may have more to do."""
        seen, deadline = (-1, -1), 0.0
        while (steps := self.steps()) < step:
            assert process.poll() is None, process.communicate()[0]
            self.remember(process.pid)
            if (now := (steps, sum(1 for _ in read_records(self.run_dir / "events.jsonl")))) != seen:
                seen, deadline = now, time.monotonic() + STANDSTILL_S
            assert time.monotonic() < deadline, f"at step {steps} for {STANDSTILL_S} s, waiting for {step}"
            time.sleep(0.05)
        self.remember(process.pid)

    def remember(self, pid: int) -> None:
        with suppress(psutil.Error):
            for child in psutil.Process(pid).children(recursive=True):
                self.family.setdefault(child.pid, child)

    def left(self) -> list[str]:
        alive = []
        for process in self.family.values():
            with suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(f"{process.pid} {process.name()} ({process.status()}, child of {process.ppid()})")
        return alive

    def nothing_left(self) -> None:
        wait_for(lambda: not self.left(), what=lambda: f"the end of {self.left()}")
