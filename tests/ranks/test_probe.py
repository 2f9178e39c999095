"""Workers that do not compute the same bits do not train together; one that does not compute the same twice, not at
all."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.control.core.workers import WorkerId
from orchestrator.control.training.alike import Alike
from orchestrator.training.messages import Ready
from strategies.comm.group_errors import DeviceFailed
from strategies.gradient.compute import LocalGradients
from strategies.gradient.spec import StepSpec
from strategies.trial.probe import probe_layer, probe_model
from tests.ranks import architectures
from tests.ranks.laid_out import LENGTH, SPEC, fetch, make_engine
from tests.ranks.local_cluster import LocalCluster, tiny_job


def local_of(model: str = "llama", dropout: float = 0.1) -> LocalGradients:
    engine = make_engine(dropout, model=model)
    return LocalGradients(engine.state.whole_part(), engine.spec, fetch)


def test_the_same_model_gives_the_same_digest_and_another_another() -> None:
    first = probe_model(local_of())
    assert probe_model(local_of()) == first
    assert probe_model(local_of(dropout=0.2)) != first, "random numbers are part of it"
    torch.manual_seed(99)
    assert probe_model(local_of()) == first, "but not whatever was drawn before"


@pytest.mark.parametrize("model", ["llama", "own"])
def test_a_layer_by_itself_has_a_digest_too(model: str) -> None:
    digests = {probe_layer(make_engine(0.1, model=model).state.blueprint, SPEC, LENGTH) for _ in range(2)}
    assert len(digests) == 1
    half = StepSpec(**{**vars(SPEC), "precision": "bf16"})
    assert probe_layer(make_engine(0.1, model=model).state.blueprint, half, LENGTH) not in digests


def test_a_model_that_changes_what_its_layers_are_given_is_not_taken_for_a_device_that_fails() -> None:
    """ctrl multiplies what its embedding gives, in place."""
    blueprint = architectures.engine_of("ctrl", shard="parameters").state.blueprint
    assert probe_layer(blueprint, SPEC, LENGTH)


def test_looking_at_a_model_leaves_it_as_it_was() -> None:
    """big_bird swaps the attention of its layers in its first pass: of all, or of none."""
    model: Any = architectures.engine_of("big_bird", shard="parameters").state.blueprint.model
    kept = {(layer.attention_type, type(layer.attention.self).__name__) for layer in model.bert.encoder.layer}
    assert len(kept) == 1
    assert {model.bert.attention_type, model.bert.encoder.attention_type} == {kind for kind, _ in kept}


def test_a_device_that_does_not_compute_the_same_twice_is_named_with_what_differs() -> None:
    local = local_of()
    try_out = local.try_out
    calls: list[int] = []

    def unsteady() -> torch.Tensor:
        gradient = try_out()
        calls.append(1)
        if len(calls) == 3:
            slot, offset = local.part.slots[4]
            gradient[offset + slot.numel - 1] *= 1 + 2**-20
        return gradient

    local.try_out = unsteady  # type: ignore[method-assign]
    name = local.part.slots[4][0].name
    with pytest.raises(DeviceFailed, match=rf"pass 3 over the same micro-batch .* for 1 of .* first of all {name}\."):
        probe_model(local)


def compute_otherwise(directory: Path) -> None:
    """The second process that comes here has another kernel: its losses are larger by the least there is. It goes on
    when another is ready, which others are measured by."""
    score: Any = StepSpec.score
    for name in ("first", "second"):
        try:
            os.close(os.open(directory / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if name == "second":
            while not (directory / "ready").exists():
                time.sleep(0.01)
            StepSpec.score = lambda *arguments: score(*arguments) * (1 + 2**-22)  # type: ignore[method-assign]
        return


def say_ready(directory: Path, worker: Any) -> None:
    (directory / "ready").touch()


def test_a_worker_whose_kernel_differs_is_refused_and_replaced(tmp_path: Path) -> None:
    text = tiny_job(tmp_path)
    alone = LocalCluster(text, tmp_path / "alone", overrides=["elastic.workers.max=1"]).run()
    (tmp_path / "kernels").mkdir()
    first = partial(compute_otherwise, tmp_path / "kernels")
    outcome = LocalCluster(
        text, tmp_path / "run", first=first, hooks=[partial(say_ready, tmp_path / "kernels")],
        overrides=["elastic.workers={min: 3, max: 3}"],
    ).run()  # fmt: skip
    assert outcome.status == "finished", outcome.reason
    assert (outcome.digest, outcome.losses) == (alone.digest, alone.losses)
    (refused,) = outcome.of("worker_killed")
    print(refused["reason"])
    assert "computes other bits than worker" in refused["reason"]
    assert "elastic.mixed_numerics" in refused["reason"]
    assert len({event["probe"] for event in outcome.of("worker_ready")}) == 1
    assert len(outcome.pids) == 4


def test_a_job_may_allow_it(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    first = partial(compute_otherwise, tmp_path / "kernels")
    overrides = ["elastic.workers={min: 2, max: 2}", "elastic.mixed_numerics=true"]
    outcome = LocalCluster(
        tiny_job(tmp_path),
        tmp_path / "run",
        first=first,
        hooks=[partial(say_ready, tmp_path / "kernels")],
        overrides=overrides,
    ).run()
    assert outcome.status == "finished", outcome.reason
    assert outcome.of("worker_killed") == []
    assert len({event["probe"] for event in outcome.of("worker_ready")}) == 2


def ready(slot: int, probe: str, device: str = "a card") -> Ready:
    return Ready(WorkerId(slot, 0), "node", 1, "host", 1, "", elements=1, probe=probe, device=device)


def test_who_is_first_is_what_others_are_measured_by_also_for_later_controllers() -> None:
    alike = Alike()
    assert alike.refusal(ready(0, "")) is None
    assert alike.refusal(ready(1, "aaaa")) is None
    assert alike.refusal(ready(2, "aaaa")) is None
    refusal = alike.refusal(ready(3, "bbbb", "another card"))
    assert refusal is not None
    assert refusal.startswith("worker 3 computes other bits than worker 1 (probe bbbb, not aaaa): it has another card")
    later = Alike()
    later.learn(WorkerId(1, 0), "aaaa", "a card")
    assert later.refusal(ready(3, "bbbb", "another card")) == refusal
    assert Alike(mixed=True, probe="aaaa").refusal(ready(3, "bbbb")) is None
