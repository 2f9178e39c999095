"""Why layouts are out, in numbers, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, fields

from orchestrator.errors import PlanError
from orchestrator.planning.memory import Memory
from orchestrator.planning.search import Planner
from orchestrator.planning.units import show_bytes, show_runs
from orchestrator.planning.work import Degrees
from strategies.layout.schedule import PipelineSchedule


@dataclass(frozen=True)
class Refusal:
    """Layouts that cannot be trained with, and the reason."""

    what: str
    reason: str


def refusals(planner: Planner, workers: int) -> list[Refusal]:
    """Everything that is out on this many workers; what is merely slower is not in it."""
    found = []
    for tensor in planner.limits.tensor:
        refused = planner.refuses_tensor(tensor)
        if refused:
            found.append(Refusal(f"tensor {tensor}", refused))
        elif workers < tensor:
            found.append(Refusal(f"tensor {tensor}", f"needs at least {tensor} workers, there are {workers}"))
        else:
            found.extend(_of_pipelines(planner, workers, tensor))
    return found


def _of_pipelines(planner: Planner, workers: int, tensor: int) -> list[Refusal]:
    found = []
    layers, shares = planner.work.model.layers, planner.work.virtual_workers
    ranks = workers // tensor
    wanted = planner.limits.pipeline
    deep = [p for p in wanted or range(layers + 1, ranks + 1) if p > layers]
    if deep:
        reason = f"more stages than the model's {layers} layers"
        found.append(Refusal(f"pipeline {show_runs(deep) if wanted else f'above {layers}'}", reason))
    if wanted and (many := [p for p in wanted if ranks < p <= layers]):
        by = f" times tensor {tensor}" if tensor > 1 else ""
        found.append(Refusal(f"pipeline {show_runs(many)}", f"needs as many workers{by}, there are {workers}"))
    if ranks > shares:
        reason = f"more replicas than the {shares} virtual workers of a step; elastic.virtual_workers sets how many"
        found.append(Refusal(f"data above {shares}", reason))
    found.extend(_of_counts(planner, ranks))
    found.extend(_of_rules(planner, ranks, tensor))
    found.extend(_of_memory(planner, ranks, tensor))
    return found


def _of_rules(planner: Planner, ranks: int, tensor: int) -> list[Refusal]:
    """What the job or its model rules out, whatever the memory."""
    by_reason: dict[str, list[tuple[PipelineSchedule, str]]] = {}
    for schedule in planner.schedules_within(ranks):
        for shard in planner.limits.shards:
            if reason := planner.refuse(tensor, schedule, shard):
                by_reason.setdefault(reason, []).append((schedule, shard))
    found = []
    for reason, of_it in by_reason.items():
        stages = sorted({schedule.stages for schedule, _ in of_it})
        shards = [shard for shard in planner.limits.shards if any(shard == other for _, other in of_it)]
        which = f", shard {', '.join(shards)}" if len(shards) < len(planner.limits.shards) else ""
        found.append(Refusal(f"pipeline {show_runs(stages)}{which}", reason))
    return found


def _of_counts(planner: Planner, ranks: int) -> list[Refusal]:
    """Pipelines that a replica has too few micro-batches for, be it with the most replicas or even with one."""
    shares, per_share = planner.work.virtual_workers, planner.work.micro_batches
    never: dict[str, dict[int, str]] = {}
    short: dict[str, list[int]] = {}
    for schedule in planner.schedules_within(ranks):
        p = schedule.stages
        reason = schedule.refuses(shares * per_share)
        if reason:
            never.setdefault(schedule.kind, {}).setdefault(p, reason)
        elif shares // min(ranks // p, shares) * per_share < p:
            most = shares // -(-p // per_share)
            short.setdefault(f"from data {most + 1} on: a replica then has fewer micro-batches than stages", []).append(
                p
            )
    found = [
        Refusal(f"{kind}, pipeline {show_runs(list(of_stages))}", _first_of(of_stages))
        for kind, of_stages in never.items()
    ]
    return found + [Refusal(f"pipeline {show_runs(sorted(set(of)))}", reason) for reason, of in short.items()]


def _first_of(of_stages: dict[int, str]) -> str:
    stages, reason = next(iter(of_stages.items()))
    return reason if len(of_stages) == 1 else f"pipeline {stages}: {reason}"


def _of_memory(planner: Planner, ranks: int, tensor: int) -> list[Refusal]:
    usable = planner.hardware.usable_bytes
    if usable is None:
        return []
    found = []
    for shard in planner.limits.shards:
        groups: dict[str, tuple[list[int], Memory, Degrees]] = {}
        for schedule in planner.schedules_within(ranks):
            best = planner.least_memory(tensor, schedule, shard, ranks)
            if planner.refuse(tensor, schedule, shard):
                continue
            if best is None or best[0].total <= usable or (best[1].data == 1 and shard != planner.limits.shards[0]):
                continue
            kind = f"{schedule.kind} " if schedule.stages > 1 else ""
            kind += f"x{schedule.chunks} " if schedule.kind == "interleaved-1f1b" else ""
            stages, memory, degrees = groups.get(kind, ([], *best))
            if best[0].total < memory.total:
                memory, degrees = best
            groups[kind] = ([*stages, schedule.stages], memory, degrees)
        for kind, (stages, memory, degrees) in groups.items():
            found.append(
                Refusal(f"{kind}pipeline {show_runs(stages)}, shard {shard}", _too_large(memory, degrees, usable))
            )
    return found


def _too_large(memory: Memory, degrees: Degrees, usable: float) -> str:
    parts = sorted(((getattr(memory, part.name), part.name) for part in fields(memory)), reverse=True)
    listed = ", ".join(f"{name} {show_bytes(size)}" for size, name in parts if size >= memory.total / 100)
    return (
        f"needs {show_bytes(memory.total)} a rank at the least (data {degrees.data}, pipeline {degrees.pipeline}: "
        f"{listed}), {show_bytes(usable)} are usable"
    )


def nothing_fits(planner: Planner, workers: int) -> PlanError:
    """The error for a job that fits no layout, with the reasons."""
    reasons = [f"  {refusal.what}: {refusal.reason}" for refusal in refusals(planner, workers)]
    plural = "worker" if workers == 1 else "workers"
    return PlanError("\n".join([f"the job fits no layout on {workers} {plural}:", *reasons]))
