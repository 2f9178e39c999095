"""The loss of hidden states and their head, some positions at a time: the loss and gradients of all at once, and never
the logits of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from strategies.gradient.loss import loss_of
from strategies.gradient.spec import StepSpec
from strategies.model.anatomy import find_layers
from strategies.model.head import Head, find_body
from strategies.model.stage import whole_model
from strategies.objective.causal_lm import CAUSAL_LM
from strategies.objective.cross_entropy import cross_entropy
from strategies.objective.rows import IGNORED, Rows
from strategies.optim.schedule import ScheduleSpec
from tests.small_models import DO_MORE, FAMILIES, VOCABULARY, family, own

SPEC = StepSpec(seed=0, micro_batch=1, micro_batches=1, base_lr=1e-3, schedule=ScheduleSpec())


def rows(batch: int = 2, length: int = 11, part: bool = False) -> Rows:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (batch, length + 1), generator=generator)
    return Rows(tokens, torch.rand((batch, length), generator=generator) < 0.5 if part else None)


def gradients(
    model: Any, body: str | None, chunk: int, given: Rows, *, waits: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    spec = StepSpec(**{**vars(SPEC), "loss_chunk": chunk})

    def score(value: torch.Tensor, head: Head | None) -> torch.Tensor:
        return spec.score(value, head, given, 7, waits=waits)

    loss: torch.Tensor = whole_model(model, body)(given.tokens[:, :-1], None, score)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def body_of(model: Any) -> str | None:
    return find_body(model, find_layers(model)[0], torch.zeros((1, 3), dtype=torch.int64))


@pytest.mark.parametrize("name", [*FAMILIES, *DO_MORE])
def test_of_every_model_of_transformers_the_head_is_known_apart(name: str) -> None:
    """Also where it does more than call a module: caps logits, or scales them."""
    model = family(name)
    body = body_of(model.eval())
    assert body is not None
    whole, expected = gradients(model, None, 0, rows())
    for chunk, waits in ((22, False), (22, True), (1000, True)):
        loss, found = gradients(model, body, chunk, rows(), waits=waits)
        assert torch.equal(loss, whole), "one chunk is the loss of all"
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_a_parameter_that_two_modules_of_a_head_share_has_its_gradient_once() -> None:
    """Bert's head has a bias of its own that its linear module has, too."""
    model = family("bert", is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    body = body_of(model.eval())
    assert body is not None
    whole, expected = gradients(model, None, 0, rows())
    for chunk, waits in ((22, False), (1000, True), (5, False)):
        loss, found = gradients(model, body, chunk, rows(), waits=waits)
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        assert found.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("part", [False, True], ids=["all count", "some count"])
@pytest.mark.parametrize("chunk", [1, 4, 21])
def test_chunks_of_any_size_add_up_to_the_same(chunk: int, part: bool) -> None:
    model = family("llama")
    whole, expected = gradients(model, None, 0, rows(part=part))
    loss, found = gradients(model, "model", chunk, rows(part=part))
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=2e-4, atol=1e-7)


def test_a_users_own_model_has_no_head_apart_and_its_logits_are_made_at_once() -> None:
    assert body_of(own().eval()) is None
    loss, found = gradients(own(), None, 4, rows())
    assert loss > 0
    assert "head.weight" in found


def test_logits_of_no_more_positions_than_a_chunk_are_ever_made() -> None:
    seen: list[int] = []
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, 8))

    def compute(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[:-1].numel())
        return F.linear(hidden, weight)

    hidden = torch.randn(2, 11, 8, requires_grad=True)
    loss_of(CAUSAL_LM, hidden, Head(compute, [weight]), rows(), 1.0, 5).backward()  # type: ignore[no-untyped-call]
    assert seen == [5, 5, 5, 5, 2]
    assert hidden.grad is not None
    assert weight.grad is not None


def test_a_head_that_is_frozen_or_that_hidden_states_do_not_need_is_left_alone() -> None:
    frozen = torch.nn.Parameter(torch.randn(VOCABULARY, 8), requires_grad=False)
    hidden = torch.randn(1, 6, 8, requires_grad=True)
    head = Head(lambda states: F.linear(states, frozen), [])
    loss_of(CAUSAL_LM, hidden, head, rows(1, 6), 1.0, 4).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    trained = torch.nn.Parameter(frozen.detach().clone())
    alone = Head(lambda states: F.linear(states, trained), [trained])
    loss_of(CAUSAL_LM, hidden.detach(), alone, rows(1, 6), 1.0, 4).backward()  # type: ignore[no-untyped-call]
    assert trained.grad is not None


def test_a_backward_pass_may_be_made_in_two_halves_and_of_a_multiple() -> None:
    """As zero bubble makes it: for what comes in first. The gradients are multiplied once."""
    hidden, weight = torch.randn(1, 6, 8, requires_grad=True), torch.nn.Parameter(torch.randn(VOCABULARY, 8))

    def loss() -> torch.Tensor:
        head = Head(lambda states: F.linear(states, weight), [weight])
        return loss_of(CAUSAL_LM, hidden, head, rows(1, 6), 1.0, 4)

    once = torch.autograd.grad(loss(), [hidden, weight])
    again = 3.0 * loss()
    halves = [*torch.autograd.grad(again, [hidden], retain_graph=True), *torch.autograd.grad(again, [weight])]
    for one, half in zip(once, halves, strict=True):
        assert torch.equal(3.0 * one, half)


def test_targets_that_do_not_count_have_no_loss_and_no_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    labels = torch.tensor([1, IGNORED, 4])
    cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad[1].any()
    assert logits.grad[0].any()
