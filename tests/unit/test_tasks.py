"""Tasks of lm-eval give what the library's own model of transformers gives; bytes of text are those of the text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data.sources import DataError
from orchestrator.data.tokenizers import byte_lengths, load_tokenizer
from orchestrator.evaluation.judge import NOT_YET
from orchestrator.job import Job, JobError
from orchestrator.training.evaluate_alone import evaluate_model
from orchestrator.training.tasks import load_tasks
from tests.ranks.tuned import engine_of
from tests.records_in_tests import completions, write
from tests.tasks_in_tests import WORDS, write_tasks
from tests.unit.test_adapters import base_in
from tests.unit.tiny_model import settle


def job_of(base: Path, directory: Path, tasks: list[str], **evaluation: Any) -> Job:
    source = write(directory / "records.jsonl", completions())
    return Job.model_validate({
        "name": "asks",
        "model": {"hf": str(base)},
        "objective": {"name": "sft"},
        "data": {"source": str(source), "tokenizer": str(base), "sequence_length": 96, "packing": "pad",
                 "cache": str(directory / "cache")},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 2, "schedule": {"name": "constant"}},
        "elastic": {"virtual_workers": 4, "workers": {"max": 1}},
        "evaluation": {"at_start": True, "tasks": tasks, **evaluation},
    })  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_in(tmp_path_factory.mktemp("base"))


def librarys_own(base: Path, job: Job) -> dict[str, float]:
    """What lm-eval finds of the same model, by its own code."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked: Any = HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(base), max_length=96, batch_size=1, device="cpu"
    )
    tasks = list(load_tasks(job)["tasks"].values())
    found: Any = evaluator.simple_evaluate(asked, tasks=tasks, bootstrap_iters=0, log_samples=False)
    return {
        f"{task}/{key.removesuffix(',none')}": value
        for task, values in found["results"].items()
        for key, value in values.items()
        if isinstance(value, float) and "stderr" not in key
    }


def said_by(base: Path, directory: Path) -> str:
    """What the model says to the first of the questions, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked = tokenizer(f"{WORDS[0]} {WORDS[1]}", return_tensors="pt", add_special_tokens=False)
    given = model.generate(**asked, max_new_tokens=5, do_sample=False)
    return str(tokenizer.decode(given[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).split("x")[0]


def test_metrics_are_those_that_the_library_finds_by_itself(base: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path, says=(0, said_by(base, tmp_path)))
    job = job_of(base, tmp_path, list(map(str, tasks)))
    engine, evaluator = engine_of(job, tmp_path / "storage")
    fabric = settle(engine.state, 4)
    engine.bind(fabric, fabric.layout, 0)
    evaluator.prepare(fabric, 0)
    report = evaluator.evaluate(0, 0, NOT_YET)
    assert report is not None
    assert report.samples == 0
    assert evaluator.moves > 10
    expected = librarys_own(base, job)
    assert report.metrics.keys() == expected.keys()
    assert {name.split("/")[0] for name in expected} == {"choices", "texts", "says"}
    for name, value in expected.items():
        assert report.metrics[name] == pytest.approx(value, rel=1e-5), name
    assert 0 < report.metrics["choices/acc"] < 1
    assert 0 < report.metrics["says/exact_match"] < 1, "one of the answers is what it says"
    again = evaluator.evaluate(0, 0, NOT_YET)
    assert again is not None
    assert again.metrics == report.metrics, "the examples are drawn alike each time"
    alone = evaluate_model(base, {
        "data": {"sequence_length": 96, "packing": "pad", "source": job.data.source},
        "objective": {"name": "sft"},
        "train": {"micro_batch": 2, "global_batch": 16},
        "evaluation": {"tasks": list(map(str, tasks))},
    })  # fmt: skip
    assert alone == report.metrics


def test_what_cannot_be_asked_is_said(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lm-eval [\d.]+ knows no nothing_of_that_name"):
        load_tasks(job_of(base, tmp_path, ["nothing_of_that_name"]))
    with pytest.raises(DataError, match=r"absent.yaml cannot be read"):
        load_tasks(job_of(base, tmp_path, [str(tmp_path / "absent.yaml")]))
    bad = tmp_path / "bad.yaml"
    bad.write_text("task: bad\ndataset_path: json\ndataset_kwargs: {data_files: /nowhere/at/all.jsonl}\n")
    with pytest.raises(DataError, match=r"bad cannot be loaded: .*must be on this machine"):
        load_tasks(job_of(base, tmp_path, [str(bad)]))
    kinds = {
        "draws": ("{do_sample: true, temperature: 0.5}", "draws its answers"),
        "long": ("{until: ['x'], max_gen_toks: 96}", r"96 tokens generated, and data.sequence_length = 96 leaves no"),
        "unsaid": ("{until: ['x']}", "256 tokens generated"),
        "code": ("{max_gen_toks: 4}\nunsafe_code: true", "runs code"),
    }
    write_tasks(tmp_path)
    for name, (settings, reason) in kinds.items():
        path = tmp_path / f"{name}.yaml"
        text = (tmp_path / "says.yaml").read_text().replace("task: says", f"task: {name}")
        path.write_text(re.sub(r"generation_kwargs: \{.*\}", f"generation_kwargs: {settings}", text))
        with pytest.raises(DataError, match=f"evaluation.tasks: {name} .*{reason}"):
            load_tasks(job_of(base, tmp_path, [str(path)]))
    with pytest.raises(DataError, match=r"arc_easy cannot be loaded: .*must be on this machine"):
        load_tasks(job_of(base, tmp_path, ["arc_easy"]))
    with pytest.raises(JobError, match="there is no loss where nothing is held out"):
        job_of(base, tmp_path, ["arc_easy"], early_stop={"patience": 2})
    with pytest.raises(JobError, match="task_samples says how much of tasks is asked, and there are none"):
        job_of(base, tmp_path, [], share=0.1, task_samples=3)
    with pytest.raises(JobError, match="must have one of share and data, or tasks"):
        job_of(base, tmp_path, [])
    with pytest.raises(JobError, match="of objective classification give no next token"):
        Job.model_validate(
            job_of(base, tmp_path, ["arc_easy"]).resolved() | {"objective": {"name": "classification", "labels": 2}}
        )


TEXT = "Élan vital: naïve cafés, 中文, and 😀 — 12,345 \t tabs\n" * 3


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "byte-fallback"])
def test_bytes_of_tokens_add_up_to_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(kind if kind == "bytes" else str(trained(kind, tmp_path)))
    lengths = byte_lengths(tokenizer)
    assert lengths is not None
    assert len(lengths) == tokenizer.vocab_size
    assert lengths[tokenizer.end_of_document] == 0
    # SentencePiece's own first space.
    more = 1 if kind == "byte-fallback" else 0
    assert lengths[tokenizer.encode(TEXT)].sum() == len(TEXT.encode()) + more


def trained(kind: str, directory: Path) -> Path:
    """A tokenizer of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
        alphabet = []
    special = ["</s>", "<unk>", *([f"<0x{number:02X}>" for number in range(256)] if kind == "byte-fallback" else [])]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special[:2], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a text of plain words, and plain words of a text " * 9], trainer)
    if kind == "byte-fallback":
        known = json.loads(tokenizer.to_str())
        vocabulary = known["model"]["vocab"]
        for token in special[2:]:
            vocabulary[token] = len(vocabulary)
        tokenizer = Tokenizer.from_str(json.dumps(known))
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"
