"""Every kind of fault on a real Ray: the same bits as the undisturbed run, no step lost, survivors keep their pids."""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from monitoring.records import read_records
from orchestrator.checkpoint.of_run import catalog_of
from orchestrator.rundir import RunDirectory
from tests.cluster.conftest import LLAMA, Outcome, Runner, steps_done, wait_for


def assert_same_result(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.result.status == "finished", outcome.result.reason
    assert outcome.result.state_digest == undisturbed.result.state_digest
    assert outcome.result.data_digest == undisturbed.result.data_digest
    assert [s["step"] for s in outcome.steps] == list(range(outcome.result.steps))
    assert [s["loss"] for s in outcome.steps] == [s["loss"] for s in undisturbed.steps]


def assert_nothing_lost(outcome: Outcome, gone: set[int]) -> None:
    """No step lost, everything from peers, and no process ended but those of the slots in `gone`."""
    assert all(r["steps_lost"] == 0 and r["source"] == "peers" for r in outcome.result.recoveries)
    pids: dict[int, set[int]] = {}
    for generation in outcome.result.generations:
        for worker in generation["workers"]:
            pids.setdefault(worker["worker"], set()).add(worker["pid"])
    for slot, seen in pids.items():
        if slot not in gone:
            assert len(seen) == 1, f"worker {slot} was a survivor and yet had the processes {seen}"
    incidents = [e for e in outcome.events if e["kind"] == "incident"]
    assert len(incidents) == len(outcome.result.recoveries), "one incident, one recovery record"


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_the_number_of_workers_does_not_change_a_bit(runner: Runner, undisturbed: Outcome, workers: int) -> None:
    outcome = runner(f"elastic.workers.max={workers}", f"elastic.workers.min={workers}")
    assert_same_result(outcome, undisturbed)
    assert [len(g["workers"]) for g in outcome.result.generations] == [workers]


def test_a_process_that_dies_and_one_that_hangs(runner: Runner, undisturbed: Outcome) -> None:
    faults = ("step=5,worker=1,kind=kill", "step=15,worker=2,kind=hang")
    outcome = runner("elastic.workers.max=3", "strategy.shard=optimizer", faults=faults)
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={1, 2})
    assert [(r["kind"], r["worker"], r["step"]) for r in outcome.recoveries("kill", "hang")] == [
        ("kill", 1, 5), ("hang", 2, 15),
    ]  # fmt: skip


@pytest.mark.nightly
def test_processes_that_die(runner: Runner, undisturbed: Outcome) -> None:
    faults = ("step=7,worker=1,kind=kill", "step=17,worker=2,kind=segfault", "step=27,worker=0,kind=exit")
    outcome = runner("elastic.workers.min=2", faults=faults)
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={0, 1, 2})
    assert [(r["kind"], r["worker"], r["step"]) for r in outcome.recoveries("kill")] == [
        ("kill", 1, 7), ("kill", 2, 17), ("kill", 0, 27),
    ]  # fmt: skip


@pytest.mark.nightly
def test_exception_hang_and_deadlock(runner: Runner, undisturbed: Outcome) -> None:
    faults = ("step=7,worker=0,kind=raise", "step=17,worker=2,kind=hang", "step=30,worker=3,kind=deadlock")
    outcome = runner(faults=faults)
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={0, 2, 3})
    assert [(r["kind"], r["worker"]) for r in outcome.recoveries("crash", "hang", "stall")] == [
        ("crash", 0), ("hang", 2), ("stall", 3),
    ]  # fmt: skip


