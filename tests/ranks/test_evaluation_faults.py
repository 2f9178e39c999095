"""Real workers under the real controller: whatever happens to them, evaluations are the job's, each once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from monitoring.evaluations import StandingEvaluations
from tests.ranks.local_cluster import LocalCluster, Outcome, on_record, tiny_job
from tests.ranks.test_worker_faults import assert_nothing_lost, assert_same_training
from tests.selection import nightly

EVALUATES = ("evaluation={share: 0.25, every_steps: 3, at_start: true, best: {metric: loss, mode: min}}",)
"""Of eight steps, after 0, 3, 6 and 8."""
STOPS = ("evaluation.early_stop={patience: 2, threshold: 10}",)
"""No loss is ever so much better: the second one after the first ends the run."""

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def job_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("job")
    text = tiny_job(directory)
    records = [{"text": f"{n} times {n} is {n * n}, and so on. "} for n in range(400)]
    source = directory / "data.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return text.replace("data.txt", "data.jsonl")


@pytest.fixture
def run(job_text: str, tmp_path: Path) -> Run:
    """Runs the job on a cluster of its own; arguments are those of `LocalCluster`."""

    def start(timeout_s: float = 240.0, overrides: Any = (), **arguments: Any) -> Outcome:
        cluster = LocalCluster(job_text, tmp_path / "run", overrides=[*EVALUATES, *overrides], **arguments)
        return cluster.run(timeout_s)

    return start


@pytest.fixture(scope="module")
def undisturbed(job_text: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one worker makes of the job when nothing happens."""
    outcome = LocalCluster(
        job_text, tmp_path_factory.mktemp("undisturbed") / "run", overrides=[*EVALUATES, "elastic.workers.max=1"]
    ).run()
    assert [each["step"] for each in outcome.of("evaluation")] == [0, 3, 6, 8]
    assert len(outcome.steps) == 8
    return outcome


def standing(outcome: Outcome) -> list[tuple[int, Any, bool]]:
    """Step, metrics and whether they were the best, of those that were not taken back."""
    events = [{"kind": kind, **fields} for kind, fields in outcome.records]
    return [(each["step"], each["metrics"], each["best"]) for each in StandingEvaluations(events).standing]


def test_evaluating_changes_nothing_of_training(run: Run, undisturbed: Outcome, job_text: str, tmp_path: Path) -> None:
    kept_apart = ["evaluation={share: 0.25, every_steps: 1000}", "elastic.workers.max=2"]
    assert_same_training(LocalCluster(job_text, tmp_path / "rarely", overrides=kept_apart).run(), undisturbed)


@pytest.mark.parametrize(("step", "phase"), [(0, "evaluate"), (3, "tally"), (6, "evaluate"), (8, "tally")])
def test_a_kill_during_an_evaluation_costs_no_step_and_no_evaluation(
    run: Run, undisturbed: Outcome, step: int, phase: str
) -> None:
    outcome = run(faults=[f"step={step},worker=1,kind=kill,phase={phase}"])
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert len(outcome.of("fault_injected")) == 1
    assert standing(outcome) == standing(undisturbed)
    assert len(outcome.of("evaluation")) == 4, "each is on record once"


@pytest.mark.parametrize(
    "fault",
    ["step=3,worker=0,kind=deadlock,phase=evaluate", *nightly(["step=3,worker=1,kind=raise,phase=evaluate"])],
)
def test_a_worker_in_trouble_during_an_evaluation_costs_nothing(run: Run, undisturbed: Outcome, fault: str) -> None:
    outcome = run(faults=[fault], overrides=["elastic.progress_timeout_s=1.5"])
    assert_same_training(outcome, undisturbed)
    assert_nothing_lost(outcome)
    assert standing(outcome) == standing(undisturbed)


def test_all_but_one_killed_during_an_evaluation(run: Run, undisturbed: Outcome) -> None:
    faults = ["step=6,worker=1,kind=kill,phase=evaluate", "step=6,worker=2,kind=kill,phase=evaluate"]
    outcome = run(faults=faults)
    assert_same_training(outcome, undisturbed)
    assert standing(outcome) == standing(undisturbed)


def test_when_all_die_evaluations_are_replayed_to_the_same_bits(run: Run, undisturbed: Outcome) -> None:
    """Back to the checkpoint of four steps: the evaluation after three stands, the one after six is made again."""
    everyone = [f"step=7,worker={worker},kind=kill,phase=compute" for worker in range(3)]
    outcome = run(
        faults=everyone,
        # Best weights would be saved too, and a checkpoint that is due waits for the one before.
        overrides=["checkpoint.every_steps=4", "evaluation.best=null"],
        holds={7: partial(on_record, 7, 4)},
    )  # fmt: skip
    assert_same_training(outcome, undisturbed)
    assert outcome.rollbacks == [4]
    assert standing(outcome) == standing(undisturbed)
    assert [each["step"] for each in outcome.of("evaluation")] == [0, 3, 6, 6, 8]


@pytest.mark.parametrize(
    "faults",
    [[], ["step=6,worker=1,kind=kill,phase=evaluate"], *nightly([["step=5,worker=0,kind=kill,phase=vote"]])],
    ids=len,
)
def test_early_stopping_comes_at_the_same_step(run: Run, undisturbed: Outcome, faults: list[str]) -> None:
    outcome = run(overrides=STOPS, faults=faults)
    assert outcome.status == "finished", outcome.reason
    assert len(outcome.steps) == 6
    assert outcome.losses == undisturbed.losses[:6]
    assert standing(outcome) == standing(undisturbed)[:3]
    assert "early" in outcome.reason
