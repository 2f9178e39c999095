"""Has another process do the examination, stage by stage, and ends it when a stage takes too long or the process dies:
that is a finding too, and the other stages go on in a new process."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import IO, Any

from monitoring.outside import json_text
from orchestrator.doctor.check import Check
from orchestrator.doctor.stages import SWEEP, ExaminedStage, Settings, not_swept

START_S = 30.0
"""How long a process may take to begin."""
END_S = 20.0
"""How long it may take to leave the cluster when all is done."""
LEAVE_S = 5.0
"""How long it may take to clean up the storage when it is told to end in the middle, before it is killed."""

Command = Callable[[Settings, int, list[ExaminedStage]], list[str]]


def command_of(settings: Settings, descriptor: int, stages: list[ExaminedStage]) -> list[str]:
    """What runs these stages, and tells of them on a file descriptor."""
    names = [stage.name for stage in stages]
    return [
        sys.executable,
        "-m",
        "orchestrator.runtime.ray.examination.child",
        json_text(asdict(settings)),
        str(descriptor),
        *names,
    ]


def examine(
    settings: Settings, stages: list[ExaminedStage], tell: Callable[[list[Check]], None], command: Command = command_of
) -> list[Check]:
    """Goes through all stages; `tell` hears of each when it is done. Returns all checks."""
    checks: list[Check] = []

    def found(new: list[Check]) -> None:
        checks.extend(new)
        tell(new)

    pending = list(stages)
    while pending:
        with _process(settings, pending, command) as process:
            pending, blocked = _follow(process, pending, settings, found)
        if blocked:
            settings = replace(settings, address=None)
    return checks


class _Process:
    """The child, the lines it says, what it wrote to its standard error, and how long to wait for it once it is told to
    end."""

    def __init__(self, process: subprocess.Popen[bytes], lines: IO[str], errors: IO[bytes]) -> None:
        self.process = process
        self.said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.patience_s = 0.5
        self._errors = errors
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()

    def _listen(self, lines: IO[str]) -> None:
        for line in lines:
            with suppress(ValueError):  # cut off in the middle when it died
                self.said.put(json.loads(line))
        self.said.put(None)

    def why_it_died(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        code = self.process.returncode
        end = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip() and " W " not in line[:40]]
        # Ray says first why it gives up, then where it was; Python the other way round.
        fatal = [line for line in lines if "Check failed:" in line]
        last = fatal[0].partition("Check failed:")[2].strip() if fatal else (lines[-1] if lines else "")
        return f"{end}: {last}" if last else end


@contextmanager
def _process(settings: Settings, pending: list[ExaminedStage], command: Command) -> Iterator[_Process]:
    """In a session of its own, so that it can be ended with whatever it started, however the block ends."""
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as lines, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command(settings, writing, pending), pass_fds=(writing,), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        child = _Process(process, lines, errors)
        try:
            yield child
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=child.patience_s)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # One that waits for a disk or a dead mount cannot even be killed; it is not waited for.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)


def _follow(
    child: _Process, pending: list[ExaminedStage], settings: Settings, found: Callable[[list[Check]], None]
) -> tuple[list[ExaminedStage], bool]:  # fmt: skip
    """Listens until the child is done, dead or too late; returns the stages that are left, and whether those that need
    the cluster are not among them any more."""
    pending, blocked = list(pending), False
    current = pending[0]
    limit_s = START_S
    deadline = time.monotonic() + START_S
    while True:
        try:
            message = child.said.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            message = {"stuck": True}
        if message is not None and "begin" in message:
            current = next(stage for stage in pending if stage.name == message["begin"])
            limit_s = message["limit_s"]
            child.patience_s = LEAVE_S if current.name == "storage" else 0.5
            deadline = time.monotonic() + limit_s
            continue
        if message is not None and "end" in message:
            found([Check(**check) for check in message["checks"]])
            pending.remove(current)
            if message["blocked"]:
                pending, blocked = _without_cluster(pending), True
            deadline = time.monotonic() + END_S
            continue
        if not pending:
            return [], blocked
        if current not in pending:
            current = pending[0]
        failure = current.stuck(limit_s, settings) if message is not None else current.crashed(child.why_it_died())
        found([not_swept() if current is SWEEP else failure])
        pending.remove(current)
        if current.leads:
            pending, blocked = _without_cluster(pending), True
        if current.name == "storage":
            pending.insert(0, SWEEP)
        return pending, blocked


def _without_cluster(stages: list[ExaminedStage]) -> list[ExaminedStage]:
    return [stage for stage in stages if not stage.needs_cluster]
