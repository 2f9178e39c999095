"""A teacher's likeliest tokens: what they are, what a student makes of them, and that they are asked for once."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.api import _like
from orchestrator.checkpoint.export_run import find_model
from orchestrator.checkpoint.names import Save
from orchestrator.checkpoint.of_run import catalog_of
from orchestrator.checkpoint.of_run import job_of as run_job
from orchestrator.data.of_job import dataset_of, open_stores, prepare_stores
from orchestrator.data.tokenizers import ByteTokenizer
from orchestrator.job import Job, JobError
from orchestrator.models.loading import build_model
from orchestrator.models.problems import ModelError
from orchestrator.rundir import RunDirectory
from orchestrator.training import build
from orchestrator.training.compared import load_teacher, release_teacher, with_compared
from orchestrator.training.teaching import Answer, LocalTeacher, Question, Teaching
from strategies.objective.distill import Distill, DistillSettings
from strategies.objective.rows import Rows
from tests.records_in_tests import completions, write
from tests.unit.states_in_tests import save_state
from tests.unit.test_adapters import base_in
from tests.unit.test_export import JOB, MODELS
from tests.unit.tiny_model import CPU, random_gradient, settle, update

TOP = 4
UNTIED = MODELS["llama"].replace("}", ", tie_word_embeddings: false}")


def job_of(base: Path, directory: Path, top_k: int = TOP, **data: Any) -> Job:
    source = write(directory / "records.jsonl", completions())
    return Job.model_validate({
        "name": "taught",
        "model": {"hf": str(base)},
        "objective": {"name": "distill", "teacher": str(base), "top_k": top_k},
        "data": {"source": str(source), "tokenizer": str(base), "sequence_length": 32, "packing": "pack",
                 "field": "prompt", "cache": str(directory / "cache"), **data},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2},
        "elastic": {"virtual_workers": 4, "workers": {"max": 1}},
    })  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_in(tmp_path_factory.mktemp("base"))


def batches(job: Job) -> Any:
    stores = [(store.directory, store.digest, ()) for store in prepare_stores(job, verify=False)]
    return dataset_of(job, open_stores(job, stores)).batch


class Refusing(LocalTeacher):
    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        raise AssertionError(f"asked about {len(questions)} rows that are known")


@pytest.mark.parametrize("mask", [True, False], ids=["documents apart", "rows whole"])
def test_answers_are_the_likeliest_tokens_of_each_row_by_itself(base: Path, tmp_path: Path, mask: bool) -> None:
    from transformers import AutoModelForCausalLM

    job = job_of(base, tmp_path, document_mask=mask)
    batch = Teaching(job, CPU).joined(batches(job)(0, 1))
    assert batch.taught is not None
    assert batch.documents is not None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for row in range(len(batch.tokens)):
        length = int((batch.documents[row] >= 0).sum()) - 1
        # Documents apart: each is what the model gives for it alone.
        marks = batch.documents[row, :length]
        pieces = np.split(np.arange(length), np.flatnonzero(np.diff(marks)) + 1) if mask else [np.arange(length)]
        for piece in pieces:
            with torch.no_grad():
                logits = model(input_ids=torch.from_numpy(batch.tokens[row, piece])[None]).logits[0]
            expected = logits.topk(TOP)
            torch.testing.assert_close(torch.from_numpy(batch.taught[0][row, piece]), expected.values)
            assert np.array_equal(batch.taught[1][row, piece], expected.indices.numpy())
        assert not batch.taught[0][row, length:].any()


def more_threads(job: Job) -> Job:
    return job.model_copy(update={"resources": job.resources.model_copy(update={"cpu": 2})})


def test_a_row_is_asked_about_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(base, tmp_path)
    fetch = batches(job)
    first = Teaching(job, CPU)
    taught = first.joined(fetch(0, 0)).taught
    assert first.questions == 2
    again = Teaching(job, CPU, Refusing(job, CPU)).joined(fetch(0, 0)).taught
    assert again is not None
    assert taught is not None
    assert all(np.array_equal(one, other) for one, other in zip(taught, again, strict=True))
    with pytest.raises(AssertionError, match="asked about 2 rows"):
        Teaching(job, CPU, Refusing(job, CPU)).joined(fetch(0, 1))
    # Other threads and other devices round otherwise.
    elsewhere = Refusing(job, CPU)
    monkeypatch.setattr(Refusing, "device", property(lambda self: "another device"))
    for differing, ask in [(job, elsewhere), (more_threads(job), LocalTeacher(job, CPU))]:
        asks = Teaching(differing, CPU, ask)
        with pytest.raises(AssertionError, match="asked") if ask is elsewhere else nullcontext():
            asks.joined(fetch(0, 0))
            assert asks.questions == 2
    # What is damaged is asked about again; a place that cannot be written costs time only.
    kept = first._cache._path
    assert kept.parent == tmp_path / "cache"
    with sqlite3.connect(kept) as connection:
        connection.execute("UPDATE answers SET content = zeroblob(length(content))")
    repaired = Teaching(job, CPU)
    assert np.array_equal(repaired.joined(fetch(0, 0)).taught[1], taught[1])  # type: ignore[index]
    assert repaired.questions == 2
    nowhere = job_of(base, tmp_path, cache=str(kept))
    other = Teaching(nowhere, CPU)
    assert np.array_equal(other.joined(fetch(0, 0)).taught[1], taught[1])  # type: ignore[index]


def test_the_memory_of_a_teacher_that_nobody_asks_is_given_back(base: Path, tmp_path: Path) -> None:
    from orchestrator.training.compared import _loaded

    job = job_of(base, tmp_path)
    fetch, teaching = batches(job), Teaching(job, CPU)
    teaching.joined(fetch(0, 0))
    assert _loaded.cache_info().currsize == 1
    for _ in range(64):
        teaching.joined(fetch(0, 0))
    assert _loaded.cache_info().currsize == 0
    teaching.joined(fetch(0, 2))
    assert _loaded.cache_info().currsize == 1


def test_with_all_tokens_the_loss_is_that_of_the_whole_distribution() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, given = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 11, (2, 6), generator=generator)
    counting = torch.rand(2, 5, generator=generator) < 0.7
    settings = DistillSettings(teacher="t", temperature=2.0, alpha=0.3)
    live = Distill(settings, lambda ids, places: given).loss(logits, Rows(tokens, counting))
    values, ids = given.sort(dim=-1, descending=True)
    rows = Rows(tokens, counting, taught=(values, ids.to(torch.int32)))
    torch.testing.assert_close(Distill(settings).loss(logits, rows), live)
    # By hand, of the two likeliest: p log(p / q), p being one over both of them.
    two = Rows(tokens, counting, taught=(values[..., :2], ids[..., :2].to(torch.int32)))
    p = (values[..., :2] / 2).softmax(-1)
    q = (logits / 2).log_softmax(-1).gather(-1, ids[..., :2])
    by_hand = ((p * (p.log() - q)).sum(-1) * counting).sum()
    usual = Distill(DistillSettings(teacher="t", alpha=1.0)).loss(logits, Rows(tokens, counting))
    torch.testing.assert_close(Distill(settings).loss(logits, two), 0.3 * usual + 0.7 * by_hand)


def test_tokens_that_the_student_has_not_are_left_out() -> None:
    logits = torch.randn(1, 2, 4).requires_grad_()
    taught = (torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[9, 1], [2, 0]]], dtype=torch.int32))
    settings = DistillSettings(teacher="t", alpha=0.0)
    loss = Distill(settings).loss(logits, Rows(torch.zeros(1, 3, dtype=torch.int64), taught=taught))
    q = logits.log_softmax(-1)[0]
    p = torch.tensor([1.0, 0.0]).softmax(-1)
    torch.testing.assert_close(loss, -q[0, 1] + (p * (p.log() - q[1, [2, 0]])).sum())
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_position_where_the_student_has_none_of_the_tokens_teaches_nothing() -> None:
    logits = torch.randn(1, 2, 4).requires_grad_()
    taught = (torch.tensor([[[3.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[9, 8], [2, 0]]], dtype=torch.int32))
    objective = Distill(DistillSettings(teacher="t", alpha=0.0))
    loss = objective.loss(logits, Rows(torch.zeros(1, 3, dtype=torch.int64), taught=taught))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert not logits.grad[0, 0].any()
    assert logits.grad[0, 1].any()


def test_who_only_tries_a_model_asks_nobody(base: Path, tmp_path: Path) -> None:
    job = job_of(base, tmp_path)
    teaching = Teaching(job, CPU, Refusing(job, CPU))
    teaching.is_trying = True
    taught = teaching.joined(batches(job)(0, 0)).taught
    assert taught is not None
    assert [each.shape[-1] for each in taught] == [TOP, TOP]
    assert not taught[0].any()


def test_a_run_is_a_teacher(tmp_path: Path) -> None:
    """By its newest checkpoint when a run begins, and by that also when there are newer ones."""
    run, model = run_in(tmp_path / "first", steps=(2, 3))
    job = job_of(base_in(tmp_path), tmp_path)
    asked = job.model_dump(exclude_unset=True) | {
        "objective": {"name": "distill", "teacher": str(run), "top_k": TOP}
    }  # fmt: skip
    job = with_compared(Job.model_validate(asked))
    assert job.objective.settings["teacher"] == f"{run}@3"
    loaded = load_teacher(job, CPU)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    release_teacher()
    # Another version of transformers writes another configuration of the same weights, to another cache.
    written = find_model(f"{run}@3").directory
    config = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps(config | {"transformers_version": "99"}))
    assert with_compared(job) == job
    shutil.rmtree(written)
    assert with_compared(job) == job
    add_checkpoint(run, 4)
    assert with_compared(job) == job
    other = with_compared(Job.model_validate(asked))
    assert other.objective.settings["teacher"] == f"{run}@4"
    assert other.digest() != job.digest()
    with pytest.raises(ModelError, match=r"has no checkpoint of 9 steps \(there: 4\)"):
        with_compared(Job.model_validate(asked | {"objective": asked["objective"] | {"teacher": f"{run}@9"}}))
    # The same job file goes on with that run.
    assert _like(job, Job.model_validate(asked), False).numerics() == job.numerics()


def run_in(directory: Path, steps: Sequence[int]) -> tuple[Path, torch.nn.Module]:
    """A run directory with checkpoints after these numbers of updates, and the model of the last."""
    text = JOB.format(hf=UNTIED)
    RunDirectory(directory).create(text, Job.loads(text).resolved())
    for step in steps:
        model = add_checkpoint(directory, step)
    return directory, model


def add_checkpoint(directory: Path, step: int) -> torch.nn.Module:
    run = RunDirectory(directory)
    job = run_job(run)
    state = build.build_state(job, ByteTokenizer.vocab_size, CPU)
    settle(state)
    for number in range(step):
        update(state, random_gradient(state, number))
    save_state(state, catalog_of(run, job), Save(step, 1, 0))
    model = build_model(job, ByteTokenizer.vocab_size)
    model.load_state_dict({name[6:]: t for name, t in state.named() if name.startswith("model.")})
    return model


def test_a_teacher_is_known_by_its_content(base: Path, tmp_path: Path) -> None:
    job = with_compared(job_of(base, tmp_path))
    copied = base_in(tmp_path / "elsewhere")
    same = with_compared(job.model_copy(update={"objective": job_of(copied, tmp_path).objective}))
    assert same.digest() == job.digest(), "wherever it lies"
    assert str(job.objective.settings["content"]).startswith("sha256:")
    changed = job.model_dump()
    changed["objective"]["content"] = "sha256:" + "0" * 64
    with pytest.raises(ModelError, match="it is not the teacher that the job was made for"):
        with_compared(Job.model_validate(changed))
    with pytest.raises(ModelError, match=r"top_k = 5000 is more than the [0-9]+ tokens that"):
        with_compared(job_of(base, tmp_path, top_k=5000))
    learns = {**job.objective.settings, "name": "distill", "alpha": 1.0}
    with pytest.raises(JobError, match="alpha = 1 learns from labels alone, and no teacher is asked"):
        Job.model_validate(job.model_dump() | {"objective": learns, "elastic": {"virtual_workers": 4, "teachers": 1}})
    with pytest.raises(JobError, match=r"top_k knows the teacher's likeliest tokens only, and beta = 0\.5"):
        Job.model_validate(job.model_dump() | {"objective": {**job.objective.settings, "name": "distill", "beta": 0.5}})


def test_equally_likely_tokens_come_in_their_order(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Same(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 300)})

    monkeypatch.setattr("orchestrator.training.teaching.load_teacher", lambda job, device: Same())
    (answer,) = LocalTeacher(job_of(base, tmp_path), CPU)([Question(np.arange(5), None)])
    assert answer.tokens.tolist() == [[0, 1, 2, 3]] * 4
