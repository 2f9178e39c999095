"""Hooks: a user's own code that is told what happens in a run, in the process that drives or follows it.

It is told of each thing once, in a thread of its own, after it is on record; whatever it raises, and however long it
takes, training does not notice.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from monitoring.events import CheckpointComplete, Evaluated, IncidentOpened, Recovered
from monitoring.sinks.base import SinkRun
from monitoring.sinks.stream import Happened, Item, Redone, Scalars

log = logging.getLogger(__name__)

MOST_TOLD = 5
"""Errors of hooks that are told; a hook that always fails is not to fill the log."""


class Hooks:
    """What a job's `hooks` may name: a subclass, of which each run makes one; override what is wanted.

    `run` says what run it is (`run`, `name`, `directory`, `job`); its files are there to be read. `step` counts
    committed steps. Steps that are done again, because all that held them was lost, are told of again.
    """

    def __init__(self, run: SinkRun) -> None:
        self.run = run

    def on_commit(self, step: int, metrics: dict[str, float]) -> None:
        """The step is committed: loss, grad_norm, learning_rate, tokens_per_second, step_seconds, world_size."""

    def on_evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """The weights after `step` steps were evaluated."""

    def on_checkpoint(self, step: int, path: str) -> None:
        """A checkpoint of `step` steps is complete."""

    def on_incident(self, step: int, incident: str, record: dict[str, Any]) -> None:
        """Something happened to a worker or node, or was recovered from (`record["kind"]`: incident, recovery)."""

    def on_end(self, status: str) -> None:
        """The run is over (finished, failed, stopped), or this process follows it no more (interrupted)."""


class HookSink:
    """A sink that calls hooks. `make` gives them, and may fail with anything."""

    name = "hooks"
    wants = frozenset({Evaluated.kind, CheckpointComplete.kind, IncidentOpened.kind, Recovered.kind})
    """Events that it is given whole."""

    def __init__(self, make: Callable[[SinkRun], Any]) -> None:
        self._make = make
        self._hooks: Any = None
        self._failed = 0

    def open(self, run: SinkRun) -> None:
        """See `Sink`."""
        self._hooks = self._make(run)

    def write(self, items: Sequence[Item]) -> None:
        """See `Sink`. Never fails, as what was told must not be told again."""
        for item in items:
            match item:
                case Scalars() if not item.of_evaluation:
                    self._call("on_commit", item.step + 1, dict(item.values))
                case Happened():
                    self._tell(item)
                case Redone():
                    pass

    def _tell(self, item: Happened) -> None:
        record = item.record
        match record["kind"]:
            case Evaluated.kind:
                self._call("on_evaluation", record["step"], dict(record["metrics"]))
            case CheckpointComplete.kind:
                self._call("on_checkpoint", record["committed"], str(record.get("path", "")))
            case _:
                self._call("on_incident", record["step"], record["incident"], dict(record))

    def _call(self, method: str, *arguments: Any) -> None:
        call = getattr(self._hooks, method, None)
        if call is None:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._failed += 1
            if self._failed <= MOST_TOLD:
                where = traceback.extract_tb(error.__traceback__)[-1]
                log.warning(
                    "hooks: %s failed (the run goes on): %s: %s (%s:%s)", method, type(error).__name__, error,
                    where.filename, where.lineno,
                )  # fmt: skip

    def close(self, status: str) -> None:
        """See `Sink`."""
        self._call("on_end", status)
