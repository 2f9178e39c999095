"""Metrics of a user's own, beside those of the objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.objective.objective import END_TO_END, Sums

if TYPE_CHECKING:
    import torch


class Metric(ABC):
    """One metric. Pure: what it gives is a function of its arguments.

    It is asked for what it measures of some positions, as often as there are parts of an evaluation; that is added up
    over all of them, exactly and in the order of samples, and it makes of the sums what people read. So its value is
    the same in every layout, also when workers die meanwhile. `name` is what it is called in records and in
    `evaluation.best`.
    """

    name: ClassVar[str]

    @abstractmethod
    def measure(self, logits: torch.Tensor, labels: torch.Tensor) -> Sums:
        """What is to be added up, by name, each fp64 [n]; of a name that begins with "all." it is put end to end
        instead. `logits` [positions, classes], `labels` int64 [positions], of which negative ones do not count."""

    @abstractmethod
    def report(self, sums: Mapping[str, list[float]]) -> Any:
        """The value, from the sums of all of an evaluation: a number, or a mapping of names to numbers."""


def measured_by(metrics: Sequence[Metric], logits: torch.Tensor, labels: torch.Tensor) -> Sums:
    """What all of them measure, under names that say whose it is."""
    return {
        _named(metric, name): values for metric in metrics for name, values in metric.measure(logits, labels).items()
    }


def reported_by(metrics: Sequence[Metric], sums: Mapping[str, list[float]]) -> dict[str, Any]:
    """The values of all of them."""
    found: dict[str, Any] = {}
    for metric in metrics:
        both = {_named(metric, ""): "", END_TO_END + _named(metric, ""): END_TO_END}
        own = {
            start + name.removeprefix(given): values
            for given, start in both.items()
            for name, values in sums.items()
            if name.startswith(given)
        }
        found[metric.name] = metric.report(own)
    return found


def _named(metric: Metric, name: str) -> str:
    if name.startswith(END_TO_END):
        return END_TO_END + _named(metric, name.removeprefix(END_TO_END))
    return f"metric.{metric.name}.{name}"
