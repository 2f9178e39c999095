"""The examples of fine-tuning, shortened, as a user runs them: with a worker killed while it evaluates."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
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
        alone = json.loads(orchestrator("evaluate", str(command.run_dir), "--json").stdout)
        assert alone == {"step": 3, **last["metrics"]}, "beside the same reference"
    else:
        assert last["metrics"]["loss"] < first["metrics"]["loss"]


@pytest.mark.nightly
def test_teachers_answer_from_processes_of_their_own(tmp_path: Path, cache: Path, base: Path) -> None:
    """One is killed, also the only one; what the student learns is what it learns from a teacher in its own process."""
    results = []
    for teachers in (0, 1, 2):
        home = tmp_path / str(teachers)
        home.mkdir()
        command = CommandLine(home, home / "cache")
        command.job = EXAMPLES / "distill.yaml"
        process = command.start(
            *FEW, "--set", "train.steps=12", "--set", f"objective.teacher={base}", "--set", "objective.top_k=8",
            "--set", "evaluation={share: 0.01, every_steps: 12, samples: 8}", "--set", f"elastic.teachers={teachers}",
            "--set", "elastic.workers.max=1", "--set", f"data.source={text_in(tmp_path)}",
            "--set", "data.document=line",
        )  # fmt: skip
        if teachers:
            wait_for(lambda command=command: steps_of(command) >= 2, process)
            victims = teachers_of(process.pid)
            assert len(victims) == teachers
            victims[0].kill()
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output
        results.append(json.loads(output))
        if teachers:
            assert not any(victim.is_running() for victim in victims), "they end with the run"
    alone, *others = results
    for asked in others:
        assert asked["state_digest"] == alone["state_digest"]
        assert asked["evaluation"] == alone["evaluation"]
        assert asked["recoveries"] == [], "nobody takes a worker that waits for a teacher for stuck"


def text_in(directory: Path) -> Path:
    """Lines to learn from."""
    path = directory / "lines.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(4000)))
    return path


def steps_of(command: CommandLine) -> int:
    path = command.run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_for(condition: Any, process: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def teachers_of(pid: int) -> list[psutil.Process]:
    """The processes with teachers of a driver's own cluster."""
    children = psutil.Process(pid).children(recursive=True)
    return [each for each in children if any("ray::TeacherActor" in part for part in each.cmdline())]
