"""`orchestrator status`: one screen, or one JSON object."""

from __future__ import annotations

from monitoring.outside import json_text
from monitoring.terminal.facts import RunFacts
from monitoring.terminal.lines import as_text, status_lines
from orchestrator.rundir import RunDirectory


def status(directory: RunDirectory, *, as_json: bool) -> None:
    """Prints where a run is. Without a controller it is how it ended, or "interrupted"."""
    alive = directory.is_steered or directory.is_driven
    facts = RunFacts(directory.path)
    facts.refresh()
    facts.run = directory.run_id
    print(json_text(facts.as_json(alive)) if as_json else as_text(status_lines(facts, alive)))
