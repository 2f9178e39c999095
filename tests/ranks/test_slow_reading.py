"""Training while reading is slow, or a shard is lost: the result is the job's alone all the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import TokenStore
from orchestrator.training.worker import Worker
from tests.ranks.local_cluster import LocalCluster, Outcome, partial, tiny_job

NOTHING_AHEAD = 7


def read_ahead_always(worker: Worker) -> None:
    """Every read counts as slow; a member for which none was done ahead ends with an exit code that tells."""
    worker._fetch._slow_s = -1.0
    worker.shutdown = partial(_end, worker, worker.shutdown)  # type: ignore[method-assign]
    worker._on_shutdown = partial(_end, worker, worker._on_shutdown)


def _end(worker: Worker, end: Callable[[], None]) -> None:
    if worker.protocol.generation is not None and worker._fetch._thread is None:
        os._exit(NOTHING_AHEAD)
    end()


def lose_shards(store: str, mirror: str, worker: Worker) -> None:
    """From now on this process reads a store whose shards are cut short."""
    read_ahead_always(worker)
    torn = Path(mirror) / f"torn-{os.getpid()}"
    shutil.copytree(store, torn)
    opened = TokenStore(torn, mirrors=[os.path.join(mirror, os.path.basename(store))])
    for shard in opened.manifest.shards:
        os.truncate(torn / shard.name, 2)
    honest = TokenStore.samples
    TokenStore.samples = lambda self, ids, length: honest(opened, ids, length)  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def alone(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return _run(job_text, tmp_path_factory.mktemp("alone") / "run", overrides=["elastic.workers.max=1"])


def _run(job_text: str, directory: Path, **arguments: Any) -> Outcome:
    outcome = LocalCluster(job_text, directory, **arguments).run()
    assert outcome.status == "finished", outcome.reason
    return outcome


def test_batches_fetched_ahead_change_nothing(job_text: str, alone: Outcome, tmp_path: Path) -> None:
    faults = ["step=2,worker=1,kind=kill,phase=reduce", "step=5,worker=0,kind=raise,phase=data"]
    outcome = _run(job_text, tmp_path / "run", faults=faults, hooks=[read_ahead_always])
    assert (outcome.digest, outcome.samples) == (alone.digest, alone.samples)
    assert len(outcome.generations) >= 3, "the assignment has changed on the way"
    # Who came last may have had nothing left to read ahead of.
    begun = {member.worker for member in outcome.generations[0].members}
    read = {worker: code for worker, code in outcome.exits.items() if worker in begun}
    assert read
    assert NOTHING_AHEAD not in read.values()


def test_a_mirror_takes_over_for_lost_shards(job_text: str, alone: Outcome, tmp_path: Path) -> None:
    cluster = LocalCluster(job_text, tmp_path / "run")
    store, mirror = cluster.stores[0][0], tmp_path / "mirror"
    shutil.copytree(store, mirror / store.name)
    outcome = _run(job_text, tmp_path / "run", hooks=[partial(lose_shards, str(store), str(mirror))])
    assert (outcome.digest, outcome.samples) == (alone.digest, alone.samples)
    assert len(outcome.generations) == 1, "no worker failed"
