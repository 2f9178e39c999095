"""Events with only those of their fields that a test speaks of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from monitoring.events import ABSENT, KINDS, RunEvent


def event_with(kind: str, **fields: Any) -> RunEvent:
    """An event of this kind; what is not given, its record will not have."""
    found = KINDS[kind]
    names = {each.name.rstrip("_"): each.name for each in dataclasses.fields(found)}
    assert fields.keys() <= names.keys(), f"{kind} has no {sorted(fields.keys() - names.keys())}"
    given: dict[str, Any] = {names[name]: value for name, value in fields.items()}
    return found(**{each.name: given.get(each.name, ABSENT) for each in dataclasses.fields(found)})


def event_of(record: Mapping[str, Any]) -> RunEvent:
    """The event that a record is of."""
    return event_with(
        record["kind"], **{key: value for key, value in record.items() if key not in ("time", "clock", "kind")}
    )
