"""Checkpoints as a user has them: saving a live run, looking at them, going on, taking the model elsewhere."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

import pytest
import torch

from tests.cluster.command_line import CommandLine
from tests.cluster.conftest import LLAMA, PATIENCE_S, Outcome
from tests.in_process import orchestrator

SLOW = "step=10,worker=0,kind=slow,factor=20"
WARM_UP = ("--set", "train.schedule.warmup_steps=10")
KEY = secrets.token_hex(32)


def everything_in(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def test_a_run_is_saved_looked_at_and_resumed(
    tmp_path: Path, cache: Path, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_CHECKPOINT_KEY", KEY)
    command = CommandLine(tmp_path, cache)
    run = str(command.run_dir)
    process = command.start(
        "--set", "elastic.workers.max=2", "--set", "checkpoint.encryption.key=${env:A_CHECKPOINT_KEY}",
        "--set", f"checkpoint.storage={tmp_path / 'storage'}", "--set", "checkpoint.every_steps=null", "--fault", SLOW,
    )  # fmt: skip
    command.until_step(process, 12)
    saved = orchestrator("checkpoint", run)
    assert saved.returncode == 0, saved.stdout + saved.stderr
    assert "checkpoint of" in saved.stdout
    (row,) = json.loads(orchestrator("checkpoints", run, "--json").stdout)
    assert row["valid"]
    assert row["encrypted"]
    assert row["writers"] == 2
    assert 10 < row["step"] < 40
    command.until_step(process, row["step"] + 1)  # Else the stop might have nothing more to save.
    assert orchestrator("stop", run).returncode == 0
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, output
    command.nothing_left()

    monkeypatch.delenv("A_CHECKPOINT_KEY")
    verified = orchestrator("checkpoints", run, "--verify")
    assert verified.returncode == 0, verified.stdout
    assert verified.stdout.count("every byte verified, encrypted") == 2, "the one asked for, and that of the stop"
    refused = orchestrator("resume", run)
    assert refused.returncode == 2
    assert "A_CHECKPOINT_KEY is not set" in refused.stderr

    monkeypatch.setenv("A_CHECKPOINT_KEY", KEY)
    resumed = command.spawn([sys.executable, "-m", "orchestrator", "resume", run, "--json"])
    output, _ = resumed.communicate(timeout=PATIENCE_S)
    assert resumed.returncode == 0, output
    result = json.loads(output.splitlines()[-1])
    assert result["state_digest"] == undisturbed.result.state_digest
    assert result["data_digest"] == undisturbed.result.data_digest

    content = everything_in(tmp_path)
    assert KEY.encode() not in content
    assert bytes.fromhex(KEY) not in content
    command.nothing_left()


@pytest.mark.nightly
def test_a_run_that_needs_another_key_and_one_that_is_exported(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_CHECKPOINT_KEY", KEY)
    command = CommandLine(tmp_path, cache)
    run = str(command.run_dir)
    process = command.start(
        "--set", LLAMA, "--set", "elastic.workers.max=1", "--set", "train.steps=20",
        "--set", "checkpoint.every_steps=5",
        "--set", "checkpoint.encryption.key=${env:A_CHECKPOINT_KEY}", "--fault", SLOW,
    )  # fmt: skip
    command.until_step(process, 12)
    assert orchestrator("stop", run).returncode == 0
    process.communicate(timeout=PATIENCE_S)
    monkeypatch.setenv("A_CHECKPOINT_KEY", secrets.token_hex(32))
    other_key = command.spawn([sys.executable, "-m", "orchestrator", "resume", run, "--json"])
    output, _ = other_key.communicate(timeout=PATIENCE_S)
    assert other_key.returncode == 1, output
    assert "another key" in json.loads(output.splitlines()[-1])["reason"]

    monkeypatch.setenv("A_CHECKPOINT_KEY", KEY)
    exported = orchestrator("export", run, "--to", str(tmp_path / "exported"))
    assert exported.returncode == 0, exported.stderr
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all()
    missing = orchestrator("export", run, "--to", str(tmp_path / "other"), "--step", "7")
    assert missing.returncode == 2
    assert "has no checkpoint of 7 steps" in missing.stderr


@pytest.mark.nightly
def test_a_damaged_checkpoint_is_found_and_passed_over(tmp_path: Path, cache: Path, undisturbed: Outcome) -> None:
    command = CommandLine(tmp_path, cache)
    run = str(command.run_dir)
    process = command.start("--set", "elastic.workers.max=2", "--set", "checkpoint.every_steps=5", "--fault", SLOW)
    command.until_step(process, 12)
    assert orchestrator("stop", run).returncode == 0
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, output
    rows = json.loads(orchestrator("checkpoints", run, "--json").stdout)
    newest = Path(rows[0]["location"])
    part = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    assert orchestrator("checkpoints", run).returncode == 0, "that takes reading"
    verified = orchestrator("checkpoints", run, "--verify")
    assert verified.returncode == 1
    assert "is not what was saved (digest differs)" in verified.stdout
    assert verified.stdout.count("valid, every byte verified") == len(rows) - 1

    resumed = command.spawn([sys.executable, "-m", "orchestrator", "resume", run, "--json"])
    output, _ = resumed.communicate(timeout=PATIENCE_S)
    assert resumed.returncode == 0, output
    result = json.loads(output.splitlines()[-1])
    assert result["state_digest"] == undisturbed.result.state_digest
    assert result["recoveries"][-1]["source"] == "checkpoint"
    events = orchestrator("events", run, "--kind", "checkpoint_invalid").stdout
    assert "digest differs" in events
    command.nothing_left()


@pytest.mark.nightly
def test_a_changed_job_goes_on_as_a_run_of_its_own(tmp_path: Path, cache: Path) -> None:
    command = CommandLine(tmp_path, cache)
    first = command.start("--set", "elastic.workers.max=1", "--set", "train.steps=20", *WARM_UP)
    assert first.wait(timeout=PATIENCE_S) == 0
    changed = ("--set", "elastic.workers.max=2", "--set", "train.steps=30", *WARM_UP,
               "--set", "train.optimizer.lr=5.0e-4")  # fmt: skip
    refused = command.start(*changed)
    output, _ = refused.communicate(timeout=PATIENCE_S)
    assert refused.returncode == 2
    assert "train.optimizer.lr (0.001 there, 0.0005 here), train.steps (20 there, 30 here)" in output
    assert "--fork" in output
    forked = command.start(*changed, "--fork", "--json")
    output, _ = forked.communicate(timeout=PATIENCE_S)
    assert forked.returncode == 0, output
    result = json.loads(output.splitlines()[-1])
    assert (result["status"], result["steps"]) == ("finished", 30)
    assert result["generations"][0]["start_step"] == 20
    assert 0 < result["goodput_ratio"] <= 1
    target = tmp_path / "run-fork"
    before = (command.run_dir / "metrics.jsonl").read_text().splitlines()
    after = (target / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in after[:20]] == [json.loads(line) for line in before]
    # The schedule of the new job: cosine, ten of the nineteen steps after warm-up.
    assert json.loads(after[20])["lr"] == pytest.approx(5e-4 * 0.51284, rel=1e-4)
    audit = orchestrator("audit", str(target))
    assert audit.returncode == 0, audit.stdout
    assert [row["step"] for row in json.loads(orchestrator("checkpoints", str(target), "--json").stdout)] == [30]
    assert [row["step"] for row in json.loads(orchestrator("checkpoints", str(command.run_dir), "--json").stdout)] == [
        20
    ]
    nothing_to_do = command.start(*changed[:-4], "--set", "train.steps=15", "--set", "train.seed=8", "--fork")
    output, _ = nothing_to_do.communicate(timeout=PATIENCE_S)
    assert nothing_to_do.returncode == 2
    assert "a fork would have nothing to do" in output
    command.nothing_left()


def test_a_storage_that_cannot_be_reached_is_told_before_anything_starts(tmp_path: Path, cache: Path) -> None:
    command = CommandLine(tmp_path, cache)
    refused = command.start("--set", "checkpoint.storage=http://127.0.0.1:9/there")
    output, _ = refused.communicate(timeout=PATIENCE_S)
    assert refused.returncode == 1, output
    assert "checkpoint.storage http://127.0.0.1:9/there cannot be read from here" in output
    command.nothing_left()
