"""Evaluation of a run or a model by itself, in this process: the numbers that its run would have had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from monitoring.outside import parse
from orchestrator.checkpoint.of_run import catalog_of, job_of, secret_of
from orchestrator.checkpoint.weights import weights_of
from orchestrator.data import load_tokenizer
from orchestrator.data.of_job import held_out_of, prepare_held_out
from orchestrator.evaluation.report import report_of
from orchestrator.job import Job
from orchestrator.job.parts import objective_of
from orchestrator.models.loading import prepare_model
from orchestrator.models.weights import WeightSource
from orchestrator.rundir import RunDirectory, RunDirectoryError
from orchestrator.training.build import step_spec
from orchestrator.training.compared import reference_values
from orchestrator.training.deterministic import make_deterministic
from orchestrator.training.references import HeldOutBeside, beside
from orchestrator.training.tasks import load_tasks, metrics_of_tasks

if TYPE_CHECKING:
    import torch

    from orchestrator.data.held_out import HeldOut
    from strategies.gradient.spec import StepSpec

_LONGEST = 1024
"""Tokens of a row, where neither the model nor the user says fewer."""


def evaluate_run(directory: RunDirectory, step: int | None, changes: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Of the weights in a checkpoint of a run (the newest), on what the run evaluates on or what `changes` of its job
    say: of how many steps they are, and their metrics. Raises RunDirectoryError, DataError, JobError,
    CheckpointError."""
    job = _changed(job_of(directory), changes)
    catalog = catalog_of(directory, job, secret_of(job))
    steps = catalog.steps()
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        raise RunDirectoryError(f"{directory.path} has no such checkpoint (there: {there})")
    chosen = steps[0] if step is None else step
    return chosen, _evaluate(job, weights_of(catalog.open(chosen), job))


def evaluate_model(path: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model in a directory, as a language model of its own tokenizer's, unless `changes` say otherwise. Raises
    ModelError, DataError, JobError."""
    config = parse((path / "config.json").read_text("utf-8"))
    most = config.get("max_position_embeddings") or config.get("n_positions") or _LONGEST
    job = Job.model_validate(
        _merged(
            {
                "name": "evaluation",
                "model": {"hf": str(path)},
                "data": {"source": "python-stdlib", "tokenizer": str(path), "sequence_length": min(most, _LONGEST)},
                "train": {"steps": 1, "global_batch": 8},
            },
            changes,
        )
    )
    return _evaluate(job, None)


def _changed(job: Job, changes: Mapping[str, Any]) -> Job:
    return Job.model_validate(_merged(job.resolved(), changes))


def _merged(given: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(given)
    for key, value in changes.items():
        inner = found.get(key)
        found[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found


def _evaluate(job: Job, weights: WeightSource | None) -> dict[str, Any]:
    import torch

    from strategies.model.anatomy import find_layers
    from strategies.model.head import find_body
    from strategies.update.evaluation import Measure, Measured, Samples, evaluate_alone

    if job.evaluation is None:
        raise RunDirectoryError("the job says not what to evaluate on; give --data or --tasks")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_deterministic(job, device)
    held_out = held_out_of(job, prepare_held_out(job))
    samples: Samples | None = held_out
    tasks = load_tasks(job) if job.evaluation.tasks else None
    tokenizer = load_tokenizer(job.data.tokenizer)
    model = prepare_model(job, tokenizer.vocab_size).filled()
    first = None
    if held_out is not None and objective_of(job).needs_reference:
        first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.to(device)
    body = find_body(model.eval(), find_layers(model)[0], torch.zeros((1, 3), dtype=torch.int64, device=device))
    spec = step_spec(job)
    if first is not None:
        assert held_out is not None
        samples = _with_reference(job, held_out, model, body, spec, device)
        _put_all(model, first.__getitem__)
    if weights is not None:
        _put(model, weights)

    def passes(samples: Samples, measured: Measure | None = None) -> Measured:
        return evaluate_alone(model, body, spec, samples, device, measured)

    found = {} if samples is None else report_of(job, passes(samples))
    if tasks is not None:
        found |= metrics_of_tasks(job, tasks, tokenizer, passes)
    return found


def _with_reference(
    job: Job, samples: HeldOut, model: Any, body: Any, spec: StepSpec, device: torch.device
) -> HeldOutBeside:
    """With what the reference gives for them: the model as it is before training, or another."""
    from strategies.objective.objective import END_TO_END
    from strategies.update.evaluation import evaluate_alone, reference

    if (values := reference_values(job)) is not None:
        _put_all(model, values.read)
    found = evaluate_alone(model, body, spec, samples, device, reference)[f"{END_TO_END}reference"]
    return beside(samples, np.array(found, dtype=np.float32))


def _put_all(model: Any, read: Callable[[str], torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))


def _put(model: Any, weights: WeightSource) -> None:
    there = weights.tensors()
    for name, _ in model.named_parameters():
        if name not in there:
            raise RunDirectoryError(f"{weights.name} has no {name}, which the model of this job has")
    _put_all(model, weights.read)
