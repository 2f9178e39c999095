"""Progress of a run in a terminal: live on a screen, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from monitoring.follow import Tail, describe_event, describe_step


class Display:
    """Shows a run from the files it writes and the controller's snapshots.

    On a terminal, a live panel (step, loss, tokens/s, workers, generation, last incident, time left) under the story of
    incidents; elsewhere a line per step and per event. Use as a context manager.
    """

    def __init__(self, run_dir: Path, total_steps: int, log_every: int = 1, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._events = Tail(run_dir / "events.jsonl", from_end=True)
        self._steps = Tail(run_dir / "metrics.jsonl", from_end=True)
        self._total = total_steps
        self._log_every = log_every
        self._started = time.time()
        self._snapshot: dict[str, Any] = {}
        self._losses: deque[float] = deque(maxlen=60)
        self._last: dict[str, Any] = {}
        self._workers = 0
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("step"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[eta]}"),
            console=self.console, auto_refresh=False,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=total_steps, eta="")

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(self._panel(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.update(self._snapshot)
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line of the driver's own."""
        self.console.print(f"[{self._clock()}] {text}", markup=False)

    def update(self, snapshot: dict[str, Any]) -> None:
        """Shows what is new."""
        self._snapshot = snapshot or self._snapshot
        lines: list[tuple[float, str]] = []
        for event in self._events.new():
            if event["kind"] == "generation":
                self._workers = len(event["workers"])
            if (text := describe_event(event)) is not None:
                lines.append((event["time"], text))
        for record in self._steps.new():
            self._last = record
            if record["loss"] is not None:
                self._losses.append(record["loss"])
            number = record["step"] + 1
            if self._live is None and (number % self._log_every == 0 or number == self._total):
                lines.append((record["committed_at"], describe_step(record, self._total, self._workers)))
        for at, text in sorted(lines):
            self.console.print(f"[{self._clock(at)}] {text}", markup=False)
        if self._live is not None:
            self._live.update(self._panel())

    def _clock(self, at: float | None = None) -> str:
        return f"{(at or time.time()) - self._started:6.1f} s"

    def _panel(self) -> Group:
        snapshot, record = self._snapshot, self._last
        step = snapshot.get("step", 0)
        median = snapshot.get("median_step_seconds") or 0.0
        left = (self._total - step) * median
        eta = f"{int(left // 60)}:{int(left % 60):02d} left" if median else ""
        self._progress.update(self._task, completed=step, eta=eta)
        table = Table.grid(padding=(0, 2))
        table.add_row("state", snapshot.get("state", "starting"))
        if record:
            speed = record["tokens"] / record["seconds"] if record["seconds"] else 0.0
            table.add_row("loss", f"{record['loss']:.4f}" if record["loss"] is not None else "not finite")
            table.add_row("speed", f"{speed:,.0f} tokens/s, {record['seconds']:.3f} s a step")
        table.add_row(
            "workers",
            f"{snapshot.get('workers', 0)} training, {snapshot.get('standby', 0)} standing by, "
            f"{snapshot.get('starting', 0)} starting; generation {snapshot.get('generation')}",
        )
        incident = snapshot.get("last_incident")
        table.add_row("incidents", incident["cause"] if incident else "none")
        return Group(Text(""), table, self._progress)
