"""Log records of a run's processes: what is on each, and how they are read back."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monitoring import logs
from monitoring.log_files import MOST_LINE_BYTES, LogFiles
from monitoring.logs import LogContext, LogRecord, logging_to, parse_line
from orchestrator.cli import app
from orchestrator.job import Job
from tests.unit.run_directories import GENERATION, RESULT, STARTED, T0, append, make_run

log = logging.getLogger("orchestrator.test")
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["text", "json"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(directory: Path, process: str, at: float, message: str, worker: int | None = None, **about: int) -> None:
    """A record as the process would have written it at that time."""
    context = LogContext("tiny-1234", process, worker, **about)
    record = logging.LogRecord("orchestrator.training.worker", logging.INFO, "", 0, message, None, None)
    record.created = at
    logs.ContextFilter(context).filter(record)
    directory.mkdir(exist_ok=True)
    with (directory / f"{process}.log").open("a") as file:
        file.write(logs.TextFormatter().format(record) + "\n")


def read(directory: Path, **selection: object) -> list[LogRecord]:
    return LogFiles(directory, **selection).new()  # type: ignore[arg-type]


def test_every_record_says_what_it_is_about(tmp_path: Path, form: str) -> None:
    about = LogContext("my run-1234", "worker-1.2", worker=1)
    with logging_to(tmp_path / "logs", about, form=form):
        log.info("ready")
        about.generation, about.rank, about.step = 3, 0, 57
        log.warning("left generation %d", 3)
        log.debug("nobody asked for this")
        try:
            raise RuntimeError("a\\b\nand more")
        except RuntimeError:
            log.exception("failed")
    lines = (tmp_path / "logs" / "worker-1.2.log").read_text().splitlines()
    assert len(lines) == 3, "one line per record, with a traceback too"
    ready, left, failed = read(tmp_path / "logs")
    assert (ready.run, ready.process, ready.worker) == ("my run-1234", "worker-1.2", 1)
    assert (ready.rank, ready.generation, ready.step) == (None, None, None)
    assert (left.level, left.message, left.logger) == ("WARNING", "left generation 3", "orchestrator.test")
    assert (left.rank, left.generation, left.step) == (0, 3, 57)
    assert failed.message.startswith("failed\nTraceback")
    assert failed.message.endswith("RuntimeError: a\\b\nand more")
    assert abs(failed.time - time.time()) < 60
    if form == "json":
        assert {"time", "level", "message", "run", "worker", "rank", "generation", "step"} <= json.loads(
            lines[1]
        ).keys()
    assert not logging.getLogger("orchestrator").handlers, "nothing stays behind"


def test_the_level_is_the_jobs(tmp_path: Path) -> None:
    with logging_to(tmp_path / "logs", LogContext("r", "driver"), level="debug"):
        log.debug("step 3 is committed")
    with logging_to(tmp_path / "logs", LogContext("r", "driver"), level="warning"):
        log.info("not this")
    assert [record.message for record in read(tmp_path / "logs")] == ["step 3 is committed"]


def test_warnings_and_what_nobody_catches_are_on_record(tmp_path: Path) -> None:
    """In a process of its own, which ends by its own mistake."""
    code = f"""
import pathlib, threading, warnings
from monitoring.logs import LogContext, set_up
set_up(pathlib.Path({str(tmp_path)!r}) / "logs", LogContext("r", "worker-0.0", worker=0))
warnings.warn("an odd thing")
def fail():
    raise ValueError("in a thread")
thread = threading.Thread(target=fail, name="odd")
thread.start()
thread.join()
raise KeyError("nobody catches this")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "KeyError" in done.stderr, "shown as ever"
    warned, thread, main = read(tmp_path / "logs")
    assert (warned.level, "an odd thing" in warned.message) == ("WARNING", True)
    assert thread.message.startswith("uncaught exception in thread odd\nTraceback")
    assert main.level == "CRITICAL"
    assert main.message.endswith("KeyError: 'nobody catches this'")


def test_where_the_run_directory_cannot_be_seen_stderr_has_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path / "not" / "here" / "logs", LogContext("r", "worker-0.0", worker=0)):
        log.info("joined")
        log.info("left")
    lines = capsys.readouterr().err.splitlines()
    assert not (tmp_path / "not").exists()
    assert len(lines) == 3
    assert "logs to stderr" in lines[0]
    joined = parse_line(lines[1], "stderr")
    assert joined is not None
    assert (joined.worker, joined.message) == (0, "joined")


def test_a_driver_shows_warnings_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path / "logs", LogContext("r", "driver"), echo=True):
        log.info("starting workers")
        log.warning("MLflow failed")
    assert capsys.readouterr().err == "WARNING orchestrator.test: MLflow failed\n"


def test_records_are_merged_by_time_and_selected(tmp_path: Path) -> None:
    write(tmp_path, "worker-0.0", 3.0, "third", worker=0)
    write(tmp_path, "worker-1.0", 1.0, "first", worker=1)
    write(tmp_path, "controller-1", 2.0, "second")
    write(tmp_path, "worker-1.0", 4.0, "fourth", worker=1)
    write(tmp_path, "worker-1.1", 5.0, "fifth", worker=1)
    assert [record.message for record in read(tmp_path)] == ["first", "second", "third", "fourth", "fifth"]
    assert [record.message for record in read(tmp_path, worker=1)] == ["first", "fourth", "fifth"]
    assert read(tmp_path, level="error") == []
    assert len(read(tmp_path, level="info")) == 5
    assert read(tmp_path / "none") == []


