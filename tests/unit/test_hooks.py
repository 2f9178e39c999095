"""Hooks: told of everything once, and of no consequence to a run whatever they do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from monitoring.sinks.base import SinkRun
from monitoring.sinks.feeder import Feeder, feeding
from monitoring.sinks.hooks import MOST_TOLD, Hooks, HookSink
from orchestrator.errors import PluginError
from orchestrator.job import Job, JobError
from orchestrator.job.kinds import hooks_from
from tests.unit.run_directories import CHECKPOINT, GENERATION, INCIDENT, JOB, RECOVERY, STARTED, T0, append, make_run
from tests.unit.run_directories import step as step_line
from tests.unit.test_job import MINIMAL

EVALUATED = {"time": T0 + 19, "kind": "evaluation", "step": 4, "generation": 3, "samples": 8, "seconds": 0.1,
             "best": True, "metrics": {"loss": 3.5, "per_class": {"a": {"f1": 1.0}}}}  # fmt: skip


class Noted(Hooks):
    """Notes what it is told."""

    def __init__(self, run: SinkRun) -> None:
        super().__init__(run)
        self.told: list[Any] = []

    def on_commit(self, step: int, metrics: dict[str, float]) -> None:
        self.told.append(("commit", step, metrics["loss"]))

    def on_evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        self.told.append(("evaluation", step, metrics))

    def on_checkpoint(self, step: int, path: str) -> None:
        self.told.append(("checkpoint", step, path))

    def on_incident(self, step: int, incident: str, record: dict[str, Any]) -> None:
        self.told.append((record["kind"], step, incident))

    def on_end(self, status: str) -> None:
        self.told.append(("end", status))


class Failing(Hooks):
    """Fails always."""

    def on_commit(self, step: int, metrics: dict[str, float]) -> None:
        raise RuntimeError(f"commit {step}")


class Deaf:
    """Not even one of ours: it has no method that is called."""

    def __init__(self, run: SinkRun) -> None:
        pass


def fed(path: Path, make: Any) -> tuple[Feeder, HookSink]:
    sink = HookSink(make)
    return Feeder("hooks", sink, SinkRun("tiny-1234", "tiny", path, JOB)), sink


def test_each_thing_is_told_once_also_by_the_next_process(tmp_path: Path) -> None:
    made: list[Noted] = []

    def make(run: SinkRun) -> Noted:
        made.append(Noted(run))
        return made[-1]

    make_run(tmp_path, events=[STARTED, GENERATION, EVALUATED, INCIDENT, RECOVERY, {**CHECKPOINT, "path": "ck"}])
    feeder, _ = fed(tmp_path, make)
    feeder.feed()
    feeder.feed()
    assert [each for each in made[0].told if each[0] != "commit"] == [
        ("evaluation", 4, EVALUATED["metrics"]), ("incident", 4, "kill"), ("recovery", 4, "kill"),
        ("checkpoint", 5, "ck"),
    ]  # fmt: skip
    assert [each[1] for each in made[0].told if each[0] == "commit"] == [1, 2, 3, 4, 5]
    again, sink = fed(tmp_path, make)
    append(tmp_path / "metrics.jsonl", step_line(5))
    again.feed()
    sink.close("finished")
    assert made[1].told == [("commit", 6, 3.5), ("end", "finished")]


def test_what_a_hook_raises_is_logged_and_told_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path, events=[STARTED], steps=20)
    feeder, _ = fed(tmp_path, Failing)
    with caplog.at_level(logging.WARNING):
        feeder.feed()
    assert len([line for line in caplog.messages if "on_commit failed (the run goes on)" in line]) == MOST_TOLD
    assert not feeder.is_given_up


def test_a_class_that_lacks_methods_is_not_asked_for_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    feeder, sink = fed(make_run(tmp_path, events=[STARTED, EVALUATED]), Deaf)
    feeder.feed()
    sink.close("finished")
    assert not caplog.messages


def test_they_are_fed_like_sinks(tmp_path: Path) -> None:
    made: list[Noted] = []

    def make(run: SinkRun) -> Noted:
        made.append(Noted(run))
        return made[-1]

    make_run(tmp_path, events=[STARTED, {**EVALUATED, "time": T0 + 13.5, "step": 3}])
    nothing = {"tensorboard": False, "mlflow": None, "wandb": None, "sinks": {}}
    with feeding(nothing, "tiny-1234", tmp_path, JOB, lambda name: None, make):  # type: ignore[arg-type, return-value]
        pass
    assert [each[0] for each in made[0].told] == [*["commit"] * 3, "evaluation", *["commit"] * 2, "end"]
    assert made[0].told[-1] == ("end", "interrupted")


def test_hooks_that_are_not_there_are_an_error() -> None:
    job = Job.loads(MINIMAL + "hooks: tests.unit.test_hooks:Noted\n")
    assert job.hooks is not None
    assert hooks_from(job.hooks) is Noted
    assert job.digest() == Job.loads(MINIMAL).digest()
    with pytest.raises(PluginError, match=r"tests\.unit\.nonesuch:Noted cannot be had"):
        hooks_from("tests.unit.nonesuch:Noted")
    with pytest.raises(PluginError, match="is a dict, and a class of hooks is wanted"):
        hooks_from("tests.unit.test_hooks:EVALUATED")
    with pytest.raises(JobError, match="hooks"):
        Job.loads(MINIMAL + "hooks: no path\n")
