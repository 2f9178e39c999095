"""Runs on a real Ray on this machine: started once, with its own temporary directory, and ended by us alone."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from monitoring.records import read_records
from orchestrator import Job, RunResult, run
from orchestrator.rundir import RunDirectory

JOB = """
name: test
model: {factory: "examples.tiny_gpt:build", args: {vocab_size: 320, hidden_size: 32, layers: 2, heads: 2, dropout: 0.1}}
data: {source: python-stdlib, tokenizer: bytes, sequence_length: 64}
train: {steps: 40, global_batch: 16, micro_batch: 1, optimizer: {name: adamw, lr: 1.0e-3},
        schedule: {warmup_steps: 5}, seed: 7}
elastic: {workers: {min: 1, max: 4}, virtual_workers: 8, heartbeat_interval_s: 0.25, heartbeat_timeout_s: 2.0,
          progress_timeout_s: 6.0, rebalance: {enabled: false}}
checkpoint: {every_steps: 20}
monitoring: {peak_tflops: 0.1}
"""
"""Of a factory: transformers takes each worker three seconds to import."""
TINY_GPT = next(line for line in JOB.splitlines() if line.startswith("model: ")).replace(": ", "=", 1)
"""Its model, for other jobs: what `--set` takes."""
LLAMA = (
    "model={hf: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 320}}"
)
"""The same job with a model of transformers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/cluster" in str(item.path):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("token-store")


@pytest.fixture(scope="package")
def ray_here() -> Iterator[None]:
    """One local Ray for all tests here that do not start their own; the process is connected to none afterwards."""
    import ray

    home = tempfile.mkdtemp(prefix="orch-test-", dir="/tmp")
    ray.init(
        num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=128 << 20, _temp_dir=home, namespace="orchestrator",
    )  # fmt: skip
    yield
    children = psutil.Process().children(recursive=True)
    ray.shutdown()
    psutil.wait_procs(children, timeout=5)
    shutil.rmtree(home, ignore_errors=True)


@dataclass
class Outcome:
    """A run that ended, with what it left behind."""

    result: RunResult
    directory: RunDirectory

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(read_records(self.directory.events))

    @property
    def steps(self) -> list[dict[str, Any]]:
        return list(read_records(self.directory.metrics))

    def recoveries(self, *kinds: str) -> list[dict[str, Any]]:
        return [r for r in self.result.recoveries if not kinds or r["kind"] in kinds]


class Runner:
    """Runs the test job with overrides and faults, and checks that nothing is left of it."""

    def __init__(self, home: Path, cache: Path) -> None:
        self._home = home
        self._cache = cache
        self._count = 0

    def job(self, *overrides: str, faults: tuple[str, ...] = ()) -> Job:
        return Job.loads(JOB, overrides=[f"data.cache={self._cache}", *overrides], faults=faults)

    def __call__(
        self,
        *overrides: str,
        faults: tuple[str, ...] = (),
        run_dir: Path | None = None,
        meanwhile: Callable[[RunDirectory], None] | None = None,
    ) -> Outcome:
        self._count += 1
        directory = RunDirectory(run_dir or self._home / f"run-{self._count}")
        with _beside(meanwhile, directory):
            result = run(self.job(*overrides, faults=faults), directory.path)
        outcome = Outcome(result, directory)
        self._nothing_left(outcome)
        return outcome

    @staticmethod
    def _nothing_left(outcome: Outcome) -> None:
        """Invariant I5: no actor, placement group or process survives the run."""
        import ray

        prefix = f"{outcome.directory.run_id}/"
        pids = {w["pid"] for g in outcome.result.generations for w in g["workers"]}
        left: list[str] = []
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            actors = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
            groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
            left = [name for name in actors if name.startswith(prefix)]
            left += [g["name"] for g in groups if g["name"].startswith(prefix)]
            left += [f"pid {pid}" for pid in pids if _trains(pid)]
            if not left:
                return
            time.sleep(0.1)
        raise AssertionError(f"left behind: {left}")


def _trains(pid: int) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return "WorkerActor" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _beside(action: Callable[[RunDirectory], None] | None, directory: RunDirectory) -> Iterator[None]:
    """Runs `action` in a thread during the block, and raises what it raised."""
    if action is None:
        yield
        return
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            action(directory)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    yield
    thread.join(timeout=10)
    if failures:
        raise failures[0]


def steps_done(directory: RunDirectory) -> int:
    return sum(1 for _ in read_records(directory.metrics))


PATIENCE_S = 300.0
"""How long is waited for what has to come: a machine may have more to do than these tests."""


def wait_for(condition: Callable[[], bool], timeout_s: float = PATIENCE_S, what: str | Callable[[], str] = "") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what() if callable(what) else what or condition}")
        time.sleep(0.02)


@pytest.fixture
def runner(ray_here: None, tmp_path: Path, cache: Path) -> Runner:
    return Runner(tmp_path, cache)


@pytest.fixture(scope="package")
def undisturbed(ray_here: None, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Outcome:
    """One worker, nothing happens: what every other history must equal."""
    outcome = Runner(tmp_path_factory.mktemp("undisturbed"), cache)("elastic.workers.max=1")
    assert outcome.result.status == "finished", outcome.result.reason
    assert outcome.result.recoveries == []
    return outcome
