"""Metrics of a user's own: measured beside the objective's, the same however an evaluation is cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from orchestrator.job import Job, JobError
from strategies.gradient.spec import StepSpec
from strategies.objective.classification import Classification, ClassificationSettings
from strategies.objective.metric import Metric, measured_by, reported_by
from strategies.objective.objective import Sums
from strategies.objective.rows import Rows
from strategies.objective.sft import SFT
from strategies.optim.schedule import ScheduleSpec
from strategies.update.evaluation import added_up, measure
from tests.unit.test_job import MINIMAL


class TopThree(Metric):
    """How often the right token is among the three likeliest."""

    name = "top_three"

    def measure(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        counts = labels >= 0
        best = logits[counts].topk(3, dim=-1).indices
        right = (best == labels[counts][:, None]).any(-1)
        return {"right": torch.tensor([float(right.sum()), float(counts.sum())], dtype=torch.float64)}

    def report(self, sums: Mapping[str, list[float]]) -> float:
        right, count = sums["right"]
        return right / count


class Surest(Metric):
    """The three surest of all predictions."""

    name = "surest"

    def measure(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        return {"all.largest": logits[labels >= 0].softmax(-1).amax(-1).double()}

    def report(self, sums: Mapping[str, list[float]]) -> dict[str, Any]:
        return {"first": max(sums["all.largest"]), "count": len(sums["all.largest"])}


class Misnamed(TopThree):
    name = "loss"


def rows_of(rows: int, length: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (rows, length + 1), generator=generator)
    return Rows(tokens, torch.rand((rows, length), generator=generator) < 0.6)


def spec_of(objective: Any, chunk: int, *metrics: Metric) -> StepSpec:
    return StepSpec(0, 1, 1, 1e-3, ScheduleSpec(), objective=objective, loss_chunk=chunk, metrics=metrics)


def test_they_are_the_same_in_any_chunks_and_micro_batches() -> None:
    """And what the objective measures stays what it is without them."""
    torch.manual_seed(0)
    head = torch.nn.Linear(7, 11)
    rows, hidden = rows_of(4, 9), torch.randn(4, 9, 7)
    found = []
    for chunk in (0, 5, 1000):
        for parts in (1, 4):
            spec = spec_of(SFT, chunk, TopThree(), Surest())
            pieces = [
                measure(spec, value, lambda given: head(given), Rows(tokens, counting))  # type: ignore[arg-type]
                for value, tokens, counting in zip(
                    hidden.chunk(parts),
                    rows.tokens.chunk(parts),
                    rows.counting.chunk(parts),
                    strict=True,  # type: ignore[union-attr]
                )
            ]
            sums = added_up([{name: values.tolist() for name, values in piece.items()} for piece in pieces])
            found.append(reported_by(spec.metrics, sums))
            assert SFT.report(sums).keys() == {"loss", "perplexity", "token_accuracy"}
    for each in found[1:]:
        assert each["top_three"] == found[0]["top_three"]
        assert each["surest"] == pytest.approx(found[0]["surest"])
    assert 0 < found[0]["top_three"] < 1
    assert found[0]["surest"]["count"] == int(rows.counting.sum())  # type: ignore[union-attr]


def test_they_see_the_positions_that_a_classifier_is_read_off() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]])
    rows = Rows(torch.zeros((1, 3), dtype=torch.int64), torch.tensor([[False, True]]), None, torch.tensor([3]))
    objective = Classification(ClassificationSettings(4))
    sums = measure(spec_of(objective, 0, TopThree()), logits, None, rows)
    given = {name: values.tolist() for name, values in sums.items()}
    assert reported_by([TopThree()], given) == {"top_three": 0.0}, "class 3 is the fourth likeliest there"


def test_two_metrics_may_use_the_same_names() -> None:
    class Other(TopThree):
        name = "other"

    logits, labels = torch.eye(11)[:4], torch.arange(4)
    sums = measured_by([TopThree(), Other()], logits, labels)
    assert reported_by([TopThree(), Other()], {name: values.tolist() for name, values in sums.items()}) == {
        "top_three": 1.0, "other": 1.0,
    }  # fmt: skip


def test_what_is_no_metric_is_refused() -> None:
    text = MINIMAL + "evaluation: {share: 0.1, metrics: [GIVEN]}\n"
    own = "tests.unit.test_own_metrics"
    assert Job.loads(text.replace("GIVEN", f"'{own}:TopThree', '{own}:Surest'")).evaluation is not None
    for given, said in (
        (f"'{own}:Nonesuch'", "cannot be had"),
        (f"'{own}:rows_of'", "cannot be had"),
        ("'collections:OrderedDict'", "makes a OrderedDict, not one of strategies.objective.metric.Metric"),
        (f"'{own}:Misnamed'", "is called 'loss'"),
        (f"'{own}:TopThree', '{own}:TopThree'", "a name of its own"),
    ):
        with pytest.raises(JobError, match=said):
            Job.loads(text.replace("GIVEN", given))
