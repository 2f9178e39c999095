"""Losses and metrics of every objective are what a hand, torch's own functions or scikit-learn's definitions give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.evaluation.judge import NOT_YET, EvaluationRules, judge, value_of
from strategies.objective import scores
from strategies.objective.batch import Batch
from strategies.objective.causal_lm import CAUSAL_LM, CausalLm, CausalLmSettings
from strategies.objective.classification import Classification, ClassificationSettings
from strategies.objective.objective import Objective
from strategies.objective.preference import Dpo, DpoSettings, Orpo, OrpoSettings, Reward, RewardSettings
from strategies.objective.regression import REGRESSION
from strategies.objective.rows import Rows
from strategies.objective.sft import SFT
from strategies.optim.schedule import ScheduleSpec

CLASSES = 5


def logits(rows: int, length: int, classes: int = CLASSES, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, classes, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def rows_of(rows: int, length: int, share: float = 0.6, **more: Any) -> Rows:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, CLASSES, (rows, length + 1), generator=generator)
    return Rows(tokens, torch.rand((rows, length), generator=generator) < share, **more)


def reported(objective: Objective, values: torch.Tensor, rows: Rows) -> dict[str, Any]:
    with torch.no_grad():
        return objective.report({name: each.tolist() for name, each in objective.measure(values, rows).items()})


# ---------------------------------------------------------------------------------------- language models


def test_a_step_is_a_mean_over_its_tokens_and_no_mean_of_means() -> None:
    """As transformers has it with `num_items_in_batch`."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    few, many = rows_of(1, 12, 0.3), rows_of(1, 12, 0.9)
    given = [logits(1, 12, seed=seed) for seed in (1, 2)]
    total = sum(int(each.counting.sum()) for each in (few, many) if each.counting is not None)
    ours = sum(SFT.loss(values, rows) for values, rows in zip(given, (few, many), strict=True)) / total
    theirs = sum(
        ForCausalLMLoss(
            values, None, CLASSES, num_items_in_batch=total,
            shift_labels=rows.tokens[:, 1:].masked_fill(~rows.counting, -100),
        )
        for values, rows in zip(given, (few, many), strict=True)
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    of_means = sum(SFT.loss(v, r) / r.counting.sum() for v, r in zip(given, (few, many), strict=True)) / 2
    assert abs(float((of_means - ours).detach())) > 1e-3


def test_smoothing_and_z_loss_are_torchs_and_palms() -> None:
    values, rows = logits(2, 9), rows_of(2, 9)
    labels = rows.tokens[:, 1:].masked_fill(~rows.counting, -100)
    found = CausalLm(CausalLmSettings(0.1, 0.01)).loss(values, rows)
    smooth = F.cross_entropy(values.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum")
    z = 0.01 * (values.logsumexp(-1)[rows.counting] ** 2).sum()
    torch.testing.assert_close(found, smooth + z)
    # An evaluation is told without either.
    plain = F.cross_entropy(values.flatten(0, 1), labels.flatten(), reduction="mean")
    assert reported(CAUSAL_LM, values, rows)["loss"] == pytest.approx(float(plain), rel=1e-6)


def test_perplexity_and_accuracy() -> None:
    values, rows = logits(3, 9), rows_of(3, 9)
    found = reported(CAUSAL_LM, values, rows)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    right = (values.argmax(-1) == rows.tokens[:, 1:])[rows.counting].float().mean()
    assert found["token_accuracy"] == pytest.approx(float(right))


# ---------------------------------------------------------------------------------------- classes and numbers


def read_off(rows: int, length: int, labels: torch.Tensor) -> Rows:
    counting = torch.zeros(rows, length, dtype=torch.bool)
    counting[torch.arange(rows), torch.arange(rows) % length] = True
    return rows_of(rows, length, labels=labels)._replace(counting=counting)


def test_classes_are_weighed_like_torchs() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    values, rows = logits(4, 6, 3), read_off(4, 6, labels)
    weights = [0.5, 2.0, 1.0]
    objective = Classification(ClassificationSettings(3, class_weights=weights, label_smoothing=0.1))
    at = values[torch.arange(4), torch.arange(4) % 6]
    expected = F.cross_entropy(at, labels, weight=torch.tensor(weights), label_smoothing=0.1)
    batch = Batch(np.zeros((4, 7), np.int64), np.arange(4), 0, None, 4, 4, step_labels=labels.numpy(), step_samples=4)
    torch.testing.assert_close(objective.loss(values, rows) / objective.weight(batch), expected)


def test_any_of_several_classes() -> None:
    sets = torch.tensor([0b011, 0b100, 0b000, 0b111])
    values, rows = logits(4, 6, 3), read_off(4, 6, sets)
    at = values[torch.arange(4), torch.arange(4) % 6]
    targets = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]]).float()
    objective = Classification(ClassificationSettings(3, multi_label=True))
    torch.testing.assert_close(
        objective.loss(values, rows) / 4, F.binary_cross_entropy_with_logits(at, targets), rtol=1e-6, atol=1e-7
    )


