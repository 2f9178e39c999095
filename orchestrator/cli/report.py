"""`orchestrator report`: what a run did with its time, in a terminal, as JSON and as a page."""

from __future__ import annotations

from pathlib import Path

from monitoring.outside import json_text
from monitoring.report.page import write_report_page
from monitoring.report.summary import lines_of, report_of
from monitoring.terminal.clean import clean
from orchestrator.rundir import RunDirectory


def report(directory: RunDirectory, *, as_json: bool, to: Path | None) -> None:
    """Prints the report of a run and writes its page, to `to` or report.html in the run directory.

    Raises OSError when the page cannot be written.
    """
    content = report_of(directory.path, alive=directory.is_steered or directory.is_driven)
    page = directory.path / "report.html" if to is None else to
    write_report_page(directory.path, page)
    content["page"] = str(page)
    if as_json:
        print(json_text(content))
        return
    print("\n".join(map(clean, lines_of(content))))
    print(f"\n{'page':<11}{page}")
