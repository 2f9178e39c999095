"""`status`, `watch` and `events` on run directories made by hand: live, ended, interrupted, and of an older version."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from monitoring.display import Display
from monitoring.follow import Tail
from monitoring.records import RecordFile
from monitoring.terminal.facts import RunFacts
from monitoring.terminal.lines import as_text, status_lines
from orchestrator.cli import app, following
from orchestrator.cli.events import parse_since
from orchestrator.rundir import RunDirectory
from tests.unit.run_directories import (
    CHECKPOINT,
    CONTROLLER,
    GENERATION,
    INCIDENT,
    JOB,
    RECOVERY,
    RESULT,
    STARTED,
    STEPS,
    T0,
    append,
    make_run,
    status,
    step,
    worker,
    write_lines,
)


def facts_of(path: Path) -> RunFacts:
    facts = RunFacts(path)
    facts.refresh()
    return facts


def shown(path: Path, *, alive: bool) -> str:
    return as_text(status_lines(facts_of(path), alive, now=T0 + 30))


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@contextmanager
def steered(path: Path) -> Iterator[None]:
    descriptor = RunDirectory(path).lock()
    try:
        yield
    finally:
        os.close(descriptor)


def test_a_live_run_on_one_screen(tmp_path: Path) -> None:
    text = shown(make_run(tmp_path, live=status()), alive=True)
    for part in (
        "running: training, step 5 of 20, 0:07 left",
        "loss       3.6000, gradient norm 1.500",
        "2,000 tokens/s, 0.500 s a step, 31.0% of the peak FLOP/s (MFU)",
        "generation 3: data 2, tensor 1, pipeline 1, shard none",
        "2 training, 1 starting; 2 wanted (1 to 2)",
        "node ab12cd34",
        "worker 1.2    rank 1    data 1  member (compute)  speed 0.61  0.400 s  1.2 GB  slow device",
        "80.0% of 30 s; lost to initialisation 3.0 s, recovery 2.0 s, detection 0.6 s",
        "checkpoint 5 steps, 12 s old; another is being written",
        "incident   hang: worker 1 is silent (2 s ago)",
        "finding    slow device of worker 1: computes at 0.61",
        "kill       of worker 1 at step 4: recovered in 0.40 s",
    ):
        assert part in text, text
    assert "other 0.4" not in text, "only the three largest losses"
    assert "resume" not in text


def test_an_interrupted_run_says_what_to_do_and_does_not_repeat_what_was_live(tmp_path: Path) -> None:
    text = shown(make_run(tmp_path, live=status()), alive=False)
    assert "state      interrupted, step 5 of 20" in text
    assert f"orchestrator resume {tmp_path} goes on from the newest checkpoint" in text
    assert "member (compute)" not in text
    assert "generation 3: data 2, tensor 1, pipeline 1, shard none; 2 workers" in text
    assert "is silent" not in text


def test_a_run_without_a_status_file_is_known_from_its_records(tmp_path: Path) -> None:
    later = INCIDENT | {"incident": "hang", "time": T0 + 25, "at": T0 + 25, "cause": "worker 1 is silent"}
    events = [STARTED, GENERATION, STEPS, INCIDENT, RECOVERY, CHECKPOINT, later]
    text = shown(make_run(tmp_path, events=events), alive=True)
    for part in ("running, step 5 of 20, 0:07 left", "2,000 tokens/s", "2 training", "worker 1.2    rank 1",
                 "checkpoint 5 steps, 8 s old", "incident   hang: worker 1 is silent (5 s ago)"):  # fmt: skip
        assert part in text, text
    assert "of 25 s; lost to waiting for resources 10.0 s" in text


def test_a_finished_run_is_its_result(tmp_path: Path) -> None:
    text = shown(make_run(tmp_path, steps=20, live=status(over=True, state="over"), result=RESULT), alive=False)
    assert "finished   20 steps, 20,000 tokens, loss 2.1000" in text
    assert "weights    sha256:aa" in text
    assert "lost to initialisation 3.0 s" in text


def test_many_workers_are_told_by_node(tmp_path: Path) -> None:
    many = [worker(number, node=f"node{number // 8:04d}", speed=0.5 if number == 9 else 1.0) for number in range(512)]
    many[9]["finding"] = "slow device"
    text = shown(make_run(tmp_path, live=status(workers=many)), alive=True)
    assert "node node0001: 8 of 8 training, speed 0.50 to 1.00, slow device" in text
    assert "and 32 nodes more" in text
    assert "worker 9.0" not in text
    assert len(text.splitlines()) < 60


def test_a_rollback_takes_steps_back_at_once(tmp_path: Path) -> None:
    make_run(tmp_path)
    facts = facts_of(tmp_path)
    RecordFile(tmp_path / "metrics.jsonl").keep(lambda record: record["step"] < 2)
    append(tmp_path / "events.jsonl", {"time": T0 + 31, "kind": "rollback", "committed": 2, "steps": 3,
                                         "tokens": 3000, "seconds": {"productive": 1.5}})  # fmt: skip
    facts.refresh()
    assert facts.step == 2
    append(tmp_path / "metrics.jsonl", step(2, loss=9.0))
    facts.refresh()
    assert (facts.step, facts.last_step and facts.last_step["loss"]) == (3, 9.0)


def test_only_the_end_of_a_long_record_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [step(number) for number in range(100)])
    lines = path.read_bytes().splitlines(keepends=True)
    last_two = sum(map(len, lines[-2:]))
    for cut in range(last_two - 3, last_two + 1):
        expected = [98, 99] if cut == last_two else [99]
        assert [record["step"] for record in Tail(path, last_bytes=cut).new()] == expected
    assert len(list(Tail(path, last_bytes=10**9).new())) == 100
    assert list(Tail(path, from_end=True).new()) == []


def test_status_json_keeps_its_keys_and_has_what_is_live(tmp_path: Path) -> None:
    path = make_run(tmp_path / "tiny", live=status())
    with steered(path):
        content = json.loads(command("status", str(path), "--json").stdout)
    assert content["state"] == "running"
    assert (content["step"], content["steps"], content["loss"]) == (5, 20, 3.6)
    assert content["generation"]["generation"] == 3
    assert [event["incident"] for event in content["recoveries"]] == ["kill"]
    assert content["result"] is None
    assert content["run"] == RunDirectory(path).run_id
    assert content["live"]["workers"][1]["finding"] == "slow device"
    assert content["goodput"]["productive_seconds"] == 24.0
    (path / "status.json").unlink()
    content = json.loads(command("status", str(path), "--json").stdout)
    assert (content["state"], content["live"]) == ("interrupted", None)
    goodput = content["goodput"]
    assert goodput["wall_seconds"] == pytest.approx(
        goodput["productive_seconds"] + sum(goodput["badput_seconds"].values())
    )


@pytest.mark.parametrize(("ended", "code"), [("finished", 0), ("failed", 1), ("stopped", 3)])
def test_watch_ends_with_the_run_and_with_its_exit_code(tmp_path: Path, ended: str, code: int) -> None:
    path = make_run(tmp_path, steps=20, result=RESULT | {"status": ended, "reason": "because"})
    done = command("watch", str(path))
    assert done.exit_code == code
    assert f"{ended:<11}20 steps" in done.stdout
    assert "kill of worker 1 at step 4" in done.stdout, "the story so far"
    lines = command("watch", str(path), "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines] == [ended]


def test_watch_of_a_run_that_nobody_steers_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path)
    for name in ("events.jsonl", "metrics.jsonl"):
        os.utime(path / name, (T0 - 1e6, T0 - 1e6))
    monkeypatch.setattr(time, "time", lambda: T0)
    done = command("watch", str(path))
    assert done.exit_code == 1
    assert f"orchestrator resume {path}" in done.stdout


def is_abandoned(directory: RunDirectory, **patience: float) -> bool:
    """At the first look."""
    return following.Abandonment(directory, **patience).has_come()


def test_how_long_nothing_came_is_measured_and_not_told_by_the_wall_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(make_run(tmp_path))
    for path in (directory.events, directory.metrics, directory.path / "job.resolved.json"):
        os.utime(path, (T0, T0))
    wall, steady = [T0 + 1], [50.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "monotonic", lambda: steady[0])
    abandonment = following.Abandonment(directory)
    assert not abandonment.has_come()
    wall[0] += 3600
    assert not abandonment.has_come(), "the clock was set"
    steady[0] += following.PATIENCE_S - 2
    assert not abandonment.has_come()
    os.utime(directory.events, (T0 - 60, T0 - 60))  # by a machine whose clock was set back
    os.utime(directory.metrics, (T0 + 1, T0 + 1))
    assert not abandonment.has_come()
    steady[0] += following.PATIENCE_S - 1
    assert not abandonment.has_come(), "that was a sign of life"
    wall[0] -= 7200
    steady[0] += 2
    assert abandonment.has_come()


def test_a_controller_that_is_restarted_is_waited_for(tmp_path: Path) -> None:
    directory = RunDirectory(make_run(tmp_path))
    newest = directory.events.stat().st_mtime
    for path in (directory.events, directory.metrics):
        os.utime(path, (newest, newest))
    os.utime(directory.path / "job.resolved.json", (newest - 1, newest - 1))
    assert not is_abandoned(directory, patience_s=time.time() - newest + 60)
    assert is_abandoned(directory, patience_s=-1.0)
    with steered(directory.path):
        assert not is_abandoned(directory, patience_s=-1.0)


def started_at(path: Path, started: float, said: float | None = None) -> RunDirectory:
    """A run that recorded nothing since it was started, and last said something in its logs at `said`."""
    path.mkdir()
    (path / "job.resolved.json").write_text(json.dumps(JOB))
    os.utime(path / "job.resolved.json", (started, started))
    (path / "events.jsonl").touch()  # Empty, whenever that was.
    if said is not None:
        (path / "logs").mkdir()
        (path / "logs" / "driver.log").write_text("2026-08-02T22:21:51.123Z INFO [run=r] driver: starting workers\n")
        os.utime(path / "logs" / "driver.log", (said, said))
    return RunDirectory(path)


def test_a_run_that_died_before_its_first_event_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(time, "time", lambda: T0)
    patience = following.START_PATIENCE_S
    assert patience > following.PATIENCE_S
    silent = started_at(tmp_path / "silent", T0 - patience - 1)
    assert is_abandoned(silent)
    with steered(silent.path):
        assert not is_abandoned(silent)
    assert not is_abandoned(started_at(tmp_path / "new", T0 - patience + 1)), "Ray may still be starting"
    assert not is_abandoned(started_at(tmp_path / "busy", T0 - 2 * patience, T0 - patience + 1))
    assert is_abandoned(started_at(tmp_path / "dead", T0 - 3 * patience, T0 - 2 * patience))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [(["watch"], 1, "interrupted after 0 steps"), (["watch", "--json"], 1, ""), (["events", "-f"], 0, ""),
     (["logs", "-f"], 0, "starting workers")],
)  # fmt: skip
def test_nothing_waits_for_ever_for_a_run_that_died_before_its_first_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    class StillWaiting(Exception):
        pass

    def wait(seconds: float) -> None:
        raise StillWaiting

    started_at(tmp_path / "run", T0 - 1e6, T0 - 1e6)
    monkeypatch.setattr(time, "time", lambda: T0)
    monkeypatch.setattr(time, "sleep", wait)
    done = command(arguments[0], str(tmp_path / "run"), *arguments[1:])
    assert done.exit_code == code, done.exception
    assert says in done.stdout


def test_a_run_that_is_resumed_is_not_given_up_before_it_recorded_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    directory = RunDirectory(make_run(tmp_path))
    for path in (directory.events, directory.metrics):
        os.utime(path, (T0 - 1e6, T0 - 1e6))
    os.utime(tmp_path / "job.resolved.json", (T0 - 60, T0 - 60))
    monkeypatch.setattr(time, "time", lambda: T0)
    assert not is_abandoned(directory)
    monkeypatch.setattr(time, "time", lambda: T0 + following.START_PATIENCE_S)
    assert is_abandoned(directory)


def test_the_panel_shows_what_status_shows(tmp_path: Path) -> None:
    make_run(tmp_path, live=status(time=time.time()))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=50, highlight=False)
    with Display(tmp_path, 20, console=console, history=2) as display:
        display.update()
    text = out.getvalue()
    for part in ("training", "3.6000", "2,000 tokens/s", "0:07 left", "5/20", "worker 1.2", "slow device",
                 "80.0% of 30 s", "hang: worker 1 is silent", "5 steps"):  # fmt: skip
        assert part in text, text
    assert "checkpoint of 5 steps" in text, "the last two events"
    assert "generation 3 from step 0" not in text, "but not those before"


def test_the_panel_of_a_resumed_run_does_not_show_the_status_of_before(tmp_path: Path) -> None:
    make_run(tmp_path, live=status(time=time.time() - 3600))
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=50)
    with Display(tmp_path, 20, console=console) as display:
        assert display.facts.live is None
        (tmp_path / "status.json").write_text(json.dumps(status(time=time.time())))
        display.update()
        assert display.facts.live is not None


def test_events_by_kind_and_time(tmp_path: Path) -> None:
    path = make_run(tmp_path, events=[STARTED, CONTROLLER, GENERATION, INCIDENT, RECOVERY, CHECKPOINT])
    done = command("events", str(path), "--kind", "incident", "--kind", "recovery", "--json")
    assert [json.loads(line)["kind"] for line in done.stdout.splitlines()] == ["incident", "recovery"]
    since = parse_since("2027-01-15T08:00:20.5+00:00", now=0.0)
    assert since == T0 + 20.5
    done = command("events", str(path), "--since", "2027-01-15T08:00:20.5+00:00")
    assert [line.split()[3] for line in done.stdout.splitlines()] == ["recovery", "checkpoint_saved"]
    assert "[   21.00 s]" in done.stdout, "times are of the run, whatever is left out"
    assert (parse_since("5m", 1000.0), parse_since("2h", 10_000.0), parse_since("1.5", 10.0)) == (700.0, 2800.0, 8.5)
    assert command("events", str(path), "--since", "yesterday").exit_code == 2


def test_a_rollback_is_told(tmp_path: Path) -> None:
    back = {"time": T0 + 1, "kind": "rollback", "committed": 50, "steps": 7, "tokens": 7000, "seconds": {}}
    path = make_run(tmp_path, events=[STARTED, back])
    assert (
        "rollback             back to the state of 50 steps: 7 steps are done again"
        in command("events", str(path)).stdout
    )


def test_following_events_ends_with_the_run(tmp_path: Path) -> None:
    finished = {"time": T0 + 9, "kind": "run_finished", "status": "finished", "reason": ""}
    path = make_run(tmp_path, events=[STARTED, finished])
    done = command("events", str(path), "-f")
    assert done.exit_code == 0
    assert "run_finished" in done.stdout
