"""What a real run says of its machine: how fast it computes, what messages and the rest of a step take there.

Of the last stretch of steps in one layout, without the first ones: arithmetic by the busiest rank's passes, messages
by what the rank that waits least waits (the others wait for it, too), and what is left of a step beside them. The run's
own job says what there was to do, so another job, or another layout, can be predicted from it. What depends on the
number of ranks on a machine, as processors that they share, is that of this run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from monitoring.events import GenerationFormed
from monitoring.records import read_records
from orchestrator.errors import PlanError
from orchestrator.job import Job, JobError
from orchestrator.models.costs import describe_model
from orchestrator.planning.hardware import Hardware, Link
from orchestrator.planning.search import Limits, Planner
from orchestrator.planning.stages import stages_of
from orchestrator.planning.step_time import hides_messages, predict_step
from orchestrator.planning.units import show_seconds
from orchestrator.planning.work import Degrees, work_of
from orchestrator.rundir import RunDirectory, RunDirectoryError
from strategies.layout.schedule import NO_PIPELINE, PipelineSchedule, chunks_of

WARM_UP = 5
"""Steps of a stretch that are left out: kernels are chosen, memory is mapped, code is compiled."""
FEWEST = 5
"""Steps that are enough to tell."""


@dataclass(frozen=True)
class Stretch:
    """Steps in one layout, in seconds (medians): a step, its busiest rank, and what each waits for all."""

    layout: dict[str, Any]
    steps: int
    step_s: float
    busy_s: float
    message_s: float


def calibrated(run: Path, hardware: Hardware) -> tuple[Hardware, tuple[str, ...]]:
    """`hardware` with what the run in this directory says of it, and a line about that. Raises PlanError."""
    job, stretch = _job_of(run), _last_stretch(run)
    layout = stretch.layout
    kind = job.strategy.schedule if layout["pipeline"] > 1 else NO_PIPELINE
    schedule = PipelineSchedule(kind, layout["pipeline"], chunks_of(kind) if layout["pipeline"] > 1 else 1)
    degrees = Degrees(layout["data"], layout["tensor"], schedule, layout["shard"])
    work = work_of(job, describe_model(job))
    planner = Planner(work, replace(hardware, overlaps=False), Limits())
    stages = planner.stages(degrees.tensor, schedule)
    if layout.get("stages"):
        stages = stages_of(work.model, schedule, degrees.tensor, [range(*part) for part in layout["stages"]])
    predicted = predict_step(work, planner.hardware, stages, degrees)
    # Gathering is part of passes.
    gathers = predicted.shard - predict_step(work, replace(planner.hardware, gather_s=0.0), stages, degrees).shard
    busy_s = max(stretch.busy_s - gathers, stretch.busy_s / 10)
    flops = hardware.flops * predicted.compute / busy_s
    found = replace(hardware, peak_flops=flops / hardware.efficiency)
    messages = predicted.messages - gathers
    said = f"{flops / 1e12:.4g} TFLOP/s reached"
    is_hidden = hides_messages(hardware, degrees)
    if messages and stretch.message_s and not is_hidden:
        factor = messages / stretch.message_s
        inside, between = (_faster(link, factor) for link in (hardware.inside, hardware.between))
        found = replace(found, inside=inside, between=between)
        said += f", messages {show_seconds(stretch.message_s)} a step"
    else:
        why = "they went on beside arithmetic" if is_hidden else "that run had none"
        said += f", messages as assumed ({why})"
    bubble = predicted.bubble * busy_s / predicted.compute if predicted.compute else 0.0
    rest = stretch.step_s - stretch.busy_s - bubble - (stretch.message_s if messages else 0.0)
    found = replace(found, step_s=max(0.0, rest))
    said += f", {show_seconds(found.step_s)} a step for the rest"
    degrees_said = ", ".join(f"{name} {layout[name]}" for name in ("data", "tensor", "pipeline"))
    return found, (f"of {run}, {stretch.steps} steps in {degrees_said}, shard {layout['shard']}: {said}",)


def _faster(link: Link, factor: float) -> Link:
    return Link(link.bytes_per_s * factor, link.latency_s / factor)


def _job_of(run: Path) -> Job:
    try:
        resolved = RunDirectory(run).read_json("job.resolved.json")
        if resolved is None:
            raise PlanError(f"--from {run}: this is no directory of a run")
        return Job.model_validate(resolved)
    except (OSError, RunDirectoryError, JobError) as error:
        raise PlanError(f"--from {run}: its job cannot be read: {error}") from error


def _last_stretch(run: Path) -> Stretch:
    events = read_records(run / "events.jsonl")
    generations = [each for each in events if each.get("kind") == GenerationFormed.kind]
    layouts = {each["generation"]: each["layout"] for each in generations if not each.get("collect")}
    records = [each for each in read_records(run / "metrics.jsonl") if each["generation"] in layouts]
    for generation in sorted({each["generation"] for each in records}, reverse=True):
        of_it = [each for each in records if each["generation"] == generation and not each["deal"] and each["ranks"]]
        steps = of_it[WARM_UP:]
        if len(steps) > FEWEST:
            return _stretch(layouts[generation], steps)
    raise PlanError(
        f"--from {run}: no generation has {WARM_UP + FEWEST + 1} steps, which it takes to tell; train longer"
    )


def _stretch(layout: dict[str, Any], steps: Sequence[dict[str, Any]]) -> Stretch:
    between = [after["committed_at"] - before["committed_at"] for before, after in pairwise(steps)]
    busy = [max(sum(rank[0]) for rank in each["ranks"]) for each in steps]
    waits = [min(rank[2] for rank in each["ranks"]) for each in steps]
    return Stretch(layout, len(steps), median(between), median(busy), median(waits))
