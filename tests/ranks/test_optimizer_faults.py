"""What an optimizer keeps goes where its parameters go, however it is shaped and stored: between ranks, to mirrors, to
a checkpoint and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.local_cluster import LLAMA, LocalCluster, Outcome, tiny_job
from tests.ranks.test_layout_faults import CHECKPOINTS, kill_together
from tests.selection import nightly

OPTIMIZERS = {
    "adafactor": ["train.optimizer.name=adafactor", "train.optimizer.lr=1e-2"],
    "fp8": ["train.optimizer.state=fp8"],
    "bf16": ["train.optimizer.state=bf16"],
    "muon": ["train.optimizer.name=muon"],
    "muon fp8": ["train.optimizer.name=muon", "train.optimizer.state=fp8"],
    "lion": ["train.optimizer.name=lion", "train.optimizer.lr=3e-4"],
}
OTHERS = [(name, shard) for name in OPTIMIZERS for shard in ("none", "optimizer", "gradients", "parameters")]
IN_EVERY_RUN = [("adafactor", "optimizer"), ("fp8", "gradients"), ("fp8", "parameters")]
CASES = [
    *IN_EVERY_RUN,
    *nightly(
        (name, shard)
        for name, shard in OTHERS
        if (name, shard) not in IN_EVERY_RUN and (shard != "parameters" or name in ("fp8", "bf16", "lion"))
    ),
]


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_job(tmp_path_factory.mktemp("job"), LLAMA)


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one worker makes of the job with an optimizer, by its name."""
    found: dict[str, Outcome] = {}

    def of(name: str) -> Outcome:
        if name not in found:
            overrides = [*OPTIMIZERS[name], "elastic.workers.max=1"]
            found[name] = LocalCluster(job_text, tmp_path_factory.mktemp("alone"), overrides=overrides).run()
        return found[name]

    return of


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.status == "finished", outcome.reason
    assert len(set(expected.losses)) == len(expected.losses), "it learns"
    assert (outcome.digest, outcome.losses, outcome.samples) == (expected.digest, expected.losses, expected.samples)


@pytest.mark.parametrize(("name", "shard"), CASES)
def test_it_survives_growth_a_kill_and_a_checkpoint(
    name: str, shard: str, job_text: str, undisturbed: Any, tmp_path: Path
) -> None:
    """A run of one worker grows to three and loses one; with as many copies as there may be, nothing is lost. With a
    single copy of what is sharded, what the lost one had is read again, and what followed is replayed."""
    overrides = [*OPTIMIZERS[name], f"strategy.shard={shard}"]
    outcome = LocalCluster(
        job_text, tmp_path / "mirrored", overrides=overrides, faults=["step=4,worker=1,kind=kill"]
    ).run()
    assert_same(outcome, undisturbed(name))
    assert outcome.steps_lost == 0
    assert max(len(generation.members) for generation in outcome.generations) > 1
    if shard == "none":
        return
    outcome = LocalCluster(
        job_text, tmp_path / "read", overrides=[*overrides, "elastic.state_copies=1", *CHECKPOINTS], **kill_together(1)
    ).run()
    assert_same(outcome, undisturbed(name))
    assert outcome.rollbacks == [4]
