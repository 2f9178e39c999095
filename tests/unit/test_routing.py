"""The loss of a mixture's routers: what transformers computes with labels, over any tokens, and known before a backward
pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.job import Job
from orchestrator.models.problems import ModelError
from orchestrator.models.routers import routers_of
from orchestrator.models.transformers_internals import router_places
from strategies.gradient.compute import LocalGradients
from strategies.gradient.router_loss import Over, RouterLoss, RouterLossSpec
from strategies.gradient.routing import Pass, Routing
from strategies.gradient.spec import StepSpec
from strategies.model.blueprint import Blueprint
from strategies.model.model_part import ModelPart
from strategies.model.recompute import Recompute
from strategies.model.routers import Routers
from strategies.objective.batch import Batch
from strategies.optim.schedule import ScheduleSpec
from tests.batches import plain_batch
from tests.small_models import LAYERS, VOCABULARY, family

COEFFICIENT = 0.3
LENGTH = 7
VIRTUAL_WORKERS, MICRO_BATCHES = 2, 2
SPEC = StepSpec(seed=0, micro_batch=1, micro_batches=MICRO_BATCHES, base_lr=1e-3, schedule=ScheduleSpec())
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "jetmoe": {"aux_loss_coef": COEFFICIENT, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
}


def mixture(name: str, **changes: Any) -> Any:
    return family(name, **MIXTURES[name], router_aux_loss_coef=COEFFICIENT, **changes)


def job_of(hf: Any = None, data: Any = None, **train: Any) -> Job:
    return Job.model_validate({
        "name": "routing",
        "model": {"hf": {"model_type": "llama"} if hf is None else hf},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": 8, **(data or {})},
        "train": {"steps": 1, "global_batch": 2, **train},
        "elastic": {"virtual_workers": 2, "workers": {"max": 2}},
    })  # fmt: skip


def tokens_of(virtual_worker: int) -> torch.Tensor:
    rng = np.random.default_rng(virtual_worker)
    return torch.from_numpy(rng.integers(0, VOCABULARY, size=(MICRO_BATCHES, LENGTH + 1), dtype=np.int64))


def fetch(step: int, virtual_worker: int) -> Batch:
    tokens = tokens_of(virtual_worker).numpy()
    return plain_batch(tokens, np.arange(MICRO_BATCHES), virtual_worker, VIRTUAL_WORKERS)


def computed(model: Any, over: Over, z: float = 0.0, recompute: str = "none") -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step and its gradients, here."""
    job = job_of()
    model.config.output_router_logits = True
    routers = routers_of(job, model)
    assert routers is not None
    model.config.output_router_logits = False
    spec = replace(
        SPEC, router_loss=RouterLossSpec(VIRTUAL_WORKERS, over, z=z),
        recompute=Recompute(recompute),  # type: ignore[arg-type]
    )  # fmt: skip
    part = ModelPart(Blueprint(model, routers=routers), 0, None)
    with torch.no_grad():
        for slot, offset in part.slots:
            part.weights[offset : offset + slot.numel].copy_(part.blueprint.values.read(slot.name).reshape(-1))
    local = LocalGradients(part, spec, fetch)
    pieces = local.compute(0, range(VIRTUAL_WORKERS), (0, VIRTUAL_WORKERS), enter=lambda *_: None, check=lambda: None)
    (gradient,) = pieces.values()
    found = {slot.name: gradient[at : at + slot.numel].view(slot.shape).clone() for slot, at in part.slots}
    return float(sum(local.losses.values())), found


