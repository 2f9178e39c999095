"""What came of a run, for the command that followed it: the same words and exit codes for every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monitoring.outside import json_text

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 1, 2, 3


def exit_code(status: str) -> int:
    """0 finished, 3 stopped on request, 1 anything else."""
    return {"finished": 0, "stopped": EXIT_STOPPED}.get(status, EXIT_FAILED)


def show_result(content: dict[str, Any], path: Path, *, as_json: bool) -> None:
    """Prints result.json, or what it means."""
    if as_json:
        print(json_text(content))
        return
    from monitoring.follow import summary
    from monitoring.terminal.clean import clean

    print()
    print("\n".join(map(clean, summary(content, str(path)))))
