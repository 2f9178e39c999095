"""Adapters: they begin as what they are put into, nothing else changes, and peft computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orchestrator.checkpoint.adapters import MergedWeights, export_adapter
from orchestrator.checkpoint.catalog import StoredCheckpoint
from orchestrator.checkpoint.export import export
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.weights import weights_of
from orchestrator.data.tokenizers import ByteTokenizer
from orchestrator.job import Job, JobError
from orchestrator.models.adapters import base_name, is_of_adapter
from orchestrator.models.loading import build_model, prepare_model
from orchestrator.models.problems import ModelError
from orchestrator.training import build
from tests.unit.checkpoints_in_tests import catalog_in
from tests.unit.states_in_tests import save_state
from tests.unit.test_export import JOB, MODELS, logits, trained
from tests.unit.tiny_model import CPU, random_gradient, settle, update

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"name": "rslora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    "dora": {"name": "dora", "r": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "lora with a head": {"name": "lora", "r": 2, "alpha": 2, "target_modules": ["k_proj"],
                         "modules_to_save": ["lm_head"]},
    "lora of embeddings": {"name": "lora", "r": 2, "alpha": 2, "target_modules": ["embed_tokens", "o_proj"]},
}  # fmt: skip


def test_what_an_adapter_and_groups_do_not_find_is_told_with_what_there_is(tmp_path: Path) -> None:
    base = Job.loads(JOB.format(hf=MODELS["llama"])).model_dump(exclude_unset=True)
    job = Job.model_validate({**base, "adapter": {"name": "lora", "target_modules": ["query"]}})
    with pytest.raises(ModelError, match=r"adapter.target_modules: .*its linear modules are called .*k_proj, .*q_proj"):
        prepare_model(job, ByteTokenizer.vocab_size)
    train = {**base["train"], "optimizer": {"groups": [{"params": ["*norm*", "zzz*"], "lr": 0.1}]}}
    with pytest.raises(
        ModelError, match=r"groups.0.params.1: 'zzz\*' fits none of the \d+ parameters that are trained"
    ):
        prepare_model(Job.model_validate({**base, "train": train}), ByteTokenizer.vocab_size)


def base_in(directory: Path) -> Path:
    """A Hugging Face directory of a small model with untied embeddings."""
    job, _, checkpoint = trained(MODELS["llama"].replace("}", ", tie_word_embeddings: false}"), directory / "first")
    export(weights_of(checkpoint, job), job, directory / "base")
    return directory / "base"


def adapted(base: Path, adapter: dict[str, Any], directory: Path) -> tuple[Job, Any, Any, StoredCheckpoint]:
    """A job with that adapter, its model before training and after three updates, and a checkpoint of the latter."""
    plain = Job.loads(JOB.format(hf=base))
    job = Job.model_validate({**plain.model_dump(exclude_unset=True), "adapter": adapter})
    state = build.build_state(job, ByteTokenizer.vocab_size, CPU)
    settle(state)
    models = []
    catalog = catalog_in(directory)
    for updates in (0, 3):
        for step in range(updates):
            update(state, random_gradient(state, step))
        model = build_model(job, ByteTokenizer.vocab_size)
        values = {name.removeprefix("model."): t for name, t in state.named() if name.startswith("model.")}
        missing, unexpected = model.load_state_dict(values, strict=False)
        assert not unexpected
        assert not [name for name in missing if is_of_adapter(name)]
        models.append(model.eval())
    save_state(state, catalog, Save(3, 1, 0))
    return job, models[0], models[1], catalog.open(3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_computes_what_was_trained(tmp_path: Path, name: str) -> None:
    base = base_in(tmp_path)
    job, before, after, checkpoint = adapted(base, ADAPTERS[name], tmp_path / "checkpoints")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    if name == "dora":  # Its norms are divided out again.
        torch.testing.assert_close(logits(before), logits(plain), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(before), logits(plain))
    assert (logits(after) - logits(plain)).abs().max() > 1e-3
    weights = weights_of(checkpoint, job)
    export_adapter(weights, job, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(after), rtol=0, atol=1e-6)
    assert job.adapter is not None
    export(MergedWeights(weights, job.adapter), job, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(after), rtol=0, atol=1e-6)
    theirs = loaded.merge_and_unload()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "lora with a head"])
def test_the_rest_is_bit_for_bit_what_it_was_and_in_no_checkpoint(tmp_path: Path, name: str) -> None:
    base = base_in(tmp_path)
    job, _, after, checkpoint = adapted(base, ADAPTERS[name], tmp_path / "checkpoints")
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert job.adapter is not None
    also = tuple(job.adapter.modules_to_save)
    saved = {key for key in checkpoint.manifest.tensors if key.startswith("model.")}
    for key, value in after.state_dict().items():
        is_trained = is_of_adapter(key) or key.startswith(also)
        assert (f"model.{key}" in saved) == is_trained, key
        if not is_trained:
            assert torch.equal(value, plain[base_name(key)]), key
    total = sum(p.numel() for p in after.parameters())
    trained_count = sum(p.numel() for p in after.parameters() if p.requires_grad)
    assert trained_count < total
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    # Weights and two moments, and what describes them.
    assert size < 3 * 4 * trained_count + 40_000


def test_modules_that_there_are_not_are_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    with pytest.raises(ModelError, match=r"target_modules"):
        adapted(base, {"name": "lora", "target_modules": ["nonesuch"]}, tmp_path / "a")
    with pytest.raises(ModelError, match=r"no module of that name"):
        adapted(base, {"name": "lora", "target_modules": ["q_proj"], "modules_to_save": ["nonesuch"]}, tmp_path / "b")


def test_an_adapter_without_rank_is_refused() -> None:
    text = JOB.format(hf=MODELS["llama"]) + "adapter: {name: lora, r: 0}\n"
    with pytest.raises(JobError, match=r"adapter\.r"):
        Job.loads(text)
