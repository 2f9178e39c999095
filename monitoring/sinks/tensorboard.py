"""TensorBoard event files, with tensorboardX: no TensorFlow, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monitoring.sinks.base import SinkRun
from monitoring.sinks.stream import Item, Note, Redone, Scalars

DIRECTORY = "tensorboard"
INCIDENTS = "incidents"
EVALUATIONS = "evaluations"


class TensorBoardSink:
    """Writes below the run directory; each process that drives the run adds files there. What happened, and what
    evaluations gave, stand in directories of their own: TensorBoard forgets by directory, and an incident is not undone
    with the steps it cost."""

    name = "TensorBoard"

    def __init__(self) -> None:
        self._writer: Any = None
        self._notes: Any = None
        self._evaluations: Any = None

    def open(self, run: SinkRun) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(run.directory / DIRECTORY))
        self._notes = SummaryWriter(logdir=str(run.directory / DIRECTORY / INCIDENTS))
        self._evaluations = SummaryWriter(logdir=str(run.directory / DIRECTORY / EVALUATIONS))

    def write(self, items: Sequence[Item]) -> None:
        for item in items:
            match item:
                case Scalars():
                    writer = self._evaluations if item.of_evaluation else self._writer
                    for name, value in item.values.items():
                        writer.add_scalar(name, value, global_step=item.step, walltime=item.at)
                case Note():
                    self._notes.add_text(item.kind, item.text, global_step=item.step, walltime=item.at)
                case Redone():
                    self._forget(item.step)
        self._writer.flush()
        self._notes.flush()
        self._evaluations.flush()

    def _forget(self, step: int) -> None:
        """TensorBoard drops what it has of a step and later ones when a session starts there anew."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = Event(session_log=SessionLog(status=SessionLog.START))
        self._writer.file_writer.add_event(start, step=step)

    def close(self, status: str) -> None:
        for writer in (self._writer, self._notes, self._evaluations):
            if writer is not None:
                writer.close()
