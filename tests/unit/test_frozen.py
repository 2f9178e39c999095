"""Frozen parameters: not in checkpoints, known by a digest, shared out by rows."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.catalog import Catalog, Description
from orchestrator.checkpoint.manifest import MANIFEST, TensorEntry, UnusableCheckpoint
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.parts import write_part
from orchestrator.checkpoint.tensors import DTYPES
from orchestrator.data.tokenizers import ByteTokenizer
from orchestrator.job import Job
from orchestrator.training import build
from orchestrator.training.restoring import open_checkpoint
from strategies.model.frozen import FrozenWeights
from strategies.model.values import BuiltValues
from strategies.state.training_state import TrainingState
from tests.unit.checkpoints_in_tests import catalog_in, chunks_of
from tests.unit.states_in_tests import save_state
from tests.unit.test_export import JOB, MODELS
from tests.unit.tiny_model import CPU, make, random_gradient, settle, state_of, tiny, update


def settled() -> TrainingState:
    """After one update."""
    state = make()
    settle(state)
    update(state, random_gradient(state, 0))
    return state


def frozen(**tensors: torch.Tensor) -> FrozenWeights:
    model = torch.nn.Module()
    for name, each in tensors.items():
        model.register_parameter(name, torch.nn.Parameter(each, requires_grad=False))
    return FrozenWeights(dict(model.named_parameters()), BuiltValues(model))


def test_the_digest_tells_names_types_shapes_and_values() -> None:
    found = {
        frozen(a=torch.zeros(6)).digest,
        frozen(b=torch.zeros(6)).digest,
        frozen(a=torch.zeros(2, 3)).digest,
        frozen(a=torch.zeros(6, dtype=torch.int32)).digest,
        frozen(a=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -0.0])).digest,
        frozen(a=torch.zeros(6), b=torch.zeros(0)).digest,
    }
    assert len(found) == 6
    assert frozen(a=torch.zeros(6).as_strided((6,), (1,))).digest in found


class Threads(BuiltValues):
    """Which threads read of it."""

    def __init__(self, model: torch.nn.Module, *, is_stored: bool) -> None:
        super().__init__(model)
        self.stored = is_stored
        self.seen: set[int] = set()

    @property
    def is_stored(self) -> bool:
        return self.stored

    def read(self, name: str) -> torch.Tensor:
        self.seen.add(threading.get_ident())
        return super().read(name)


@pytest.mark.parametrize("is_stored", [False, True])
def test_what_is_drawn_is_read_by_no_thread_but_the_one_that_draws(is_stored: bool) -> None:
    model = torch.nn.Linear(2, 3)
    model.requires_grad_(False)
    named = {name: each.detach().clone() for name, each in model.named_parameters()}
    values = Threads(model, is_stored=is_stored)
    weights = FrozenWeights.of(model, values)
    with ThreadPoolExecutor(1) as saver:
        digest = saver.submit(lambda: weights.digest).result()
    assert digest == frozen(**named).digest
    assert (threading.get_ident() in values.seen) == (not is_stored)
    assert len(values.seen) == 1


def test_the_digest_of_a_base_that_begins_at_random_leaves_alone_what_training_draws() -> None:
    """The other thread asks while this one draws: what is drawn is what it would be, and so is the digest."""
    job = Job.loads(JOB.format(hf=MODELS["llama"])).model_dump(exclude_unset=True)
    adapter = {"name": "lora", "r": 2, "target_modules": ["q_proj"]}
    made = Job.model_validate({**job, "adapter": adapter})
    digests = set()
    for _ in range(2):
        weights = build.build_state(made, ByteTokenizer.vocab_size, CPU).blueprint.frozen
        torch.manual_seed(7)
        with ThreadPoolExecutor(1) as saver:
            asked = saver.submit(lambda weights=weights: weights.digest)
            drawn = [torch.rand(100) for _ in range(200)]
            digest = asked.result()
        torch.manual_seed(7)
        assert all(torch.equal(each, torch.rand(100)) for each in drawn)
        digests.add(digest)
    assert len(digests) == 1


def test_what_has_no_rows_or_another_type_is_not_divided() -> None:
    weights = frozen(a=torch.zeros(6), scalar=torch.tensor(1.0), table=torch.zeros(6, dtype=torch.int64))
    assert weights.divisible == ["a"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_rows_are_shared_out_as_torch_chunks_them(count: int) -> None:
    tensor = torch.arange(14.0).view(7, 2)
    weights = frozen(a=tensor)
    parts = [weights.rows("a", index, count) for index in range(count)]
    assert torch.equal(torch.cat(parts), tensor)
    assert max(map(len, parts)) == -(-7 // count)


def test_a_checkpoint_names_them_and_does_not_have_them(tmp_path: Path) -> None:
    state = settled()
    catalog = catalog_in(tmp_path)
    save_state(state, catalog, Save(1, 1, 0))
    manifest = catalog.open(1).manifest
    assert "model.frozen" not in manifest.tensors
    assert "model.scale" in manifest.tensors
    assert manifest.frozen is not None
    assert manifest.frozen.xxh3_128 == state.blueprint.frozen.digest
    assert manifest.frozen.tensors == {"frozen": TensorEntry(dtype="F32", shape=[3])}
    assert open_checkpoint(catalog, 1, settled()).manifest == manifest


def test_a_checkpoint_beside_other_frozen_parameters_is_refused(tmp_path: Path) -> None:
    catalog = catalog_in(tmp_path)
    save_state(settled(), catalog, Save(1, 1, 0))
    model = tiny(0.0, 3)
    with torch.no_grad():
        model.get_parameter("frozen")[0] += 1.0
    changed = state_of(model)
    with pytest.raises(UnusableCheckpoint, match="other frozen parameters than those that the model has now"):
        open_checkpoint(catalog, 1, changed)


def test_earlier_versions_saved_them_and_these_checkpoints_are_read(tmp_path: Path) -> None:
    state = settled()
    catalog = catalog_in(tmp_path)
    save_as_before(catalog, {name: tensor for name, tensor in state.named() if name != "optimizer.updates"})
    raw = json.loads(catalog.storage.read(f"{Save(1, 1, 0).directory}/{MANIFEST}"))
    assert "frozen" not in raw
    assert "model.frozen" in open_checkpoint(catalog, 1, settled()).manifest.tensors
    model = tiny(0.0, 3)
    with torch.no_grad():
        model.get_parameter("frozen")[0] += 1.0
    changed = state_of(model)
    with pytest.raises(UnusableCheckpoint, match="other frozen parameters"):
        open_checkpoint(catalog, 1, changed)


def save_as_before(catalog: Catalog, values: dict[str, torch.Tensor]) -> None:
    save = Save(1, 1, 0)
    _, part = write_part(catalog.storage, save, 0, 1, chunks_of(values, 0, 1), None)
    entries = {name: TensorEntry(dtype=DTYPES[t.dtype], shape=list(t.shape)) for name, t in values.items()}
    catalog.commit(save, {0: part}, Description("sha256:0", {}, {}, {}, {}, entries))