def by_transformers(
    name: str, units: list[list[torch.Tensor]], z: float = 0.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean of what transformers computes of each unit's rows with labels; and a z-loss, over all."""
    model = mixture(name, output_router_logits=True)
    total = torch.zeros(())
    logits: list[torch.Tensor] = []
    handles = [
        model.get_submodule(place).register_forward_hook(
            lambda module, given, output, index=index: logits.append(output[index])
        )
        for place, index in router_places(model).items()
    ]
    for rows in units:
        tokens = torch.cat(rows)
        labels = tokens[:, 1:].contiguous()
        total = total + model(input_ids=tokens[:, :-1], labels=labels, shift_labels=labels).loss
    total = total / len(units) + z * torch.cat(logits).float().logsumexp(dim=-1).square().mean()
    total.backward()
    for handle in handles:
        handle.remove()
    return float(total.detach()), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def units_of(over: Over) -> list[list[torch.Tensor]]:
    by_worker = [list(tokens_of(index).split(1)) for index in range(VIRTUAL_WORKERS)]
    if over == "step":
        return [[rows for all_rows in by_worker for rows in all_rows]]
    return by_worker if over == "virtual-worker" else [[rows] for all_rows in by_worker for rows in all_rows]


def assert_close(found: tuple[float, Mapping[str, torch.Tensor]], expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for key, gradient in expected[1].items():
        scale = float(gradient.abs().max()) + 1e-6
        assert torch.allclose(found[1][key], gradient, rtol=1e-4, atol=2e-5 * scale), key


@pytest.mark.parametrize("name", MIXTURES)
def test_over_a_micro_batch_it_is_what_transformers_computes_with_labels(name: str) -> None:
    assert_close(computed(mixture(name), "micro-batch"), by_transformers(name, units_of("micro-batch")))


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("over", ["virtual-worker", "step"])
def test_over_more_it_is_what_transformers_computes_of_all_of_it_at_once(over: Over, recompute: str) -> None:
    found = computed(mixture("mixtral"), over, recompute=recompute)
    assert_close(found, by_transformers("mixtral", units_of(over)))
    assert found[0] != pytest.approx(computed(mixture("mixtral"), "micro-batch")[0], rel=1e-5)


@pytest.mark.parametrize("over", ["micro-batch", "virtual-worker", "step"])
def test_recomputed_layers_give_the_same_bits(over: Over) -> None:
    loss, gradients = computed(mixture("mixtral"), over, z=0.1)
    for mode in ("full", "selective"):
        again, found = computed(mixture("mixtral"), over, z=0.1, recompute=mode)
        assert again == loss
        assert all(torch.equal(found[key], gradients[key]) for key in gradients)


def test_the_z_loss_is_the_mean_square_of_logsumexp() -> None:
    found = computed(mixture("mixtral"), "step", z=0.2)
    assert_close(found, by_transformers("mixtral", units_of("step"), z=0.2))


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_gradients_of_logits_are_those_of_the_formula(tokens: int, routers: int, seed: int) -> None:
    """By torch's own derivation, with f held constant."""
    experts, top_k = 5, 2
    loss = RouterLoss(
        {f"r{n}": 0 for n in range(routers)}, experts, top_k, virtual_workers=1, micro_batches=1, balance=0.7, z=0.01
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn((tokens, experts), generator=generator).requires_grad_() for _ in range(routers)]
    others = [torch.ones((), requires_grad=True) for _ in range(routers)]
    routing, at = Routing(loss), Pass()
    with routing.watch(at):
        handed_on = [routing.see(n, logits[n], [others[n]])[0] for n in range(routers)]
        torch.stack(handed_on).sum().backward()  # type: ignore[no-untyped-call]
    again = [each.detach().clone().requires_grad_() for each in logits]
    together = torch.cat(again)
    probabilities = together.softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1.0)
    expected = 0.7 * experts * (chosen.mean(0) * probabilities.mean(0)).sum()
    expected = expected + 0.01 * together.logsumexp(-1).square().mean()
    expected.backward()  # type: ignore[no-untyped-call]
    for one, other in zip(logits, again, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    assert [float(each.grad) for each in others if each.grad is not None] == [1.0] * routers
    routing._passes[0, 0] = at
    assert routing.all_losses([0])[0] == pytest.approx(float(expected), rel=1e-5)


def test_the_routers_of_a_model_are_those_that_it_would_record() -> None:
    assert router_places(mixture("mixtral")) == {f"model.layers.{n}.mlp.gate": 0 for n in range(LAYERS)}
    assert router_places(family("llama")) == {}


def test_a_pass_that_failed_is_not_taken_for_counted() -> None:
    """Memory may be short once: the step is then run again, with what is known of it."""
    loss = RouterLoss({"r": 0}, 3, 1, virtual_workers=1, micro_batches=1, over="step", balance=1.0)
    routing = Routing(loss)
    routing.begin(0)
    with pytest.raises(MemoryError), routing.count(0, 0):
        raise MemoryError
    assert not routing.is_counted(0)
    with routing.count(0, 0):
        routing.see(0, torch.eye(3), [])
    assert routing.is_counted(0)


def why(job: Job, model: Any) -> str:
    with pytest.raises(ModelError) as caught:
        routers_of(job, model)
    return str(caught.value)


def test_what_a_model_has_not_is_refused_by_name() -> None:
    assert "LlamaForCausalLM has no routers" in why(job_of(router_loss={"over": "step"}), family("llama"))
    padded = job_of(router_loss={"over": "step"}, data={"packing": "pad"})
    assert "packing: pad" in why(padded, mixture("mixtral"))
    hf = {"model_type": "mixtral", "router_aux_loss_coef": 0.1}
    assert "output_router_logits: true" in why(job_of(hf), mixture("mixtral"))


@pytest.mark.parametrize(
    ("asks", "spec", "expected"),
    [
        (False, RouterLossSpec(1), None),
        (True, RouterLossSpec(1), (0.5, 0.0)),
        (False, RouterLossSpec(1, is_asking=True), (0.5, 0.0)),
        (False, RouterLossSpec(1, balance=0.0, z=0.0, is_asking=True), None),
        (True, RouterLossSpec(1, balance=0.1, z=0.2, is_asking=True), (0.1, 0.2)),
    ],
)
def test_a_job_says_more_than_a_model(asks: bool, spec: RouterLossSpec, expected: Any) -> None:
    routers = Routers({"r": 0}, 4, 2, balance=0.5, are_balanced=asks)
    found = RouterLoss.of(routers, spec, 1)
    assert (found and (found.balance, found.z)) == expected
