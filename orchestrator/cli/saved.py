"""Commands about what a run has saved and used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
) -> None:
    """Write the model of a checkpoint for `transformers` to load."""
    from orchestrator.checkpoint import of_run
    from orchestrator.checkpoint.export import export as write
    from orchestrator.checkpoint.weights import weights_of
    from orchestrator.rundir import find_run

    directory = find_run(run)
    job = of_run.job_of(directory)
    catalog = of_run.catalog_of(directory, job, of_run.secret_of(job))
    steps = catalog.steps()
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        refuse(f"{directory.path} has no checkpoint{'' if step is None else f' of {step} steps'} (there: {there})")
    chosen = steps[0] if step is None else step
    files = write(weights_of(catalog.open(chosen), job), job, to, dtype)
    size = sum(file.stat().st_size for file in files)
    print(f"{to}: the model after {chosen} steps, {len(files)} files, {size / 1e6:.1f} MB")


def audit(run: Run, json_: AsJson = False) -> None:
    """Prove that every sample was used exactly once, and that its tokens are still those that were used."""
    from orchestrator.cli.audit import audit as prove
    from orchestrator.rundir import find_run

    raise typer.Exit(0 if prove(find_run(run), as_json=json_) else EXIT_FAILED)
