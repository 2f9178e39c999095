"""What a rank needs in memory, beside FSDP2 and torch's own checkpointing, and what saving memory costs in time.

A model of 100 million parameters, whose ranks each have a share of it (`shard: parameters`), one copy of the state, and
one micro-batch or several for each virtual worker. Memory is the most that a process has had resident, less what it
had before it made anything but had run a tiny model, by phase: while it starts, in any of five steps, and between them.
Both sides do the same work in processes of their own, forked alike, and give free memory back when they have started.
FSDP2's model begins without memory and is filled when it is sharded; ours has its moments from the start.

Times are those of our own steps, in turn: layers that recompute beside layers that do not, and a loss in chunks beside
one at once. Ratios are taken round by round; "cpu" is the same ratio in processor seconds of all ranks together, which
hardly depends on what else the machine does.

    python benchmarks/memory.py [--ranks 2] [--rounds 8] [--steps 2] [--only memory,times] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import torch_layouts
from paired import Done, Side, Start, Turn

from orchestrator.job import Job
from strategies.layout.parallel import ParallelLayout
from strategies.update.warm_up import give_back_memory

JOB = """
name: memory
model:
  hf:
    model_type: llama
    hidden_size: 768
    intermediate_size: 2048
    num_hidden_layers: 12
    num_attention_heads: 12
    num_key_value_heads: 12
    vocab_size: 16384
    max_position_embeddings: 512
    tie_word_embeddings: false
data: {source: python-stdlib, tokenizer: bytes, sequence_length: %d}
train: {steps: 1000, global_batch: %d, micro_batch: 1, precision: fp32}
elastic: {virtual_workers: %d, workers: {min: %d, max: %d}, state_copies: 1}
strategy: {shard: parameters}
"""
LENGTH = 256
MIB = 2**20


def job_file(home: str, ranks: int, micro_batches: int = 1) -> str:
    path = Path(home) / f"memory-{micro_batches}.yaml"
    path.write_text(JOB % (LENGTH, ranks * micro_batches, ranks, ranks, ranks), encoding="utf-8")
    return str(path)


def job_of(path: str, ranks: int, recompute: str, chunk: int | None = None) -> tuple[Job, ParallelLayout]:
    overrides = [f"train.recompute={recompute}"] + ([] if chunk is None else [f"train.loss_chunk={chunk}"])
    _, layout = layouts.layout_of(path, f"dp{ranks}.parameters")
    return Job.load(path, overrides=overrides), layout


# -------------------------------------------------------------------------------------------- what a process has


def resident() -> int:
    """Bytes of this process in memory."""
    return _of_status("VmRSS")


def peak() -> int:
    """The most since `forget_peak`."""
    return _of_status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _of_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not say {name}")


def watched(start: Start, make: Callable[..., Any], *arguments: Any) -> Callable[[int], Done]:
    """A side whose steps say how much memory its process had: in `phases`, bytes."""
    _load_code()
    before = resident()
    forget_peak()
    step = make(start, *arguments)
    started = peak() - before
    # Ours has done so before its state came; from here on neither side does.
    give_back_memory()
    found = {"start-up": started, "step": 0, "between steps": 0}

    def measured(number: int) -> Done:
        forget_peak()
        done = step(number)
        found["step"] = max(found["step"], peak() - before)
        found["between steps"] = max(found["between steps"], resident() - before)
        return Done(done.loss, dict(found))

    return measured


def _load_code() -> None:
    """Code is nobody's: what transformers and torch take to train any model at all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.zeros((1, 8), dtype=torch.int64)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()


def ours(start: Start, job: Job, layout: ParallelLayout) -> Any:
    return layouts.ours(start, job, layout, 1)


def theirs(start: Start, job: Job, layout: ParallelLayout, recompute: str) -> Any:
    """FSDP2 of a model that begins without memory, with torch's own wrapper around each layer where it is to
    recompute."""
    with _built_empty(recomputes=recompute != "none"):
        return torch_layouts.make(start, job, layout, "FSDP2 sync")


