"""A checkpoint as a Hugging Face directory, and a Hugging Face directory as the beginning of a run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.checkpoint.catalog import StoredCheckpoint
from orchestrator.checkpoint.encryption import Secret
from orchestrator.checkpoint.export import ExportError, export
from orchestrator.checkpoint.manifest import UnusableCheckpoint
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.weights import weights_of
from orchestrator.data.tokenizers import ByteTokenizer
from orchestrator.job import Job
from orchestrator.models.loading import build_model
from orchestrator.training import build
from tests.unit.checkpoints_in_tests import SECRET, catalog_in
from tests.unit.states_in_tests import save_state
from tests.unit.tiny_model import random_gradient, settle, update

CPU = torch.device("cpu")
JOB = """
name: exported
model: {{hf: {hf}}}
data: {{source: python-stdlib, tokenizer: bytes, sequence_length: 16}}
train: {{steps: 4, global_batch: 2}}
elastic: {{virtual_workers: 2, workers: {{max: 2}}}}
"""
SMALL = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2"
MODELS = {
    "llama": f"{{model_type: llama, {SMALL}}}",
    "qwen3": f"{{model_type: qwen3, {SMALL}, head_dim: 8, tie_word_embeddings: false}}",
    "mistral": f"{{model_type: mistral, {SMALL}}}",
    "roformer": "{model_type: roformer, is_decoder: true, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 2, num_attention_heads: 4, embedding_size: 32, max_position_embeddings: 64, "
    "tie_word_embeddings: false}",
    "gpt2": "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 4, tie_word_embeddings: false}",
}


def trained(hf: str, directory: Path, secret: Secret | None = None) -> tuple[Job, Any, StoredCheckpoint]:
    """A job, its model after two updates, and a checkpoint of them."""
    job = Job.loads(JOB.format(hf=hf))
    state = build.build_state(job, ByteTokenizer.vocab_size, CPU)
    settle(state)
    for step in range(2):
        update(state, random_gradient(state, step))
    catalog = catalog_in(directory, secret)
    save_state(state, catalog, Save(2, 1, 0))
    values = {name.removeprefix("model."): t for name, t in state.named() if name.startswith("model.")}
    model = build_model(job, ByteTokenizer.vocab_size)
    model.load_state_dict(values)
    return job, model.eval(), catalog.open(2)


def test_a_model_whose_configuration_knows_no_padding_is_exported(tmp_path: Path) -> None:
    asked = "{model_type: codegen, n_embd: 32, n_layer: 2, n_head: 4, n_ctx: 64, n_positions: 64, rotary_dim: 4}"
    job, model, checkpoint = trained(asked, tmp_path)
    assert not hasattr(model.config, "pad_token_id")
    export(weights_of(checkpoint, job), job, tmp_path / "exported")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(loaded.eval()), logits(model))


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20) * 6
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [4 << 30, 20_000])
def test_transformers_loads_the_same_logits(tmp_path: Path, name: str, shard_bytes: int) -> None:
    job, model, checkpoint = trained(MODELS[name], tmp_path / "checkpoints")
    target = tmp_path / "exported"
    files = {path.name for path in export(weights_of(checkpoint, job), job, target, shard_bytes=shard_bytes)}
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dtype == torch.float32
    assert ("model.safetensors.index.json" in files) == (shard_bytes == 20_000)
    assert ("model.safetensors" in files) != (shard_bytes == 20_000)
    if shard_bytes == 20_000:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(model.state_dict())


def test_frozen_parameters_come_from_where_the_job_has_them_and_are_verified(tmp_path: Path) -> None:
    job, model, checkpoint = trained(MODELS["roformer"], tmp_path / "checkpoints")
    name = "roformer.encoder.embed_positions.weight"
    assert not model.get_parameter(name).requires_grad
    assert f"model.{name}" not in checkpoint.manifest.tensors
    weights = weights_of(checkpoint, job)
    assert torch.equal(weights.read(name), model.get_parameter(name))
    assert weights.tensors().keys() == set(model.state_dict())
    frozen = checkpoint.manifest.frozen
    assert frozen is not None
    other = checkpoint.manifest.model_copy(update={"frozen": frozen.model_copy(update={"xxh3_128": "0" * 32})})
    tampered = copy.copy(checkpoint)
    tampered.manifest = other
    with pytest.raises(UnusableCheckpoint, match="beside other frozen parameters"):
        weights_of(tampered, job).read(name)


def test_it_is_cast_as_transformers_would(tmp_path: Path) -> None:
    job, model, checkpoint = trained(MODELS["llama"], tmp_path / "checkpoints")
    export(weights_of(checkpoint, job), job, tmp_path / "exported", "bf16")
    export(weights_of(checkpoint, job), job, tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert loaded.dtype == torch.bfloat16
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(cast))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(torch.bfloat16)), name


def test_an_encrypted_checkpoint_is_exported_with_its_key(tmp_path: Path) -> None:
    job, model, checkpoint = trained(MODELS["llama"], tmp_path / "checkpoints", SECRET)
    export(weights_of(checkpoint, job), job, tmp_path / "exported")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")), logits(model))


def test_the_tokenizer_gives_the_ids_that_the_model_was_trained_with(tmp_path: Path) -> None:
    job, _, checkpoint = trained(MODELS["llama"], tmp_path / "checkpoints")
    export(weights_of(checkpoint, job), job, tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in ("hello, world", "naïve 日本語 \U0001f600\n\ttabs  and  spaces ", "\x00\x7f'll"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == ByteTokenizer().encode(text).tolist()
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == ByteTokenizer.end_of_document
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ByteTokenizer.end_of_document
    assert model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=4).shape[0] == 1
    assert len(tokenizer) == ByteTokenizer.vocab_size


def test_a_tokenizer_of_ones_own_comes_along(tmp_path: Path) -> None:
    job, _, checkpoint = trained(MODELS["llama"], tmp_path / "checkpoints")
    export(weights_of(checkpoint, job), job, tmp_path / "first")
    for name in (tmp_path / "first", tmp_path / "first" / "tokenizer.json"):
        other = job.model_copy(update={"data": job.data.model_copy(update={"tokenizer": str(name)})})
        target = tmp_path / f"with {name.name}"
        export(weights_of(checkpoint, job), other, target)
        assert AutoTokenizer.from_pretrained(target).encode("abc", add_special_tokens=False) == [97, 98, 99]


@pytest.mark.parametrize("shard_bytes", [4 << 30, 20_000])
def test_a_run_begins_with_what_was_exported(tmp_path: Path, shard_bytes: int) -> None:
    job, model, checkpoint = trained(MODELS["llama"], tmp_path / "checkpoints")
    export(weights_of(checkpoint, job), job, tmp_path / "exported", shard_bytes=shard_bytes)
    warm = Job.loads(JOB.format(hf=tmp_path / "exported"))
    again = build_model(warm, ByteTokenizer.vocab_size)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # And what was begun so is exported again.
    state = build.build_state(warm, ByteTokenizer.vocab_size, CPU)
    settle(state)
    update(state, random_gradient(state, 0))
    catalog = catalog_in(tmp_path / "more")
    save_state(state, catalog, Save(1, 1, 0))
    export(weights_of(catalog.open(1), warm), warm, tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_never_more_than_a_tensor_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest thing that is ever handed to the storage is one tensor."""
    from orchestrator import storage

    job, model, checkpoint = trained(MODELS["llama"], tmp_path / "checkpoints")
    sizes: list[int] = []
    put = storage.LocalStorage.put

    def watched(self: Any, path: str, pieces: Any) -> None:
        put(self, path, lambda: (sizes.append(len(piece)) or piece for piece in pieces()))

    monkeypatch.setattr(storage.LocalStorage, "put", watched)
    export(weights_of(checkpoint, job), job, tmp_path / "exported")
    assert max(sizes[1:]) == max(4 * value.numel() for value in model.state_dict().values())


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    job, _, checkpoint = trained(MODELS["llama"], tmp_path / "checkpoints")
    with pytest.raises(ExportError, match="one of fp32, bf16, fp16"):
        export(weights_of(checkpoint, job), job, tmp_path / "exported", "int4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ExportError, match="something already"):
        export(weights_of(checkpoint, job), job, tmp_path / "full")
    own = job.model_copy(update={"model": job.model.model_copy(update={"hf": None, "factory": "a:b"})})
    with pytest.raises(ExportError, match="no Hugging Face format"):
        export(weights_of(checkpoint, job), own, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
