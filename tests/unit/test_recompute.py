"""Layers that recompute: the same gradients to the last bit, and less that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.job import Job
from orchestrator.models.validation import why_not_recomputed
from strategies.model.recompute import NOTHING_AGAIN, Recompute, recompute
from tests.small_models import LAYERS, VOCABULARY, family

MODES = [Recompute("full"), Recompute("selective"), Recompute("full", 2), Recompute("full", 3)]


def layers_of(model: Any) -> list[tuple[int, Any]]:
    return list(enumerate(getattr(model, model.base_model_prefix).layers))


def computed(name: str, spec: Recompute, bf16: bool, **changes: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of a pass, and the bytes that it kept."""
    model = family(name, **changes)
    recompute(layers_of(model), spec, draws=bool(changes))
    tokens = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    casts = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casts:
        loss = model(input_ids=tokens).logits.float().square().mean()
    loss.backward()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return (
        {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None},
        sum(size for key, size in kept.items() if key not in weights),
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("llama", {"attention_dropout": 0.3}), ("gpt_neox", {"hidden_dropout": 0.3}), ("mixtral", {})],
    ids=["plain", "attention dropout", "dropout", "experts"],
)
def test_gradients_are_the_same_to_the_last_bit(name: str, changes: dict[str, float], bf16: bool) -> None:
    expected, _ = computed(name, NOTHING_AGAIN, bf16, **changes)
    for spec in MODES:
        found, _ = computed(name, spec, bf16, **changes)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], spec


def test_the_more_is_recomputed_the_less_is_kept() -> None:
    none, every_third, every_second, full = (
        computed("llama", spec, False)[1] for spec in (NOTHING_AGAIN, MODES[3], MODES[2], MODES[0])
    )
    assert none > every_third >= every_second > full
    assert full < none / 3


def test_selective_runs_no_product_of_matrices_again(monkeypatch: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.products += str(func) in ("aten.mm.default", "aten.addmm.default")
            return func(*args, **(kwargs or {}))

    counts = {}
    for mode in (NOTHING_AGAIN, Recompute("selective"), Recompute("full")):
        model = family("llama")
        recompute(layers_of(model), mode, draws=False)
        with Counting() as counting:
            model(input_ids=torch.zeros((1, 4), dtype=torch.int64)).logits.sum().backward()  # type: ignore[operator]
        counts[mode.mode] = counting.products
    assert counts["selective"] == counts["none"]
    # What the last product of a layer gives nobody needs to know again.
    assert counts["full"] == counts["none"] + 6 * LAYERS


def test_layers_can_be_told_to_keep_all_again() -> None:
    model = family("llama")
    layers = layers_of(model)
    recompute(layers, Recompute("full"), draws=False)
    recompute(layers, Recompute("full", 2), draws=False)
    assert ["forward" in vars(layer) for _, layer in layers] == [True, False, True, False]
    recompute(layers, NOTHING_AGAIN, draws=False)
    assert not any("forward" in vars(layer) for _, layer in layers)


def test_a_model_whose_layers_are_not_known_cannot_compute_them_again() -> None:
    """It would need as much memory as before, and nobody would say so."""
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    path = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
    job = Job.load(path, ["train.recompute=full"])
    assert "has no torch.nn.ModuleList" in str(why_not_recomputed(job, model))
    assert why_not_recomputed(job, family("llama")) is None
    assert why_not_recomputed(Job.load(path), model) is None
