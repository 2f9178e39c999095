"""Sinks: the stream they get, what TensorBoard, MLflow and W&B are told, and that a failing one hurts nobody."""

from __future__ import annotations

import json
import logging
import math
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from monitoring.records import RecordFile
from monitoring.sinks import feeder as feeder_module
from monitoring.sinks.base import Sink, SinkProblem, SinkRun
from monitoring.sinks.feeder import Feeder, check_sinks, feeding, make_sinks
from monitoring.sinks.stream import Item, Note, Position, Scalars, Stream
from orchestrator.cli import main
from orchestrator.job import Job, JobError
from tests.unit.run_directories import (
    GENERATION,
    INCIDENT,
    JOB,
    RECOVERY,
    RESULT,
    STARTED,
    T0,
    append,
    make_run,
    status,
    step,
)

ROOT = Path(__file__).parents[2]
NONE = {"tensorboard": False, "mlflow": None, "wandb": None, "sinks": {}}


def nobodys(name: str) -> Any:
    raise AssertionError(f"no sink {name} of another package is asked for")


def steps_of(items: Sequence[Item]) -> list[int | str]:
    """Steps as they were given; "<3" where those from 3 on are taken back."""
    return [item.step if isinstance(item, Scalars) else f"<{item.step}" for item in items if not isinstance(item, Note)]


def roll_back(path: Path, committed: int, then: int, at: float = T0 + 100) -> None:
    """The run goes back and does steps again, all between two looks."""
    file = RecordFile(path / "metrics.jsonl")
    file.keep(lambda record: record["step"] < committed)
    for number in range(committed, then):
        file.append(step(number, committed_at=at + number, loss=9.0))


# ---------------------------------------------------------------------------------------------- the stream


def test_steps_and_incidents_come_once(tmp_path: Path) -> None:
    stream = Stream(make_run(tmp_path, events=[STARTED, GENERATION, INCIDENT, RECOVERY], live=status()))
    items = stream.new()
    assert steps_of(items) == [0, 1, 2, 3, 4]
    notes = [item for item in items if isinstance(item, Note)]
    assert [(note.step, note.kind, note.text) for note in notes] == [
        (4, "incident", "kill: worker 1 died: its process ended"),
        (4, "recovery", "kill of worker 1 at step 4: recovered in 0.40 s (detected after 0.05 s), 0 steps lost, "
                        "10.6 MB from peers"),
    ]  # fmt: skip
    last = [item for item in items if isinstance(item, Scalars)][-1]
    assert items.index(last) == 4, "what happened after it comes after it"
    assert (last.at, last.values) == (T0 + 15, {
        "loss": 3.6, "grad_norm": 1.5, "learning_rate": 1e-3, "tokens_per_second": 2000.0, "step_seconds": 0.5,
        "world_size": 2.0, "goodput": 0.8,
    })  # fmt: skip
    assert stream.new() == []
    append(tmp_path / "metrics.jsonl", step(5, loss=None))
    (item,) = stream.new()
    assert isinstance(item, Scalars)
    assert "loss" not in item.values, "what is not finite cannot be told"


def test_steps_done_again_are_found_even_if_the_cut_was_not_seen(tmp_path: Path) -> None:
    stream = Stream(make_run(tmp_path, events=[]))
    stream.new()
    roll_back(tmp_path, committed=2, then=7)
    assert steps_of(stream.new()) == ["<2", 2, 3, 4, 5, 6]
    append(tmp_path / "metrics.jsonl", step(7, committed_at=T0 + 200))
    assert steps_of(stream.new()) == [7]
    RecordFile(tmp_path / "metrics.jsonl").keep(lambda record: record["step"] < 4)
    assert steps_of(stream.new()) == []
    append(tmp_path / "metrics.jsonl", step(4, committed_at=T0 + 300))
    assert steps_of(stream.new()) == ["<4", 4]


@pytest.mark.parametrize("cut", [None, 2, 5])
def test_another_process_goes_on_where_the_one_before_stopped(tmp_path: Path, cut: int | None) -> None:
    first = Stream(make_run(tmp_path, events=[STARTED, INCIDENT]))
    first.new()
    if cut is not None:
        roll_back(tmp_path, committed=cut, then=cut)
    position = Position.read(json.loads(json.dumps(first.position.as_dict())))
    second = Stream(tmp_path, position)
    assert second.new() == []
    start = 5 if cut is None else cut
    append(tmp_path / "metrics.jsonl", step(start, committed_at=T0 + 500))
    append(tmp_path / "events.jsonl", INCIDENT | {"step": start, "worker": 0})
    items = second.new()
    assert steps_of(items) == ([f"<{start}", start] if start < 5 else [start])
    assert [item.step for item in items if isinstance(item, Note)] == [start]


