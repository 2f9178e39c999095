"""`orchestrator attach`: follows a run whose driver is gone."""

from __future__ import annotations

from orchestrator.cli.outcome import exit_code, show_result
from orchestrator.rundir import RunDirectory
from orchestrator.runtime.ray.driver import attach as follow


def attach(directory: RunDirectory, address: str | None, *, as_json: bool) -> int:
    """Shows a run to its end and what came of it; the exit code. Ctrl-C leaves the run alone.

    Raises ClusterError and RunDirectoryError.
    """
    from monitoring.display import Display

    train = (directory.read_json("job.resolved.json") or {}).get("train", {})
    if as_json:
        result = follow(directory, address)
    else:
        with Display(directory.path, train.get("steps", 0), train.get("log_every", 1)) as display:
            result = follow(directory, address, on_update=display.update, on_note=display.note)
    if result is None:
        if not as_json:
            print(f"{directory.path.name} goes on; end it with `orchestrator stop {directory.path}`")
        return 0
    show_result(result, directory.path, as_json=as_json)
    return exit_code(result["status"])
