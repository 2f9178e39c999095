"""Weights are the same from wherever they come: a checkpoint, a directory, a rank that trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.export import ExportError, export
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.weights import CheckpointWeights
from orchestrator.data.tokenizers import ByteTokenizer
from orchestrator.job import Job
from orchestrator.models.problems import ModelError
from orchestrator.models.weights import DirectoryWeights, TensorInfo, WeightSource
from orchestrator.training import build
from strategies.state.training_state import TrainingState
from tests.unit.checkpoints_in_tests import catalog_in
from tests.unit.states_in_tests import save_state
from tests.unit.tiny_model import random_gradient, settle, update

JOB = """
name: weights
model: {hf: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
             num_key_value_heads: 2}}
data: {source: python-stdlib, tokenizer: bytes, sequence_length: 16}
train: {steps: 4, global_batch: 2}
elastic: {virtual_workers: 2, workers: {max: 2}}
"""


class LiveWeights:
    """Of a rank that trains, and has all of its state."""

    name = "this rank"

    def __init__(self, state: TrainingState) -> None:
        self._values = {name.removeprefix("model."): t for name, t in state.named() if name.startswith("model.")}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in self._values.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._values[name].clone()


@pytest.fixture
def job() -> Job:
    return Job.loads(JOB)


@pytest.fixture
def state(job: Job) -> TrainingState:
    made = build.build_state(job, ByteTokenizer.vocab_size, torch.device("cpu"))
    settle(made)
    update(made, random_gradient(made, 0))
    return made


def test_all_sources_give_the_same(job: Job, state: TrainingState, tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path / "checkpoints")
    save_state(state, catalog, Save(1, 1, 0))
    live, stored = LiveWeights(state), CheckpointWeights(catalog.open(1))
    export(stored, job, tmp_path / "stored")
    export(live, job, tmp_path / "live", shard_bytes=20_000)
    sources: list[WeightSource] = [
        live, stored, DirectoryWeights(tmp_path / "stored"), DirectoryWeights(tmp_path / "live"),
    ]  # fmt: skip
    for source in sources:
        assert source.tensors() == live.tensors(), source.name
        for name in live.tensors():
            assert torch.equal(source.read(name), live.read(name)), (source.name, name)
        with pytest.raises(KeyError):
            source.read("nothing")
    assert not any(name.startswith("optimizer") for name in stored.tensors())


def test_what_is_missing_is_named(job: Job, state: TrainingState, tmp_path: Path) -> None:
    live = LiveWeights(state)
    del live._values["model.norm.weight"]
    with pytest.raises(ExportError, match=r"this rank has no model\.norm\.weight of this model"):
        export(live, job, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_directory_that_is_none_or_is_damaged_is_refused(job: Job, state: TrainingState, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        DirectoryWeights(tmp_path)
    export(LiveWeights(state), job, tmp_path / "exported")
    file = tmp_path / "exported" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        DirectoryWeights(tmp_path / "exported")
