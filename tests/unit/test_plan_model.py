"""What the planner takes from a network: its blocks, their parameters, arithmetic and activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from orchestrator.errors import PlanError
from orchestrator.job import Job
from orchestrator.models.costs import ModelCosts, describe_model
from orchestrator.planning.work import work_of

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
OTHERS = {
    "gpt_neox": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128},
    "qwen2": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "opt": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4},
    "mixtral": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
}


def job(model: dict[str, Any], precision: str = "fp32", length: int = 64, **train: Any) -> Job:
    return Job.model_validate(
        {
            "name": "j", "model": model, "data": {"source": "python-stdlib", "sequence_length": length},
            "train": {"steps": 1, "global_batch": 8, "precision": precision, **train},
        }
    )  # fmt: skip


def real(hf: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(hf)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    config.use_cache = False
    module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    return module


def test_blocks_of_a_llama_by_hand() -> None:
    costs = describe_model(job({"hf": LLAMA}))
    hidden, wide, vocab, length = 64, 176, 320, 64
    matrices = 2 * hidden * hidden + 2 * hidden * 32 + 3 * hidden * wide
    embedding, *layers, head = costs.blocks
    assert (embedding.parameters, embedding.flops_per_token) == (vocab * hidden, 0)
    assert len(layers) == costs.layers == 3
    for layer in layers:
        assert (layer.parameters, layer.whole_parameters) == (matrices + 2 * hidden, 2 * hidden)
        assert layer.attention_flops_per_token == 4 * length * hidden
        assert layer.flops_per_token == 2 * matrices + 4 * length * hidden
    assert (head.parameters, head.flops_per_token) == (vocab * hidden + hidden, 2 * vocab * hidden)
    assert (costs.heads, costs.key_value_heads, costs.tied, costs.notes) == (4, 2, 0, ())


def test_arithmetic_is_that_of_the_megatron_paper() -> None:
    """Narayanan et al. 2021: 72 B s l h^2 (1 + s/6h + V/12lh) forward and backward, without recomputation."""
    costs = describe_model(job({"hf": GPT2}))
    s, layers, h, vocab = 64, 3, 64, 320
    expected = 72 * layers * h * h * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert 3 * costs.flops_per_token == pytest.approx(expected, rel=1e-9)


def test_a_tied_head_computes_but_has_no_parameters_of_its_own() -> None:
    costs = describe_model(job({"hf": GPT2}))
    assert costs.tied == 320 * 64
    assert costs.parameters == sum(parameter.numel() for parameter in real(GPT2).parameters())
    assert costs.blocks[-1].parameters == 2 * 64
    assert costs.blocks[-1].flops_per_token == 2 * 320 * 64


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families_count_every_parameter_once(kind: str) -> None:
    hf = {"model_type": kind, "vocab_size": 320, **OTHERS[kind]}
    costs = describe_model(job({"hf": hf}))
    assert costs.parameters == sum(parameter.numel() for parameter in real(hf).parameters())
    assert costs.layers == 3
    assert all(block.kept_bytes_per_token >= block.kept_split_bytes_per_token >= 0 for block in costs.blocks)


def test_a_mixture_computes_with_the_experts_a_token_is_sent_to() -> None:
    hf = {"model_type": "mixtral", "vocab_size": 320, **OTHERS["mixtral"], "intermediate_size": 128}
    few, many = (
        describe_model(job({"hf": hf | {"num_local_experts": experts, "num_experts_per_tok": 2}})) for experts in (4, 8)
    )
    assert many.parameters > 1.5 * few.parameters
    assert many.flops_per_token == pytest.approx(few.flops_per_token, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("hf", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_activations_are_what_a_real_forward_pass_keeps(hf: dict[str, Any], precision: str) -> None:
    """Within 12 % of the bytes autograd saves for one more sample on this machine."""
    module, length = real(hf).to(torch.bfloat16 if precision == "bf16" else torch.float32), 64
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def kept(batch: int) -> int:
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage
            return tensor

        ids = torch.zeros((batch, length), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                logits = module(input_ids=ids).logits
            functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        return sum(storage.nbytes() for storage in saved.values())

    costs = describe_model(job({"hf": hf}, precision, loss_chunk=0))
    predicted = sum(block.kept_bytes_per_token for block in costs.blocks)
    assert predicted == pytest.approx((kept(2) - kept(1)) / length, rel=0.12)


def test_a_network_that_cannot_be_traced_is_estimated_and_says_so() -> None:
    costs = describe_model(job({"factory": "tests.unit.test_plan_model:stubborn"}))
    assert any("estimated from weight shapes" in note for note in costs.notes)
    # Every product keeps its input and output: 64 + 64 values of 4 bytes.
    assert costs.blocks[1].kept_bytes_per_token == 128 * 4


def test_a_factory_is_planned_from_its_longest_list() -> None:
    costs = describe_model(Job.load(ROOT / "examples/factory.yaml"))
    assert (costs.layers, costs.hidden_size, costs.vocab_size, costs.heads) == (2, 64, 257, None)
    assert costs.blocks[0].parameters == 257 * 64
    assert any("tensor stays 1" in note for note in costs.notes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_layers", "no torch.nn.ModuleList of layers"),
        ("no_embedding", "no torch.nn.Embedding"),
        ("needs_data", "model.factory: the network cannot be built without weights"),
        ("missing", "cannot be imported"),
    ],
)
def test_a_factory_that_cannot_be_planned_says_what_is_missing(name: str, expected: str) -> None:
    with pytest.raises(PlanError, match=expected):
        describe_model(job({"factory": f"tests.unit.test_plan_model:{name}"}))


def test_the_7b_example_is_what_it_says() -> None:
    loaded = Job.load(ROOT / "examples/llama-7b.yaml", ["strategy.tensor=8", "strategy.shard=parameters"])
    assert (loaded.strategy.tensor, loaded.strategy.shard) == (8, "parameters")
    asked = work_of(loaded, small())
    assert (asked.virtual_workers, asked.micro_batches, asked.tokens) == (64, 16, 4096)
    assert (asked.state.weights, asked.state.gradients, asked.state.optimizer) == (4, 4, 8)


def small() -> ModelCosts:
    return describe_model(job({"hf": LLAMA}))


class Plain(nn.Module):
    """An embedding, square layers and a head, around whatever a test breaks."""

    def __init__(self, layers: int, embedding: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(300, 64) if embedding else nn.Linear(1, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))
        self.head = nn.Linear(64, 300)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(input_ids)
        if bool((hidden.sum() > 1e9).item()):  # what no tensor without data can answer
            return hidden
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def stubborn() -> nn.Module:
    return Plain(2)


def no_layers() -> nn.Module:
    return nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 300))


def no_embedding() -> nn.Module:
    return Plain(2, embedding=False)


def needs_data() -> nn.Module:
    return Plain(int(torch.ones(3).sum()))
