"""What a rules file is made of, and how that becomes Prometheus's YAML. Knows nothing of what is watched."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["critical", "warning"]
"""Critical: training stands or what it computes is in danger, somebody should look now. Warning: in working hours."""


@dataclass(frozen=True)
class Recording:
    """A series that Prometheus computes: `name` is level:metric:operation."""

    name: str
    expr: str

    def as_dict(self) -> dict[str, Any]:
        return {"record": self.name, "expr": _tidy(self.expr)}


@dataclass(frozen=True)
class Alert:
    """A condition that somebody should know of when it has held for `holds` (Prometheus's duration, e.g. 5m).

    `summary` and `description` are Prometheus templates: {{ $labels.run }}, {{ $value }}. `expr` gives a run's label.
    """

    name: str
    severity: Severity
    expr: str
    holds: str
    summary: str
    description: str

    @property
    def anchor(self) -> str:
        """Where in the runbooks its section is: the heading is its name."""
        return self.name.lower()

    def as_dict(self, runbooks: str) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": _tidy(self.expr),
            "for": self.holds,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": " ".join(self.description.split()),
                "runbook_url": f"{runbooks}#{self.anchor}",
            },
        }


@dataclass(frozen=True)
class Group:
    """Rules that are evaluated one after the other: recordings before the alerts that use them."""

    name: str
    recordings: tuple[Recording, ...]
    alerts: tuple[Alert, ...]


def as_yaml(groups: Sequence[Group], runbooks: str) -> str:
    """The content of a rules file, with links to the runbooks at the address or path `runbooks`. Same rules, same
    bytes."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes expressions of several lines as such."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    content = {
        "groups": [
            {
                "name": group.name,
                "rules": [rule.as_dict() for rule in group.recordings]
                + [alert.as_dict(runbooks) for alert in group.alerts],
            }
            for group in groups
        ]
    }
    head = "# Written by `orchestrator monitoring rules`; change the generator, not this file.\n"
    return head + yaml.dump(content, Dumper=Dumper, sort_keys=False, width=10_000, allow_unicode=True)


def _tidy(expr: str) -> str:
    """An expression without the indentation of the Python around it."""
    lines = textwrap.dedent(expr).strip().splitlines()
    return "\n".join(re.sub(r"\s+$", "", line) for line in lines)
