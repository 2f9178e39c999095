"""Every objective under the real controller: runs that grow, lose a worker and evaluate give one worker's bits.

`pytest -s -m nightly` prints the table of digests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.local_cluster import LocalCluster, Outcome
from tests.ranks.test_worker_faults import assert_nothing_lost, assert_same_training
from tests.ranks.tuned import OBJECTIVES, job_of
from tests.selection import nightly
from tests.unit.test_adapters import base_in

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "distill": ("sft-completions", {"objective": {"name": "distill", "alpha": 0.2}}),
    "distill of the likeliest": ("sft-completions", {"objective": {"name": "distill", "alpha": 0.2, "top_k": 5}}),
    "lora": ("sft", {"adapter": {"name": "lora", "r": 2, "target_modules": ["q_proj", "down_proj"]}}),
    "lora on int8": ("sft", {"adapter": {"name": "lora", "r": 2, "quantize_base": "int8"}}),
    "adafactor": ("sft", {"train": {"optimizer": {"name": "adafactor", "lr": 1e-2}}}),
    "muon and a mean of weights": ("sft", {"train": {"optimizer": {"name": "muon"}, "ema": {"decay": 0.9}}}),
}
"""By name: whose records, and what else the job says."""
HISTORIES = {
    "three, one killed": (["elastic.workers.max=3"], ["step=3,worker=1,kind=kill"]),
    "sharded, one killed while it evaluates": (
        ["elastic.workers.max=3", "strategy.shard=optimizer"],
        ["step=3,worker=1,kind=kill,phase=evaluate"],
    ),
    "four in two stages, one killed": (
        ["elastic.workers.min=2", "elastic.workers.max=4", "strategy.pipeline=2"],
        ["step=4,worker=1,kind=kill"],
    ),
}


def outcome_of(name: str, directory: Path, run: str, overrides: list[str], faults: list[str]) -> Outcome:
    records, sections = OTHERS.get(name, (name, {}))
    sections = dict(sections)
    if sections.get("objective", {}).get("name") == "distill":
        teacher = directory / "teacher" / "base"
        if not teacher.exists():
            base_in(directory / "teacher")
        sections["objective"] = sections["objective"] | {"teacher": str(teacher)}
        # The records are those of another objective: texts of these.
        sections["data"] = {"field": "prompt"}
    sections["evaluation"] = {"share": 0.2, "every_steps": 3, "at_start": True}
    given = job_of(name if name in OBJECTIVES else records, directory, **sections).model_dump(
        mode="json", exclude_unset=True
    )
    given["elastic"] |= {
        "heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 2.0, "progress_timeout_s": 20.0, "lease_s": 20.0,
        "scaling": {"settle_s": 0},
    }  # fmt: skip
    given["strategy"] = {}
    return LocalCluster(json.dumps(given), directory / run, overrides=overrides, faults=faults).run()


@pytest.mark.parametrize("name", ["dpo", *nightly(each for each in [*OBJECTIVES, *OTHERS] if each != "dpo")])
def test_a_run_with_faults_is_one_workers(name: str, tmp_path: Path) -> None:
    alone = outcome_of(name, tmp_path, "alone", ["elastic.workers.max=1"], [])
    assert alone.status == "finished", alone.reason
    evaluated = [each["metrics"] for each in alone.of("evaluation")]
    assert len(evaluated) == 4
    print(f"{name:28} {alone.digest[:23]} loss {alone.losses[0]:.4f} {alone.losses[-1]:.4f}", end="")
    for history, (overrides, faults) in HISTORIES.items():
        if name == "embedding" and "strategy.pipeline=2" in overrides:
            continue  # It has a micro-batch for each virtual worker, and no stages to overlap them.
        outcome = outcome_of(name, tmp_path, history.replace(" ", "-"), overrides, faults)
        assert outcome.status == "finished", (history, outcome.reason)
        assert_same_training(outcome, alone)
        assert_nothing_lost(outcome)
        assert [each["metrics"] for each in outcome.of("evaluation")] == evaluated, history
        assert len(outcome.of("fault_injected")) == 1
        print(f" | {history}", end="")
    print()
