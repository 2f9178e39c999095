"""Texts that an evaluation goes on with are those that transformers generates."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.of_job import prompts_of
from orchestrator.data.sources import DataError
from orchestrator.data.tokenizers import ByteTokenizer, load_tokenizer
from orchestrator.evaluation.judge import NOT_YET
from orchestrator.job import Job, JobError
from orchestrator.training.generating import _next_tokens
from strategies.gradient.spec import StepSpec
from strategies.objective.rows import Rows
from strategies.optim.schedule import ScheduleSpec
from tests.ranks.tuned import engine_of
from tests.records_in_tests import CHATML, completions, write
from tests.unit.test_adapters import base_in
from tests.unit.tiny_model import settle

PROMPTS = ["apple stone", "river", "cloud lamp green"]


def job_of(base: Path, directory: Path, generate: dict[str, Any], **data: Any) -> Job:
    source = write(directory / "records.jsonl", completions())
    return Job.model_validate({
        "name": "says",
        "model": {"hf": str(base)},
        "objective": {"name": "sft"},
        "data": {"source": str(source), "tokenizer": str(base), "sequence_length": 64, "packing": "pad",
                 "cache": str(directory / "cache"), **data},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2, "schedule": {"name": "constant"}},
        "elastic": {"virtual_workers": 4, "workers": {"max": 1}},
        "evaluation": {"share": 0.2, "at_start": True, "generate": {"prompts": PROMPTS, **generate}},
    })  # fmt: skip


def says(job: Job, directory: Path) -> list[dict[str, str]]:
    engine, evaluator = engine_of(job, directory / "storage")
    fabric = settle(engine.state, 4)
    engine.bind(fabric, fabric.layout, 0)
    report = evaluator.evaluate(0, 0, NOT_YET)
    assert report is not None
    assert evaluator.moves > report.samples // 2
    found: list[dict[str, str]] = report.metrics["generated"]
    return found


@pytest.mark.parametrize("data", [{}, {"packing": "pack", "document_mask": True}], ids=["pad", "pack"])
def test_the_likeliest_tokens_are_those_of_transformers(tmp_path: Path, data: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_in(tmp_path)
    found = says(job_of(base, tmp_path, {"max_new_tokens": 7}, **data), tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        assert found[number] == {"prompt": prompt, "text": load_tokenizer(str(base)).decode(made.numpy())}


def test_what_is_drawn_is_the_jobs(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    job = job_of(base, tmp_path, {"temperature": 1.0, "max_new_tokens": 5})
    first = says(job, tmp_path)
    assert says(job, tmp_path) == first
    other = job.model_copy(update={"train": job.train.model_copy(update={"seed": 1})})
    assert says(other, tmp_path) != first


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1])).expand(4000, 1, 3)
    rows = Rows(
        torch.zeros((4000, 2), dtype=torch.int64), torch.ones((4000, 1), dtype=torch.bool), None, torch.arange(4000)
    )
    spec = StepSpec(0, 1, 1, 1e-3, ScheduleSpec())
    (drawn,) = _next_tokens(0, 5, 1.0, spec, logits, None, rows).values()
    counts = Counter(drawn.tolist())
    for token, share in enumerate((0.6, 0.3, 0.1)):
        assert counts[float(token)] / 4000 == pytest.approx(share, abs=0.03)
    (cold,) = _next_tokens(0, 5, 0.05, spec, logits, None, rows).values()
    assert (cold == 0).double().mean() > 0.99


def test_prompts_are_checked_before_a_run(tmp_path: Path) -> None:
    base, tokenizer = base_in(tmp_path), ByteTokenizer()
    with pytest.raises(DataError, match=r"prompt 1 has 80 tokens, .* leaves room for 1 to 32"):
        prompts_of(job_of(base, tmp_path, {"prompts": ["a", "b" * 80]}), tokenizer)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        prompts_of(job_of(base, tmp_path, {"chat": True}), tokenizer)
    (ids,) = prompts_of(job_of(base, tmp_path, {"chat": True, "prompts": ["hi"]}, chat_template=CHATML), tokenizer)
    assert tokenizer.decode(ids) == "<|user|>hi<end><|assistant|>"
    with pytest.raises(JobError, match="leaves no room for a prompt"):
        job_of(base, tmp_path, {"max_new_tokens": 64})
    text = job_of(base, tmp_path, {}).resolved() | {"objective": {"name": "classification", "labels": 2}}
    with pytest.raises(JobError, match="models of objective classification give none"):
        Job.model_validate(text)


def test_bytes_are_decoded_whatever_they_are() -> None:
    assert ByteTokenizer().decode(np.array([104, 105, 256, 300])) == "hi"
    assert ByteTokenizer().decode(np.array([0xC3])) == "�"