def test_what_workers_printed_is_shown_with_its_file(tmp_path: Path) -> None:
    write(tmp_path, "worker-1.0", time.time() + 3600, "a record", worker=1)
    name = "worker-" + "3bb1289373d1c421d52e" + "-01000000-28403.err"
    (tmp_path / name).write_text(":job_id:01000000\n:actor_name:WorkerActor\nSegmentation fault\n  at 0x0\n")
    (tmp_path / "worker-notes.txt").write_text("not a log")
    found = read(tmp_path, slots={28403: 1})
    assert [(record.message, record.level) for record in found] == [
        ("a record", "INFO"), ("Segmentation fault", ""), ("  at 0x0", ""),
    ]  # fmt: skip
    assert logs.describe(found[1]).endswith(f"{name}: Segmentation fault")
    assert len(read(tmp_path, slots={28403: 1}, worker=1)) == 3
    assert len(read(tmp_path, slots={28403: 1}, worker=2)) == 0
    assert len(read(tmp_path, level="info")) == 1, "plain lines have no level"


def test_following_takes_new_lines_new_files_and_torn_ones(tmp_path: Path) -> None:
    files = LogFiles(tmp_path)
    assert files.new() == []
    write(tmp_path, "worker-0.0", 1.0, "one", worker=0)
    assert [record.message for record in files.new()] == ["one"]
    assert files.new() == []
    path = tmp_path / "worker-0.0.log"
    line = path.read_bytes().replace(b"one", b"two")
    with path.open("ab") as file:
        file.write(line[:30])
    assert files.new() == []
    with path.open("ab") as file:
        file.write(line[30:])
    write(tmp_path, "worker-1.0", 0.5, "new file", worker=1)
    assert [record.message for record in files.new()] == ["new file", "two"]


def test_rotation_loses_nothing_for_those_who_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    files = LogFiles(tmp_path / "logs")
    seen = []
    with logging_to(tmp_path / "logs", LogContext("r", "worker-0.0", worker=0)):
        for number in range(200):
            log.info("record %d", number)
            if number % 7 == 0:
                seen += files.new()
    seen += files.new()
    assert [record.message for record in seen] == [f"record {number}" for number in range(200)]
    assert len(list((tmp_path / "logs").iterdir())) == 1 + logs.BACKUPS
    late = [record.message for record in read(tmp_path / "logs")]
    assert late == [f"record {number}" for number in range(200 - len(late), 200)], "oldest first over all files"


def test_of_a_line_as_long_as_a_disk_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = tmp_path / "worker-0.0.log"
    with path.open("wb") as file:
        file.write(b"2026-08-02T22:21:51.123Z INFO [run=r] a: first\n")
        file.seek(3 * MOST_LINE_BYTES)
        file.write(b"x\n2026-08-02T22:21:52.123Z INFO [run=r] a: last\n")
    records = LogFiles(tmp_path).new()
    assert records[0].message == "first"
    assert records[-1].message == "last"
    assert all(len(record.message) <= MOST_LINE_BYTES for record in records)
    assert [record.message.strip("\x00") for record in records] == ["first", "", "last"]


def test_the_command_merges_follows_and_prints_json(tmp_path: Path) -> None:
    path = make_run(tmp_path, events=[STARTED, GENERATION], result=RESULT)
    write(path / "logs", "worker-1.2", T0 + 1, "joined generation 3", worker=1, rank=1, generation=3, step=0)
    write(path / "logs", "controller-1", T0, "generation 3, start", generation=3)
    name = "worker-" + "3bb1289373d1c421d52e" + "-01000000-12.out"
    (path / "logs" / name).write_text("printed\n")
    append(path / "events.jsonl", {"time": T0, "kind": "worker_ready", "worker": 1, "incarnation": 2, "pid": 12})
    run = CliRunner().invoke
    lines = run(app, ["logs", str(path), "-f"]).stdout.splitlines()
    assert lines[0].endswith("INFO     controller-1 gen 3: generation 3, start")
    assert lines[1].endswith("INFO     worker-1.2 rank 1 gen 3 step 0: joined generation 3")
    assert lines[2].endswith(f"{name}: printed")
    found = [json.loads(line) for line in run(app, ["logs", str(path), "--worker", "1", "--json"]).stdout.splitlines()]
    assert [(record["worker"], record["message"]) for record in found] == [(1, "joined generation 3"), (1, "printed")]
    assert (found[0]["rank"], found[0]["generation"], found[0]["step"]) == (1, 3, 0)
    refused = run(app, ["logs", str(path), "--level", "loud"])
    assert refused.exit_code == 2


def test_following_sees_what_is_written_meanwhile(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", events=[STARTED])
    write(path / "logs", "driver", T0, "before")
    command = [sys.executable, "-m", "orchestrator", "logs", str(path), "-f"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        lines: Iterator[str] = iter(process.stdout)
        assert "before" in next(lines)
        write(path / "logs", "worker-7.0", T0 + 1, "a new worker", worker=7)
        assert "worker-7.0: a new worker" in next(lines)
        write(path / "logs", "worker-7.0", T0 + 2, "the last word", worker=7)
        (path / "result.json").write_text(json.dumps(RESULT))
        assert "the last word" in next(lines)
        assert list(lines) == []
        assert process.wait(timeout=60) == 0


def test_how_a_run_is_watched_is_no_part_of_its_numbers() -> None:
    text = (ROOT / "examples/quickstart.yaml").read_text()
    watched = Job.loads(
        text,
        overrides=["monitoring.logs=json", "monitoring.log_level=debug", "monitoring.tensorboard=true",
                   "monitoring.mlflow={tracking_uri: 'sqlite:///m.db'}",
                   "monitoring.wandb={project: p, mode: offline}"],
    )  # fmt: skip
    assert watched.digest() == Job.loads(text).digest()
    assert watched.monitoring.mlflow is not None
    assert watched.monitoring.mlflow.experiment == "orchestrator"
