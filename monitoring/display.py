"""Progress of a run in a terminal: live on a screen, plain lines elsewhere. For `orchestrator run` and `watch`."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from monitoring.follow import describe_event, describe_step
from monitoring.terminal.clean import clean, clean_lines
from monitoring.terminal.facts import RunFacts
from monitoring.terminal.gone import silence_stdout
from monitoring.terminal.lines import (
    checkpoint_lines,
    counts_text,
    describe_state,
    evaluation_lines,
    goodput_lines,
    layout_text,
    open_incident_lines,
    step_lines,
    time_left,
    worker_lines,
)


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process here; a command that shows a run has more to do before that."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads what is printed")


ROWS_BELOW = 15
"""Rows of the panel that are not workers."""


class Display:
    """Shows a run from the files in its directory.

    On a terminal, a live panel (state, loss, speed, workers by node, goodput, checkpoint, open incidents, time left)
    under the story of what happened; elsewhere a line per step and per event. Of what happened before, the last
    `history` events are told. `facts` are those of this run; its own are made without. Use as a context manager.

    When nobody reads what it prints any more (a closed pipe, a terminal that is gone) the method that finds that out
    raises BrokenPipeError, once; from then on nothing is printed.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        log_every: int = 1,
        console: Console | None = None,
        history: int = 0,
        facts: RunFacts | None = None,
    ) -> None:
        self.console = console or _Terminal(highlight=False, soft_wrap=True)
        # An attempt that goes on with a run is not shown what the one before it was at.
        self.facts = facts or RunFacts(run_dir, is_new=not history, steps=total_steps)
        self._total = total_steps
        self._log_every = log_every
        past, _ = self.facts.refresh()
        self._started = self.facts.started if history and self.facts.started else self.facts.now()
        self._snapshot: dict[str, Any] = {}
        self._waits = self._is_gone = False
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("step"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[eta]}"),
            console=self.console, auto_refresh=False,
        )  # fmt: skip
        self._task = self._progress.add_task("steps", total=total_steps, eta="")
        self._to_tell = [(event["time"], text) for event in past if (text := _described(event)) is not None]
        self._to_tell = self._to_tell[-history:] if history else []

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(self._panel(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.update()
        finally:
            if self._live is not None:
                with suppress(OSError):
                    self._live.stop()

    def note(self, text: str) -> None:
        """A line of the driver's own."""
        self._print(f"[{self._clock()}] {clean_lines(text)}")

    def _print(self, text: str) -> None:
        if self._is_gone:
            return
        try:
            self.console.print(text, markup=False)
        except OSError as error:  # EPIPE, and of a terminal that has hung up EIO
            self._is_gone = self.console.quiet = True
            silence_stdout()
            raise BrokenPipeError(errno.EPIPE, str(error)) from error

    def update(self, snapshot: dict[str, Any] | None = None) -> None:
        """Shows what is new. `snapshot`, the controller's own word, says how things are until status.json does."""
        self._snapshot = snapshot or self._snapshot
        events, steps = self.facts.refresh()
        lines, self._to_tell = self._to_tell, []
        lines += [(event["time"], text) for event in events if (text := _described(event)) is not None]
        workers = len((self.facts.generation or {}).get("workers", ()))
        for record in steps:
            number = record["step"] + 1
            if self._live is None and (number % self._log_every == 0 or number == self._total):
                lines.append((record["committed_at"], describe_step(record, self._total, workers)))
        for at, text in sorted(lines):
            self._print(f"[{self._clock(at)}] {clean(text)}")
        self._tell_unwritten(self._snapshot.get("unwritten"))
        if self._live is not None:
            self._live.update(self._panel())

    def _tell_unwritten(self, waiting: dict[str, Any] | None) -> None:
        """A disk that is full cannot tell of itself in the events."""
        if (waiting is not None) == self._waits:
            return
        self._waits = waiting is not None
        if waiting is None:
            self.note("the run directory is written again, and all that waited")
        else:
            self.note(f"the run directory cannot be written ({waiting['error']}): training goes on, records wait")

    def _clock(self, at: float | None = None) -> str:
        return f"{(at or self.facts.now()) - self._started:6.1f} s"

    def _panel(self) -> Group:
        facts, snapshot, now = self.facts, self._snapshot, self.facts.now()
        self._progress.update(self._task, completed=facts.step, eta=time_left(facts))
        rows = [("state", "starting" if facts.generation is None else "running")]
        if facts.live is not None:
            rows = [("state", describe_state(facts.live))]
        elif snapshot:
            rows = [("state", str(snapshot.get("state", "starting")))]
        rows += step_lines(facts)
        rows.append(("generation", layout_text(facts)))
        if facts.live is None and snapshot:
            rows.append(("workers", f"{snapshot.get('workers', 0)} training, {snapshot.get('standby', 0)} standing by, "
                                    f"{snapshot.get('starting', 0)} starting"))  # fmt: skip
        else:
            rows.append(("workers", counts_text(facts)))
            room = max(0, self.console.height - ROWS_BELOW)
            lines = worker_lines(facts, now)
            rows += [("", line) for line in lines[:room]]
            if len(lines) > room:
                rows.append(("", f"and {len(lines) - room} lines more; `orchestrator status` shows them"))
        rows += evaluation_lines(facts) + goodput_lines(facts) + checkpoint_lines(facts, now)
        rows += open_incident_lines(facts, now) or [("incidents", f"none open, {facts.num_incidents} so far")]
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="ellipsis", no_wrap=True)
        for label, text in rows:
            table.add_row(Text(clean(label)), Text(clean(text)))
        return Group(Text(""), table, self._progress)


def _described(event: dict[str, Any]) -> str | None:
    return describe_event(event)
