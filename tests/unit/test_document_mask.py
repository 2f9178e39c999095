"""Documents side by side in a row do not see each other; what does not count carries no loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from strategies.gradient.spec import StepSpec
from strategies.model.blueprint import Blueprint
from strategies.model.model_part import ModelPart
from strategies.model.stage import whole_model
from strategies.objective.batch import Batch, positions
from strategies.optim.schedule import ScheduleSpec
from strategies.trial.document_mask import refuse_leaks, refuse_without_positions
from tests.small_models import VOCABULARY, family, own
from tests.unit.tiny_model import CPU

DOCUMENTS = np.array([[0] * 5 + [1] + [2] * 7 + [3] * 3 + [-1] * 4, [0] * 9 + [1] * 11], dtype=np.int32)
SPEC = StepSpec(
    seed=1, micro_batch=2, micro_batches=1, base_lr=1e-2, schedule=ScheduleSpec("constant"), document_mask=True
)
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


def model_of(name: str) -> nn.Module:
    if name != "gpt2":
        return family(name)
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, use_cache=False, resid_pdrop=0.0, **GPT2, **ends)
    model: nn.Module = AutoModelForCausalLM.from_config(config).float().train()
    return model


def random_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, size=DOCUMENTS.shape)


def logits(model: nn.Module, tokens: np.ndarray, **more: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.from_numpy(tokens), **more).logits
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2"])
def test_a_document_in_a_packed_row_is_as_if_it_were_alone(name: str) -> None:
    model, tokens = model_of(name), random_tokens()
    packed = logits(model, tokens, position_ids=torch.from_numpy(positions(DOCUMENTS)))
    unmasked = logits(model, tokens)
    for row in range(len(tokens)):
        for number in range(DOCUMENTS[row].max() + 1):
            here = np.flatnonzero(DOCUMENTS[row] == number)
            alone = logits(model, tokens[row : row + 1, here])[0]
            assert torch.allclose(packed[row, here], alone, atol=1e-5), (row, number)
            assert number == 0 or not torch.allclose(unmasked[row, here], alone, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_gradient_leaks_into_another_document(name: str) -> None:
    model, tokens = model_of(name), random_tokens()
    embedded = model.get_input_embeddings()(torch.from_numpy(tokens)).detach().requires_grad_()  # type: ignore[operator]
    output = model(inputs_embeds=embedded, position_ids=torch.from_numpy(positions(DOCUMENTS))).logits
    output[1, 9:].square().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad[1, :9].abs().max() == 0
    assert embedded.grad[0].abs().max() == 0
    assert (embedded.grad[1, 9:].abs().amax(dim=1) > 0).all()


def batch_of(tokens: np.ndarray, documents: np.ndarray | None, targets: int = 1) -> Batch:
    return Batch(tokens, np.arange(len(tokens)), 0, documents, targets, targets)


@pytest.mark.parametrize("mask", [False, True])
def test_the_loss_is_that_of_the_targets_that_count(mask: bool) -> None:
    model, tokens = model_of("llama"), random_tokens()
    documents = DOCUMENTS if mask else np.minimum(DOCUMENTS, 0)
    spec = replace(SPEC, document_mask=mask)
    (rows,) = spec.micro_batches_of(batch_of(tokens, documents), CPU)
    assert (rows.positions is None) == (not mask)
    expected = 0.0
    for row in range(len(tokens)):
        for number in range(documents[row].max() + 1):
            alone = tokens[row : row + 1, documents[row] == number]
            if alone.shape[1] > 1:
                given, labels = logits(model, alone[:, :-1])[0], torch.from_numpy(alone[0, 1:])
                expected += float(nn.functional.cross_entropy(given, labels, reduction="sum").detach())
    assert float(spec.loss(whole_model(model), rows, 7).detach()) == pytest.approx(expected / 7, rel=1e-5)


def test_what_does_not_count_changes_no_gradient() -> None:
    """Neither the tokens of padding nor, behind a mask, those of other documents."""

    def gradient(tokens: np.ndarray, documents: np.ndarray) -> list[torch.Tensor]:
        model = model_of("llama")
        (rows,) = SPEC.micro_batches_of(batch_of(tokens, documents), CPU)
        SPEC.loss(whole_model(model), rows, 10).backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    tokens = random_tokens()
    other = tokens.copy()
    other[0, 16:] = random_tokens(1)[0, 16:]
    assert (other != tokens).any()
    pairs = zip(gradient(tokens, DOCUMENTS), gradient(other, DOCUMENTS), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_a_step_without_targets_has_no_loss_and_no_gradient() -> None:
    model = model_of("llama")
    nothing = batch_of(random_tokens(), np.tile(np.arange(20, dtype=np.int32), (2, 1)), targets=0)
    (rows,) = SPEC.micro_batches_of(nothing, CPU)
    loss = SPEC.loss(whole_model(model), rows, SPEC.divisor(nothing))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_micro_batches_of_padded_rows_are_as_wide_as_their_longest() -> None:
    documents = np.array([[0] * 9, [0] * 6 + [-1] * 3, [0] * 4 + [-1] * 5, [0] * 3 + [-1] * 6], dtype=np.int32)
    batch = replace(batch_of(random_tokens()[:1, :9].repeat(4, axis=0), documents), widths=(8, 3))
    wide, narrow = replace(SPEC, document_mask=False).micro_batches_of(batch, CPU)
    assert (wide.tokens.shape, narrow.tokens.shape) == ((2, 9), (2, 4))
    assert narrow.counting is not None
    assert narrow.counting.tolist() == [[True] * 3, [True, True, False]]


class Leaky(nn.Module):
    """Takes positions and attends to everything before all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self.head(self.embedding(input_ids).cumsum(dim=1))
        return output


def check(model: nn.Module) -> None:
    refuse_without_positions(model)
    blueprint = Blueprint(model, device=CPU)
    part = ModelPart(blueprint, 0, None)
    part.weights.copy_(0.1 * torch.randn(len(part.weights), generator=torch.Generator().manual_seed(0)))
    refuse_leaks(part.modules[0].module, CPU)
    assert part.modules[0].training


def test_models_that_cannot_keep_documents_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="forward of Own takes no position_ids"):
        check(own())
    with pytest.raises(ValueError, match="in Leaky what a document gives depends on the document before it"):
        check(Leaky())
    for name in ("llama", "gpt2", "mixtral"):
        check(model_of(name))
