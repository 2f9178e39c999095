"""Commands for the nodes of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import AsJson, refuse


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
        refuse(str(error))
    take_out(node, deadline_s=deadline_s, reason=reason, address=address, as_json=json_)


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
        refuse(str(error))
    options = WatchOptions(source, source_url, notice_file, poll, lead_s, early)
    raise typer.Exit(watch_node(options, address, node_id, grace_s, command or []))
