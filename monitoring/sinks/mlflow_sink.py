"""MLflow, through its client: the process's own MLflow settings and runs are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monitoring.sinks.base import SinkRun, settings_of
from monitoring.sinks.stream import Item, Note, Scalars

BATCH = 500
MAX_PARAMS = 100
"""Of both, what one request may have."""
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "interrupted": "KILLED"}


class MLflowSink:
    """One MLflow run for a run, resumed when the run is. A step done again is logged again with its
    later time, as MLflow takes nothing back."""

    name = "MLflow"

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        self._uri = tracking_uri
        self._experiment = experiment
        self._client: Any = None
        self._id = ""

    def open(self, run: SinkRun) -> None:
        from mlflow import MlflowClient

        self._client = client = MlflowClient(tracking_uri=self._uri)
        if "run_id" in run.memory:
            self._id = str(run.memory["run_id"])
            client.update_run(self._id, status="RUNNING")
            return
        found = client.get_experiment_by_name(self._experiment)
        experiment = client.create_experiment(self._experiment) if found is None else found.experiment_id
        tags = {"orchestrator.run": run.run, "orchestrator.directory": str(run.directory)}
        self._id = run.memory["run_id"] = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for name, value in list(settings_of(run.job).items())[:MAX_PARAMS]:
            client.log_param(self._id, name, str(value)[:500])

    def write(self, items: Sequence[Item]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(item.at * 1000), item.step)
            for item in items
            if isinstance(item, Scalars)
            for name, value in item.values.items()
        ]
        for begin in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + BATCH])
        for item in items:
            if isinstance(item, Note):
                self._client.set_tag(self._id, f"{item.kind}.step-{item.step:08d}", item.text[:5000])

    def close(self, status: str) -> None:
        if self._id:
            self._client.set_terminated(self._id, status=_STATUS.get(status, "FAILED"))
