"""The examples of fine-tuning, shortened, as a user runs them: with a worker killed while it evaluates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import records
from monitoring.records import read_records
from tests.cluster.command_line import CommandLine
from tests.cluster.conftest import LLAMA, PATIENCE_S
from tests.in_process import orchestrator
from tests.records_in_tests import write
from tests.selection import nightly

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = ("--set", "train.schedule.warmup_ratio=0", "--set", "train.global_batch=16", "--json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the records that the examples train on."""
    directory = tmp_path_factory.mktemp("records")
    known = records.answers()[:120]
    write(directory / "paragraphs.jsonl", records.labelled()[:160])
    write(directory / "chats.jsonl", [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in known
    ])  # fmt: skip
    write(directory / "preferences.jsonl", [
        {"prompt": ask, "chosen": answer, "rejected": other}
        for (ask, answer), (_, other) in zip(known, known[1:] + known[:1], strict=True)
        if answer != other
    ])  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A small model that was trained a little, as a directory."""
    command = CommandLine(tmp_path_factory.mktemp("base"), cache)
    process = command.start(
        "--set", LLAMA, "--set", "train.steps=2", "--set", "train.schedule.warmup_steps=1",
        "--set", "elastic.workers.max=1", "--set", "data.sequence_length=192", "--set", "train.global_batch=8",
    )  # fmt: skip
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    done = orchestrator("export", str(command.run_dir), "--to", str(command.home / "model"))
    assert done.returncode == 0, done.stdout + done.stderr
    return command.home / "model"


def train(command: CommandLine, example: str, *options: str, faults: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs an example, shortened; its result."""
    command.job = EXAMPLES / f"{example}.yaml"
    process = command.start(*FEW, *options, *(part for fault in faults for part in ("--fault", fault)))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def evaluations(command: CommandLine) -> list[dict[str, Any]]:
    return [each for each in read_records(command.run_dir / "events.jsonl") if each["kind"] == "evaluation"]


def test_a_classifier_is_trained_judged_and_exported(tmp_path: Path, cache: Path, made: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    command = CommandLine(tmp_path, cache)
    options = [
        "--set", f"data.source={made}/paragraphs.jsonl", "--set", "train.epochs=null", "--set", "train.steps=6",
        "--set", "evaluation={share: 0.2, every_steps: 2, at_start: true, best: {metric: f1_macro, mode: max}}",
    ]  # fmt: skip
    result = train(command, "classify", *options, faults=("step=4,worker=1,kind=kill,phase=evaluate",))
    found = evaluations(command)
    assert [each["step"] for each in found] == [0, 2, 4, 6]
    assert [each["incident"] for each in read_records(command.run_dir / "events.jsonl")
            if each["kind"] == "incident"][:1] == ["kill"]  # fmt: skip
    assert {"loss", "accuracy", "f1_macro", "confusion", "per_class"} <= found[-1]["metrics"].keys()
    assert result["evaluation"]["last"] == {"step": 6, **found[-1]["metrics"]}
    best = max(found, key=lambda each: (each["metrics"]["f1_macro"], -each["step"]))
    assert result["evaluation"]["best"]["step"] == best["step"]
    alone = json.loads(orchestrator("evaluate", str(command.run_dir), "--json").stdout)
    assert alone == {"step": 6, **found[-1]["metrics"]}, "by itself it gives the same, to the bit"
    assert "after 6 steps: loss" in orchestrator("status", str(command.run_dir)).stdout
    assert best["step"] > 0, "it has learnt something"
    assert {path.name for path in (command.run_dir / "checkpoints").iterdir()} >= {f"step-{best['step']:08d}"}
    done = orchestrator("export", str(command.run_dir), "--to", str(tmp_path / "model"), "--best")
    assert done.returncode == 0, done.stdout + done.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.num_labels == 3
    assert list(model.config.id2label.values()) == ["code", "documentation", "licence"]
    report = orchestrator("report", str(command.run_dir))
    assert report.returncode == 0, report.stderr
    assert "<h2>Evaluations</h2>" in (command.run_dir / "report.html").read_text(encoding="utf-8")


def test_an_adapter_is_trained_and_exported(tmp_path: Path, cache: Path, made: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    command = CommandLine(tmp_path, cache)
    result = train(
        command, "lora", "--set", f"model.hf={base}", "--set", f"data.source={made}/preferences.jsonl",
        "--set", "train.steps=4", "--set", "evaluation={share: 0.2, every_steps: 2, at_start: true}",
        faults=("step=4,worker=0,kind=kill,phase=tally",),
    )  # fmt: skip
    found = evaluations(command)
    assert [each["step"] for each in found] == [0, 2, 4]
    assert result["evaluation"]["last"]["loss"] < found[0]["metrics"]["loss"]
    for options, target in ((), "adapter"), (("--merge",), "merged"):
        done = orchestrator("export", str(command.run_dir), "--to", str(tmp_path / target), *options)
        assert done.returncode == 0, done.stdout + done.stderr
    ids = torch.arange(40).reshape(2, 20) * 6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=0, atol=1e-5)
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors"))
    saved = sum(path.stat().st_size for path in (command.run_dir / "checkpoints").rglob("*.safetensors"))
    assert saved < 3.3 * size, "weights and two moments of the adapter, and nothing of its base"


@pytest.mark.parametrize("example", ["dpo", *nightly(["sft", "distill"])])
def test_the_other_examples_run(tmp_path: Path, cache: Path, made: Path, base: Path, example: str) -> None:
    sources = {"sft": f"{made}/chats.jsonl", "dpo": f"{made}/preferences.jsonl"}
    models = {"dpo": f"model.hf={base}", "distill": f"objective.teacher={base}"}
    command = CommandLine(tmp_path, cache)
    evaluation = "evaluation={share: 0.2, every_steps: 3, at_start: true, samples: 20}"
    options = ["--set", "train.steps=3", "--set", evaluation]
    if example in sources:
        options += ["--set", f"data.source={sources[example]}"]
    if example in models:
        options += ["--set", models[example]]
    train(command, example, *options)
    first, last = evaluations(command)
    if example == "dpo":  # Three steps teach it nothing about other pairs.
        assert first["metrics"]["loss"] == pytest.approx(0.693147, abs=1e-6), "the policy is its reference"
        assert first["metrics"]["margin"] == 0 != last["metrics"]["margin"]
    else:
        assert last["metrics"]["loss"] < first["metrics"]["loss"]
