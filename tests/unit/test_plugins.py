"""Parts that another package brings: found by name, and as good as our own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from monitoring.redaction import redact
from monitoring.sinks.base import SinkProblem, SinkRun
from monitoring.sinks.feeder import Feeder, check_sinks, feeding, make_sinks
from orchestrator import plugins
from orchestrator.errors import PluginError
from orchestrator.job import Job, JobError
from orchestrator.job.kinds import sink_named
from orchestrator.job.parts import objective_of, optimizer_of
from orchestrator.notices.notice import Notice, NoticeError
from orchestrator.notices.sources import detect, make_source
from orchestrator.planning.work import state_bytes
from orchestrator.storage import StorageError, open_storage, why_not
from orchestrator.training.build import step_spec
from orchestrator.training.fault_injector import FaultInjector
from orchestrator.urls import UrlProblem, expand_settings
from strategies.layout.space import FlatRanges, Space
from strategies.objective.causal_lm import CAUSAL_LM
from strategies.optim.adamw import ADAMW
from strategies.optim.optimizer import Optimizer
from strategies.optim.spec import OPTIMIZERS, OptimizerSpec
from strategies.state.shard import StateShard
from tests.unit.run_directories import make_run, status
from tests.victims import Bystander

PACKAGE = Path(__file__).parents[1] / "plugin_package"
JOB = """
name: plugged
model: {hf: {model_type: llama}}
data: {source: python-stdlib, sequence_length: 16}
train: {steps: 4, global_batch: 8, optimizer: {name: NAME}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example package installed, as pip does it."""
    home = tmp_path_factory.mktemp("plugins")
    shutil.copytree(PACKAGE, home / "package")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-index", "--no-build-isolation", "--target", str(home / "site"), str(home / "package")]  # fmt: skip
    subprocess.run(command, check=True)
    return home / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(site)
    plugins._of_packages.cache_clear()
    yield
    plugins._of_packages.cache_clear()


def test_without_the_package_its_name_is_unknown() -> None:
    with pytest.raises(JobError, match=r"must be one of adamw, sgd, lion, muon, adafactor, got the string 'tiger'"):
        Job.loads(JOB.replace("NAME", "tiger"))
    with pytest.raises(JobError, match=r"got the string 'adamv', did you mean \"adamw\"\?"):
        Job.loads(JOB.replace("NAME", "adamv"))


def test_with_it_a_job_may_name_what_it_brings(installed: None) -> None:
    job = Job.loads(JOB.replace("NAME", "tiger"))
    assert job.digest() != Job.loads(JOB.replace("NAME", "adamw")).digest()
    assert state_bytes(job).optimizer == 4.0, "the planner asks it what it keeps"
    with pytest.raises(
        JobError,
        match=r"must be one of adamw, sgd, lion, muon, adafactor, broken, impostor, tiger, got the string 'tigre'",
    ):
        Job.loads(JOB.replace("NAME", "tigre"))


def test_ours_come_first() -> None:
    job = Job.loads(JOB.replace("NAME", "adamw"))
    assert optimizer_of(job) is ADAMW
    assert objective_of(job) is CAUSAL_LM


def test_a_job_names_an_objective(installed: None) -> None:
    job, usual = (Job.loads(JOB.replace("NAME", "adamw"), overrides=[f"objective.name={name}"])
                  for name in ("remainder", "causal-lm"))  # fmt: skip
    assert objective_of(job).loss_unit == "nats per row"
    assert step_spec(job).objective is objective_of(job)
    assert usual.digest() == Job.loads(JOB.replace("NAME", "adamw")).digest() != job.digest()


def test_what_it_brings_trains_the_same_bits_however_the_state_is_cut(installed: None) -> None:
    spec = OptimizerSpec(kind=optimizer_of(Job.loads(JOB.replace("NAME", "tiger"))), lr=0.1)
    space = Space.of([("a", (8, 8), 0, None), ("b", (5,), 0, None), ("c", (16, 3), 1, None)], 1)
    torch.manual_seed(3)
    weights, gradients = torch.randn(space.size), torch.randn(4, space.size)

    def train(ranges: list[tuple[int, int]]) -> torch.Tensor:
        found = torch.zeros(space.size)
        for start, stop in ranges:
            state_shard = StateShard(0, FlatRanges.of([(start, stop)], space.boundary), spec, torch.device("cpu"))
            assert state_shard.kinds().keys() == {"weights", "exp_avg"}
            for low, at, length in state_shard.flat.locate(start, stop):
                state_shard.weights[at : at + length].copy_(weights[low : low + length])
            for gradient in gradients:
                for low, at, length in state_shard.flat.locate(start, stop):
                    state_shard.gradient[at : at + length].copy_(gradient[low : low + length])
                state_shard.apply(0.1)
            for low, at, length in state_shard.flat.locate(start, stop):
                found[low : low + length] = state_shard.weights[at : at + length]
        return found

    whole = train([(0, space.size)])
    assert not torch.equal(whole, weights)
    assert torch.equal(whole, train([(0, 48), (48, space.size)]))


def test_a_kind_of_fault(installed: None) -> None:
    job = Job.loads(JOB.replace("NAME", "adamw"), faults=["step=2,worker=1,kind=stutter,factor=5"])
    announced: list[int] = []
    injector = FaultInjector(job, 1, announced.append, Bystander())
    assert injector.may_be_slow
    assert not FaultInjector(job, 0, announced.append, Bystander()).may_be_slow
    for step in range(3):
        assert announced == []
        injector.on_phase("compute", step)
    (slowness,) = injector._slow["compute"]
    assert (announced, slowness.factor, slowness.lasts(2), slowness.lasts(3)) == ([0], 5.0, True, False)
    with pytest.raises(JobError, match="steps says nothing about kind stutter, only about slow"):
        Job.loads(JOB.replace("NAME", "adamw"), faults=["step=2,worker=1,kind=stutter,steps=3"])
    with pytest.raises(JobError, match=r"kind must be one of kill, .*, stutter, got the string 'stuter'"):
        Job.loads(JOB.replace("NAME", "adamw"), faults=["step=2,worker=1,kind=stuter"])


def test_a_source_of_notices(installed: None, tmp_path: Path) -> None:
    source = make_source("bell", str(tmp_path / "bell"))
    assert (source.detect(), source.poll(0.0)) == (False, [])
    (tmp_path / "bell").write_text("1234.5")
    assert source.poll(0.0) == [Notice("1234.5", "the bell has rung", 1234.5)]
    found = detect(str(tmp_path / "bell"), threading.Event(), tries=1)
    assert found is not None
    assert found.name == "bell", "the source that cannot be made stops no other"
    with pytest.raises(NoticeError, match="choose one of auto, aws, gcp, azure, bell, cracked, none"):
        make_source("gong", None)
    with pytest.raises(NoticeError, match="--source cracked: RuntimeError: it does not ring"):
        make_source("cracked", None)


def test_a_sink(installed: None, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    asked = f"monitoring.sinks={{lines: {{file: '{file}'}}}}"
    job = Job.loads(JOB.replace("NAME", "adamw"), overrides=[asked])
    assert job.digest() == Job.loads(JOB.replace("NAME", "adamw")).digest()
    path = make_run(tmp_path / "run", live=status())
    with feeding(job.monitoring.model_dump(), "tiny-1234", path, job.resolved(), sink_named):
        pass
    first, *steps, last = file.read_text().splitlines()
    assert (first, last) == ("run tiny-1234", "interrupted")
    assert [line.split()[0] for line in steps] == ["0", "1", "2", "3", "4"]


def test_a_sink_that_is_not_there_is_told_where_the_run_is_started_and_nowhere_else(installed: None) -> None:
    job = Job.loads(JOB.replace("NAME", "adamw"), overrides=["monitoring.sinks={rows: {}}"])
    with pytest.raises(SinkProblem, match=r"sinks\.rows: there is none of the sinks named 'rows'; known are lines"):
        check_sinks(job.monitoring.model_dump(), sink_named)
    with pytest.raises(SinkProblem, match=r"sinks\.wandb: .* use monitoring\.wandb, or another name in the package"):
        check_sinks({"sinks": {"wandb": {}}}, sink_named)


@pytest.mark.parametrize("settings", [{"lines": {}}, {"rows": {}}])
def test_a_sink_that_cannot_be_made_is_tried_again_and_given_up(
    installed: None, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = make_run(tmp_path / "run", live=status())
    ((name, sink),) = make_sinks({"sinks": settings}, sink_named)
    feeder = Feeder(name, sink, SinkRun("r", "run", path, {}), poll_s=0.0, first_pause_s=0.0)
    feeder.start()
    feeder.finish(10.0)
    assert feeder.is_given_up
    assert caplog.records[0].getMessage().startswith(f"{name} failed (the run goes on, it is tried again)")


def test_what_a_sink_is_told_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINK_TOKEN", "the token of a sink")
    settings = {"url": "https://host/${env:SINK_TOKEN}", "keys": ["${env:SINK_TOKEN}", 3]}
    assert expand_settings(settings) == {"url": "https://host/the token of a sink", "keys": ["the token of a sink", 3]}
    assert "the token" not in redact("it is: the token of a sink")
    with pytest.raises(UrlProblem, match="the environment variable NO_TOKEN is not set"):
        expand_settings(["${env:NO_TOKEN}"])


def test_a_storage(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELVES", str(tmp_path))
    job = Job.loads(JOB.replace("NAME", "adamw"), overrides=["checkpoint.storage=shelf://upper/runs"])
    assert job.checkpoint.storage is not None
    storage = open_storage(job.checkpoint.storage)
    storage.put("some/file", lambda: [b"content"])
    assert storage.read("some/file") == b"content"
    assert (tmp_path / "upper" / "runs" / "some" / "file").read_bytes() == b"content"
    assert why_not("shelf://") == "'shelf://' names no bucket or directory"
    monkeypatch.delenv("SHELVES")
    with pytest.raises(StorageError, match="shelf://upper/runs cannot be opened: KeyError: 'SHELVES'"):
        open_storage("shelf://upper/runs")
    with pytest.raises(ValueError, match="the package for cupboard:// gives a str, not a Storage"):
        open_storage("cupboard://lower/runs")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "example_plugin.nowhere:NOTHING fails: ModuleNotFoundError"),
        ("impostor", "example_plugin.tiger:Update is a type, not a Optimizer"),
        (
            "absent",
            "there is none of the optimizers named 'absent'; known are adamw, sgd, lion, muon, adafactor, broken, "
            "impostor, tiger",
        ),
    ],
)
def test_what_is_wrong_with_a_package_is_said(installed: None, name: str, reason: str) -> None:
    with pytest.raises(PluginError) as found:
        plugins.find("optimizers", name, OPTIMIZERS, Optimizer)  # type: ignore[type-abstract]
    assert reason in str(found.value)
