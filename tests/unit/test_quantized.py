"""A quantized base: its codes, what is computed with them, and what is exported."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from orchestrator.checkpoint.adapters import MergedWeights
from orchestrator.checkpoint.export import export
from orchestrator.checkpoint.weights import weights_of
from orchestrator.data.tokenizers import ByteTokenizer
from orchestrator.job import Job, JobError
from orchestrator.models.costs import describe_model
from orchestrator.models.loading import prepare_model
from orchestrator.models.problems import ModelError
from orchestrator.models.quantization import DequantizedWeights
from orchestrator.planning.memory import predict_memory
from orchestrator.planning.stages import cut_model
from orchestrator.planning.work import QUANTIZED_BYTES, Degrees, step_settings, work_of
from orchestrator.training import build
from strategies.layout.schedule import NO_PIPELINE, PipelineSchedule
from strategies.model.quantized import KINDS, NF4, QuantizedLinear, dequantize, quantize
from tests.unit.test_adapters import adapted
from tests.unit.test_export import JOB, logits, trained

WIDE = (
    "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, tie_word_embeddings: false}"
)


NO_STAGES = PipelineSchedule(NO_PIPELINE, 1)
ALONE = Degrees(1, 1, NO_STAGES, "none")


def adapter(kind: str) -> dict[str, Any]:
    return {"name": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"], "quantize_base": kind}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    job, _, checkpoint = trained(WIDE, directory / "first")
    export(weights_of(checkpoint, job), job, directory / "base")
    return directory / "base"


def test_the_numbers_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    """Dettmers et al. 2023, appendix E: eight above and seven below zero, and zero."""
    scipy = pytest.importorskip("scipy.stats")
    offset = 0.9677083
    above = scipy.norm.ppf(torch.linspace(offset, 0.5, 9)[:-1].numpy()).tolist()
    below = (-scipy.norm.ppf(torch.linspace(offset, 0.5, 8)[:-1].numpy())).tolist()
    expected = torch.tensor(sorted([*above, 0.0, *below]))
    torch.testing.assert_close(torch.tensor(NF4), expected / expected.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantized_is_near_and_takes_what_the_planner_says(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 256) * 0.03
    weight[5] = 0.0
    codes, scales = quantize(weight, kind)
    found = dequantize(codes, scales)
    # Half of the largest step between two numbers, and what rounding of scales adds.
    step = 1 / 127 if kind == "int8" else max(b - a for a, b in pairwise(NF4))
    parts = weight if kind == "int8" else weight.unflatten(1, (-1, 64))
    largest = parts.abs().amax(-1, keepdim=True).expand_as(parts).reshape(weight.shape)
    assert bool(((found - weight).abs() <= largest * (step / 2 + 0.01)).all())
    assert not found[5].any()
    assert float((found - weight).norm() / weight.norm()) < (0.01 if kind == "int8" else 0.11)
    num_bytes = codes.numel() * codes.element_size() + scales.numel() * scales.element_size()
    assert num_bytes / weight.numel() == pytest.approx(QUANTIZED_BYTES[kind], abs=0.01)
    if kind == "nf4":  # Each is one of the table's, times its scale.
        shares = found.unflatten(1, (-1, 64)) / scales.float()[..., None]
        distance = (shares[..., None] - torch.tensor(NF4)).abs().amin(-1)
        assert float(distance[~torch.isnan(distance)].max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_module_is_the_linear_one_of_what_it_stands_for(kind: str) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(128, 16)
    module = QuantizedLinear(linear, kind)
    codes, scales = quantize(linear.weight.detach(), kind)
    module.codes, module.scales = (nn.Parameter(each, requires_grad=False) for each in (codes, scales))
    linear.weight.data = dequantize(codes, scales)
    value = torch.randn(3, 5, 128)
    gradients = []
    for each in (linear, module):
        given = value.clone().requires_grad_()
        output = each(given)
        output.square().sum().backward()
        gradients.append((output.detach(), given.grad))
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_was_trained(kind: str, base: Path, tmp_path: Path) -> None:
    job, before, after, checkpoint = adapted(base, adapter(kind), tmp_path / "checkpoints")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert (logits(before) - logits(plain)).abs().max() > 1e-5, "its weights are others"
    weights = weights_of(checkpoint, job)
    assert job.adapter is not None
    export(MergedWeights(DequantizedWeights(weights), job.adapter), job, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(after), rtol=0, atol=1e-6)
    assert (logits(after) - logits(before)).abs().max() > 1e-3
    kinds = {type(part).__name__ for name, part in after.named_modules() if name.endswith(("base_layer", "up_proj"))}
    assert kinds == {"QuantizedLinear"}
    assert isinstance(after.get_output_embeddings(), nn.Linear)
    assert not [name for name in checkpoint.manifest.tensors if "codes" in name], "what is frozen is in no checkpoint"
    assert step_settings(job).frozen_bytes == QUANTIZED_BYTES[kind]


def test_a_head_with_an_adapter_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    asked = adapter("int8") | {"target_modules": ["q_proj", "lm_head"]}
    _, before, _, checkpoint = adapted(base, asked, tmp_path / "checkpoints")
    kinds = {name: type(part) for name, part in before.named_modules() if name.endswith("base_layer")}
    assert kinds["lm_head.base_layer"] is nn.Linear
    assert {kind for name, kind in kinds.items() if "q_proj" in name} == {QuantizedLinear}
    assert "model.lm_head.lora_A.default.weight" in checkpoint.manifest.tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_planner_counts_what_is_quantized_and_no_more(kind: str, base: Path) -> None:
    plain = Job.loads(JOB.format(hf=base)).model_dump(exclude_unset=True)
    job, usual = (Job.model_validate({**plain, "adapter": adapter(each)}) for each in (kind, "none"))
    model = prepare_model(job, ByteTokenizer.vocab_size).model
    codes = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n.endswith((".codes", ".scales")))
    costs = describe_model(job)
    linear = sum(block.frozen_linear for block in costs.blocks)
    assert linear * QUANTIZED_BYTES[kind] == pytest.approx(codes, rel=0.05)
    other = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dtype == torch.float32)
    assert sum(block.frozen_parameters for block in costs.blocks) - linear == other
    memory, before = (
        predict_memory(work_of(each, describe_model(each)), cut_model(costs, NO_STAGES, 1), ALONE)
        for each in (job, usual)
    )
    assert before.weights - memory.weights == pytest.approx((4 - QUANTIZED_BYTES[kind]) * linear)
    whole = prepare_model(usual, ByteTokenizer.vocab_size).model
    assert build.flops_per_token(job, model) == build.flops_per_token(usual, whole) > 0


def test_what_cannot_be_quantized_is_said(base: Path, tmp_path: Path) -> None:
    def job_of(**changes: Any) -> Job:
        plain = Job.loads(JOB.format(hf=base)).model_dump(exclude_unset=True)
        return Job.model_validate({**plain, "adapter": adapter("nf4") | changes})

    with pytest.raises(JobError, match="dora takes norms of the frozen weights in every pass"):
        job_of(name="dora")
    narrow = WIDE.replace("hidden_size: 64", "hidden_size: 40")
    odd, _, checkpoint = trained(narrow, tmp_path / "first")
    export(weights_of(checkpoint, odd), odd, tmp_path / "narrow")
    given = job_of().model_dump(exclude_unset=True) | {"model": {"hf": str(tmp_path / "narrow")}}
    with pytest.raises(ModelError, match="nf4 needs rows of multiples of 64 elements, got 40; use int8"):
        prepare_model(Job.model_validate(given), ByteTokenizer.vocab_size)
