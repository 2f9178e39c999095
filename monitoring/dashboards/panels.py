"""What a dashboard is made of: rows of panels, and the queries that fill them. Knows nothing of Grafana's JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "table", "heatmap", "state-timeline", "bargauge"]
Color = Literal["green", "yellow", "orange", "red", "blue", "purple", "text"]


@dataclass(frozen=True)
class Target:
    """One query. `expr` may use `$run`, `$__rate_interval` and `$__range`; `legend` names the line by its labels.

    `may_be_empty` says in which ordinary case it has no data, so that a test can expect data of all others.
    """

    expr: str
    legend: str = ""
    instant: bool = False
    buckets: bool = False
    """Whether the series are the cumulative buckets of a histogram, told apart by `le`."""
    may_be_empty: str = ""


@dataclass(frozen=True)
class Threshold:
    """From `value` on (in the panel's unit) the panel has this colour."""

    value: float
    color: Color


@dataclass(frozen=True)
class Column:
    """A column of a table: the result of the target with this letter (A, B, ...), or a label."""

    source: str
    title: str
    unit: str = ""
    thresholds: tuple[Threshold, ...] = ()
    base: Color = "green"
    states: tuple[tuple[str, Color], ...] = ()
    """For a label: values that are shown in a colour."""


@dataclass(frozen=True)
class Panel:
    """One picture. `unit` is one of Grafana's (s, bytes, percentunit, ...); `width` and `height` in grid units.

    More than 15 attributes: those that Grafana's pictures have.
    """

    title: str
    description: str
    targets: tuple[Target, ...]
    unit: str = "short"
    kind: Kind = "timeseries"
    width: int = 12
    height: int = 8
    thresholds: tuple[Threshold, ...] = ()
    base: Color = "green"
    """The colour below the first threshold."""
    stacked: bool = False
    minimum: float | None = None
    maximum: float | None = None
    columns: tuple[Column, ...] = ()
    states: tuple[tuple[float, str, Color], ...] = ()
    """For a timeline of states: what each value means."""
    logarithmic: bool = False
    low_is_good: bool = False
    """For a heat map: which end of the colours is green."""


@dataclass(frozen=True)
class Row:
    """Panels under a common heading, from left to right, wrapped where the width is used up."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of the page: the values of `label` that `series` has."""

    name: str
    series: str
    label: str


@dataclass(frozen=True)
class Annotation:
    """Marks on every panel of a dashboard, where `expr` has a value."""

    name: str
    expr: str
    title: str
    color: Color
    may_be_empty: str = ""


@dataclass(frozen=True)
class Dashboard:
    """A page. `uid` is part of its address, and stays when the title changes."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    annotations: tuple[Annotation, ...] = ()

    def panels(self) -> Iterator[Panel]:
        for row in self.rows:
            yield from row.panels
