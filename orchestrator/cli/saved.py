"""Commands about what a run has saved and used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from monitoring.outside import json_text
from monitoring.terminal.clean import clean
from orchestrator.cli.options import AsJson, Run, refuse
from orchestrator.cli.outcome import EXIT_FAILED


def checkpoints(
    run: Run,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte.")] = False,
    json_: AsJson = False,
) -> None:
    """The checkpoints of a run: step, age, size, layout, and whether they are what was saved."""
    from dataclasses import asdict

    from orchestrator.checkpoint import listing, of_run
    from orchestrator.rundir import find_run

    directory = find_run(run)
    catalog = of_run.catalog_of(directory, of_run.job_of(directory))
    found = listing.rows(catalog, verify=verify)
    if json_:
        print(json_text([asdict(row) for row in found]))
    elif not found:
        print(clean(f"no checkpoints in {catalog.storage.locate('')}"))
    else:
        print(listing.HEADER)
        for row in found:
            print(clean(listing.describe(row, verified=verify)))
    raise typer.Exit(EXIT_FAILED if verify and any(not row.valid for row in found) else 0)


def export(
    run: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new directory, in Hugging Face's format.")],
    step: Annotated[
        int | None, typer.Option(min=1, help="The checkpoint after that many steps; else the newest.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="bf16|fp16|fp32", help="Type of the weights.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint that evaluation found best.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Of a run with an adapter: the whole model.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="The mean of the weights (train.ema).")] = False,
) -> None:
    """Write the model of a checkpoint for `transformers` to load; of a run with an adapter that, for peft."""
    from orchestrator.checkpoint.export_run import export_run
    from orchestrator.checkpoint.of_run import job_of
    from orchestrator.rundir import find_run

    directory = find_run(run)
    job = job_of(directory)
    if merge and job.adapter is None:
        refuse("--merge: the job has no adapter; leave it out")
    if ema and job.train.ema is None:
        refuse("--ema: the job keeps no mean of its weights (train.ema); leave it out")
    if best:
        step = _best_of(directory, step)
    chosen, files, what = export_run(directory, to, step, dtype, merge=merge, ema=ema)
    size = sum(file.stat().st_size for file in files)
    print(f"{to}: the {what} after {chosen} steps, {len(files)} files, {size / 1e6:.1f} MB")


def _best_of(directory: Any, step: int | None) -> int:
    """Of which step the best weights of a run are."""
    from orchestrator.evaluation.record import judged_of

    if step is not None:
        refuse("--best and --step: each names a checkpoint; give one of them")
    judged = judged_of(directory)
    if judged.best_step < 0:
        refuse(f"--best: {directory.path} has no evaluation on record (evaluation.best)")
    return judged.best_step


def audit(run: Run, json_: AsJson = False) -> None:
    """Prove that every sample was used exactly once, and that its tokens are still those that were used."""
    from orchestrator.cli.audit import audit as prove
    from orchestrator.rundir import find_run

    raise typer.Exit(0 if prove(find_run(run), as_json=json_) else EXIT_FAILED)
