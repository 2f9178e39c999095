"""An update rule that another package brings: its own state is laid out, mirrored, moved, saved and digested with the
rest, so that the result is as much the job's alone as that of the synchronous rule."""

from __future__ import annotations

from functools import cache, partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from orchestrator import plugins
from orchestrator.job import Job, JobError
from orchestrator.planning.work import state_bytes
from orchestrator.runtime.result import bit_exact
from strategies.update.rule import UpdateRule
from tests.plugin_package.example_plugin.delayed import DELAYED
from tests.ranks.laid_out import Stretch, Trained, as_numbers, layout_of, train
from tests.ranks.local_cluster import LocalCluster, Outcome, on_record, tiny_job
from tests.ranks.local_ranks import run_ranks
from tests.ranks.test_layouts import Numbers, assert_all_give, expected
from tests.selection import nightly


@cache
def alone(steps: int = 2, tensor: int = 1, model: str = "llama") -> Numbers:
    """What the smallest group of ranks computes."""
    program = partial(train, rule=DELAYED, model=model)
    seen: Trained = run_ranks(tensor, program, [Stretch(layout_of(tensor=tensor), steps)])[0]
    return as_numbers(seen)  # type: ignore[return-value]


def test_every_layout_gives_one_ranks_bits() -> None:
    assert alone()[0][0] == expected()[0][0], "the first step reads the same weights"
    assert alone()[2] != expected()[2], "and applies another gradient"
    layouts = [layout_of(3), layout_of(2, shard="parameters"), layout_of(2, 2, shard="optimizer")]
    assert_all_give(alone(), layouts, rule=DELAYED)


def test_tensor_parallel_groups_give_the_bits_of_one() -> None:
    layouts = [layout_of(2, 1, 2, "optimizer"), layout_of(1, 2, 2)]
    assert_all_give(alone(tensor=2, model="own"), layouts, rule=DELAYED, model="own")


def test_its_state_follows_the_layouts_and_outlives_the_loss_of_a_holder() -> None:
    """From layout to layout, each time without one of the ranks that had state."""
    stretches = [
        Stretch(layout_of(3, shard="optimizer"), 1, (0, 1, 2)),
        Stretch(layout_of(2, shard="parameters"), 1, (1, 2)),
        Stretch(layout_of(1, 2), 1, (2, 0)),
    ]
    seen = run_ranks(3, partial(train, rule=DELAYED), stretches)
    assert seen[2].digest == alone(3)[2]
    assert seen[2].losses == alone(3)[0]


# ---------------------------------------------------------------------------------------- under a controller


ENTRY = EntryPoint("delayed", f"{type(DELAYED).__module__}:DELAYED", "elastic_orchestrator.update_rules")


def of_packages(kind: str) -> dict[str, EntryPoint]:
    """As if the package was installed."""
    return {"delayed": ENTRY} if kind == "update_rules" else {}


def install() -> None:
    plugins._of_packages = of_packages  # type: ignore[assignment]


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_of_packages", of_packages)


RULE = "strategy.update=delayed"


@pytest.mark.parametrize("shard", ["optimizer", *nightly(["none", "gradients", "parameters"])])
def test_a_run_loses_workers_and_all_of_them_and_gives_the_same(delayed: None, tmp_path: Path, shard: str) -> None:
    """The last of its state is read from a checkpoint, with what the rule keeps."""
    text = tiny_job(tmp_path)

    def run(name: str, *overrides: str, **arguments: Any) -> Outcome:
        outcome = LocalCluster(text, tmp_path / name, overrides=[RULE, *overrides], first=install, **arguments).run()
        assert outcome.status == "finished", outcome.reason
        return outcome

    one = run("one", "elastic.workers.max=1")
    layout = (f"strategy.shard={shard}", "elastic.workers.max=2", "checkpoint.every_steps=3")
    lost = run("lost", *layout, faults=("step=2,worker=1,kind=kill",))
    assert (lost.digest, lost.losses, lost.steps_lost) == (one.digest, one.losses, 0)
    both = run(
        "both",
        *layout,
        "elastic.workers.min=2",
        faults=("step=5,worker=0,kind=kill", "step=5,worker=1,kind=kill"),
        holds={5: partial(on_record, 5, 3)},
    )
    assert (both.digest, both.samples, both.rollbacks) == (one.digest, one.samples, [3])


def test_the_planner_and_the_result_ask_it(delayed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, job = (Job.loads(tiny_job(tmp_path), overrides=overrides) for overrides in ((), (RULE,)))
    assert state_bytes(job).optimizer == state_bytes(usual).optimizer + 4
    assert job.digest() != usual.digest()
    assert bit_exact(job) is True
    monkeypatch.setattr(type(DELAYED), "result", "replayable")
    assert bit_exact(job) == "replayable"
    assert bit_exact(Job.loads(tiny_job(tmp_path), overrides=[RULE, "strategy.reduction=native"])) is False


def test_a_rule_that_no_controller_can_follow_is_refused(
    delayed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(DELAYED), "progress", "vector")
    with pytest.raises(JobError, match=r"strategy.update has each replica count its own steps, and there is no"):
        Job.loads(tiny_job(tmp_path), overrides=[RULE])
    assert UpdateRule.progress == "lockstep"