@pytest.mark.nightly
def test_a_standby_takes_the_place_of_a_killed_worker(runner: Runner, undisturbed: Outcome) -> None:
    def kill_when_standby_is_warm(directory: RunDirectory) -> None:
        def warm() -> set[int]:
            return {e["worker"] for e in read_records(directory.events) if e["kind"] == "worker_ready"}

        wait_for(lambda: len(warm()) == 3 and steps_done(directory) >= 5, what="a warm standby")
        generation = [e for e in read_records(directory.events) if e["kind"] == "generation"][-1]
        os.kill(generation["workers"][1]["pid"], signal.SIGKILL)

    outcome = runner(
        "elastic.workers.max=2", "elastic.workers.min=2", "elastic.standby=1", "train.steps=300",
        meanwhile=kill_when_standby_is_warm,
    )  # fmt: skip
    assert outcome.result.status == "finished", outcome.result.reason
    assert_nothing_lost(outcome, gone={1})
    assert [len(g["workers"]) for g in outcome.result.generations] == [2, 2]
    assert {w["worker"] for w in outcome.result.generations[1]["workers"]} == {0, 2}


@pytest.mark.nightly
def test_two_workers_at_once_and_one_more_during_the_recovery(runner: Runner, undisturbed: Outcome) -> None:
    faults = (
        "step=10,worker=1,kind=kill",
        "step=10,worker=2,kind=kill,phase=reduce",
        "step=10,worker=3,kind=kill,phase=gather",
    )
    outcome = runner(faults=faults)
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={1, 2, 3})
    assert {r["worker"] for r in outcome.recoveries("kill")} >= {1, 2}


def test_the_controller_is_killed_while_a_checkpoint_is_made_and_then_a_worker(
    runner: Runner, undisturbed: Outcome
) -> None:
    """At the beginning of the step after a snapshot; what was under way is completed or removed."""
    outcome = runner(
        "checkpoint.every_steps=10", "checkpoint.keep=20", "elastic.workers.max=2",
        faults=("step=10,kind=controller", "step=30,worker=1,kind=kill"),
    )  # fmt: skip
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={1})
    assert_checkpoints_are_whole(outcome, runner)
    controllers = [e for e in outcome.events if e["kind"] == "controller"]
    assert [c["epoch"] for c in controllers] == [1, 2]
    assert len({c["pid"] for c in controllers}) == 2
    # The workers trained on: the generation the controller died in is the one its successor found.
    taken_over = next(e for e in outcome.events if e["kind"] == "controller_restarted")
    assert taken_over["workers_found"] == 2
    before = [e for e in outcome.events if e["kind"] == "generation" and e["time"] < taken_over["time"]]
    assert len(before) == 1


def assert_checkpoints_are_whole(outcome: Outcome, runner: Runner) -> None:
    catalog = catalog_of(outcome.directory, runner.job())
    assert catalog.steps()[0] == outcome.result.steps
    assert catalog.steps() == catalog.all_steps(), "none is half there"
    for step in catalog.steps():
        catalog.open(step).verify()


@pytest.mark.nightly
def test_the_controller_is_killed_while_a_worker_starts(runner: Runner, undisturbed: Outcome) -> None:
    """The worker that its successor finds on its way joins the run; nobody is asked for in its place."""

    def kill_both(directory: RunDirectory) -> None:
        def newest(kind: str) -> dict[str, Any]:
            return [event for event in read_records(directory.events) if event["kind"] == kind][-1]

        wait_for(lambda: steps_done(directory) >= 10, what="ten steps")
        os.kill(newest("generation")["workers"][1]["pid"], signal.SIGKILL)
        wait_for(lambda: newest("generation_running")["generation"] == 1, what="a generation without it")
        wait_for(lambda: newest("worker_placed")["incarnation"] == 1, what="a place for its replacement")
        os.kill(newest("controller")["pid"], signal.SIGKILL)

    outcome = runner("train.steps=300", "elastic.workers={min: 1, max: 2}", meanwhile=kill_both)
    assert outcome.result.status == "finished", outcome.result.reason
    (found,) = [event for event in outcome.events if event["kind"] == "controller_restarted"]
    assert (found["workers_found"], found["workers_starting"]) == (1, 1)
    requested = [(e["worker"], e["incarnation"]) for e in outcome.events if e["kind"] == "worker_requested"]
    assert requested == [(0, 0), (1, 0), (1, 1)]
    assert [len(g["workers"]) for g in outcome.result.generations] == [2, 1, 2]
    assert [g["workers"][-1]["worker"] for g in outcome.result.generations] == [1, 0, 1]


