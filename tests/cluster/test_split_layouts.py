"""Split layouts on a real Ray: faults in pipelines, shards and tensor-parallel groups, and where their workers are."""

from __future__ import annotations

from collections import defaultdict

import pytest
from ray.util.placement_group import placement_group_table

from orchestrator.rundir import RunDirectory
from tests.cluster.conftest import LLAMA, Outcome, Runner, steps_done, wait_for
from tests.cluster.test_faults import assert_nothing_lost, assert_same_result

SHORT = (
    "model={factory: 'tests.small_models:leisurely', args: {seconds: 0}}",
    "train.steps=6",
    "train.global_batch=8",
    "checkpoint.every_steps=3",
)
"""A step of tensor-parallel groups takes some hundred collectives. A model of a factory is imported faster."""


@pytest.mark.nightly
def test_pipelines_of_shards_lose_and_regain_workers(runner: Runner) -> None:
    faults = ("step=7,worker=1,kind=kill", "step=17,worker=2,kind=hang", "step=30,worker=3,kind=raise")
    calm = runner(LLAMA, "elastic.workers.max=1")
    outcome = runner(LLAMA, "strategy.pipeline=2", "strategy.shard=optimizer", faults=faults)
    assert_same_result(outcome, calm)
    assert_nothing_lost(outcome, gone={1, 2, 3})
    layouts = [generation["layout"] for generation in outcome.result.generations]
    assert {k: layouts[0][k] for k in ("data", "tensor", "pipeline", "shard")} == {
        "data": 2, "tensor": 1, "pipeline": 2, "shard": "optimizer",
    }  # fmt: skip
    assert len({str(layout) for layout in layouts}) > 1, "fewer workers are laid out in another way"


@pytest.mark.nightly
def test_sharded_parameters_with_a_killed_controller(runner: Runner, undisturbed: Outcome) -> None:
    faults = ("step=10,kind=controller", "step=25,worker=0,kind=kill")
    outcome = runner("strategy.shard=parameters", "elastic.workers.max=3", faults=faults)
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={0})


@pytest.mark.nightly
def test_tensor_parallel_groups_share_a_placement_group_and_are_mended_in_place(runner: Runner) -> None:
    split = (*SHORT, "strategy.tensor=2", "elastic.workers.min=2")
    calm = runner(*split, "elastic.workers.max=2")
    assert calm.result.status == "finished", calm.result.reason
    bundles: dict[str, dict[str, int]] = {}

    def look(directory: RunDirectory) -> None:
        wait_for(lambda: steps_done(directory) >= 2)
        for group in placement_group_table().values():
            if group["state"] == "CREATED" and group["name"].startswith(directory.run_id):
                counts: dict[str, int] = defaultdict(int)
                for node in group["bundles_to_node_id"].values():
                    counts[node] += 1
                bundles[group["name"]] = dict(counts)
                assert group["strategy"] == "STRICT_PACK"

    outcome = runner(*split, "strategy.pipeline=2", faults=("step=4,worker=1,kind=kill",), meanwhile=look)
    assert_same_result(outcome, calm)
    assert_nothing_lost(outcome, gone={1})
    assert sorted(sum(counts.values()) for counts in bundles.values()) == [2, 2], bundles
    assert all(len(counts) == 1 for counts in bundles.values()), "a tensor-parallel group shares a node"
    first = outcome.result.generations[0]["workers"]
    assert [worker["worker"] // 2 for worker in first] == [0, 0, 1, 1], "units are neighbours in rank order"
