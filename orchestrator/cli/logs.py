"""`orchestrator logs`: what the processes of a run said, merged by time."""

from __future__ import annotations

import time

from monitoring.events import WorkerReady
from monitoring.follow import Tail
from monitoring.log_files import LogFiles
from monitoring.logs import describe
from monitoring.outside import json_text
from monitoring.terminal.clean import clean_lines
from orchestrator.cli.following import POLL_S, Abandonment
from orchestrator.rundir import RunDirectory


def logs(
    directory: RunDirectory, *, follow: bool, worker: int | None, level: str | None, as_json: bool
) -> None:  # fmt: skip
    """Prints the records in `logs/` (of one `worker`, at least as bad as `level`); with `follow` until the run ends."""
    slots: dict[int, int] = {}
    files = LogFiles(directory.path / "logs", worker, level, slots)
    events = Tail(directory.events)
    abandonment = Abandonment(directory)
    while True:
        ends = not follow or _is_over(directory, abandonment)
        for event in events.new():
            if event["kind"] == WorkerReady.kind:
                slots[event["pid"]] = event["worker"]
        for record in files.new():
            print(json_text(record.as_dict()) if as_json else clean_lines(describe(record)), flush=True)
        if ends:
            return
        time.sleep(POLL_S)


def _is_over(directory: RunDirectory, abandonment: Abandonment) -> bool:
    ended = directory.read_json("result.json") is not None
    return (ended and not directory.is_steered) or abandonment.has_come()