# ---------------------------------------------------------------------------------------------- TensorBoard


def event_files(directory: Path) -> Iterator[Any]:
    """The records of all event files in the order in which TensorBoard reads them: length, its checksum, content,
    checksum."""
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            yield Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]


def charts(directory: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard shows: a session that starts at a step takes back what there was from it on."""
    shown: dict[str, list[tuple[int, Any]]] = {}
    for event in event_files(directory):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            shown = {tag: [each for each in points if each[0] < event.step] for tag, points in shown.items()}
        for value in event.summary.value:
            is_text = value.HasField("tensor")
            content = value.tensor.string_val[0].decode() if is_text else round(value.simple_value, 5)
            shown.setdefault(value.tag, []).append((event.step, content))
    return shown


def test_tensorboard_has_each_step_once_also_after_a_rollback_and_in_a_run_gone_on_with(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", events=[STARTED, GENERATION, INCIDENT], live=status())
    settings = NONE | {"tensorboard": True}
    with feeding(settings, "tiny-1234", path, JOB, nobodys):
        pass
    roll_back(path, committed=3, then=5)
    # In another process there would be another file: its name ends with the time in seconds.
    for number, file in enumerate(sorted((path / "tensorboard").rglob("events*"))):
        file.rename(file.with_name(f"events.out.tfevents.1.{number}"))
    with feeding(settings, "tiny-1234", path, JOB, nobodys):
        pass
    shown = charts(path / "tensorboard")
    assert shown["loss"] == [(0, 4.0), (1, 3.9), (2, 3.8), (3, 9.0), (4, 9.0)]
    assert shown["world_size"][0] == (0, 2.0)
    assert shown["goodput"] == [(4, 0.8)]
    assert {"grad_norm", "learning_rate", "tokens_per_second", "step_seconds"} <= shown.keys()
    told = charts(path / "tensorboard" / "incidents")
    assert list(told.values()) == [[(4, "kill: worker 1 died: its process ended")]], "not undone with the step"


# ---------------------------------------------------------------------------------------------- MLflow and W&B


@pytest.fixture
def fake_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins, because the packages are optional: see fake_packages/README.md."""
    names = ("mlflow", "mlflow.entities", "wandb")
    real = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fake_packages"))
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(real)


def test_mlflow_gets_one_run_that_is_gone_on_with(tmp_path: Path, fake_packages: None) -> None:
    import mlflow

    path = make_run(tmp_path / "run", events=[STARTED, GENERATION, INCIDENT], result=RESULT | {"status": "stopped"})
    settings = NONE | {"mlflow": {"tracking_uri": "fake://", "experiment": "trials"}}
    check_sinks(settings, nobodys)
    with feeding(settings, "tiny-1234", path, JOB, nobodys):
        pass
    store = mlflow.stores["fake://"]
    ((identity, run),) = store.runs.items()
    assert list(store.experiments) == ["trials"]
    assert [(metric.step, metric.value) for metric in run["metrics"] if metric.key == "loss"] == [
        (number, pytest.approx(4.0 - number / 10)) for number in range(5)
    ]
    assert {metric.timestamp for metric in run["metrics"] if metric.step == 2} == {int((T0 + 13) * 1000)}
    assert run["params"]["train.steps"] == "20"
    assert run["tags"]["incident.step-00000004"] == "kill: worker 1 died: its process ended"
    assert run["status"] == ["RUNNING", "KILLED"]

    roll_back(path, committed=4, then=6)
    (path / "result.json").write_text(json.dumps(RESULT))
    with feeding(settings, "tiny-1234", path, JOB, nobodys):
        pass
    assert list(store.runs) == [identity], "no second one"
    again = [(metric.step, metric.value) for metric in run["metrics"] if metric.key == "loss"][5:]
    assert again == [(4, 9.0), (5, 9.0)]
    assert run["status"] == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]


