"""Attention in segments: what masks give, and nothing of the size of a row squared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.job import Job
from orchestrator.models.attention import NAME, attend, choose_attention, gives_the_same, register
from strategies.compat import TorchDispatchMode
from strategies.objective.batch import positions
from tests.small_models import VOCABULARY, family

LENGTH = 24
CAN = ["llama", "mistral", "qwen3", "gemma", "gpt_neox", "olmo2", "mixtral", "cohere", "granite"]


def job_of(document_mask: bool, length: int = LENGTH) -> Job:
    return Job.model_validate({
        "name": "attention", "model": {"hf": {"model_type": "llama"}},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": length, "packing": "pack",
                 "document_mask": document_mask},
        "train": {"steps": 1, "global_batch": 2}, "elastic": {"virtual_workers": 2, "workers": {"max": 2}},
    })  # fmt: skip


def chosen(model: Any) -> str:
    found: str = model.config._attn_implementation
    return found


@pytest.mark.parametrize("name", CAN)
def test_documents_are_computed_one_by_one_where_that_gives_the_same(name: str) -> None:
    model: Any = family(name)
    choose_attention(model, job_of(document_mask=True))
    assert chosen(model) == NAME
    masked: Any = family(name)
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    places = torch.stack([
        torch.cat([torch.arange(n) for n in (9, 1, 14)]), torch.cat([torch.arange(n) for n in (20, 4)])
    ])  # fmt: skip
    losses = []
    for each in (model, masked):
        logits = each(input_ids=tokens, position_ids=places).logits
        losses.append(logits.square().sum())
        losses[-1].backward()
    assert torch.allclose(*losses, rtol=1e-5)
    for (key, one), other in zip(model.named_parameters(), masked.parameters(), strict=True):
        if other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5 * float(other.grad.abs().max())), key


def test_a_window_that_slides_needs_no_mask_of_the_row_either() -> None:
    """Mistral's is 4 here; a model without one, and rows without documents, are left as they are."""
    model: Any = family("mistral")
    choose_attention(model, job_of(document_mask=False))
    assert chosen(model) == NAME
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(input_ids=tokens).logits, family("mistral")(input_ids=tokens).logits, atol=1e-5)
    short: Any = family("mistral")
    choose_attention(short, job_of(document_mask=False, length=4))
    assert chosen(short) == "sdpa"
    plain: Any = family("llama")
    choose_attention(plain, job_of(document_mask=False))
    assert chosen(plain) == "sdpa"


class _Squares(TorchDispatchMode):
    """Notes tensors that have the length of a row twice."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = operation(*args, **(kwargs or {}))
        for each in given if isinstance(given, (tuple, list)) else (given,):
            if torch.is_tensor(each) and list(each.shape).count(LENGTH) > 1:
                self.found.add(str(operation))
        return given


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_nothing_is_as_large_as_a_row_squared(name: str) -> None:
    tokens = torch.ones((1, LENGTH), dtype=torch.int64)
    places = torch.from_numpy(positions(torch.tensor([[0] * 10 + [1] * 14]).numpy()))
    found = []
    for is_masked in (True, False):
        model: Any = family(name)
        if not is_masked:
            choose_attention(model, job_of(document_mask=True))
        with _Squares() as squares:
            model(input_ids=tokens, position_ids=places).logits.sum().backward()
        found.append(squares.found)
    assert found[0]
    assert not found[1]


def test_what_gives_something_else_keeps_its_masks() -> None:
    """Bloom's attention depends on distances in the row; it is not even made by this interface."""
    register()
    bloom: Any = family("bloom")
    before = chosen(bloom)
    choose_attention(bloom, job_of(document_mask=True))
    assert chosen(bloom) == before
    model: Any = family("llama")
    # Layers that do not hand on positions: where documents begin is not known in them.
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(_forget_positions, with_kwargs=True)
    assert not gives_the_same(model)


def _forget_positions(module: Any, given: Any, named: dict[str, Any]) -> Any:
    return given, {key: value for key, value in named.items() if key != "position_ids"}


def test_a_mask_is_refused() -> None:
    query = torch.zeros((1, 1, 4, 8))
    with pytest.raises(ValueError, match="takes no mask"):
        attend(torch.nn.Module(), query, query, query, attention_mask=torch.ones(4, 4))
