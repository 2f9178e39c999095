"""What a run looks like in a terminal and elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from monitoring.display import Display

STEP = {"step": 0, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "generation": 0, "tokens": 512, "seconds": 0.5,
        "skipped": False, "committed_at": 100.0, "phase_seconds": {}}  # fmt: skip
GENERATION = {"time": 99.0, "kind": "generation", "generation": 0, "start_step": 0, "cause": "start",
              "workers": [{"worker": 3, "incarnation": 0}], "layout": {"data": 1}}  # fmt: skip
INCIDENT = {"time": 99.5, "kind": "incident", "incident": "kill", "worker": 1, "cause": "worker 1 died",
            "step": 0, "at": 99.4, "detect_seconds": 0.1}  # fmt: skip
SNAPSHOT = {"state": "training", "step": 1, "workers": 1, "standby": 0, "starting": 2, "generation": 0,
            "median_step_seconds": 0.5}  # fmt: skip


def shown(tmp_path: Path, *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    with Display(tmp_path, total_steps=3, console=console) as display:
        (tmp_path / "events.jsonl").write_text(f"{json.dumps(GENERATION)}\n{json.dumps(INCIDENT)}\n")
        (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
        display.note("starting workers")
        display.update(SNAPSHOT)
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=False)
    assert "starting workers" in text
    assert "generation 0 from step 0: workers 3" in text
    assert "step      1/3  loss 2.5000  norm 1.000     1,024 tokens/s  1 workers" in text
    assert "\x1b" not in text


def test_a_live_panel_on_a_terminal(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    for part in (
        "1 training, 0 standing by, 2 starting",
        "2.5000",
        "1,024 tokens/s",
        "worker 1 died",
        "0:01 left",
        "1/3",
    ):
        assert part in text