def test_wandb_gets_steps_as_an_axis_of_its_own(tmp_path: Path, fake_packages: None) -> None:
    import wandb

    path = make_run(tmp_path / "run", events=[STARTED, GENERATION, INCIDENT], result=RESULT | {"status": "failed"})
    settings = NONE | {"wandb": {"project": "p", "mode": "offline", "entity": None}}
    check_sinks(settings, nobodys)
    for _ in range(2):
        with feeding(settings, "tiny-1234", path, JOB, nobodys):
            pass
        roll_back(path, committed=4, then=5)
    first, second = wandb.runs
    assert first.arguments["project"] == "p"
    assert first.arguments["mode"] == "offline"
    assert first.arguments["dir"] == str(path)
    assert first.arguments["id"] == second.arguments["id"], "the same run, resumed"
    assert ("*", "step") in first.defined, "W&B's own count only goes up, and steps are done again"
    assert [values["step"] for values in first.logged if "loss" in values] == [0, 1, 2, 3, 4]
    assert {"step": 4, "incident": "kill: worker 1 died: its process ended"} in first.logged
    assert [(values["step"], values["loss"]) for values in second.logged] == [(4, 9.0)]
    assert first.exit_code == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("mlflow", "{tracking_uri: 'sqlite:///m.db'}"), ("wandb", "{project: p}")],
)
def test_a_package_that_is_missing_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], field: str, value: str
) -> None:
    monkeypatch.setattr(feeder_module.importlib.util, "find_spec", lambda name: None)
    where = tmp_path / "run"
    monkeypatch.setattr(
        sys, "argv",
        ["orchestrator", "run", str(ROOT / "examples/quickstart.yaml"), "--run-dir", str(where),
         "--set", f"monitoring.{field}={value}", "--json"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"`pip install {field}" in capsys.readouterr().err
    assert not where.exists()
    with pytest.raises(SinkProblem, match="tensorboardX"):
        check_sinks(NONE | {"tensorboard": True}, nobodys)


def test_the_job_file_is_strict_about_sinks() -> None:
    text = (ROOT / "examples/quickstart.yaml").read_text()
    with pytest.raises(JobError) as refused:
        Job.loads(text, overrides=["monitoring.mlflow={experiment: e}", "monitoring.wandb={project: p, mode: on}",
                                   "monitoring.logs=xml"])  # fmt: skip
    fields = [problem.field for problem in refused.value.problems]
    assert fields == ["monitoring.mlflow.tracking_uri", "monitoring.wandb.mode", "monitoring.logs"]


# ---------------------------------------------------------------------------------------------- failing sinks


class Failing:
    """A sink that fails `times` times, in the one or the other call."""

    name = "the archive"

    def __init__(self, times: float, where: str) -> None:
        self.left = times
        self.where = where
        self.got: list[Item] = []
        self.closed = ""

    def _maybe(self, where: str) -> None:
        if where == self.where and self.left > 0:
            self.left -= 1
            raise OSError("no route to host")

    def open(self, run: SinkRun) -> None:
        self._maybe("open")

    def write(self, items: Sequence[Item]) -> None:
        self._maybe("write")
        self.got += items

    def close(self, status: str) -> None:
        self.closed = status
        self._maybe("close")


def fed(path: Path, sink: Sink) -> Feeder:
    feeder = Feeder("archive", sink, SinkRun("r", "run", path, JOB), poll_s=0.01, first_pause_s=0.001)
    feeder.start()
    feeder.finish(timeout_s=60.0)
    return feeder


@pytest.mark.parametrize("where", ["open", "write"])
def test_a_sink_that_recovers_has_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:  # fmt: skip
    path = make_run(tmp_path, events=[STARTED, INCIDENT], result=RESULT)
    sink = Failing(3, where)
    with caplog.at_level(logging.INFO, logger="monitoring"):
        feeder = fed(path, sink)
    assert not feeder.is_given_up
    assert steps_of(sink.got) == [0, 1, 2, 3, 4]
    assert sink.closed == "finished"
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["the archive failed (the run goes on, it is tried again): OSError: no route to host"]


def test_a_sink_that_never_works_is_given_up_and_told_of_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    path = make_run(tmp_path, events=[STARTED])
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    sink = Failing(math.inf, "write")
    feeder = fed(path, sink)
    assert feeder.is_given_up
    first, last = [record.getMessage() for record in caplog.records]
    assert "tried again" in first
    assert last.startswith("the archive is given up")
    assert {name: (path / name).read_bytes() for name in before} == before
    # The process that resumes the run tries again, with all that was missed.
    good = Failing(0, "")
    fed(path, good)
    assert steps_of(good.got) == [0, 1, 2, 3, 4]


def test_only_what_is_asked_for_is_fed() -> None:
    assert make_sinks(NONE, nobodys) == []
    asked = {"tensorboard": True, "mlflow": {"tracking_uri": "u", "experiment": "e"},
             "wandb": {"project": "p", "mode": "offline", "entity": None}}  # fmt: skip
    assert [field for field, _ in make_sinks(asked, nobodys)] == ["tensorboard", "mlflow", "wandb"]


def test_two_that_follow_a_run_do_not_both_feed_it(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", events=[STARTED, GENERATION], live=status())
    settings = NONE | {"tensorboard": True}

    def feeders() -> int:
        return sum(thread.name == "sink tensorboard" for thread in threading.enumerate())

    with feeding(settings, "tiny-1234", path, JOB, nobodys):
        with feeding(settings, "tiny-1234", path, JOB, nobodys):
            assert feeders() == 1
        assert feeders() == 1
    with feeding(settings, "tiny-1234", path, JOB, nobodys):
        assert feeders() == 1, "its successor does"
