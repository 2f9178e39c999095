"""Every objective gives one rank's bits in every layout, what it evaluates too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data.of_job import prepare_held_out, prepare_stores
from orchestrator.evaluation.judge import NOT_YET, judge
from orchestrator.job import Job
from orchestrator.models.loading import build_model
from orchestrator.models.problems import ModelError
from orchestrator.training.evaluator import Evaluator
from strategies.layout.parallel import ParallelLayout
from strategies.objective.metric import Metric
from strategies.objective.objective import Sums
from tests.ranks.laid_out import layout_of
from tests.ranks.local_ranks import run_ranks
from tests.ranks.tuned import LLAMA, OBJECTIVES, VIRTUAL_WORKERS, engine_of, job_of, tune
from tests.selection import nightly
from tests.tasks_in_tests import write_tasks
from tests.unit.test_adapters import base_in
from tests.unit.tiny_model import settle

SAYS = {"prompts": ["apple", "stone river", "seven"], "chat": True, "max_new_tokens": 3, "temperature": 0.8}
EVALUATION = {"share": 0.2, "every_steps": 1, "at_start": True}


def laid_out(*sizes: Any, **more: Any) -> ParallelLayout:
    return layout_of(*sizes, virtual_workers=VIRTUAL_WORKERS, **more)


LAYOUTS = [
    laid_out(),
    laid_out(3),
    laid_out(2, shard="parameters"),
    laid_out(1, 2),
    laid_out(2, 2, 1, "gradients", schedule="zero-bubble"),
    laid_out(2, shard="optimizer"),
]


def assert_all_alike(name: str, directory: Path, layouts: list[ParallelLayout], **sections: Any) -> Any:
    """The first layout is one rank's; what it gives."""
    jobs = [(job_of(name, directory, layout, **sections), layout) for layout in layouts]
    prepare_stores(jobs[0][0])
    prepare_held_out(jobs[0][0])
    by_rank = run_ranks(max(each.world_size for each in layouts), tune, jobs, directory, timeout_s=240.0)
    alone = by_rank[0][0]
    for number, layout in enumerate(layouts):
        for rank in range(layout.world_size):
            losses, norms, digest, metrics = by_rank[rank][number]
            where = f"{name}: rank {rank} of {layout.describe()} {layout.schedule}"
            assert (losses, norms, metrics) == (alone[0], alone[1], alone[3]), where
            assert digest == (alone[2] if rank == 0 else ""), where
    return alone


IN_EVERY_RUN = ("sft", "classification", "dpo", "embedding")
"""One of each kind: tokens, texts, answers beside a reference, pairs of a virtual worker."""


@pytest.mark.parametrize("name", [*IN_EVERY_RUN, *nightly(name for name in OBJECTIVES if name not in IN_EVERY_RUN)])
def test_an_objective_is_one_ranks_in_every_layout(name: str, tmp_path: Path) -> None:
    layouts = LAYOUTS
    if name == "embedding":  # It has a micro-batch for each virtual worker, which are few for some schedules.
        layouts = [each for each in layouts if each.schedule != "zero-bubble"] + [laid_out(2, 2, 1, "gradients")]
    asked = EVALUATION | ({"generate": SAYS} if name == "sft" else {})
    losses, _, _, metrics = assert_all_alike(name, tmp_path, layouts, evaluation=asked)
    assert len(set(losses)) == len(losses)
    if name == "sft":
        said = [[each["text"] for each in one["generated"]] for one in metrics]
        assert len(said[0]) == 3
        assert said[0] != said[-1], "what it draws depends on what it has learnt"
    assert metrics[0]["loss"] != metrics[-1]["loss"]


@pytest.mark.parametrize("top_k", [5, *nightly([0])])
def test_what_a_teacher_gives_is_one_ranks_in_every_layout(top_k: int, tmp_path: Path) -> None:
    """A row is asked about by whoever computes with it; packed rows of several documents."""
    objective = {"name": "distill", "teacher": str(base_in(tmp_path)), "alpha": 0.2, "top_k": top_k}
    data = {"packing": "pack", "document_mask": True, "sequence_length": 32, "document": "line"}
    source = tmp_path / "lines.txt"
    source.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(90)))
    asked = {"objective": objective, "data": {**data, "source": str(source)}}
    losses, *_ = assert_all_alike("sft-completions", tmp_path, LAYOUTS, **asked)
    alone = {**asked, "objective": {**objective, "alpha": 1.0}}
    others, *_ = assert_all_alike("sft-completions", tmp_path, LAYOUTS[:1], **alone)
    assert losses != others, "it learns from the teacher"


def test_another_reference_is_one_ranks_in_every_layout(tmp_path: Path) -> None:
    """And what is trained begins as ever."""
    other = tmp_path / "other"
    job = job_of("sft-completions", tmp_path)
    model = build_model(job.model_copy(update={"train": job.train.model_copy(update={"seed": 8})}), 257)
    model.save_pretrained(other)
    losses, *_ = assert_all_alike("dpo", tmp_path, LAYOUTS, objective={"reference": str(other)})
    usual, *_ = assert_all_alike("dpo", tmp_path, LAYOUTS[:1])
    assert usual[0] == pytest.approx(math.log(2)), "the policy is its reference"
    assert abs(losses[0] - math.log(2)) > 1e-4
    same = tmp_path / "same"
    build_model(job_of("dpo", tmp_path), 257).save_pretrained(same)
    again, *_ = assert_all_alike("dpo", tmp_path, LAYOUTS[:1], objective={"reference": str(same)})
    assert again == usual
    narrow = tmp_path / "narrow"
    build_model(job_of("dpo", tmp_path, model={"hf": LLAMA | {"intermediate_size": 32}}), 257).save_pretrained(narrow)
    with pytest.raises(ModelError, match="narrow is of another architecture than the model that is trained"):
        prepare(job_of("dpo", tmp_path, objective={"reference": str(narrow)}), tmp_path / "unused")


