"""What `validate` finds out of first records, as a run would encode them, and what it shows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.of_job import prepare_stores
from orchestrator.data.records import MARK
from orchestrator.data.sources import DataError
from orchestrator.data.tokenizers import load_tokenizer
from orchestrator.data.trying import as_text, try_data
from orchestrator.job import Job
from tests.ranks.tuned import OBJECTIVES, job_of
from tests.records_in_tests import chats, completions, write
from tests.unit.test_cli import orchestrator


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_records_of_every_objective_are_what_is_trained_on(name: str, tmp_path: Path) -> None:
    job = job_of(name, tmp_path)
    tokenizer = load_tokenizer(job.data.tokenizer)
    shown = try_data(job, 3)
    assert len(shown) == 3
    (store,) = prepare_stores(job, verify=False)
    start = 0
    for each, length in zip(shown, store.document_lengths()[:3], strict=True):
        assert each.counts is not None
        assert each.counts.any()
        kept = np.empty(len(each.ids), dtype=np.int64)
        store.read(start, kept)
        assert np.array_equal(kept & ~MARK, each.ids)
        assert np.array_equal((kept & MARK) != 0, each.counts)
        start += int(length)
        assert "[[" in as_text(each, tokenizer)


def test_what_counts_is_shown_in_brackets(tmp_path: Path) -> None:
    job = changed(job_of("sft", tmp_path), sequence_length=200)
    (shown,) = try_data(job, 1)
    first = chats()[0]["messages"]
    answers = [message["content"] for message in first if message["role"] == "assistant"]
    text = as_text(shown, load_tokenizer("bytes"))
    assert text.startswith(f"<|user|>{first[0]['content']}<end><|assistant|>[[{answers[0]}<end>]]<|user|>")
    assert text.endswith(f"[[{answers[1]}<end><end>]]")


def changed(job: Job, **data: Any) -> Job:
    given = job.model_dump(exclude_unset=True)
    return Job.model_validate(given | {"data": given["data"] | data})


def test_what_a_run_would_stumble_over_is_told_at_once(tmp_path: Path) -> None:
    job = job_of("sft", tmp_path)
    with pytest.raises(DataError, match="messages need a chat template"):
        try_data(changed(job, chat_template=None))
    with pytest.raises(DataError, match=r"data.chat_template: none.jinja cannot be read"):
        try_data(changed(job, chat_template="none.jinja"))
    bad = write(tmp_path / "bad.jsonl", [{"question": "?"}, *chats(1)])
    with pytest.raises(DataError, match=r"bad.jsonl:1: has the fields \['question'\]"):
        try_data(changed(job, source=str(bad)))
    skipping = changed(job, source=str(bad), on_bad_record="skip")
    assert len(try_data(skipping, 5)) == 1
    worse = write(tmp_path / "worse.jsonl", [{"question": "?"}] * 3)
    for attempt in (try_data, prepare_stores):
        with pytest.raises(DataError, match=r"all of 3 records are bad, .*the first: .*worse.jsonl:1: has the fields"):
            attempt(changed(job, source=str(worse), on_bad_record="skip"))
    elsewhere = job.model_dump(exclude_unset=True) | {"evaluation": {"data": {"source": str(tmp_path / "none.jsonl")}}}
    with pytest.raises(DataError, match=r"evaluation.data: .*nothing found"):
        try_data(Job.model_validate(elsewhere))


def test_the_command_shows_it(tmp_path: Path) -> None:
    source = write(tmp_path / "records.jsonl", completions())
    job = tmp_path / "job.yaml"
    job.write_text(
        "name: shown\nmodel: {hf: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 2}}\nobjective: {name: sft}\n"
        f"data: {{source: {source}, tokenizer: bytes, sequence_length: 64, packing: pad}}\n"
        "train: {steps: 2, global_batch: 8}\n"
    )
    said = orchestrator("validate", str(job), "--show", "2").stdout
    first = completions()[0]
    assert f"#   {first['prompt']}[[{first['completion']}<end>]]" in said
    assert said.count("of them learnt") == 2
    assert json.loads(orchestrator("validate", str(job), "--json").stdout)["job"]["name"] == "shown"
