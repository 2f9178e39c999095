"""Commands that look at a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import AsJson, PagePort, Run, refuse
from orchestrator.cli.outcome import exit_code


def status(run: Run, json_: AsJson = False) -> None:
    """Where a run is: step, speed, workers, goodput, checkpoint, incidents, and its result when it has ended."""
    from orchestrator.cli.status import status as show
    from orchestrator.rundir import find_run

    show(find_run(run), as_json=json_)


def watch(run: Run, json_: AsJson = False) -> None:
    """Show a run as it goes. Ends with it: exit code 0 finished, 1 failed or interrupted, 3 stopped."""
    from orchestrator.cli.watch import watch as show
    from orchestrator.rundir import find_run

    ended = show(find_run(run), as_json=json_)
    raise typer.Exit(exit_code(ended))


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
        refuse(str(error))
    show(directory, follow=follow, kinds=kind or [], since=begin, as_json=json_)


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
        refuse(f"--level {level}: choose one of {', '.join(LEVELS)}")
    show(directory, follow=follow, worker=worker, level=level, as_json=json_)


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
        refuse(f"the report cannot be written: {error}; choose another file with --to")


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
