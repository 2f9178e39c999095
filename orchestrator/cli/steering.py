"""Commands that ask a live run for something."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from monitoring.terminal.clean import clean
from orchestrator.cli.options import Run, refuse
from orchestrator.cli.outcome import EXIT_FAILED


def resize(run: Run, workers: Annotated[int, typer.Argument(min=1, help="How many workers to train with.")]) -> None:
    """Change how many workers a live run trains with; it does so at a step boundary."""
    from orchestrator.rundir import find_run

    directory = find_run(run)
    limits = (directory.read_json("job.resolved.json") or {}).get("elastic", {}).get("workers")
    if limits is None:
        refuse(f"{directory.path / 'job.resolved.json'} is damaged: it has no elastic.workers")
    if not limits["min"] <= workers <= limits["max"]:
        refuse(f"{workers} workers is outside elastic.workers of this run: {limits['min']} to {limits['max']}")
    _ask(directory, "resize", workers=workers)
    print(f"{directory.path.name}: {workers} workers from the next step boundary on")


def checkpoint(
    run: Run,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait until it is complete.")] = 600.0,
) -> None:
    """Save a live run at its next step boundary."""
    from monitoring.events import CheckpointComplete, CheckpointFailed, ControllerBegan, RunFinished
    from monitoring.follow import Tail, describe_event
    from orchestrator.rundir import find_run

    directory = find_run(run)
    tail = Tail(directory.events)
    list(tail.new())
    _ask(directory, "checkpoint")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        for event in tail.new():
            if event["kind"] in (CheckpointComplete.kind, CheckpointFailed.kind):
                print(clean(f"{directory.path.name}: {describe_event(event)}"))
                raise typer.Exit(EXIT_FAILED if event["kind"] == CheckpointFailed.kind else 0)
            if event["kind"] == RunFinished.kind:
                print(f"orchestrator: {directory.path} ended before it was saved", file=sys.stderr)
                raise typer.Exit(EXIT_FAILED)
            if event["kind"] == ControllerBegan.kind:
                _ask(directory, "checkpoint")  # What the one before was asked for went with it.
        time.sleep(0.1)
    print(f"orchestrator: {directory.path} was not saved within {wait:.0f} s; it may be still", file=sys.stderr)
    raise typer.Exit(EXIT_FAILED)


def stop(run: Run) -> None:
    """End a live run at the next step boundary, with a checkpoint if it makes any."""
    from orchestrator.rundir import find_run

    directory = find_run(run)
    _ask(directory, "stop", reason="orchestrator stop")
    print(f"{directory.path.name}: stopping at the next step boundary")


def _ask(directory: Any, kind: str, **fields: Any) -> None:
    from orchestrator.succession import NoAnswer, ask

    try:
        answer = ask(directory, lambda text: print(f"orchestrator: {text}", file=sys.stderr), kind, **fields)
    except NoAnswer as error:
        print(f"orchestrator: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from None
    if answer.get("error"):
        refuse(answer["error"])
