"""TensorBoard event files, with tensorboardX: no TensorFlow, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monitoring.sinks.base import SinkRun
from monitoring.sinks.stream import Item, Note, Redone, Scalars

DIRECTORY = "tensorboard"
INCIDENTS = "incidents"


class TensorBoardSink:
    """Writes below the run directory; each process that drives the run adds files there. What happened stands in a
    directory of its own: TensorBoard forgets by directory, and an incident is not undone with the steps it cost."""

    name = "TensorBoard"

    def __init__(self) -> None:
        self._writer: Any = None
        self._notes: Any = None

    def open(self, run: SinkRun) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(run.directory / DIRECTORY))
        self._notes = SummaryWriter(logdir=str(run.directory / DIRECTORY / INCIDENTS))

    def write(self, items: Sequence[Item]) -> None:
        for item in items:
            match item:
                case Scalars():
                    for name, value in item.values.items():
                        self._writer.add_scalar(name, value, global_step=item.step, walltime=item.at)
                case Note():
                    self._notes.add_text(item.kind, item.text, global_step=item.step, walltime=item.at)
                case Redone():
                    self._forget(item.step)
        self._writer.flush()
        self._notes.flush()

    def _forget(self, step: int) -> None:
        """TensorBoard drops what it has of a step and later ones when a session starts there anew."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = Event(session_log=SessionLog(status=SessionLog.START))
        self._writer.file_writer.add_event(start, step=step)

    def close(self, status: str) -> None:
        for writer in (self._writer, self._notes):
            if writer is not None:
                writer.close()
