"""Alerting and recording rules, generated from Python. Knows the names of series and nothing of their making."""

from __future__ import annotations

from monitoring.alerts.rule import Alert, Group, Recording, as_yaml
from monitoring.alerts.rules import DEFAULT_GOODPUT_TARGET, DEFAULT_RUNBOOKS, rules

__all__ = ["DEFAULT_GOODPUT_TARGET", "DEFAULT_RUNBOOKS", "Alert", "Group", "Recording", "as_yaml", "rules"]
