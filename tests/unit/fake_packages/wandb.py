"""Not Weights & Biases: records what it is called with."""

from __future__ import annotations

from typing import Any

runs: list[FakeRun] = []


class Settings:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class FakeRun:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.defined: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def init(**arguments: Any) -> FakeRun:
    runs.append(FakeRun(arguments))
    return runs[-1]
