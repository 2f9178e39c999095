"""Runs of local steps with real workers and the real controller: whoever is lost, the result is the job's."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.job import Job, JobError
from tests.ranks.local_cluster import LocalCluster, Outcome, on_record, tiny_job
from tests.selection import nightly

DILOCO = "strategy.update={rule: local, replicas: 4, inner_steps: 3, warmup_steps: 2}"
"""Of 8 steps: two synchronous ones, and two rounds of three."""
STREAMING = (
    "strategy.update={rule: local, replicas: 4, inner_steps: 4, fragments: 2, overlap_steps: 1, warmup_steps: 2, "
    "wire: int8}"
)


def run(tmp_path: Path, name: str, *overrides: str, rule: str = DILOCO, **arguments: Any) -> Outcome:
    outcome = LocalCluster(tiny_job(tmp_path), tmp_path / name, overrides=[rule, *overrides], **arguments).run()
    assert outcome.status == "finished", outcome.reason
    return outcome


PHASES = [
    ("compute", 3),
    ("vote", 4),
    *nightly([("data", 2), ("reduce", 4), ("gather", 4), ("commit", 4), ("compute", 7)]),
]


@pytest.mark.parametrize(("phase", "step"), PHASES)
@pytest.mark.parametrize("rule", [DILOCO, STREAMING], ids=["diloco", "streaming"])
def test_a_worker_is_lost_in_a_round_and_no_round_is(tmp_path: Path, rule: str, phase: str, step: int) -> None:
    one = run(tmp_path, "one", "elastic.workers.max=1", rule=rule)
    fault = f"step={step},worker=1,kind=kill,phase={phase}"
    lost = run(tmp_path, "lost", "elastic.standby=1", rule=rule, faults=(fault,))
    assert (lost.digest, lost.losses, lost.samples) == (one.digest, one.losses, one.samples)
    assert lost.steps_lost == 0


@pytest.mark.parametrize("fault", ["kind=hang", "kind=drain", *nightly(["kind=raise", "kind=nan"])])
def test_other_faults(tmp_path: Path, fault: str) -> None:
    one = run(tmp_path, "one", "elastic.workers.max=1")
    other = run(tmp_path, "other", "elastic.workers.max=2", faults=(f"step=3,worker=1,{fault}",))
    assert (other.digest, other.losses) == (one.digest, one.losses)
    assert other.steps_lost == 0


def test_without_copies_moments_of_replicas_are_read_from_a_checkpoint(tmp_path: Path) -> None:
    one = run(tmp_path, "one", "elastic.workers.max=1")
    lost = run(
        tmp_path, "lost", "elastic.state_copies=1", "elastic.workers.max=2", "checkpoint.every_steps=4",
        faults=("step=6,worker=1,kind=kill",), holds={5: partial(on_record, 5, 5)},
    )  # fmt: skip
    assert (lost.digest, lost.samples) == (one.digest, one.samples)
    assert lost.rollbacks == [], "the checkpoint is of all that was committed: the round is run again from there"


@cache
def text_of(directory: Path) -> str:
    return tiny_job(directory)


REFUSED = {
    "strategy.shard=optimizer": "replicas have weights of their own",
    "train.ema={decay: 0.9}": "is a mean over steps",
    "strategy.wire=int8": r"strategy\.update\.wire",
    "train.optimizer.name=adafactor": "keeps rows and columns",
    "train.optimizer.state=bf16": "use state: fp32",
    "elastic.virtual_workers=2": r"virtual_workers: 4 would fit",
    "evaluation={share: 0.1, every_steps: 3}": "are inside of a round",
    "strategy.update.overlap_steps=4": "at most inner_steps / fragments = 3, got 4",
    "strategy.update.fragments=2": "must be a multiple of fragments = 2",
    "strategy.update=local": "needs its settings",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_go_together_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(JobError, match=REFUSED[override]):
        Job.loads(text_of(tmp_path), overrides=[DILOCO, override])