def test_numbers_and_how_far_off_they_are() -> None:
    numbers = torch.tensor([0.5, -1.25, -100.0, 3e7])
    values = logits(4, 6, 1)
    rows = read_off(4, 6, numbers.view(torch.int32).long())
    at = values[torch.arange(4), torch.arange(4) % 6, 0]
    torch.testing.assert_close(REGRESSION.loss(values, rows), F.mse_loss(at, numbers, reduction="sum"))
    found = reported(REGRESSION, values, rows)
    assert found["mae"] == pytest.approx(float((at - numbers).abs().double().mean()))
    spread = ((numbers - numbers.mean()).double() ** 2).sum()
    assert found["r2"] == pytest.approx(1.0 - float(((at - numbers).double() ** 2).sum() / spread))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_metrics_of_classifiers_are_scikit_learns(data: st.DataObject) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    size = data.draw(st.integers(2, 4))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), min_size=1, max_size=30))
    actual, said = zip(*pairs, strict=True)
    labels = list(range(size))
    table = metrics.confusion_matrix(actual, said, labels=labels)
    found = scores.of_classes(table.flatten().tolist(), [str(each) for each in labels])
    assert found["accuracy"] == metrics.accuracy_score(actual, said)
    for average in ("macro", "micro"):
        for name, function in (
            ("precision", metrics.precision_score), ("recall", metrics.recall_score), ("f1", metrics.f1_score)
        ):  # fmt: skip
            expected = function(actual, said, labels=labels, average=average, zero_division=0)
            assert found[f"{name}_{average}"] == pytest.approx(expected)