@contextlib.contextmanager
def _built_empty(*, recomputes: bool) -> Any:
    """What models are built meanwhile have parameters without memory, and layers that recompute if that is asked."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    from orchestrator.models.initialisation import without_parameters
    from orchestrator.models.loading import empty_model

    build = torch_layouts.build_model

    def built(job: Job, vocab_size: int) -> Any:
        with without_parameters():
            model: Any = empty_model(job)
        for number, layer in enumerate(model.model.layers if recomputes else ()):
            model.model.layers[number] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        return model

    torch_layouts.build_model = built  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch_layouts.build_model = build  # type: ignore[attr-defined]


def share_of(job: Job, ranks: int) -> tuple[int, int]:
    """Bytes that a rank keeps of the state (weights, which are gathered from where they are updated, and moments), and
    of the largest tensor."""
    from orchestrator.models.costs import describe_model
    from orchestrator.models.loading import empty_model

    parameters = describe_model(job).parameters
    largest = max(parameter.numel() for parameter in empty_model(job).parameters())
    return (4 + 8) * parameters // ranks, 4 * largest


# -------------------------------------------------------------------------------------------- rounds


def memory(path: str, ranks: int, recompute: str) -> dict[str, dict[str, int]]:
    """Bytes by side and phase, of the rank that has most. One side after the other: no process sees the other's."""
    job, layout = job_of(path, ranks, recompute)
    found = {}
    sides: dict[str, tuple[Any, ...]] = {
        "ours": (layouts.serve, watched, ours, job, layout),
        "FSDP2": (torch_layouts.serve, watched, theirs, job, layout, recompute),
    }
    for name, (serve, make, *arguments) in sides.items():
        side = Side(name, ranks, serve, make, *arguments)
        try:
            side.turn(0, 2)
            turn = side.turn(3, 1)  # Each has the most so far.
        finally:
            side.close()
        found[name] = {phase: int(max(rank[phase] for rank in turn.phases)) for phase in turn.phases[0]}
    return found


def times(path: str, ranks: int, rounds: int, steps: int) -> dict[str, list[Turn]]:
    """Turns by side, one of each round."""
    kinds = {"plain": ("none", None), "recompute: full": ("full", None), "loss in 4 chunks": ("none", LENGTH // 4)}
    sides = []
    try:
        for name, (recompute, chunk) in kinds.items():
            job, layout = job_of(path, ranks, recompute, chunk)
            sides.append(Side(name, ranks, layouts.serve, ours, job, layout))
        for side in sides:
            side.turn(0, 1)
        found: dict[str, list[Turn]] = {name: [] for name in kinds}
        for number in range(rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                found[side.name].append(side.turn(2 + number * (steps + 1), steps))
    finally:
        for side in sides:
            side.close()
    return found


def show_memory(figures: dict[str, Any]) -> None:
    share, largest = figures["share_bytes"], figures["largest_tensor_bytes"]
    print(f"\n{'recompute':<16}{'phase':<16}{'ours, MiB':>12}{'FSDP2, MiB':>12}{'ratio':>8}")
    for recompute, by_side in figures["memory"].items():
        for phase, own in by_side["ours"].items():
            other = by_side["FSDP2"][phase]
            print(f"{recompute:<16}{phase:<16}{own / MIB:>12,.0f}{other / MIB:>12,.0f}{own / other:>8.2f}")
    print(
        f"a rank's share of the state {share / MIB:,.0f} MiB, the largest tensor {largest / MIB:,.0f} MiB; "
        f"the goal at start-up, both and a tenth: {1.1 * (share + largest) / MIB:,.0f} MiB"
    )


def show_times(seconds: dict[str, list[float]], cpu_seconds: dict[str, list[float]]) -> None:
    # A chunk is 1,024 positions by default, and a micro-batch has no more: then there is nothing to cut.
    for name, beside in (("recompute: full", "plain"), ("loss in 4 chunks", "plain")):
        wall, cpu = (
            sorted(one / other for one, other in zip(each[name], each[beside], strict=True))
            for each in (seconds, cpu_seconds)
        )
        print(
            f"{name} / {beside}: {statistics.median(wall):.3f} ({wall[0]:.3f} to {wall[-1]:.3f}), "
            f"cpu {statistics.median(cpu):.3f} ({cpu[0]:.3f} to {cpu[-1]:.3f}), "
            f"{statistics.median(seconds[name]):.3f} s a step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", default="memory,times", help="which parts to run")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        path = job_file(home, asked.ranks)
        share, largest = share_of(Job.load(path), asked.ranks)
        figures: dict[str, Any] = {
            "benchmark": "memory", "ranks": asked.ranks, "share_bytes": share, "largest_tensor_bytes": largest,
        }  # fmt: skip
        if "memory" in asked.only:
            cases = (("none", 1), ("full", 1), ("full", 4))
            figures["memory"] = {
                f"{recompute}, {number} micro": memory(job_file(home, asked.ranks, number), asked.ranks, recompute)
                for recompute, number in cases
            }
            show_memory(figures)
        if "times" in asked.only:
            turns = times(path, asked.ranks, asked.rounds, asked.steps)
            figures["seconds"] = {name: [turn.seconds for turn in each] for name, each in turns.items()}
            figures["cpu_seconds"] = {name: [turn.cpu_seconds for turn in each] for name, each in turns.items()}
            show_times(figures["seconds"], figures["cpu_seconds"])
    if asked.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
