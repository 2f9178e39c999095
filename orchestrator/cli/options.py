"""Options that several commands have, and how one says that it cannot do what was asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from monitoring.terminal.clean import clean_lines
from orchestrator.cli.outcome import EXIT_BAD_INPUT

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


def refuse(text: str) -> NoReturn:
    """Ends the command with this line and exit code 2."""
    print(clean_lines(f"orchestrator: {text}"), file=sys.stderr)
    raise typer.Exit(EXIT_BAD_INPUT)
