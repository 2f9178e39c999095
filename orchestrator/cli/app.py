"""The command line. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import io
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from monitoring.errors import UserError
from monitoring.outside import json_text
from monitoring.redaction import redact
from monitoring.terminal.clean import clean, clean_lines
from orchestrator.cli.monitoring import app as monitoring_app
from orchestrator.cli.outcome import EXIT_BAD_INPUT, EXIT_FAILED, exit_code, show_result


class _WholeSentences(typer.core.TyperGroup):
    """Lists commands with the whole of their first sentence, over as many lines as it takes."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, each.get_short_help_str(limit=10_000)) for name, each in found if each and not each.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    name="orchestrator",
    cls=_WholeSentences,
    help="Elastic training on Ray: the result is a function of the job file, not of the cluster's luck.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(monitoring_app, name="monitoring")

JobFile = Annotated[Path, typer.Argument(help="The job file (YAML).", show_default=False)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or the name of a run under runs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a field of the job file; repeatable.")
]
Faults = Annotated[
    list[str] | None,
    typer.Option("--fault", metavar="step=N,worker=W,kind=K", help="Inject a fault (kill, hang, ...); repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Page = Annotated[bool, typer.Option("--page", help="Serve a live page of the run on this machine; prints where.")]
Ephemeral = Annotated[
    bool, typer.Option("--ephemeral", help="On a cluster, end the run when this process is gone; else it goes on.")
]
Shared = Annotated[
    bool, typer.Option("--shared", help="Let the directory's group read and write the run; else only you.")
]
PagePort = Annotated[int, typer.Option(min=0, max=65535, help="Of the live page; 0 takes any free one.")]


@app.command()
def run(
    job: JobFile,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run is kept; an unfinished run goes on.")] = None,
    set_: Overrides = None,
    fault: Faults = None,
    local_nodes: Annotated[int, typer.Option(min=0, help="Start this many Ray nodes on this machine.")] = 0,
    fork: Annotated[
        bool, typer.Option("--fork", help="A new run beside --run-dir, from its newest checkpoint, with this job.")
    ] = False,
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
    if fork:
        directory = _fork(loaded, directory)
    if shared:
        directory.make(shared=True)
    _run(
        loaded, directory, job.read_text(encoding="utf-8"), local_nodes=local_nodes, ephemeral=ephemeral,
        page=page, page_port=page_port, json_=json_,
    )  # fmt: skip


def _fork(job: Any, parent: Any) -> Any:
    """The directory of a new run that goes on where another one is."""
    from orchestrator.checkpoint import of_run
    from orchestrator.rundir import RunDirectory

    if parent.read_json("job.resolved.json") is None:
        _refuse(f"--fork: {parent.path} is not a run directory; say with --run-dir which run to fork")
    target = RunDirectory(_unused(parent.path.with_name(f"{parent.path.name}-fork")))
    step = of_run.fork(parent, target, job, of_run.secret_of(job))
    print(f"forked from {parent.path} after {step} steps: {target.path}", file=sys.stderr)
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


@app.command()
def resume(
    run: Run,
    local_nodes: Annotated[int, typer.Option(min=0, help="Start this many Ray nodes on this machine.")] = 0,
    ephemeral: Ephemeral = False,
    shared: Shared = False,
    page: Page = False,
    page_port: PagePort = 0,
    json_: AsJson = False,
) -> None:
    """Go on with an unfinished run, from its newest valid checkpoint."""
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


@app.command()
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


@app.command()
def attach(
    run: Run,
    address: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Of the cluster; else RAY_ADDRESS.")] = None,
    json_: AsJson = False,
) -> None:
    """Follow a run that goes on without its driver. Ctrl-C leaves it alone; the exit code is the run's."""
    from orchestrator.cli.attach import attach as follow
    from orchestrator.rundir import find_run

    raise typer.Exit(follow(find_run(run), address, as_json=json_))


@app.command()
def validate(
    job: JobFile,
    set_: Overrides = None,
    no_data: Annotated[bool, typer.Option("--no-data", help="Leave out the first records of the data.")] = False,
    json_: AsJson = False,
) -> None:
    """Check a job file, its model (without weights) and first records; show it with all defaults; starts nothing."""
    from orchestrator.cli.validate import validate as check

    check(job, set_ or [], with_data=not no_data, as_json=json_)


@app.command()
def plan(
    job: JobFile,
    workers: Annotated[
        str | None, typer.Option(metavar="N|N..M|N,M", help="How many workers; elastic.workers.max if not given.")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(metavar="80GiB", help="Memory of a worker's GPU.")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Its peak TFLOP/s in the job's precision.")] = None,
    efficiency: Annotated[float | None, typer.Option(help="The fraction of the peak that is reached.")] = None,
    bandwidth: Annotated[str | None, typer.Option(metavar="300GB/s", help="Of a worker inside its node.")] = None,
    node_bandwidth: Annotated[str | None, typer.Option(metavar="25GB/s", help="Of a worker between nodes.")] = None,
    latency: Annotated[str | None, typer.Option(metavar="5us", help="Of a message inside a node.")] = None,
    node_latency: Annotated[str | None, typer.Option(metavar="15us", help="Of a message between nodes.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Workers on a node.")] = None,
    tensor: Annotated[str | None, typer.Option(metavar="1,2,..", help="Degrees to allow; else the job's.")] = None,
    pipeline: Annotated[str | None, typer.Option(metavar="1,2,..", help="Degrees to allow; else all.")] = None,
    shard: Annotated[str | None, typer.Option(help="Shards to allow; else the job's, or all if it says none.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Pipeline schedules to allow; else all.")] = None,
    set_: Overrides = None,
    json_: AsJson = False,
    all_: Annotated[bool, typer.Option("--all", help="Every layout and every reason.")] = False,
) -> None:
    """Predict which layouts suit a job on so many workers, and why others do not; starts nothing."""
    from orchestrator.cli.validate import pointing_into
    from orchestrator.planning import command
    from orchestrator.planning.assume import MachineOptions

    machine = MachineOptions(
        gpu_memory, gpu_tflops, efficiency, bandwidth, node_bandwidth, latency, node_latency, ranks_per_node
    )
    limits = command.LimitOptions(tensor, pipeline, shard, schedule)
    with pointing_into(job, set_ or []):
        command.plan(job, workers, machine, limits, set_ or [], as_json_=json_, everything=all_)


@app.command()
def status(run: Run, json_: AsJson = False) -> None:
    """Where a run is: step, speed, workers, goodput, checkpoint, incidents, and its result when it has ended."""
    from orchestrator.cli.status import status as show
    from orchestrator.rundir import find_run

    show(find_run(run), as_json=json_)


@app.command()
def watch(run: Run, json_: AsJson = False) -> None:
    """Show a run as it goes. Ends with it: exit code 0 finished, 1 failed or interrupted, 3 stopped."""
    from orchestrator.cli.watch import watch as show
    from orchestrator.rundir import find_run

    ended = show(find_run(run), as_json=json_)
    raise typer.Exit(exit_code(ended))


@app.command()
def events(
    run: Run,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more until the run ends.")] = False,
    kind: Annotated[list[str] | None, typer.Option(help="Only events of this kind; repeatable.")] = None,
    since: Annotated[str | None, typer.Option(metavar="5m|TIME", help="Only from then on.")] = None,
    json_: AsJson = False,
) -> None:
    """What happened in a run, one line an event."""
    from orchestrator.cli.events import events as show
    from orchestrator.cli.events import parse_since
    from orchestrator.rundir import find_run

    directory = find_run(run)
    try:
        begin = None if since is None else parse_since(since, time.time())
    except ValueError as error:
        _refuse(str(error))
    show(directory, follow=follow, kinds=kind or [], since=begin, as_json=json_)


@app.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more until the run ends.")] = False,
    worker: Annotated[int | None, typer.Option(min=0, metavar="N", help="Only worker N.")] = None,
    level: Annotated[
        str | None, typer.Option(metavar="debug|info|warning|error", help="Only records at least as bad.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """What the processes of a run said, merged by time."""
    from monitoring.logs import LEVELS
    from orchestrator.cli.logs import logs as show
    from orchestrator.rundir import find_run

    directory = find_run(run)
    if level is not None and level not in LEVELS:
        _refuse(f"--level {level}: choose one of {', '.join(LEVELS)}")
    show(directory, follow=follow, worker=worker, level=level, as_json=json_)


@app.command()
def report(
    run: Run,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the page goes; else RUN/report.html.")] = None,
    json_: AsJson = False,
) -> None:
    """What a run did with its time: goodput, what each incident cost, and a page of it."""
    from orchestrator.cli.report import report as tell
    from orchestrator.rundir import find_run

    directory = find_run(run)
    try:
        tell(directory, as_json=json_, to=to)
    except OSError as error:
        _refuse(f"the report cannot be written: {error}; choose another file with --to")


@app.command("page")
def page_(
    run: Run,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback it needs a token.")] = "127.0.0.1",
    port: PagePort = 0,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ask for the token in it; or set ORCHESTRATOR_PAGE_TOKEN.")
    ] = None,
) -> None:
    """Serve the page of a run, live or ended, until Ctrl-C."""
    from orchestrator.cli.page import serve

    serve(run, host, port, token_file)


@app.command()
def resize(run: Run, workers: Annotated[int, typer.Argument(min=1, help="How many workers to train with.")]) -> None:
    """Change how many workers a live run trains with; it does so at a step boundary."""
    from orchestrator.rundir import find_run

    directory = find_run(run)
    limits = (directory.read_json("job.resolved.json") or {}).get("elastic", {}).get("workers")
    if limits is None:
        _refuse(f"{directory.path / 'job.resolved.json'} is damaged: it has no elastic.workers")
    if not limits["min"] <= workers <= limits["max"]:
        _refuse(f"{workers} workers is outside elastic.workers of this run: {limits['min']} to {limits['max']}")
    _ask(directory, "resize", workers=workers)
    print(f"{directory.path.name}: {workers} workers from the next step boundary on")


@app.command()
def checkpoint(
    run: Run,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait until it is complete.")] = 600.0,
) -> None:
    """Save a live run at its next step boundary."""
    from monitoring.follow import Tail, describe_event
    from orchestrator.rundir import find_run

    directory = find_run(run)
    tail = Tail(directory.events)
    list(tail.new())
    _ask(directory, "checkpoint")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        for event in tail.new():
            if event["kind"] in ("checkpoint_saved", "checkpoint_failed"):
                print(clean(f"{directory.path.name}: {describe_event(event)}"))
                raise typer.Exit(EXIT_FAILED if event["kind"] == "checkpoint_failed" else 0)
            if event["kind"] == "run_finished":
                print(f"orchestrator: {directory.path} ended before it was saved", file=sys.stderr)
                raise typer.Exit(EXIT_FAILED)
            if event["kind"] == "controller":
                _ask(directory, "checkpoint")  # What the one before was asked for went with it.
        time.sleep(0.1)
    print(f"orchestrator: {directory.path} was not saved within {wait:.0f} s; it may be still", file=sys.stderr)
    raise typer.Exit(EXIT_FAILED)


@app.command()
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


@app.command()
def export(
    run: Run,
    to: Annotated[Path, typer.Option(metavar="DIR", help="A new directory, in Hugging Face's format.")],
    step: Annotated[int | None, typer.Option(min=1, help="The checkpoint of so many steps; else the newest.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="bf16|fp16|fp32", help="Type of the weights.")] = None,
) -> None:
    """Write the model of a checkpoint for `transformers` to load."""
    from orchestrator.checkpoint import of_run
    from orchestrator.checkpoint.export import export as write
    from orchestrator.rundir import find_run

    directory = find_run(run)
    job = of_run.job_of(directory)
    catalog = of_run.catalog_of(directory, job, of_run.secret_of(job))
    steps = catalog.steps()
    if not steps or (step is not None and step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        _refuse(f"{directory.path} has no checkpoint{'' if step is None else f' of {step} steps'} (there: {there})")
    chosen = steps[0] if step is None else step
    files = write(catalog.open(chosen), job, to, dtype)
    size = sum(file.stat().st_size for file in files)
    print(f"{to}: the model after {chosen} steps, {len(files)} files, {size / 1e6:.1f} MB")


@app.command()
def stop(run: Run) -> None:
    """End a live run at the next step boundary, with a checkpoint if it makes any."""
    from orchestrator.rundir import find_run

    directory = find_run(run)
    _ask(directory, "stop", reason="orchestrator stop")
    print(f"{directory.path.name}: stopping at the next step boundary")


@app.command()
def drain(
    node: Annotated[
        str, typer.Argument(metavar="NODE", help="A node id or its first 6 digits, an IP address or a name.")
    ],
    deadline: Annotated[str, typer.Option(metavar="10m", help="When the machine will be taken away.")] = "10m",
    reason: Annotated[str, typer.Option(help="Why, for the records.")] = "planned maintenance",
    address: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Of the cluster; else RAY_ADDRESS.")] = None,
    json_: AsJson = False,
) -> None:
    """Take a node out of use: its runs leave it at their next step boundary, and nothing new is placed on it."""
    from orchestrator.cli.drain import drain as take_out
    from orchestrator.cli.durations import parse_duration

    try:
        deadline_s = parse_duration("--deadline", deadline)
    except ValueError as error:
        _refuse(str(error))
    take_out(node, deadline_s=deadline_s, reason=reason, address=address, as_json=json_)


@app.command("node-watcher")
def node_watcher(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="Run this, and drain the node before SIGTERM or SIGINT reaches it."),
    ] = None,
    source: Annotated[
        str, typer.Option(metavar="auto|aws|gcp|azure|none|MODULE:CLASS", help="Whose notices to watch for.")
    ] = "auto",
    source_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Of the metadata service, if not its usual one.")
    ] = None,
    notice_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A file whose appearance is a notice.")
    ] = None,
    poll: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often to look.")] = 2.0,
    lead: Annotated[str, typer.Option(metavar="3m", help="Drain no longer than this before the deadline.")] = "3m",
    early: Annotated[bool, typer.Option("--early", help="Drain for what is only possible, too.")] = False,
    node_id: Annotated[str | None, typer.Option(metavar="ID", help="This node; else found by its addresses.")] = None,
    address: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Of the cluster; else RAY_ADDRESS.")] = None,
    grace: Annotated[
        str, typer.Option(metavar="25s", help="Keep a signal from COMMAND for at most this long.")
    ] = "25s",
) -> None:
    """Turn a cloud's notice that this machine will be taken away into a drain of its Ray node."""
    from orchestrator.cli.durations import parse_duration
    from orchestrator.cli.node_watcher import WatchOptions
    from orchestrator.cli.node_watcher import node_watcher as watch_node

    try:
        lead_s, grace_s = parse_duration("--lead", lead), parse_duration("--grace", grace)
    except ValueError as error:
        _refuse(str(error))
    options = WatchOptions(source, source_url, notice_file, poll, lead_s, early)
    raise typer.Exit(watch_node(options, address, node_id, grace_s, command or []))


def _ask(directory: Any, kind: str, **fields: Any) -> None:
    from orchestrator.succession import NoAnswer, ask

    try:
        answer = ask(directory, lambda text: print(f"orchestrator: {text}", file=sys.stderr), kind, **fields)
    except NoAnswer as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from None
    if answer.get("error"):
        _refuse(answer["error"])


@app.command()
def audit(run: Run, json_: AsJson = False) -> None:
    """Prove that every sample was used exactly once, and that its tokens are still those that were used."""
    from orchestrator.cli.audit import audit as prove
    from orchestrator.rundir import find_run

    raise typer.Exit(0 if prove(find_run(run), as_json=json_) else EXIT_FAILED)


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="Of the cluster; else RAY_ADDRESS; else this machine.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="Also try out a storage, as for checkpoint.storage.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Move less data over the network and to the storage.")] = False,
    json_: AsJson = False,
) -> None:
    """Is this machine, or every node of a cluster, fit to train on? Exit code 1 with a problem; starts no Ray."""
    from orchestrator.cli.doctor import doctor as examine

    try:
        fit = examine(address, storage, as_json_=json_, quick=quick)
    except ValueError as error:
        _refuse(str(error))
    raise typer.Exit(0 if fit else EXIT_FAILED)


def _refuse(text: str) -> NoReturn:
    print(clean_lines(f"orchestrator: {text}"), file=sys.stderr)
    raise typer.Exit(EXIT_BAD_INPUT)


def main() -> None:
    """Entry point: turns what a user did wrong into one clear error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the locale of a terminal has no letters for is shown as an escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:
        _end_unread()
    except SystemExit:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # Typer's sign that it met a closed pipe.
            _end_unread()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _end_unread()
        raise
    except UserError as error:
        print(clean_lines(str(error) if error.has_place else f"orchestrator: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _end_unread() -> NoReturn:
    """Nobody reads what is printed (`orchestrator events RUN | head`): that is no error."""
    from monitoring.terminal.gone import EXIT_CODE, silence_stdout

    silence_stdout()
    sys.exit(EXIT_CODE)


if __name__ == "__main__":
    main()
