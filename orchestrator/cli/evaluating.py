"""The command that evaluates a run's weights, or a model, by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from monitoring.outside import json_text
from orchestrator.cli.options import AsJson, Overrides, refuse


def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a directory with a model.")],
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="What to evaluate on; else what the run does.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=1, help="The checkpoint after that many steps; else the newest.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Tasks of lm-eval, by name or YAML file, with commas between.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="No more than this many, of each task.")] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Loss and metrics of a checkpoint or a model on held-out data, computed here; the numbers that a run has."""
    from orchestrator.job.overrides import as_mapping
    from orchestrator.rundir import find_run
    from orchestrator.training.evaluate_alone import evaluate_model, evaluate_run

    changes: dict[str, Any] = as_mapping(set_ or [])
    evaluation: dict[str, Any] = changes.setdefault("evaluation", {})
    if data is not None:
        evaluation |= {"data": {"source": data}, "share": None}
    if tasks is not None:
        evaluation |= {"tasks": [name for name in tasks.split(",") if name]}
        if data is None:
            # Only them.
            evaluation |= {
                "data": None,
                "share": None,
                "metrics": [],
                "samples": None,
                "best": None,
                "early_stop": None,
            }
    if samples is not None:
        evaluation["samples" if data is not None or tasks is None else "task_samples"] = samples
    if not evaluation:
        del changes["evaluation"]
    path = Path(what).expanduser()
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        refuse(f"{what} has an adapter, without the model that it is for; name the run, or export it with --merge")
    if (path / "config.json").is_file() and not (path / "job.resolved.json").is_file():
        if "evaluation" not in changes:
            refuse("--data or --tasks: say what to evaluate the model on")
        if step is not None:
            refuse("--step: a model has no checkpoints; leave it out, or name a run")
        metrics = evaluate_model(path, changes)
    else:
        step, metrics = evaluate_run(find_run(what), step, changes)
    found = ({"step": step} if step is not None else {}) | metrics
    if json_:
        print(json_text(found))
        return
    for name, value in found.items():
        if value is None or isinstance(value, (int, float)):
            print(f"{name:24} {'not finite' if value is None else format(value, '.6g')}")
