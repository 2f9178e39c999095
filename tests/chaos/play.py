"""Plays a story with real processes: the command line, a Ray of its own, signals, and commands from beside.

    python -m tests.chaos.play --seeds 0-39 [--loaded | --quiet]

prints a line a story and what deviates; exit code 1 if any does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from monitoring.records import read_records
from tests.chaos.story import JOB, STEPS, Act, Story, draw

ROOT = Path(__file__).parents[2]
RAY_NICENESS = 15
"""Of the processes that Ray starts for its actors, unless it is told otherwise (its setting `worker_niceness`)."""
PATIENCE_S = 180.0
"""For one life of a driver; a story takes some 30 s on a quiet machine."""
COMMAND_PATIENCE_S = 120.0


class Deviation(AssertionError):
    """A run did not do what it promises."""


@dataclass
class Verdict:
    """What came of a story."""

    story: Story
    deviations: list[str] = field(default_factory=list)
    incidents: int = 0
    recoveries: int = 0
    steps_lost: int = 0
    lives: int = 0
    """How often a driver was started."""
    seconds: float = 0.0

    def __str__(self) -> str:
        told = "ok" if not self.deviations else "DEVIATES: " + " | ".join(self.deviations)
        return (
            f"{self.story.seed:4d}  {self.seconds:5.0f} s  {self.lives} lives  {self.incidents:2d} incidents  "
            f"{self.recoveries:2d} recoveries  {self.steps_lost:3d} steps again  {told}  ({self.story})"
        )


class Stage:
    """Where stories are played: references and token stores are made once and shared."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.job = home / "job.yaml"
        self.job.write_text(JOB, encoding="utf-8")
        self._references: dict[tuple[str, ...], dict[str, Any]] = {}

    def reference(self, overrides: tuple[str, ...]) -> dict[str, Any]:
        """The result of an undisturbed run."""
        if overrides not in self._references:
            run_dir = self.home / f"reference-{len(self._references)}"
            driver = Driver(self.run_command(run_dir, overrides, ()), self.home / f"{run_dir.name}.log")
            if driver.wait(PATIENCE_S, lambda: _num_records(run_dir)) != 0:
                raise Deviation(f"the undisturbed run of {overrides}: {driver}")
            self._references[overrides] = _result(run_dir)
        return self._references[overrides]

    def play(self, story: Story) -> Verdict:
        """Plays a story and compares it with its undisturbed run."""
        started = time.monotonic()
        expected = self.reference(story.undisturbed)
        verdict = Verdict(story)
        run_dir = self.home / f"story-{story.seed}{'-loaded' if story.is_loaded else ''}"
        with _load(story.is_loaded):
            try:
                _Play(self, story, run_dir, verdict).run()
                _compare(run_dir, expected, verdict)
            except Deviation as error:
                verdict.deviations.append(str(error)[-3000:])
        verdict.seconds = time.monotonic() - started
        return verdict

    def run_command(self, run_dir: Path, overrides: Sequence[str], faults: Sequence[str]) -> list[str]:
        """The command that starts a run."""
        options = [part for value in overrides for part in ("--set", value)]
        options += [part for value in faults for part in ("--fault", value)]
        cache = f"data.cache={self.home / 'cache'}"
        return ["run", str(self.job), "--run-dir", str(run_dir), "--set", cache, *options]