@pytest.mark.nightly
def test_the_controller_is_killed_again_and_again_while_checkpoints_are_made(
    runner: Runner, undisturbed: Outcome
) -> None:
    outcome = runner(
        "checkpoint.every_steps=5", "checkpoint.keep=20", "elastic.workers.max=2",
        faults=("step=10,kind=controller", "step=30,kind=controller"),
    )  # fmt: skip
    assert_same_result(outcome, undisturbed)
    assert sum(1 for e in outcome.events if e["kind"] == "controller") == 3
    assert_checkpoints_are_whole(outcome, runner)


@pytest.mark.nightly
def test_notice_bad_gradient_and_slow_worker(runner: Runner, undisturbed: Outcome) -> None:
    faults = (
        "step=5,worker=2,kind=nan", "step=10,worker=0,kind=slow,factor=3,seconds=1", "step=20,worker=1,kind=drain",
    )  # fmt: skip
    outcome = runner(faults=faults)
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={1})
    assert [r["worker"] for r in outcome.recoveries("drain")] == [1]
    assert not any(s["skipped"] for s in outcome.steps)


@pytest.mark.nightly
def test_resizes_while_it_runs(runner: Runner) -> None:
    def resize(directory: RunDirectory) -> None:
        for at, workers in ((15, 2), (40, 1), (60, 4)):
            wait_for(lambda at=at: steps_done(directory) >= at, what=f"step {at}")
            assert directory.answer(directory.request("resize", workers=workers), timeout_s=10) is not None

    outcome = runner("train.steps=120", meanwhile=resize)
    assert_same_result(outcome, runner("train.steps=120", "elastic.workers.max=1"))
    sizes = [len(g["workers"]) for g in outcome.result.generations]
    assert sizes[:3] == [4, 2, 1]
    assert all(r["steps_lost"] == 0 for r in outcome.result.recoveries)


@pytest.mark.nightly
def test_it_starts_with_what_there_is_and_grows_when_there_is_room(runner: Runner, undisturbed: Outcome) -> None:
    """And meanwhile the place of a dead worker, the only one that there is for another, is given back to the run."""
    import ray

    taken = ray.util.placement_group([{"CPU": 6}])
    assert taken.wait(10)

    def make_room(directory: RunDirectory) -> None:
        def sizes() -> list[int]:
            return [len(e["workers"]) for e in read_records(directory.events) if e["kind"] == "generation"]

        wait_for(lambda: sizes() == [2, 1, 2], what=lambda: f"two workers again: {sizes()}")
        ray.util.remove_placement_group(taken)
        wait_for(lambda: sizes()[-1] == 4, what=lambda: f"four workers: {sizes()}")
        directory.request("stop", reason="the test has seen it")

    outcome = runner(
        "train.steps=100000", "train.schedule.name=constant", faults=("step=5,worker=1,kind=kill",),
        meanwhile=make_room,
    )  # fmt: skip
    assert outcome.result.status == "stopped", outcome.result.reason
    assert_nothing_lost(outcome, gone={1})
    assert {r["kind"] for r in outcome.result.recoveries} == {"kill", "grow"}
    first = undisturbed.steps[: undisturbed.result.steps]
    assert [s["samples"] for s in outcome.steps[: len(first)]] == [s["samples"] for s in first]


@pytest.mark.nightly
def test_bf16_and_a_factory_model_are_as_reproducible(runner: Runner) -> None:
    settings = (
        "model={factory: 'examples.tiny_gpt:build', args: {vocab_size: 320, hidden_size: 32, layers: 2, heads: 2, "
        "dropout: 0.1}}",
        "train.precision=bf16",
        "train.steps=30",
    )
    alone = runner(*settings, "elastic.workers.max=1")
    disturbed = runner(*settings, faults=("step=10,worker=1,kind=kill",))
    assert_same_result(disturbed, alone)