def prepare(job: Job, storage: Path) -> Evaluator:
    """As a worker is, alone, before the first step."""
    if job.evaluation is not None:
        prepare_held_out(job)
    engine, evaluator = engine_of(job, storage)
    fabric = settle(engine.state, VIRTUAL_WORKERS)
    engine.bind(fabric, fabric.layout, 0)
    evaluator.prepare(fabric, 0)
    return evaluator


def test_a_metric_that_is_not_measured_is_told_before_the_first_step(tmp_path: Path) -> None:
    tasks = [str(path) for path in write_tasks(tmp_path)]
    for metric, asked, told in (
        ("f1", {"share": 0.2}, "there are bits_per_byte, loss, perplexity, token_accuracy"),
        ("choices/acc", {"share": 0.2}, "nothing that is measured is called 'choices/acc'"),
        ("choice/acc", {"tasks": tasks}, "tasks are choices, says, texts"),
        ("acc", {"tasks": tasks}, "of tasks they are called TASK/METRIC"),
    ):
        job = job_of("sft-completions", tmp_path, evaluation={**asked, "best": {"metric": metric}})
        with pytest.raises(ModelError, match=told):
            prepare(job, tmp_path / "storage")


class Moody(Metric):
    """Cannot say anything of little, and later not always."""

    name = "moody"
    is_silent = False

    def measure(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        return {"count": (labels >= 0).sum(dtype=torch.float64)[None]}

    def report(self, sums: Mapping[str, list[float]]) -> Any:
        if sums["count"][0] < 60:
            raise ZeroDivisionError
        return {} if type(self).is_silent else {"count/all": sums["count"][0]}


def test_a_metric_of_ones_own_decides_where_it_says_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried on one micro-batch; what it does not say once is no better value, unless it was never said."""
    own = {
        "share": 0.3,
        "metrics": [f"{__name__}:Moody"],
        "every_steps": 1,
        "best": {"metric": "moody.count/all", "mode": "max"},
    }
    job = job_of("sft-completions", tmp_path, evaluation=own)
    evaluator = prepare(job, tmp_path / "storage")
    report = evaluator.evaluate(1, 0, NOT_YET)
    assert report is not None
    assert evaluator.rules is not None
    judged = judge(NOT_YET, 1, report.metrics, evaluator.rules)
    assert judged.is_best
    monkeypatch.setattr(Moody, "is_silent", True)
    silent = evaluator.evaluate(2, 0, judged)
    assert silent is not None
    assert not judge(judged, 2, silent.metrics, evaluator.rules).is_best
    with pytest.raises(ModelError, match=r"nothing that is measured is called .moody\.count/all"):
        evaluator.evaluate(2, 0, NOT_YET)


def test_tasks_are_one_ranks_in_every_layout(tmp_path: Path) -> None:
    tasks = [str(path) for path in write_tasks(tmp_path)]
    asked = {"tasks": tasks, "task_samples": 5, "every_steps": 2, "at_start": True}
    *_, metrics = assert_all_alike("sft-completions", tmp_path, LAYOUTS, evaluation=asked)
    assert len(metrics) == 2
    assert metrics[0].keys() == metrics[1].keys()
    names = {name.split("/")[0] for name in metrics[0]}
    assert names == {"choices", "texts", "says"}
    assert metrics[0]["texts/bits_per_byte"] != metrics[1]["texts/bits_per_byte"], "it learns"


@pytest.mark.parametrize("name", ["sft", *nightly(["classification", "dpo"])])
@pytest.mark.parametrize("kind", ["lora", *nightly(["dora", "lora int8", "lora nf4"])])
def test_an_adapter_is_one_ranks_in_every_layout(name: str, kind: str, tmp_path: Path) -> None:
    kind, _, base = kind.partition(" ")
    adapter = {"name": kind, "r": 2, "alpha": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"],
               "quantize_base": base or "none"}  # fmt: skip
    wide = {"hidden_size": 64, "intermediate_size": 128} if base == "nf4" else {}
    assert_all_alike(name, tmp_path, LAYOUTS, adapter=adapter, model={"hf": LLAMA | wide})


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "lion", "lr": 1e-3},
        {"name": "muon", "lr": 1e-2},
        {"name": "adafactor", "lr": 1e-2},
        {"name": "adamw", "lr": 1e-2, "state": "fp8"},
        {"name": "adamw", "lr": 1e-2, "groups": [{"params": ["*embed*"], "lr": 1e-3, "weight_decay": 0.0}]},
    ],
    ids=["lion", "muon", "adafactor", "fp8", "groups"],
)
def test_an_optimizer_is_one_ranks_in_every_layout(optimizer: dict[str, Any], tmp_path: Path) -> None:
    layouts = [each for each in LAYOUTS if each.shard != "parameters" or optimizer["name"] in ("lion", "adamw")]
    train = {"optimizer": optimizer, "ema": {"decay": 0.9}}
    assert_all_alike("sft-completions", tmp_path, layouts, train=train)
