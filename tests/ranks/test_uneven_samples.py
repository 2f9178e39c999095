"""Packed, padded and mixed samples: the result is the job's alone, on any layout and whatever happens."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data import audit
from orchestrator.job import Job
from tests.ranks.local_cluster import LLAMA, LocalCluster, Outcome, tiny_job
from tests.selection import nightly

STEPS = 6
KINDS: dict[str, tuple[str, ...]] = {
    "pack": ("data.packing=pack", "data.document_mask=true"),
    "pad": ("data.packing=pad",),
    "mix": ("data.packing=pad", "data.source=null", "data.mix=MIX"),
    "masked stream": ("data.document_mask=true",),
}


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny job on documents of many lengths, with two micro-batches of two samples for each virtual worker."""
    directory = tmp_path_factory.mktemp("job")
    text = tiny_job(directory, LLAMA)
    for name, seed, letter in (("one", 1, "a"), ("two", 2, "A")):
        rng = random.Random(seed)
        words = ["".join(chr(ord(letter) + rng.randrange(26)) for _ in range(rng.randint(1, 60))) for _ in range(400)]
        lines = (json.dumps({"text": " ".join(words[n : n + rng.randint(0, 2)])}) for n in range(400))
        (directory / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    text = text.replace("data.txt", "one.jsonl").replace("global_batch: 8", "global_batch: 32\n  micro_batch: 2")
    return text.replace("steps: 8", f"steps: {STEPS}")


Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, int], Outcome]:
    """What the fewest workers make of it when nothing happens."""

    @functools.cache
    def outcome(kind: str, tensor: int, layers: int) -> Outcome:
        overrides = [*overrides_of(job_text, kind), *split(tensor, layers), *workers(tensor, tensor)]
        found = LocalCluster(job_text, tmp_path_factory.mktemp("alone") / "run", overrides=overrides).run(120.0)
        assert found.status == "finished", found.reason
        assert len(set(found.losses)) == STEPS
        return found

    return outcome


def overrides_of(job_text: str, kind: str) -> list[str]:
    source = Job.loads(job_text).data.source
    assert isinstance(source, str)
    mix = f"[{{source: {source}, weight: 3}}, {{source: {source.replace('one', 'two')}, weight: 1}}]"
    return [override.replace("MIX", mix) for override in KINDS[kind]]


def split(tensor: int, layers: int) -> list[str]:
    """Less to do where every layer of every micro-batch costs some collectives."""
    smaller = ["train.global_batch=16"] if tensor > 1 else []
    return [f"strategy.tensor={tensor}", f"model.hf.num_hidden_layers={layers}", *smaller]


def workers(low: int, high: int) -> list[str]:
    return [f"elastic.workers.min={low}", f"elastic.workers.max={high}"]


@pytest.fixture
def train(job_text: str, tmp_path: Path, undisturbed: Callable[[str, int, int], Outcome]) -> Train:
    """Runs a kind on a cluster, whole at every step unless a worker is lost, and compares."""

    def start(
        kind: str, number: int, *, tensor: int = 1, layers: int = 2, overrides: tuple[str, ...] = (), **more: Any
    ) -> Outcome:
        settings = [*overrides_of(job_text, kind), *split(tensor, layers), *workers(tensor, number), *overrides]

        def is_whole(cluster: LocalCluster, step: int) -> bool:
            return cluster.committed == step and cluster.is_whole(number)

        holds = {step: functools.partial(is_whole, step=step) for step in range(STEPS)}
        cluster = LocalCluster(job_text, tmp_path / "run", overrides=settings, holds=holds, **more)
        outcome, expected = cluster.run(timeout_s=120.0), undisturbed(kind, tensor, layers)
        assert outcome.status == "finished", outcome.reason
        assert number in outcome.sizes
        assert (outcome.losses, outcome.grad_norms) == (expected.losses, expected.grad_norms)
        assert outcome.samples == expected.samples
        assert outcome.digest == expected.digest
        assert_audited(cluster, outcome, tmp_path)
        return outcome

    return start


def assert_audited(cluster: LocalCluster, outcome: Outcome, directory: Path) -> None:
    """The record proves what was used; tokens and padding in it are those of the samples."""
    described = cluster.dataset.describe(directory)
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(step)) + "\n" for step in outcome.steps))
    report = audit(path, **described)
    assert report.ok, report.problems
    for step in outcome.steps:
        batches = [cluster.dataset.batch(step.step, worker) for worker in range(8)]
        assert step.tokens == sum(batch.num_targets for batch in batches)
        assert step.padding == sum(batch.num_padding for batch in batches) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_three_workers_and_a_kill_give_what_one_gives(train: Train, kind: str) -> None:
    outcome = train(kind, 3, faults=["step=3,worker=1,kind=kill"])
    assert [recovery["kind"] for recovery in outcome.recoveries].count("kill") == 1
    assert outcome.rollbacks == []


@pytest.mark.parametrize("shard", ["parameters", *nightly(["gradients"])])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_layouts_give_what_one_worker_gives(train: Train, kind: str, shard: str) -> None:
    train(kind, 3, overrides=(f"strategy.shard={shard}",))


def test_a_sharded_layout_that_loses_a_worker_gives_what_one_worker_gives(train: Train) -> None:
    outcome = train("pad", 3, overrides=("strategy.shard=parameters",), faults=["step=3,worker=2,kind=kill"])
    assert outcome.rollbacks == []


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble", *nightly(["gpipe", "interleaved-1f1b"])])
def test_pipelines_give_what_one_worker_gives(train: Train, schedule: str) -> None:
    train("pack", 2, layers=4, overrides=("strategy.pipeline=2", f"strategy.schedule={schedule}"))


def test_a_pipeline_of_sharded_replicas_gives_what_one_worker_gives(train: Train) -> None:
    train("masked stream", 4, overrides=("strategy.pipeline=2", "strategy.shard=parameters"))


@pytest.mark.parametrize("kind", nightly(["pack", "pad"]))
def test_tensor_parallel_groups_give_what_one_group_gives(train: Train, kind: str) -> None:
    train(kind, 4, tensor=2)