class Driver:
    """A command in a process of its own, with what it prints in a file, and every process that came of it."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self._log = log
        self._family: dict[int, psutil.Process] = {}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *command], cwd=ROOT, env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __str__(self) -> str:
        return f"exit code {self._process.returncode}: {self.output[-2000:]}"

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def is_running(self) -> bool:
        """Also takes note of the processes it has started."""
        with suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                self._family.setdefault(child.pid, child)
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float, progress: Callable[[], object] = lambda: None) -> int:
        """Its exit code. Raises Deviation when it does not end, and `progress` stays the same, for `timeout_s`."""
        before, deadline = progress(), time.monotonic() + timeout_s
        while self.is_running:
            if (now := progress()) != before:
                before, deadline = now, time.monotonic() + timeout_s
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                raise Deviation(f"no end within {timeout_s:.0f} s; {self}")
            time.sleep(0.05)
        return int(self._process.returncode)

    def end(self) -> None:
        """Ends it if need be. Raises Deviation when a process that came of it is left after some time."""
        if self.is_running:
            self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + 30.0
        while left := [process for process in self._family.values() if _is_alive(process)]:
            if time.monotonic() > deadline:
                names = ", ".join(str(process) for process in left)
                for process in left:
                    with suppress(psutil.Error):
                        process.kill()
                raise Deviation(f"left behind: {names}")
            time.sleep(0.1)


class _Play:
    def __init__(self, stage: Stage, story: Story, run_dir: Path, verdict: Verdict) -> None:
        self._stage = stage
        self._story = story
        self._run_dir = run_dir
        self._verdict = verdict

    def run(self) -> None:
        """Lives of a driver, one after the other, until the run has ended by itself."""
        command = self._stage.run_command(self._run_dir, self._story.overrides, self._story.faults)
        acts = list(self._story.acts)
        while True:
            self._verdict.lives += 1
            driver = self._start(command, f"driver-{self._verdict.lives}")
            try:
                ended_by = self._live(driver, acts)
            finally:
                driver.end()
            if ended_by is None:
                return
            command = ["resume", str(self._run_dir)]

    def _live(self, driver: Driver, acts: list[Act]) -> Act | None:
        """Follows a driver to its end, and does what is to be done meanwhile; the act that ended it."""
        before, deadline = (0, 0), time.monotonic() + PATIENCE_S
        while driver.is_running:
            if (now := _num_records(self._run_dir)) != before:
                before, deadline = now, time.monotonic() + PATIENCE_S
            if time.monotonic() > deadline:
                raise Deviation(f"nothing for {PATIENCE_S:.0f} s at step {self._steps()}: {self._last_events()}")
            if acts and self._steps() >= acts[0].step:
                act = acts.pop(0)
                if self._do(act, driver):
                    # A signal that comes while the run ends by itself may find nothing left to stop.
                    if driver.wait(PATIENCE_S) not in ((-signal.SIGKILL,) if act.kind == "driver" else (3, 0)):
                        raise Deviation(f"after {act.kind}: {driver}")
                    return act
            time.sleep(0.05)
        if driver.wait(PATIENCE_S) != 0:
            raise Deviation(str(driver))
        return None

    def _do(self, act: Act, driver: Driver) -> bool:
        """Does it; whether the driver is to end of it."""
        if act.kind in ("kill", "freeze"):
            workers = self._newest("generation")["workers"]
            number = signal.SIGKILL if act.kind == "kill" else signal.SIGSTOP
            _signal(workers[act.number % len(workers)]["pid"], number)
        elif act.kind == "controller":
            _signal(self._newest("controller")["pid"], signal.SIGKILL)
        elif act.kind == "resize":
            self._command("resize", str(self._run_dir), str(act.number))
        elif act.kind == "save":
            self._command("checkpoint", str(self._run_dir))
        elif act.kind == "stop":
            return self._command("stop", str(self._run_dir))
        else:
            driver.send(signal.SIGTERM if act.kind == "signal" else signal.SIGKILL)
            return True
        return False

    def _command(self, *arguments: str) -> bool:
        """Gives a command; one that finds the run at its end (there is nothing to do any more) has come too late."""
        command = self._start(arguments, arguments[0])
        if command.wait(COMMAND_PATIENCE_S) == 0:
            return True
        if self._steps() < self._story.steps and not _ended(self._run_dir):
            raise Deviation(f"`{arguments[0]}`: {command}")
        return False

    def _start(self, command: Sequence[str], name: str) -> Driver:
        return Driver(command, self._stage.home / f"{self._run_dir.name}.{name}.log")

    def _steps(self) -> int:
        return sum(1 for _ in read_records(self._run_dir / "metrics.jsonl"))

    def _newest(self, kind: str) -> dict[str, Any]:
        return [event for event in read_records(self._run_dir / "events.jsonl") if event["kind"] == kind][-1]

    def _last_events(self) -> str:
        return str(list(read_records(self._run_dir / "events.jsonl"))[-8:])


def _compare(run_dir: Path, expected: dict[str, Any], verdict: Verdict) -> None:
    """Adds to the verdict everything in which the run is not what it would have been without its story."""
    result = _result(run_dir)
    found = verdict.deviations
    found += [
        f"{key}: {result.get(key)}, not {expected[key]}"
        for key in ("status", "steps", "tokens", "state_digest", "data_digest", "final_loss", "bit_exact")
        if result.get(key) != expected[key]
    ]
    steps = [record["step"] for record in read_records(run_dir / "metrics.jsonl")]
    if steps != list(range(expected["steps"])):
        found.append(f"metrics.jsonl has the steps {steps}")
    audit = Driver(["audit", str(run_dir)], run_dir.with_name(f"{run_dir.name}.audit.log"))
    if audit.wait(COMMAND_PATIENCE_S) != 0:
        found.append(f"audit: {audit}")
    events = list(read_records(run_dir / "events.jsonl"))
    recoveries = [event for event in events if event["kind"] == "recovery"]
    verdict.incidents = sum(event["kind"] == "incident" for event in events)
    verdict.recoveries = len(recoveries)
    verdict.steps_lost = sum(recovery["steps_lost"] for recovery in recoveries)
    from_peers = [r for r in recoveries if r["source"] == "peers" and r["steps_lost"]]
    if from_peers:
        found.append(f"steps were lost although all state came from peers: {from_peers}")
    if verdict.lives == 1 and verdict.incidents != verdict.recoveries:
        found.append(f"{verdict.incidents} incidents, {verdict.recoveries} recoveries")


def _result(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / "result.json").read_text(encoding="utf-8")))
    except OSError as error:
        raise Deviation(f"no result: {error}") from error


def _ended(run_dir: Path) -> bool:
    return (run_dir / "result.json").exists()


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _num_records(run_dir: Path) -> tuple[int, int]:
    """Of steps and of events: a run that gets on is waited for, however slow the machine is."""
    steps, events = (sum(1 for _ in read_records(run_dir / f"{name}.jsonl")) for name in ("metrics", "events"))
    return steps, events


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextmanager
def _load(wanted: bool) -> Iterator[None]:
    """A busy process for each processor that there is, of the priority of Ray's workers: before one of a higher
    priority they would stand still, and nothing but patience would be tested."""
    burner = ["nice", "-n", str(RAY_NICENESS), sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burner) for _ in range(len(os.sched_getaffinity(0)) if wanted else 0)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _seeds(text: str) -> list[int]:
    """The numbers of "0-3,7": 0, 1, 2, 3 and 7."""
    ranges = [part.partition("-") for part in text.split(",")]
    return [seed for first, _, last in ranges for seed in range(int(first), int(last or first) + 1)]


def main(show: Callable[[str], None] = lambda line: print(line, flush=True)) -> int:
    parser = argparse.ArgumentParser(description="Plays stories of faults and compares them with undisturbed runs.")
    parser.add_argument("--seeds", default="0-39", type=_seeds, help="N, N-M, or several with commas")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--loaded", action="store_true", help="all of them beside busy processes")
    how.add_argument("--quiet", action="store_true", help="none of them")
    parser.add_argument("--steps", type=int, default=STEPS, help="only the beginning of each story")
    parser.add_argument("--keep", type=Path, help="keep the run directories here")
    options = parser.parse_args()
    is_loaded = True if options.loaded else False if options.quiet else None
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        home = options.keep or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        stage = Stage(home)
        for seed in options.seeds:
            verdicts.append(stage.play(draw(seed, is_loaded=is_loaded, steps=options.steps)))
            show(str(verdicts[-1]))
    bad = sum(bool(verdict.deviations) for verdict in verdicts)
    show(
        f"{len(verdicts)} runs, {sum(v.lives for v in verdicts)} drivers, {sum(v.incidents for v in verdicts)} "
        f"incidents, {sum(v.recoveries for v in verdicts)} recoveries: {bad} deviations"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
