"""`orchestrator watch`: a run as it goes, until it ends."""

from __future__ import annotations

import time

from monitoring.display import Display
from monitoring.follow import summary
from monitoring.outside import json_text
from monitoring.terminal.clean import clean
from monitoring.terminal.facts import RunFacts
from orchestrator.cli.following import Abandonment
from orchestrator.rundir import RunDirectory

HISTORY = 10
"""How many earlier events a new watcher is told."""
REFRESH_S = 0.5


def watch(directory: RunDirectory, *, as_json: bool) -> str:
    """Shows a run until it ends; with `as_json` a line with what `status --json` says, whenever that has changed.

    Returns how it ended: finished, failed, stopped, or interrupted when nobody steers it any more.
    """
    facts = RunFacts(directory.path)
    return _watch_json(directory, facts) if as_json else _watch(directory, facts)


def _watch(directory: RunDirectory, facts: RunFacts) -> str:
    job = directory.read_json("job.resolved.json") or {}
    train = job.get("train", {})
    abandonment = Abandonment(directory)
    with Display(
        directory.path, train.get("steps", 0), train.get("log_every", 1), history=HISTORY, facts=facts
    ) as shown:
        while not _is_over(directory, facts, abandonment):
            shown.update()
            time.sleep(REFRESH_S)
    print()
    if facts.result is not None:
        print("\n".join(map(clean, summary(facts.result, str(directory.path)))))
    else:
        print(f"interrupted after {facts.step} steps; orchestrator resume {directory.path} goes on from the newest "
              "checkpoint")  # fmt: skip
    return facts.state(alive=False)


def _watch_json(directory: RunDirectory, facts: RunFacts) -> str:
    facts.run = directory.run_id
    before = ""
    abandonment = Abandonment(directory)
    while True:
        over = _is_over(directory, facts, abandonment)
        facts.refresh()
        facts.run = directory.run_id
        line = json_text(facts.as_json(alive=not over))
        if line != before:
            print(line, flush=True)
        before = line
        if over:
            return facts.state(alive=False)
        time.sleep(REFRESH_S)


def _is_over(directory: RunDirectory, facts: RunFacts, abandonment: Abandonment) -> bool:
    """Whether the end is on record (result.json comes last), or nobody is there to record it."""
    facts.refresh_files()
    return (facts.result is not None and not directory.is_steered) or abandonment.has_come()