@pytest.mark.nightly
def test_below_min_the_run_waits_and_goes_on(runner: Runner, undisturbed: Outcome) -> None:
    outcome = runner("elastic.workers.min=2", "elastic.workers.max=2", faults=("step=15,worker=1,kind=kill",))
    assert_same_result(outcome, undisturbed)
    assert_nothing_lost(outcome, gone={1})
    assert any(e["kind"] == "waiting" and e["needed"] == 2 for e in outcome.events)


@pytest.mark.nightly
def test_all_workers_lost_replays_from_the_newest_checkpoint(runner: Runner, undisturbed: Outcome) -> None:
    outcome = runner(
        "elastic.workers.max=2",
        faults=("step=30,worker=0,kind=kill", "step=30,worker=1,kind=kill"),
    )
    assert_same_result(outcome, undisturbed)
    # Step 30 never ended; the last steps before it may have been committed and died before anybody heard of them.
    assert 0 < sum(r["steps_lost"] for r in outcome.result.recoveries) <= 10
    assert 20 in [g["start_step"] for g in outcome.result.generations]
    assert {r["source"] for r in outcome.result.recoveries if r["steps_lost"]} == {"checkpoint"}


@pytest.mark.nightly
def test_stopped_runs_go_on_where_they_were(runner: Runner, undisturbed: Outcome, tmp_path: Path) -> None:
    def stop(directory: RunDirectory) -> None:
        wait_for(lambda: steps_done(directory) >= 5, what="step 5")
        directory.request("stop", reason="the test says so")

    first = runner("elastic.workers.max=2", run_dir=tmp_path / "stopped", meanwhile=stop)
    assert first.result.status == "stopped"
    assert 5 <= first.result.steps < 40
    # Also when the controller of the second attempt is killed: the result of the first is not taken for its own.
    second = runner("elastic.workers.max=2", run_dir=tmp_path / "stopped", faults=("step=35,kind=controller",))
    assert_same_result(second, undisturbed)
    third = runner(run_dir=tmp_path / "stopped")
    assert third.result.state_digest == undisturbed.result.state_digest
    assert len(third.result.generations) == len(second.result.generations), "a finished run is not run again"


@pytest.mark.nightly
def test_native_reduction_is_equal_within_rounding_and_says_so(runner: Runner, undisturbed: Outcome) -> None:
    outcome = runner("strategy.reduction=native", "elastic.workers.max=3")
    assert outcome.result.status == "finished", outcome.result.reason
    assert not outcome.result.bit_exact
    assert outcome.result.data_digest == undisturbed.result.data_digest
    assert outcome.result.final_loss is not None
    assert undisturbed.result.final_loss is not None
    assert math.isclose(outcome.result.final_loss, undisturbed.result.final_loss, rel_tol=1e-3)


BROKEN_MODEL = """
import os

import torch

class Broken(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(320, 320)

    def forward(self, input_ids):
        # Counted where no trial of the model sees it: what it keeps itself may not change.
        os.environ["CALLS"] = str(int(os.environ.get("CALLS", 0)) + 1)
        if int(os.environ["CALLS"]) > 200:
            raise RuntimeError("the batch breaks it")
        return self.embedding(input_ids)

def build():
    return Broken()
"""


def test_a_step_that_always_fails_ends_the_run_with_its_reason(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_model.py").write_text(BROKEN_MODEL)
    monkeypatch.chdir(tmp_path)
    outcome = runner("model={factory: 'broken_model:build'}", "elastic.workers.max=1")
    assert outcome.result.status == "failed"
    assert re.search(r"step [1-9]\d* failed 3 times", outcome.result.reason), outcome.result.reason
    assert "the batch breaks it" in outcome.result.reason
    assert next(e["worker"] for e in outcome.events if e["kind"] == "incident") == 0


@pytest.mark.nightly
def test_a_model_that_cannot_be_built_fails_at_once(runner: Runner) -> None:
    outcome = runner(LLAMA.replace("vocab_size: 320", "vocab_size: 100"), "elastic.workers.max=1")
    assert outcome.result.status == "failed"
    assert "vocab_size" in outcome.result.reason
