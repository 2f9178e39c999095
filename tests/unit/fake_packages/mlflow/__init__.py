"""Not MLflow: records what its client is called with, per tracking URI."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

stores: dict[str, FakeStore] = {}


class FakeStore:
    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}


class MlflowClient:
    def __init__(self, tracking_uri: str) -> None:
        self._store = stores.setdefault(tracking_uri, FakeStore())

    def get_experiment_by_name(self, name: str) -> Any:
        found = self._store.experiments.get(name)
        return None if found is None else SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        return self._store.experiments.setdefault(name, str(len(self._store.experiments)))

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        identity = f"run-{len(self._store.runs)}"
        self._store.runs[identity] = {
            "experiment": experiment_id, "name": run_name, "tags": dict(tags), "params": {}, "metrics": [],
            "status": ["RUNNING"],
        }  # fmt: skip
        return SimpleNamespace(info=SimpleNamespace(run_id=identity))

    def update_run(self, run_id: str, status: str) -> None:
        self._store.runs[run_id]["status"].append(status)

    def log_param(self, run_id: str, key: str, value: str) -> None:
        self._store.runs[run_id]["params"][key] = value

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self._store.runs[run_id]["metrics"] += metrics

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._store.runs[run_id]["tags"][key] = value

    def set_terminated(self, run_id: str, status: str) -> None:
        self._store.runs[run_id]["status"].append(status)
