"""What `orchestrator plan` prints: a table and lines for people, or one JSON value."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.planning.refusals import Refusal
from orchestrator.planning.search import Plan
from orchestrator.planning.step_time import sent_bytes
from orchestrator.planning.units import show_bytes, show_runs, show_seconds
from orchestrator.planning.work import Exchange, Work

_WIDTH = 132
_SHOWN_REFUSALS = 12


@dataclass(frozen=True)
class Answer:
    """The layouts for one number of workers, best first, and what is out."""

    workers: int
    plans: Sequence[Plan]
    refusals: Sequence[Refusal]


def as_json(job_name: str, work: Work, assumptions: Sequence[str], answers: Sequence[Answer]) -> dict[str, Any]:
    """Seconds, bytes and counts; stages are decoder layers per model part, in the order of the parts."""
    model = work.model
    return {
        "job": job_name,
        "model": {
            "parameters": model.parameters,
            "layers": model.layers,
            "heads": model.heads,
            "key_value_heads": model.key_value_heads,
            "forward_flops_per_token": model.flops_per_token,
            "kept_bytes_per_token": sum(block.kept_bytes_per_token for block in model.blocks),
            "notes": list(model.notes),
        },
        "assumptions": list(assumptions),
        "workers": [
            {
                "workers": answer.workers,
                "layouts": [_plan_json(plan, work) for plan in answer.plans],
                "out": [asdict(refusal) for refusal in answer.refusals],
            }
            for answer in answers
        ],
    }


def _plan_json(plan: Plan, work: Work) -> dict[str, Any]:
    degrees = plan.degrees
    return {
        "data": degrees.data,
        "tensor": degrees.tensor,
        "pipeline": degrees.pipeline,
        "shard": degrees.shard,
        "schedule": degrees.schedule.kind,
        "chunks": degrees.schedule.chunks,
        "recompute": plan.recompute or None,
        "stages": list(plan.layers),
        "ranks": degrees.ranks,
        "idle": plan.idle,
        "virtual_workers": [len(held) for held in plan.assignment(work.virtual_workers)],
        "step_seconds": plan.time.total,
        "step_parts_seconds": asdict(plan.time),
        "sent_bytes": round(sent_bytes(work, degrees)),
        "memory_bytes": plan.memory.total,
        "memory_parts_bytes": asdict(plan.memory),
    }


def print_answers(
    job_name: str, work: Work, assumptions: Sequence[str], answers: Sequence[Answer], everything: bool
) -> None:
    """The table, what the best layout's figures are made of, and why others are out."""
    model = work.model
    heads = f"{model.heads} heads ({model.key_value_heads} key-value), " if model.heads else ""
    print(f"{job_name}: {model.parameters:,} parameters, {model.layers} layers, {heads}"
          f"{work.virtual_workers} virtual workers of {work.micro_batches} micro-batches "
          f"of {work.tokens:,} tokens")  # fmt: skip
    for line in (*assumptions, *model.notes):
        print(f"  {line}")
    print()
    _print_table(answers)
    for answer in answers:
        if answer.plans and (len(answers) <= 3 or everything):
            _print_parts(answer, work)
    _print_refusals(answers, everything)


def _print_table(answers: Sequence[Answer]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    is_open = any(plan.recompute for answer in answers for plan in answer.plans)
    again = ("recompute",) if is_open else ()
    for name in ("workers", "data", "tensor", "pipe", "shard", "schedule", *again, "layers", "idle", "step", "compute",
                 "bubble", "messages", "memory"):  # fmt: skip
        left = name in ("shard", "schedule", "recompute", "layers")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "layers", min_width=len(name))
    for answer in answers:
        for plan in answer.plans:
            table.add_row(*_row(answer.workers, plan))
        if not answer.plans:
            table.add_row(str(answer.workers), "-", "-", "-", "nothing fits")
    # What is piped into a file has no width of its own.
    Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False).print(table)


def _row(workers: int, plan: Plan) -> list[str]:
    degrees, time = plan.degrees, plan.time
    again = [plan.recompute] if plan.recompute else []
    return [
        str(workers), str(degrees.data), str(degrees.tensor), str(degrees.pipeline), degrees.shard,
        _schedule(plan), *again, _cuts(plan.layers), str(plan.idle), show_seconds(time.total),
        show_seconds(time.compute), show_seconds(time.bubble), show_seconds(time.messages),
        show_bytes(plan.memory.total),
    ]  # fmt: skip


def _schedule(plan: Plan) -> str:
    schedule = plan.degrees.schedule
    if schedule.stages == 1:
        return "-"
    return f"interleaved x{schedule.chunks}" if schedule.kind == "interleaved-1f1b" else schedule.kind


def _cuts(layers: Sequence[int]) -> str:
    """Layers of each model part with runs folded: `9 8x3` is 9, 8, 8, 8."""
    runs: list[list[int]] = []
    for count in layers:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return " ".join(f"{count}x{times}" if times > 1 else str(count) for count, times in runs)


def _print_parts(answer: Answer, work: Work) -> None:
    best = answer.plans[0]
    seconds = _parts(best.time, show_seconds)
    sizes = _parts(best.memory, show_bytes)
    print(f"\nbest on {answer.workers}: step {show_seconds(best.time.total)} = {seconds}")
    indent = " " * len(f"best on {answer.workers}")
    print(f"{indent}  memory {show_bytes(best.memory.total)} = {sizes}")
    if work.exchange != Exchange() and (sent := sent_bytes(work, best.degrees)):
        print(f"{indent}  sent by a rank in a step, on average: {show_bytes(sent)}")


def _parts(values: Any, show: Any) -> str:
    named = [(field.name, getattr(values, field.name)) for field in fields(values)]
    return " + ".join(f"{name} {show(value)}" for name, value in named if value) or "0"


def _print_refusals(answers: Sequence[Answer], everything: bool) -> None:
    """Each reason once, with the numbers of workers it holds for."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for answer in answers:
        for refusal in answer.refusals:
            reasons.setdefault((refusal.what, refusal.reason), []).append(answer.workers)
    if not reasons:
        return
    print("\nout:")
    shown = list(reasons.items()) if everything else list(reasons.items())[:_SHOWN_REFUSALS]
    for (what, reason), workers in shown:
        where = "" if len(workers) == len(answers) else f" (on {show_runs(workers)})"
        print(f"  {what}{where}: {reason}")
    if len(shown) < len(reasons):
        print(f"  and {len(reasons) - len(shown)} more reasons; --all prints every layout and reason")
