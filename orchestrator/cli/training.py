"""Commands that train: here, on a cluster, and where another one left off."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.options import AsJson, Ephemeral, Faults, JobFile, Overrides, Page, PagePort, Run, Shared, refuse
from orchestrator.cli.outcome import exit_code, show_result


def run(
    job: JobFile,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run is kept; an unfinished run goes on.")] = None,
    set_: Overrides = None,
    fault: Faults = None,
    local_nodes: Annotated[int, typer.Option(min=0, help="Start this many Ray nodes on this machine.")] = 0,
    fork: Annotated[
        bool, typer.Option("--fork", help="A new run beside --run-dir, from its newest checkpoint, with this job.")
    ] = False,
    step: Annotated[
        int | None, typer.Option(min=1, help="With --fork: from the checkpoint after that many steps.")
    ] = None,
    ephemeral: Ephemeral = False,
    shared: Shared = False,
    page: Page = False,
    page_port: PagePort = 0,
    json_: AsJson = False,
) -> None:
    """Train a job to its end; with the directory of a run that is under way on the cluster, follow that."""
    from orchestrator.cli.validate import pointing_into
    from orchestrator.job import Job
    from orchestrator.models.validation import look_at_model
    from orchestrator.rundir import RunDirectory, runs_root

    loaded = Job.load(job, overrides=set_ or [], faults=fault or [])
    with pointing_into(job, set_ or [], fault or []):
        look_at_model(loaded)
    name = f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = RunDirectory(run_dir if run_dir is not None else _unused(runs_root() / name))
    if step is not None and not fork:
        refuse("--step: says from which checkpoint to --fork; leave it out, or give both")
    if fork:
        directory = _fork(loaded, directory, step)
    if shared:
        directory.make(shared=True)
    _run(
        loaded, directory, job.read_text(encoding="utf-8"), local_nodes=local_nodes, ephemeral=ephemeral,
        page=page, page_port=page_port, json_=json_,
    )  # fmt: skip


def _fork(job: Any, parent: Any, step: int | None) -> Any:
    """The directory of a new run that goes on where another one is, or was after `step` steps."""
    from orchestrator.checkpoint import of_run
    from orchestrator.data.of_job import with_steps
    from orchestrator.rundir import RunDirectory

    if parent.read_json("job.resolved.json") is None:
        refuse(f"--fork: {parent.path} is not a run directory; say with --run-dir which run to fork")
    target = RunDirectory(_unused(parent.path.with_name(f"{parent.path.name}-fork")))
    begun = of_run.fork(parent, target, with_steps(job), of_run.secret_of(job), step)
    print(f"forked from {parent.path} after {begun} steps: {target.path}", file=sys.stderr)
    return target


def _run(
    job: Any,
    directory: Any,
    text: str,
    *,
    local_nodes: int,
    ephemeral: bool = False,
    page: bool = False,
    page_port: int = 0,
    json_: bool,
) -> None:
    """Trains, shows how it goes and what came of it, and exits."""
    from orchestrator.api import run as run_job
    from orchestrator.cli.page import page_of
    from orchestrator.data.of_job import with_steps

    job = with_steps(job)
    if json_:
        with page_of(directory.path, page, page_port, lambda text: print(text, file=sys.stderr, flush=True)):
            result = run_job(job, directory.path, job_text=text, local_nodes=local_nodes, ephemeral=ephemeral)
    else:
        from monitoring.display import Display

        with (
            Display(directory.path, job.train.steps, job.train.log_every) as display,
            page_of(directory.path, page, page_port, display.note),
        ):
            display.note(f"run {directory.path}")
            result = run_job(
                job, directory.path, job_text=text, local_nodes=local_nodes, ephemeral=ephemeral,
                on_update=display.update, on_note=display.note,
            )  # fmt: skip
    # What the run told at its end counts: a full disk, or a deleted directory, has no result.json, or an old one.
    try:
        show_result(_result_json(directory.path, result), directory.path, as_json=json_)
        sys.stdout.flush()
    except OSError:  # Its terminal is gone. The exit code tells what came of the run all the same.
        from monitoring.terminal.gone import silence_stdout

        silence_stdout()
    raise typer.Exit(exit_code(result.status))


def _unused(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _result_json(path: Path, told: Any) -> dict[str, Any]:
    """What result.json says; what was `told` where it cannot be read, or says otherwise."""
    from contextlib import suppress
    from dataclasses import asdict

    from orchestrator.rundir import RunDirectory, RunDirectoryError

    with suppress(OSError, RunDirectoryError):
        content = RunDirectory(path).read_json("result.json") or {}
        if (content.get("status"), content.get("reason")) == (told.status, told.reason):
            return dict(content)
    return {key: value for key, value in asdict(told).items() if key != "run_dir"}


def resume(
    run: Run,
    local_nodes: Annotated[int, typer.Option(min=0, help="Start this many Ray nodes on this machine.")] = 0,
    ephemeral: Ephemeral = False,
    shared: Shared = False,
    page: Page = False,
    page_port: PagePort = 0,
    json_: AsJson = False,
    set_: Annotated[list[str] | None, typer.Option("--set", hidden=True)] = None,
) -> None:
    """Go on with an unfinished run, from its newest valid checkpoint."""
    if set_:
        refuse(
            "--set: a run goes on with the job that it has; with another (`--set train.optimizer.lr=...`) "
            "`run JOB --run-dir RUN --fork` begins a new run where it is"
        )
    from orchestrator.checkpoint.of_run import job_of
    from orchestrator.rundir import find_run

    directory = find_run(run)
    if shared:
        directory.make(shared=True)
    text = (directory.path / "job.yaml").read_text(encoding="utf-8") if (directory.path / "job.yaml").exists() else ""
    _run(
        job_of(directory), directory, text, local_nodes=local_nodes, ephemeral=ephemeral,
        page=page, page_port=page_port, json_=json_,
    )  # fmt: skip


def submit(
    job: JobFile,
    address: Annotated[
        str | None,
        typer.Option(metavar="http://HEAD:8265", help="Its dashboard; else RAY_API_SERVER_ADDRESS."),
    ] = None,
    run_dir: Annotated[
        str | None,
        typer.Option(help="Where the run is kept, as nodes see it; an unfinished run goes on."),
    ] = None,
    set_: Overrides = None,
    fault: Faults = None,
    ephemeral: Ephemeral = False,
    shared: Shared = False,
    working_dir: Annotated[Path, typer.Option(metavar="DIR", help="Its files go with the job.")] = Path("."),
    runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More of Ray's runtime environment (pip, env_vars, ...), YAML.")
    ] = None,
    submission_id: Annotated[str | None, typer.Option(metavar="ID", help="Else Ray makes one up.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what it prints; exit with its code.")] = False,
    json_: AsJson = False,
) -> None:
    """Run a job on a Ray cluster, as a Ray job: `orchestrator run` there, with the files here."""
    from orchestrator.cli.submit import submit as send
    from orchestrator.cli.validate import pointing_into
    from orchestrator.job import Job
    from orchestrator.models.validation import look_at_model

    loaded = Job.load(job, overrides=set_ or [], faults=fault or [])
    with pointing_into(job, set_ or [], fault or []):
        look_at_model(loaded, here=False)
    options = [*(["--run-dir", run_dir] if run_dir else []), *(["--ephemeral"] if ephemeral else [])]
    options += ["--shared"] if shared else []
    options += [part for value in set_ or [] for part in ("--set", value)]
    options += [part for value in fault or [] for part in ("--fault", value)]
    code = send(
        job, name=loaded.name, address=address, working_dir=working_dir, runtime_env=runtime_env,
        submission_id=submission_id, options=options, follow=follow, as_json=json_,
    )  # fmt: skip
    raise typer.Exit(code)


def attach(
    run: Run,
    address: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Of the cluster; else RAY_ADDRESS.")] = None,
    json_: AsJson = False,
) -> None:
    """Follow a run that goes on without its driver. Ctrl-C leaves it alone; the exit code is the run's."""
    from orchestrator.cli.attach import attach as follow
    from orchestrator.rundir import find_run

    raise typer.Exit(follow(find_run(run), address, as_json=json_))