def test_the_area_under_the_curve_by_hand() -> None:
    assert scores._area([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert scores._area([0.5, 0.5], [0, 1]) == 0.5
    assert scores._area([0.5], [1]) is None


# ---------------------------------------------------------------------------------------- preferences


def pairs(count: int = 3, length: int = 8) -> tuple[torch.Tensor, Rows]:
    return logits(2 * count, length), rows_of(2 * count, length)


def log_probabilities(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    each = values.log_softmax(-1).gather(-1, rows.tokens[:, 1:, None])[..., 0]
    return (each * rows.counting).sum(-1)


def test_a_policy_that_is_its_reference_loses_ln_2() -> None:
    values, rows = pairs()
    with torch.no_grad():
        same = rows._replace(reference=Dpo().reference(values, rows))
    torch.testing.assert_close(Dpo().loss(values, same) / 3, torch.tensor(math.log(2.0)))
    assert reported(Dpo(), values, same)["margin"] == 0.0


@pytest.mark.parametrize(
    "chosen", [DpoSettings(0.3), DpoSettings(0.3, label_smoothing=0.2), DpoSettings(0.3, "robust", 0.2)]
)
def test_dpo_is_its_papers(chosen: DpoSettings) -> None:
    values, rows = pairs()
    reference = torch.randn(6, generator=torch.Generator().manual_seed(3))
    gained = log_probabilities(values, rows) - reference
    delta, s = chosen.beta * (gained[0::2] - gained[1::2]), chosen.label_smoothing
    right, wrong = -F.logsigmoid(delta), -F.logsigmoid(-delta)
    if chosen.loss == "robust":
        expected = ((1 - s) * right - s * wrong) / (1 - 2 * s)
    else:
        expected = (1 - s) * right + s * wrong
    torch.testing.assert_close(Dpo(chosen).loss(values, rows._replace(reference=reference)), expected.sum())


def test_ipo_is_its_papers() -> None:
    values, rows = pairs()
    reference = torch.zeros(6)
    means = log_probabilities(values, rows) / rows.counting.sum(-1)
    expected = ((means[0::2] - means[1::2] - 1 / (2 * 0.3)) ** 2).sum()
    torch.testing.assert_close(Dpo(DpoSettings(0.3, "ipo")).loss(values, rows._replace(reference=reference)), expected)


def test_orpo_is_its_papers_and_finite_near_certainty() -> None:
    values, rows = pairs()
    means = log_probabilities(values, rows) / rows.counting.sum(-1)
    odds = means - torch.log1p(-means.exp())
    expected = (-means[0::2] - 0.2 * F.logsigmoid(odds[0::2] - odds[1::2])).sum()
    torch.testing.assert_close(Orpo(OrpoSettings(0.2)).loss(values, rows), expected)
    sure = torch.full((2, 8, CLASSES), -50.0).scatter(-1, rows.tokens[:2, 1:, None], 50.0).requires_grad_()
    Orpo().loss(sure, rows._replace(tokens=rows.tokens[:2], counting=rows.counting[:2])).backward()
    assert torch.isfinite(sure.grad).all()


def test_rewards_are_bradley_and_terrys() -> None:
    values = logits(4, 6, 1)
    rows = read_off(4, 6, torch.zeros(4, dtype=torch.int64))
    at = values[torch.arange(4), torch.arange(4) % 6, 0]
    expected = -F.logsigmoid(at[0::2] - at[1::2]) + 0.1 * (at[0::2] + at[1::2]) ** 2
    torch.testing.assert_close(Reward(RewardSettings(0.1)).loss(values, rows), expected.sum())


# ---------------------------------------------------------------------------------------- what becomes of them


def test_the_best_is_kept_and_patience_ends() -> None:
    rules = EvaluationRules(100, 10, metric="per_class.a.f1", mode="max", patience=2, threshold=0.05)
    state, found = NOT_YET, []
    for step, value in ((10, 0.5), (20, 0.52), (30, 0.6), (40, None), (50, 0.59)):
        state = judge(state, step, {"per_class": {"a": {"f1": value}}}, rules)
        found.append((state.best, state.best_step, state.without, state.stops))
    assert found == [
        (0.5, 10, 0, False), (0.52, 20, 1, False), (0.6, 30, 0, False), (0.6, 30, 1, False), (0.6, 30, 2, True),
    ]  # fmt: skip
    assert [step for step in range(101) if rules.is_due(step)] == list(range(10, 101, 10))
    assert value_of({"loss": float("nan")}, "loss") is None


# ---------------------------------------------------------------------------------------- rates


def test_wsd_and_polynomial_end_at_the_least() -> None:
    wsd = ScheduleSpec("wsd", 10, 0.1, 101, decay_ratio=0.2)
    assert [round(wsd.factor(step), 3) for step in (9, 10, 79, 90, 100)] == [1.0, 1.0, 1.0, 0.546, 0.1]
    power = ScheduleSpec("polynomial", 0, 0.0, 11, power=2.0)
    assert [round(power.factor(step), 3) for step in (0, 5, 10)] == [1.0, 0.25, 0.0]
