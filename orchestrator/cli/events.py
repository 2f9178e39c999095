"""`orchestrator events`: what happened, one line an event."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from monitoring.clock import when
from monitoring.events import RunFinished
from monitoring.follow import Tail, describe_event
from monitoring.outside import json_text
from monitoring.records import passed_over_text
from monitoring.terminal.clean import clean
from orchestrator.cli.following import POLL_S, Abandonment
from orchestrator.rundir import RunDirectory

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_since(text: str, now: float) -> float:
    """A time in seconds since the epoch: `90`, `90s`, `5m`, `2h` or `1d` ago, or an ISO time (local if it says no
    zone). Raises ValueError."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text):
        return now - float(found[1]) * _UNITS[found[2] or "s"]
    from datetime import datetime

    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(
            f"--since {text}: give a length of time (90s, 5m, 2h, 1d) or a time like 2026-08-02T22:10:00"
        ) from None


def events(
    directory: RunDirectory, *, follow: bool, kinds: Sequence[str], since: float | None, as_json: bool
) -> None:  # fmt: skip
    """Prints events of `kinds` (all when empty) from `since` (seconds since the epoch) on; with `follow` until the run
    ends or is given up."""
    tail = Tail(directory.events)
    started: float | None = None
    abandonment = Abandonment(directory)
    while True:
        # Looked at before the file is: what is written until then is still read.
        abandoned = follow and abandonment.has_come()
        over = False
        for event in tail.new():
            started = started if started is not None else when(event)
            over = event["kind"] == RunFinished.kind
            if (kinds and event["kind"] not in kinds) or (since is not None and event["time"] < since):
                continue
            print(json_text(event) if as_json else _line(event, started), flush=True)
        if over or abandoned or not follow:
            for problem in passed_over_text(tail.passed_over):
                print(clean(f"orchestrator: {problem}"), file=sys.stderr)
            return
        time.sleep(POLL_S)


def _line(event: dict[str, Any], started: float) -> str:
    text = describe_event(event) or ", ".join(
        f"{key}={value}" for key, value in event.items() if key not in ("time", "clock", "kind")
    )
    return clean(f"[{when(event) - started:8.2f} s] {event['kind']:<20} {text}")
