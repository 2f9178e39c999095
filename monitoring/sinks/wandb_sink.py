"""Weights & Biases. Its own files are kept in the run directory's `wandb/`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from monitoring.sinks.base import SinkRun, settings_of
from monitoring.sinks.stream import Item, Note, Scalars


class WandBSink:
    """One W&B run for a run, by an identity that going on with the run keeps. Charts are drawn over `step`; a step done
    again is logged again, as W&B takes nothing back."""

    name = "Weights & Biases"

    def __init__(self, project: str, mode: str, entity: str | None) -> None:
        self._project = project
        self._mode = mode
        self._entity = entity
        self._run: Any = None

    def open(self, run: SinkRun) -> None:
        import wandb

        identity = hashlib.sha256(run.run.encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=self._project, entity=self._entity, mode=self._mode, id=identity, resume="allow", name=run.name,
            dir=str(run.directory), config=settings_of(run.job),
            # What the run prints is its own business, and so is how the terminal looks.
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, Scalars):
                self._run.log({"step": item.step, **item.values})
            elif isinstance(item, Note):
                self._run.log({"step": item.step, item.kind: item.text})

    def close(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if status == "failed" else 0)
