"""Grafana dashboards, generated from Python. Knows the names of series, and nothing of how they come about."""

from __future__ import annotations

from monitoring.dashboards import checkpoints, fleet, ranks, run
from monitoring.dashboards.panels import Dashboard


def dashboards() -> tuple[Dashboard, ...]:
    """All of them, in the order in which one reads them."""
    return (fleet.DASHBOARD, run.DASHBOARD, ranks.DASHBOARD, checkpoints.DASHBOARD)
