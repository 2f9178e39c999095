"""Runs whose sums are rounded on their way, with feedback: the result is the job's, whoever is lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.local_cluster import LocalCluster, Outcome, on_record, tiny_job
from tests.selection import nightly

WIRE = ("strategy.wire=int4",)


def run(tmp_path: Path, name: str, *overrides: str, **arguments: Any) -> Outcome:
    outcome = LocalCluster(tiny_job(tmp_path), tmp_path / name, overrides=[*WIRE, *overrides], **arguments).run()
    assert outcome.status == "finished", outcome.reason
    return outcome


@pytest.mark.parametrize("phase", ["reduce", *nightly(["compute", "gather", "vote", "commit"])])
@pytest.mark.parametrize("shard", ["none", *nightly(["optimizer", "gradients"])])
def test_a_worker_is_lost_and_another_joins_and_no_step_is_lost(tmp_path: Path, phase: str, shard: str) -> None:
    one = run(tmp_path, "one", "elastic.workers.max=1")
    fault = f"step=3,worker=1,kind=kill,phase={phase}"
    lost = run(tmp_path, "lost", f"strategy.shard={shard}", "elastic.standby=1", faults=(fault,))
    assert (lost.digest, lost.losses, lost.steps_lost) == (one.digest, one.losses, 0)
    assert lost.digest != run(tmp_path, "exact", "strategy.wire=fp32").digest


def test_without_copies_what_was_rounded_off_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    """All weights are at whoever is left, but not what its nodes had rounded off: that costs the steps since then."""
    one = run(tmp_path, "one", "elastic.workers.max=1")
    lost = run(
        tmp_path, "lost", "elastic.state_copies=1", "elastic.workers.max=2", "checkpoint.every_steps=3",
        faults=("step=5,worker=1,kind=kill",), holds={5: partial(on_record, 5, 3)},
    )  # fmt: skip
    assert (lost.digest, lost.samples, lost.rollbacks) == (one.digest, one.samples, [3])
