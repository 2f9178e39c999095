"""A teacher's likeliest tokens: what they are, what a student makes of them, and that they are asked for once."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.of_job import dataset_of, open_stores, prepare_stores
from orchestrator.job import Job, JobError
from orchestrator.models.content import with_content
from orchestrator.models.problems import ModelError
from orchestrator.training.teaching import Answer, LocalTeacher, Question, Teaching
from strategies.objective.distill import Distill, DistillSettings
from strategies.objective.rows import Rows
from tests.records_in_tests import completions, write
from tests.unit.test_adapters import base_in
from tests.unit.tiny_model import CPU

TOP = 4


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


def refuse(questions: Sequence[Question]) -> list[Answer]:
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


def test_a_row_is_asked_about_once(base: Path, tmp_path: Path) -> None:
    job = job_of(base, tmp_path)
    fetch = batches(job)
    first = Teaching(job, CPU)
    taught = first.joined(fetch(0, 0)).taught
    assert first.questions == 2
    again = Teaching(job, CPU, refuse).joined(fetch(0, 0)).taught
    assert again is not None
    assert taught is not None
    assert all(np.array_equal(one, other) for one, other in zip(taught, again, strict=True))
    with pytest.raises(AssertionError, match="asked about 2 rows"):
        Teaching(job, CPU, refuse).joined(fetch(0, 1))
    # What is damaged is asked about again; a place that cannot be written costs time only.
    (kept,) = (tmp_path / "cache").glob("teacher-*.sqlite")
    with sqlite3.connect(kept) as connection:
        connection.execute("UPDATE answers SET content = zeroblob(length(content))")
    repaired = Teaching(job, CPU)
    assert np.array_equal(repaired.joined(fetch(0, 0)).taught[1], taught[1])  # type: ignore[index]
    assert repaired.questions == 2
    nowhere = job_of(base, tmp_path, cache=str(kept))
    other = Teaching(nowhere, CPU)
    assert np.array_equal(other.joined(fetch(0, 0)).taught[1], taught[1])  # type: ignore[index]


def test_the_memory_of_a_teacher_that_nobody_asks_is_given_back(base: Path, tmp_path: Path) -> None:
    from orchestrator.models.teacher import _loaded

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


def test_a_teacher_is_known_by_its_content(base: Path, tmp_path: Path) -> None:
    job = with_content(job_of(base, tmp_path))
    copied = base_in(tmp_path / "elsewhere")
    same = with_content(job.model_copy(update={"objective": job_of(copied, tmp_path).objective}))
    assert same.digest() == job.digest(), "wherever it lies"
    assert str(job.objective.settings["content"]).startswith("sha256:")
    changed = job.model_dump()
    changed["objective"]["content"] = "sha256:" + "0" * 64
    with pytest.raises(ModelError, match="it is not the teacher that the job was made for"):
        with_content(Job.model_validate(changed))
    with pytest.raises(JobError, match=r"top_k knows the teacher's likeliest tokens only, and beta = 0\.5"):
        Job.model_validate(job.model_dump() | {"objective": {**job.objective.settings, "name": "distill", "beta": 0.5}})


def test_equally_likely_tokens_come_in_their_order(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Same(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 300)})

    monkeypatch.setattr("orchestrator.training.teaching.load_teacher", lambda job, device: Same())
    (answer,) = LocalTeacher(job_of(base, tmp_path), CPU)([Question(np.arange(5), None)])
    assert answer.tokens.tolist() == [[0, 1, 2, 3]] * 4
