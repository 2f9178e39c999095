"""`orchestrator plan`: from a job file and options to the ranked layouts. Starts nothing and needs no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from monitoring.outside import json_text
from orchestrator.errors import PlanError
from orchestrator.job import Job
from orchestrator.job.sections.train import EveryLayers
from orchestrator.models.costs import describe_modes
from orchestrator.models.routers import routers_of
from orchestrator.models.validation import check_sizes, model_without_weights
from orchestrator.planning.assume import HardwareOptions, hardware_for
from orchestrator.planning.calibrate import calibrated
from orchestrator.planning.possible import possible
from orchestrator.planning.refusals import nothing_fits, refusals
from orchestrator.planning.search import Limits, Planner, best_of
from orchestrator.planning.tables import Answer, as_json, print_answers
from orchestrator.planning.units import parse_counts
from orchestrator.planning.work import work_of
from strategies.layout.parallel import SHARDS
from strategies.layout.schedule import SCHEDULES

_FEW = 4
"""Up to this many numbers of workers, each is shown with more than its best layout."""


@dataclass(frozen=True)
class LimitOptions:
    """Which layouts may be chosen, as written on the command line; None: the job file decides, or everything."""

    tensor: str | None = None
    pipeline: str | None = None
    shard: str | None = None
    schedule: str | None = None


def plan(
    path: Path, workers: str | None, hardware: HardwareOptions, limits: LimitOptions, overrides: Sequence[str] = (),
    as_json_: bool = False, everything: bool = False, run: Path | None = None,
) -> None:  # fmt: skip
    """Prints the layouts; for the machine of a `run`, if one is given. Raises JobError, ModelError, and PlanError for
    an option or if nothing fits."""
    counts = None if workers is None else parse_counts(workers, "--workers")
    job = Job.load(path, overrides)
    counts = counts or (job.elastic.workers.max,)
    chosen, assumptions = hardware_for(job, hardware)
    if run is not None:
        chosen, said = calibrated(run, chosen)
        assumptions = (*assumptions, *said)
    allowed = limits_of(job, limits)
    check_sizes(job)
    model = model_without_weights(job)
    routers_of(job, model)
    refuse = possible(job, model)
    modes = modes_of(job)
    planners = [
        Planner(work_of(job, costs), chosen, allowed, refuse, mode if len(modes) > 1 else "")
        for costs, mode in zip(describe_modes(job, list(modes.values())), modes, strict=True)
    ]
    work, last = planners[0].work, planners[-1]
    keep = None if everything else 5 if len(counts) <= _FEW else 1
    # What needs least memory says what is out.
    answers = [Answer(count, best_of(planners, count, keep), refusals(last, count)) for count in counts]
    if not any(answer.plans for answer in answers):
        raise nothing_fits(last, counts[-1])
    if as_json_:
        print(json_text(as_json(job.name, work, assumptions, answers)))
    else:
        print_answers(job.name, work, assumptions, answers, everything)


def modes_of(job: Job) -> dict[str, str | EveryLayers]:
    """What layers may compute again, by what that is called, least memory last: what the job says, or if it says
    nothing any, as no bit depends on it."""
    if "recompute" in job.train.model_fields_set:
        asked = job.train.recompute
        return {asked if isinstance(asked, str) else f"every {asked.every}": asked}
    return {mode: mode for mode in ("none", "selective", "full")}


def limits_of(job: Job, options: LimitOptions) -> Limits:
    """What may be chosen: the job's tensor degree, its shard and schedule if the file has them. Raises PlanError."""
    said = job.strategy.model_fields_set if "strategy" in job.model_fields_set else set()
    shards = (job.strategy.shard,) if "shard" in said else SHARDS
    schedules = (job.strategy.schedule,) if "schedule" in said else SCHEDULES
    return Limits(
        tensor=parse_counts(options.tensor, "--tensor") if options.tensor else (job.strategy.tensor,),
        pipeline=parse_counts(options.pipeline, "--pipeline") if options.pipeline else None,
        shards=_choices(options.shard, "--shard", SHARDS, shards),
        schedules=_choices(options.schedule, "--schedule", SCHEDULES, schedules),
    )


def _choices(text: str | None, option: str, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    if text is None:
        return default
    chosen = [part.strip() for part in text.split(",")]
    for name in chosen:
        if name not in known:
            raise PlanError(f"{option} must be one or more of {', '.join(known)}, got {name!r}")
    return tuple(name for name in known if name in chosen)
